"""The figures of a profile: from a load test's records, the machine's limits and the model's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.interference import Gaps, cache_potential, computed_tokens, gaps_of, prefill_seconds
from loadtest.record import Floats, Record, Run
from loadtest.summary import ALL, figures, spread
from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.errors import BatonError
from python_backends.core.layout import DTYPE_BYTES, KVLayout
from python_backends.core.paths import resolve_model
from python_backends.core.types import Role
from scripts import doctor_facts as facts
from scripts import doctor_measures as measures
from scripts.profile_verdict import Kind, Profile, Spread, Use

_WEIGHT_BYTES = {**DTYPE_BYTES, "int8": 1 + 2 / 32, "int4": 0.5 + 4 / 32}  # codes, and scales per 32 weights
_HANDED_OVER = "remote"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the device that computes: bytes per second read from memory, operations per second of matrix products."""

    bandwidth: float
    matrix: float
    device: str


@dataclass(frozen=True, slots=True)
class Model:
    """What one step reads and one token costs. `parameters`: those that every token passes."""

    parameters: int
    weight_bytes: float
    kv_token_bytes: int


def served_by(deployment: Deployment) -> WorkerConfig:
    """The worker whose limits count: an aggregated one, else one that decodes."""
    order = (Role.AGGREGATED, Role.DECODE, Role.PREFILL)
    return min(deployment.workers, key=lambda worker: order.index(worker.role))


def limits_of(worker: WorkerConfig) -> Limits:
    """Measured now, a second or two of full load. Raises BatonError when the worker's device is not here."""
    if worker.engine == "torch" and worker.device == "cpu":
        cores = facts.cores()
        bandwidth = max(measures.memory_bandwidth(threads) for threads in {1, cores})
        matrix = max(measures.matrix_rate(threads) for threads in {1, cores})
        return Limits(bandwidth, matrix, f"{cores} cores")
    index = int((worker.gpus or worker.device.partition(":")[2] or "0").split(",")[0])
    names, _ = facts.gpus()
    if index >= len(names):
        raise BatonError(f"{worker.name} computes on GPU {index}, which this Python does not see; its limits are not measured")
    bandwidth, matrix = measures.gpu_rates(index)
    return Limits(bandwidth, matrix, f"GPU {index}")


def model_of(deployment: Deployment, worker: WorkerConfig) -> Model:
    """Raises BatonError when its size can't be told, as of the fake engine or an architecture that is not known here."""
    from python_backends.engines.torch.architecture import load_architecture
    from python_backends.engines.torch.weights import expected_tensors

    if worker.engine == "fake":
        raise BatonError(f"{worker.name} has the engine fake, which computes nothing: no share of any limit can be told")
    directory = resolve_model(deployment.model.path)
    architecture = load_architecture(directory)
    shapes = expected_tensors(architecture)
    if not architecture.tied_embeddings:
        del shapes["model.embed_tokens.weight"]  # of which a token reads one row
    parameters = sum(_product(shape) for shape in shapes.values())
    weights = worker.weights or deployment.model.weights
    if weights == "auto":
        stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        per_weight = stored / sum(_product(shape) for shape in expected_tensors(architecture).values())
    else:
        per_weight = _WEIGHT_BYTES[weights]
    kv = deployment.model.kv_dtype
    layout = KVLayout(
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        block_size=deployment.engine.block_size,
        dtype=deployment.model.dtype if kv == "auto" else kv,
    )
    return Model(parameters, parameters * per_weight, layout.token_bytes)


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def profile_of(
    run: Run, records: Sequence[Record], limits: Limits | None, model: Model | None, step_tokens: int, workers: int
) -> Profile:
    """`step_tokens`: chunk of a prompt. `workers`: engines that share the load."""
    gaps = gaps_of(run, records)
    quiet, disturbed = gaps.only(False), gaps.only(True)
    low, high = run.window
    counted = [record for record in records if low <= record.due_s < high]
    inputs = sum(record.input_tokens for record in counted)
    prefill_s = prefill_seconds(run, records)
    use = None
    if limits is not None and model is not None:
        use = use_of(gaps, computed_tokens(run, records), prefill_s, high - low, limits, model, step_tokens, workers)
    return Profile(
        undisturbed=_spread(quiet.ms),
        disturbed=_spread(disturbed.ms),
        lost_share=gaps.lost_share(spread(quiet.ms).p50) if quiet.ms.size else 0.0,
        prefill_share=prefill_s / (high - low),
        streams=float(gaps.ms.sum() / (gaps.seconds * 1e3)) if gaps.ms.size else 0.0,
        cache_potential=cache_potential(run.options, records),
        cache_found=sum(record.cached_tokens for record in counted) / inputs if inputs else 0.0,
        kinds=_kinds(run, records),
        handed_over=sum(record.route == _HANDED_OVER for record in counted) / len(counted) if counted else 0.0,
        use=use,
    )


def use_of(
    gaps: Gaps,
    prompt_tokens: int,
    prefill_s: float,
    window_s: float,
    limits: Limits,
    model: Model,
    step_tokens: int,
    workers: int,
) -> Use:
    """Shares of the limits: 2 operations per weight and token, every weight once a step, and each stream's KV."""
    quiet, disturbed = gaps.only(False), gaps.only(True)
    operations = 2.0 * model.parameters
    chunks = prompt_tokens / step_tokens
    steps = max(disturbed.steps * workers, chunks)  # a chunk rides in a step of the streams, where there are some
    read_in_prefill = steps * model.weight_bytes + float(disturbed.context.sum()) * model.kv_token_bytes
    read_in_decode = quiet.steps * workers * model.weight_bytes + float(quiet.context.sum()) * model.kv_token_bytes
    in_prefill = operations * (prompt_tokens + float(disturbed.tokens.sum()))
    in_decode = operations * float(quiet.tokens.sum())
    return Use(
        arithmetic=_share(in_prefill + in_decode, window_s, limits.matrix),
        arithmetic_in_prefill=_share(in_prefill, prefill_s, limits.matrix),
        bandwidth_in_prefill=_share(read_in_prefill, prefill_s, limits.bandwidth),
        arithmetic_in_decode=_share(in_decode, quiet.seconds, limits.matrix),
        bandwidth_in_decode=_share(read_in_decode, quiet.seconds, limits.bandwidth),
    )


def _share(amount: float, seconds: float, limit: float) -> float:
    return amount / seconds / limit if seconds > 0 else 0.0


def _spread(ms: Floats) -> Spread:
    found = spread(ms)
    return Spread(found.n, found.p50, found.p99)


def _kinds(run: Run, records: Sequence[Record]) -> list[Kind]:
    return [
        Kind(
            name=one.kind,
            requests=one.requests,
            failed=one.failed,
            good=one.good / max(one.requests, 1),
            ttft_p50=one.ttft.p50,
            ttft_p99=one.ttft.p99,
            itl_p50=one.itl.p50,
            itl_p99=one.itl.p99,
            slo_ttft=run.slos[one.kind].ttft_ms,
            slo_itl=run.slos[one.kind].itl_ms,
        )
        for one in figures(run, records)
        if one.kind != ALL
    ]
