"""Measures what the codecs of KV on the wire make of a model's real KV, and what rounding it costs in quality.

    scripts/bench codec
    scripts/bench codec --quality --model MODEL --text FILE

Without --quality each block of a text's KV is encoded and decoded. Each line also says below which link rate the codec pays:
encoding, sending what is left and decoding, one after the other, then take less time than sending the block as it is.

With --quality the first half of each window of text is a prompt whose KV is rounded as on the way to a decode worker; the
second half is then predicted, and an answer generated, from that KV. This is to be run, with one's own model and text,
before transfer.rounding is set: it ends with status 1 when a codec changes more than the limits that are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.errors import BatonError, ConfigError
from python_backends.core.layout import KVLayout
from python_backends.core.paths import resolve_model
from python_backends.core.types import Epoch, Role, SamplingParams
from python_backends.engines.paged.runner import Draw, Slice
from python_backends.engines.torch.runner import TorchRunner
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import block_digest
from python_backends.kv.transfer.codec import LENGTH, BlockCodec, create_codec, roundings
from scripts.terminal import print_error

_BLOCK = 16
_CHUNK = 256
_GIB = 1 << 30
_KEY = bytes(32)
_PROMPT = 256  # tokens of a window whose KV is rounded
_REST = 256  # that are predicted after it
_ANSWER = 64
_MOST_CHANGE = 0.005  # of the perplexity
_LEAST_AGREED = 0.98  # of the tokens that are the likeliest

Blocks = npt.NDArray[np.uint8]  # [blocks, block_bytes]


@dataclass(frozen=True)
class Measured:
    """Of all blocks of one dtype in one codec. Rates are of KV bytes, in GiB/s, by one thread: the median of the rounds.

    `rounded`: the share of blocks that the codec took; it leaves those as they are that would lose too much.
    """

    kv_dtype: str
    codec: str
    tokens: int
    ratio: float
    encode: float
    decode: float
    rounded: float

    @property
    def pays_below(self) -> float:
        """Gbit/s."""
        return (1 - 1 / self.ratio) / (1 / self.encode + 1 / self.decode) * _GIB * 8 / 1e9


def measure(layout: KVLayout, blocks: Blocks, codec: str, rounds: int) -> Measured:
    """Raises AssertionError when a block does not come back as it was, or nearly so where it is rounded."""
    made, target = create_codec(codec, layout, _KEY), np.zeros_like(blocks[0])
    digests = [block_digest(block) for block in blocks]
    encode, decode, wire, rounded = [], [], 0, 0
    for _ in range(rounds):
        encoding, decoding, wire, rounded = 0.0, 0.0, 0, 0
        for block, digest in zip(blocks, digests, strict=True):
            began = time.perf_counter()
            pieces = made.encode(block, digest)
            encoding += time.perf_counter() - began
            wire += sum(piece.nbytes for piece in pieces)
            length = _land(made, pieces, target)
            began = time.perf_counter()
            inexact = made.decode(length, target, digest)
            decoding += time.perf_counter() - began
            assert inexact or np.array_equal(target, block)
            rounded += inexact
        encode.append(blocks.nbytes / encoding / _GIB)
        decode.append(blocks.nbytes / decoding / _GIB)
    ratio = blocks.nbytes / wire
    rates = statistics.median(encode), statistics.median(decode)
    return Measured(layout.dtype, codec, len(blocks) * layout.block_size, ratio, *rates, rounded / len(blocks))


def _land(codec: BlockCodec, pieces: Sequence[memoryview], target: npt.NDArray[np.uint8]) -> int:
    """As the wire does it. Returns the length that goes before a block."""
    (length,) = LENGTH.unpack(pieces[0])
    for view, piece in zip(codec.landing(length, target), pieces[1:], strict=True):
        view[:] = piece
    return int(length)


class Model:
    """A model on this machine's CPU, with the KV of one text at a time in blocks 0, 1, 2 ..."""

    def __init__(self, path: Path, kv_dtype: str, tokens: int) -> None:
        """`tokens`: the longest text. Raises ConfigError."""
        config = ModelConfig(kv_dtype=kv_dtype)  # type: ignore[arg-type]
        self._runner = TorchRunner(config, WorkerConfig(role=Role.AGGREGATED), _BLOCK, path)
        self._runner.start()
        self.layout = self._runner.layout
        self._table = list(range(self.layout.blocks_for(tokens)))
        self._memory = PoolMemory(len(self._table), self.layout.block_bytes, Epoch(1))
        self._runner.attach(self._memory)

    def read(self, tokens: Sequence[int]) -> Blocks:
        """Compute a text's KV; a copy of its blocks."""
        for start in range(0, len(tokens), _CHUNK):
            self._runner.step([Slice(list(tokens[start : start + _CHUNK]), start, self._table, None)])
        self._runner.export_blocks(self._table)
        return self._memory.blocks[: self.layout.blocks_for(len(tokens))].copy()

    def remember(self, blocks: Blocks) -> None:
        """The text's KV is this, from now on."""
        self._memory.blocks[: len(blocks)] = blocks
        self._runner.import_blocks(self._table[: len(blocks)])

    def logits(self, tokens: Sequence[int], start: int) -> torch.Tensor:
        """After each of the tokens, which follow `start` others: [tokens, vocab]."""
        piece = Slice(tokens, start, self._table, _GREEDY, drafts=len(tokens) - 1)
        return self._runner._started().forward([piece]).clone()

    def answer(self, last: int, start: int) -> list[int]:
        """Greedy, after `start` tokens of the text and this one."""
        tokens = [last]
        for at in range(start, start + _ANSWER):
            (sampled,) = self._runner.step([Slice(tokens[-1:], at, self._table, _GREEDY)])
            assert sampled is not None
            tokens.append(sampled.token_id)
        return tokens[1:]

    def close(self) -> None:
        self._runner.close()
        self._memory.close()


_GREEDY = Draw(SamplingParams(temperature=0, seed=0), [], [], [])


# --- quality ---


@dataclass
class Quality:
    """What was predicted from KV in one codec, and how often as from exact KV."""

    codec: str
    loss: float = 0.0
    tokens: int = 0
    agreed: int = 0  # tokens that are the likeliest with both
    answers: int = 0
    same: int = 0  # tokens of answers before the first other one
    blocks: int = 0
    rounded: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.tokens)

    def is_good(self, exact: Quality) -> bool:
        return self.perplexity <= exact.perplexity * (1 + _MOST_CHANGE) and self.agreed >= _LEAST_AGREED * self.tokens


def measure_quality(model: Model, tokens: Sequence[int], windows: int) -> list[Quality]:
    """The first is of exact KV. Raises ConfigError when the text is too short for a window."""
    names = ["raw", *roundings(model.layout.dtype, "int8")]
    found = [Quality(name) for name in names]
    size = _PROMPT + _REST
    starts = range(0, len(tokens) - size + 1, size)[:windows]
    if not starts:
        raise ConfigError(f"--text: it has {len(tokens)} tokens; a window takes {size}")
    for start in starts:
        prompt, rest = tokens[start : start + _PROMPT - 1], list(tokens[start + _PROMPT - 1 : start + size])
        blocks = model.read(prompt)
        exact: tuple[torch.Tensor, list[int]] | None = None
        for quality in found:
            model.remember(_travelled(model.layout, blocks, quality))
            logits = model.logits(rest[:-1], len(prompt))
            loss = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(rest[1:]), reduction="sum")
            answer = model.answer(rest[0], len(prompt))
            likely = logits.argmax(-1)
            exact = exact or (likely, answer)
            quality.loss += float(loss)
            quality.tokens += len(rest) - 1
            quality.agreed += int((likely == exact[0]).sum())
            quality.answers += len(answer)
            quality.same += next((i for i, (a, b) in enumerate(zip(answer, exact[1], strict=True)) if a != b), len(answer))
    return found


def _travelled(layout: KVLayout, blocks: Blocks, quality: Quality) -> Blocks:
    """The blocks as they would arrive."""
    if quality.codec == "raw":
        return blocks
    codec, arrived = create_codec(quality.codec, layout, _KEY), np.empty_like(blocks)
    for block, target in zip(blocks, arrived, strict=True):
        digest = block_digest(block)
        length = _land(codec, codec.encode(block, digest), target)
        quality.rounded += codec.decode(length, target, digest)
        quality.blocks += 1
    return arrived


def show_quality(console: Console, found: Sequence[Quality]) -> None:
    table = Table(box=None)
    headings = ("KV on the wire", "perplexity", "change", "same likeliest token", "same greedy tokens", "blocks rounded", "")
    for heading in headings:
        table.add_column(heading, justify="right")
    for quality in found:
        table.add_row(
            quality.codec,
            f"{quality.perplexity:.3f}",
            f"{quality.perplexity / found[0].perplexity - 1:+.3%}",
            f"{quality.agreed / quality.tokens:.2%}",
            f"{_ANSWER * quality.same / quality.answers:.0f} of {_ANSWER}",
            f"{quality.rounded / max(1, quality.blocks):.0%}",
            "good" if quality.is_good(found[0]) else "beyond the limits",
        )
    console.print(table)
    console.print(
        f"limits: perplexity at most {_MOST_CHANGE:.1%} higher, at least {_LEAST_AGREED:.0%} of the likeliest tokens the same"
    )


# --- command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    try:
        path = resolve_model(options.model)
        tokens = Tokenizer.from_file(str(path / "tokenizer.json")).encode(_read(options.text)).ids
        if options.quality:
            return _judge(console, path, tokens, options)
        found = [one for dtype in options.kv_dtypes for one in _measure_codecs(path, dtype, tokens[: options.tokens], options)]
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    if options.json:
        print(json.dumps([asdict(one) | {"pays_below": one.pays_below} for one in found]))
        return 0
    table = Table(box=None)
    for heading in ("KV", "codec", "tokens", "ratio", "encode GiB/s", "decode GiB/s", "pays below Gbit/s"):
        table.add_column(heading, justify="right")
    for one in found:
        figures = (f"{value:.2f}" for value in (one.ratio, one.encode, one.decode, one.pays_below))
        table.add_row(one.kv_dtype, one.codec, str(one.tokens), *figures)
    console.print(table)
    return 0


def _measure_codecs(path: Path, kv_dtype: str, tokens: Sequence[int], options: Any) -> list[Measured]:
    model = Model(path, kv_dtype, len(tokens))
    try:
        blocks = model.read(tokens)
    finally:
        model.close()
    names = ["lossless", *roundings(model.layout.dtype, "int8")]
    return [measure(model.layout, blocks, name, options.rounds) for name in names]


def _judge(console: Console, path: Path, tokens: Sequence[int], options: Any) -> int:
    model = Model(path, "auto", _PROMPT + _REST)
    try:
        found = measure_quality(model, tokens, options.windows)
    finally:
        model.close()
    show_quality(console, found)
    return 0 if all(quality.is_good(found[0]) for quality in found) else 1


def _read(text: Path) -> str:
    try:
        return text.read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--text: {text} can't be read: {error}") from error


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="scripts/bench codec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the model whose KV it is")
    parser.add_argument("--text", type=Path, default=Path("docs/architecture.md"), help="what the model reads")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text, at most")
    parser.add_argument("--kv-dtypes", nargs="+", default=["float32", "float16", "int8"], help="model.kv_dtype, in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", action="store_true", help="what rounding changes, instead of speed")
    parser.add_argument("--windows", type=int, default=8, help=f"with --quality: pieces of {_PROMPT + _REST} tokens, at most")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
