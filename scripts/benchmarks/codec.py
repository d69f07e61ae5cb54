"""Measures what the lossless codec of transfer.codec makes of real KV: a model computes the KV of a text, and each block is
encoded and decoded. Each line also says below which link rate the codec pays: encoding, sending what is left and decoding,
one after the other, then take less time than sending the block as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.errors import BatonError, ConfigError
from python_backends.core.paths import resolve_model
from python_backends.core.types import Epoch, Role
from python_backends.engines.paged.runner import Slice
from python_backends.engines.torch.runner import TorchRunner
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.codec import LENGTH, PlaneCodec
from scripts.terminal import print_error

_BLOCK = 16
_CHUNK = 256
_GIB = 1 << 30


@dataclass(frozen=True)
class Measured:
    """Of all blocks of one dtype. Rates are of KV bytes, in GiB/s, by one thread: the median of the rounds."""

    kv_dtype: str
    tokens: int
    ratio: float
    encode: float
    decode: float

    @property
    def pays_below(self) -> float:
        """Gbit/s."""
        return (1 - 1 / self.ratio) / (1 / self.encode + 1 / self.decode) * _GIB * 8 / 1e9


def measure(kv_dtype: str, blocks: npt.NDArray[np.uint8], tokens: int, rounds: int) -> Measured:
    """`blocks`: uint8 [blocks, block_bytes]. Raises AssertionError when a block does not come back as it was."""
    codec, target = PlaneCodec(kv_dtype, blocks.shape[1]), np.zeros_like(blocks[0])
    encode, decode, wire = [], [], 0
    for _ in range(rounds):
        encoding, decoding, wire = 0.0, 0.0, 0
        for block in blocks:
            began = time.perf_counter()
            pieces = codec.encode(block)
            encoding += time.perf_counter() - began
            wire += sum(piece.nbytes for piece in pieces)
            (length,) = LENGTH.unpack(pieces[0])
            for view, piece in zip(codec.landing(length, target), pieces[1:], strict=True):
                view[:] = piece
            began = time.perf_counter()
            codec.decode(length, target)
            decoding += time.perf_counter() - began
            assert np.array_equal(target, block)
        encode.append(blocks.nbytes / encoding / _GIB)
        decode.append(blocks.nbytes / decoding / _GIB)
    return Measured(kv_dtype, tokens, blocks.nbytes / wire, statistics.median(encode), statistics.median(decode))


def real_kv(model: Path, kv_dtype: str, tokens: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The KV of all full blocks of a text: uint8 [blocks, block_bytes]. Raises ConfigError."""
    runner = TorchRunner(ModelConfig(kv_dtype=kv_dtype), WorkerConfig(role=Role.AGGREGATED), _BLOCK, model)  # type: ignore[arg-type]
    runner.start()
    count = -(-len(tokens) // _BLOCK)
    memory = PoolMemory(count, runner.layout.block_bytes, Epoch(1))
    runner.attach(memory)
    try:
        for start in range(0, len(tokens), _CHUNK):
            runner.step([Slice(list(tokens[start : start + _CHUNK]), start, list(range(count)), None)])
        runner.export_blocks(range(count))
        return memory.blocks[: len(tokens) // _BLOCK].copy()
    finally:
        runner.close()
        memory.close()


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    try:
        model = resolve_model(options.model)
        tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode(_read(options.text)).ids[: options.tokens]
        found = [
            measure(kv_dtype, real_kv(model, kv_dtype, tokens), len(tokens), options.rounds) for kv_dtype in options.kv_dtypes
        ]
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    if options.json:
        print(json.dumps([asdict(one) | {"pays_below": one.pays_below} for one in found]))
        return 0
    table = Table(box=None)
    for heading in ("KV", "tokens", "ratio", "encode GiB/s", "decode GiB/s", "pays below Gbit/s"):
        table.add_column(heading, justify="right")
    for one in found:
        figures = (f"{value:.2f}" for value in (one.ratio, one.encode, one.decode, one.pays_below))
        table.add_row(one.kv_dtype, str(one.tokens), *figures)
    console.print(table)
    return 0


def _read(text: Path) -> str:
    try:
        return text.read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--text: {text} can't be read: {error}") from error


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="scripts/bench codec", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the model whose KV it is")
    parser.add_argument("--text", type=Path, default=Path("docs/architecture.md"), help="what the model reads")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text, at most")
    parser.add_argument("--kv-dtypes", nargs="+", default=["float32", "float16", "int8"], help="model.kv_dtype, in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
