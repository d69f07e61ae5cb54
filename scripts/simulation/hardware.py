"""What simulated workers are able to do: their step times, their memory, their link.

From a YAML of published figures (configs/simulation/gpus.yaml): a GPU's datasheet, a model's size, and how much of the
datasheet engines reach; or as measured, from the coefficients that a router has learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import yaml
from msgspec import Meta

from python_backends.core.errors import ConfigError
from python_backends.core.messages import StepSample
from python_backends.core.section import Section
from python_backends.core.step_model import LINEAR, TERMS

# prompt tokens, of which so many are cached; streams, of so many tokens each
_CALIBRATION = ((64, 0, 0, 0), (0, 0, 1, 64), (0, 0, 8, 64), (1024, 0, 0, 0), (0, 0, 8, 512), (1024, 1024, 0, 0))

Entry = TypeVar("Entry")
Amount = Annotated[float, Meta(gt=0)]


class Rates(msgspec.Struct, frozen=True):
    """One worker. `coefficients`: ms, of core.step_model.TERMS."""

    coefficients: tuple[float, ...]
    token_bytes: int  # of KV, per token
    pool_tokens: int  # that the KV pool holds
    link_bytes_per_ms: float  # at which KV arrives at a decode worker
    link_ms: float  # that a transfer takes, however small
    hop_ms: float  # from the router's submission to the worker's queue, and back
    noise: float = 0.0  # standard deviation of the logarithm of a step's time
    tokens_per_step: float = 1.0  # that a stream gets; more where it guesses ahead

    @property
    def factors(self) -> Sequence[float]:
        return LINEAR

    def step_ms(self, prefill_tokens: float, prefill_context: float, streams: float, context: float) -> float:
        """Of one step; the arguments are StepSample's."""
        constant, token, pair, stream, depth = self.coefficients
        return constant + token * prefill_tokens + pair * prefill_context + stream * streams + depth * context

    def calibration(self) -> list[StepSample]:
        """What a worker of these rates would find when it calibrates (engines/paged/calibration.py)."""
        shapes = [(p, p * (cached + p / 2), n, n * context) for p, cached, n, context in _CALIBRATION]
        return [StepSample(*shape, self.step_ms(*shape)) for shape in shapes]


class Gpu(Section, frozen=True, kw_only=True):
    """A datasheet. tflops: dense, of the model's dtype."""

    tflops: Amount
    memory_gb: Amount
    memory_gb_s: Amount
    link_gb_s: Amount  # of the network, per GPU
    source: str


class Model(Section, frozen=True, kw_only=True):
    billion_parameters: Amount  # that a token is multiplied with
    billion_weights: Amount  # that are in memory; more, for a mixture of experts
    layers: int
    hidden: int  # query heads x head_dim
    kv_heads: int
    head_dim: int
    weight_bytes: Amount = 2.0
    kv_bytes: Amount = 2.0
    source: str


class Efficiency(Section, frozen=True, kw_only=True):
    """How much of a datasheet engines reach."""

    compute: Amount
    memory: Amount
    link: Amount
    attention: Amount  # compute, in attention over long contexts
    memory_used: Amount  # share of the memory for weights and KV
    step_overhead_ms: float
    stream_overhead_ms: float
    link_ms: float
    hop_ms: float
    source: str


class Catalogue(Section, frozen=True):
    """configs/simulation/gpus.yaml."""

    gpus: dict[str, Gpu]
    models: dict[str, Model]
    efficiency: Efficiency

    def rates(self, gpu: str, model: str, gpus_per_worker: int) -> Rates:
        """Of a worker that spreads the model over so many GPUs. Raises ConfigError when a name is unknown or it won't fit.

        A roofline: arithmetic at the compute rate, weights and KV read at the memory rate, the two not overlapped.
        """
        chip, network, reach = _known(self.gpus, gpu, "GPU"), _known(self.models, model, "model"), self.efficiency
        flops_per_ms = chip.tflops * 1e9 * gpus_per_worker * reach.compute
        bytes_per_ms = chip.memory_gb_s * 1e6 * gpus_per_worker * reach.memory
        weight_bytes = network.billion_weights * 1e9 * network.weight_bytes
        token_bytes = int(2 * network.layers * network.kv_heads * network.head_dim * network.kv_bytes)
        room = chip.memory_gb * 1e9 * gpus_per_worker * reach.memory_used - weight_bytes
        if room < token_bytes * 1024:
            raise ConfigError(f"{model} does not fit into {gpus_per_worker} x {gpu}; give --gpus-per-worker a larger number")
        active_bytes = min(weight_bytes, network.billion_parameters * 1e9 * network.weight_bytes)
        token_ms = 2 * network.billion_parameters * 1e9 / flops_per_ms
        pair_ms = 4 * network.layers * network.hidden / (flops_per_ms / reach.compute * reach.attention)
        return Rates(
            coefficients=(
                reach.step_overhead_ms + active_bytes / bytes_per_ms,
                token_ms,
                pair_ms,
                reach.stream_overhead_ms + token_ms,
                token_bytes / bytes_per_ms,
            ),
            token_bytes=token_bytes,
            pool_tokens=int(room / token_bytes),
            link_bytes_per_ms=chip.link_gb_s * 1e6 * gpus_per_worker * reach.link,
            link_ms=reach.link_ms,
            hop_ms=reach.hop_ms,
        )


def load_catalogue(path: Path) -> Catalogue:
    """Raises ConfigError that names file and key."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), Catalogue)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error


def load_rates(path: Path) -> Rates:
    """As `scripts/simulate --measure` writes them. Raises ConfigError."""
    try:
        rates = msgspec.json.decode(path.read_bytes(), type=Rates)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from error
    if len(rates.coefficients) != len(TERMS):
        raise ConfigError(f"{path}: coefficients: {len(TERMS)} numbers are needed: {', '.join(TERMS)}")
    return rates


def _known(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    if name not in table:
        raise ConfigError(f"{name!r} is no {kind} of the catalogue; it has {', '.join(table)}")
    return table[name]
