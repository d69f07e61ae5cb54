"""Prepared steps, as a GPU replays them, against the plain operators: the same logits, whatever the batch."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.types import Role
from python_backends.engines.paged.runner import Slice
from python_backends.engines.torch.decode import row_sizes
from python_backends.engines.torch.device_executor import DeviceExecutor
from python_backends.engines.torch.paged_attention import Flex, compiled_flex
from python_backends.engines.torch.runner import TorchRunner
from tests.engines.host_device import HostDevice
from tests.engines.paged_sequences import PagedSequence, SequencePool
from tests.engines.tiny_model import VOCAB, write_tiny_llama

BLOCK_SIZE = 16
NUM_BLOCKS = 64
MAX_BATCH = 6  # prepared for 1, 2, 4 and 8 rows
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "three heads per KV head": {"num_attention_heads": 6, "hidden_size": 96},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 21},
    "windows in some layers": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
}


class Bench:
    """One model twice: by plain operators, and on a device with prepared steps."""

    def __init__(self, directory: Path, device: HostDevice, max_batch: int = MAX_BATCH, dtype: str = "float32") -> None:
        worker, model = WorkerConfig(role=Role.DECODE), ModelConfig(dtype=dtype, max_context=512)  # type: ignore[arg-type]
        self.device = device
        self.plain = SequencePool(TorchRunner(model, worker, BLOCK_SIZE, directory, "torch"), NUM_BLOCKS)
        runner = TorchRunner(model, worker, BLOCK_SIZE, directory, "torch", max_batch=max_batch, device=device)
        self.prepared = SequencePool(runner, NUM_BLOCKS)
        executor = runner._executor
        assert isinstance(executor, DeviceExecutor)
        assert executor._pool is not None
        self.pool = executor._pool.tensor
        self.pool[:-1] = torch.nan  # what a sequence did not write must never count

    def step(self, slices: Sequence[Slice]) -> torch.Tensor:
        """Logits [draws, vocab] of the prepared steps, after comparing them with those of the plain operators."""
        expected = self.plain.runner._started().forward(slices)
        logits = self.prepared.runner._started().forward(slices)
        assert logits.shape == expected.shape
        assert float((logits - expected).abs().max()) < 1e-5 * float(expected.abs().max())
        return logits.clone()

    def close(self) -> None:
        self.plain.close()
        self.prepared.close()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make_bench(model: str = "llama", device: HostDevice | None = None, max_batch: int = MAX_BATCH) -> Bench:
        directory = write_tiny_llama(tmp_path / "model", **MODELS[model])
        made.append(Bench(directory, device or HostDevice(), max_batch))
        return made[-1]

    yield make_bench
    for bench in made:
        bench.close()


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def stream(bench: Bench, length: int, seed: int) -> PagedSequence:
    """A sequence all but whose last token has been computed."""
    sequence = PagedSequence(prompt(length, seed))
    bench.plain.runner._started().forward([first := bench.plain.slice(sequence, length - 1, draw=False)])
    bench.prepared.runner._started().forward([first])
    return sequence


def advance(bench: Bench, sequences: Sequence[PagedSequence]) -> None:
    """One step of streams; each goes on with its likeliest token."""
    logits = bench.step([bench.plain.slice(sequence, 1, draw=True) for sequence in sequences])
    for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
        sequence.tokens.append(token)


@pytest.mark.parametrize("model", ["llama", "three heads per KV head", "windows in some layers"])
def test_streams_that_come_and_go_have_the_logits_of_plain_operators(make: Callable[..., Bench], model: str) -> None:
    bench = make(model)
    streams = [stream(bench, length, seed=length) for length in (2, 15, 16, 17, 33, 95)]
    captured = bench.device.computed
    for batch in ([0, 1, 2], [0, 1, 2, 3, 4, 5], [5, 0], [5, 0], [3], [1, 2, 3, 4, 5]):
        for _ in range(5):
            advance(bench, [streams[index] for index in batch])
    assert bench.device.computed == captured, "Python computed what was to be replayed"
    assert bench.device.replayed == 30


def test_drafts_are_rows_of_their_own(make: Callable[..., Bench]) -> None:
    bench = make()
    streams = [stream(bench, length, seed=length) for length in (30, 14)]
    slices = [bench.plain.slice(each, 1, draw=True) for each in streams]
    for piece, guessed in zip(slices, ([5, 6, 7], [9, 10]), strict=True):
        piece.token_ids = [*piece.token_ids, *guessed]
        piece.drafts = len(guessed)
        while len(piece.block_table) * BLOCK_SIZE < piece.start + len(piece.token_ids):
            piece.block_table = [*piece.block_table, bench.plain.free.pop()]
    assert len(bench.step(slices)) == 7
    assert bench.device.replayed == 1


def test_streams_beside_prompts_come_in_the_order_of_the_slices(make: Callable[..., Bench]) -> None:
    bench = make()
    streams = [stream(bench, length, seed=length) for length in (20, 40)]
    prompts = [PagedSequence(prompt(length, seed=length)) for length in (50, 18)]
    bench.step(
        [
            bench.plain.slice(prompts[0], 20, draw=False),
            bench.plain.slice(streams[0], 1, draw=True),
            bench.plain.slice(prompts[1], 18, draw=True),
            bench.plain.slice(streams[1], 1, draw=True),
        ]
    )
    bench.step([bench.plain.slice(prompts[0], 30, draw=True)])
    assert bench.device.replayed == 1


def test_more_streams_than_prepared_for_are_computed_all_the_same(make: Callable[..., Bench]) -> None:
    bench = make(max_batch=2)
    advance(bench, [stream(bench, length, seed=length) for length in (5, 20, 30)])
    assert bench.device.replayed == 0


def test_rows_that_pad_a_step_touch_nobodys_blocks(make: Callable[..., Bench]) -> None:
    bench = make()
    streams = [stream(bench, length, seed=length) for length in (20, 40, 35)]
    advance(bench, streams)
    others = [block for block in range(NUM_BLOCKS) if block not in {each.blocks[-1] for each in streams}]
    before = bench.pool[others].clone()
    for sequence in streams:
        advance(bench, [sequence])
    advance(bench, streams)
    assert torch.equal(bench.pool[others].view(torch.int32), before.view(torch.int32))


def test_a_sequence_in_other_blocks_goes_on_as_before(make: Callable[..., Bench]) -> None:
    """Its block table is another list, in the same row of the same step."""
    bench = make()
    sequence = stream(bench, 40, seed=1)
    advance(bench, [sequence])
    moved = [bench.plain.free.pop() for _ in sequence.blocks]
    host = bench.plain.memory.blocks
    bench.pool[moved], host[moved] = bench.pool[sequence.blocks], host[sequence.blocks]
    bench.pool[sequence.blocks], host[sequence.blocks] = 0, 0
    sequence.blocks = moved
    advance(bench, [sequence])


def test_exported_blocks_are_those_of_the_device_and_imported_ones_get_there(make: Callable[..., Bench]) -> None:
    bench = make()
    sequence = stream(bench, 40, seed=1)
    runner, memory = bench.prepared.runner, bench.prepared.memory
    runner.export_blocks(sequence.blocks)
    assert memory.blocks[sequence.blocks].tobytes() == bench.pool[sequence.blocks].numpy().tobytes()
    moved = [bench.plain.free.pop() for _ in sequence.blocks]
    memory.blocks[moved] = memory.blocks[sequence.blocks]
    bench.plain.memory.blocks[moved] = bench.plain.memory.blocks[sequence.blocks]
    runner.import_blocks(moved)
    sequence.blocks = moved
    advance(bench, [sequence])


class NoKernels(HostDevice):
    def flex(self, kinds: int) -> Flex:
        raise RuntimeError("no compiler here")


def test_without_prepared_steps_plain_operators_compute(make: Callable[..., Bench], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        bench = make(device=NoKernels())
    assert "no compiler here" in caplog.text
    advance(bench, [stream(bench, length, seed=length) for length in (5, 20)])


class Compiled(HostDevice):
    """FlexAttention itself, made for this processor by the compiler."""

    def flex(self, kinds: int) -> Flex:
        compiled = compiled_flex(kinds)

        def widened(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_mask: BlockMask) -> torch.Tensor:
            """On a CPU, and only there, a list of blocks must be as long as the keys are."""
            size = block_mask.BLOCK_SIZE
            wanted = -(-key.shape[2] // size[1]) - block_mask.kv_indices.shape[3]
            longer = BlockMask.from_kv_blocks(
                block_mask.kv_num_blocks,
                torch.nn.functional.pad(block_mask.kv_indices, (0, wanted)),
                BLOCK_SIZE=size,
                mask_mod=block_mask.mask_mod,
                seq_lengths=block_mask.seq_lengths,
                compute_q_blocks=False,
            )
            return compiled(query, key, value, block_mask=longer)

        return widened

    def captured(self, compute: Callable[[], None]) -> Callable[[], None]:
        return compute  # what is compiled can't be recorded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
@pytest.mark.skipif(not os.environ.get("BATON_LONG"), reason="compiling takes half a minute; set BATON_LONG=1")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")
def test_compiled_flex_attention(tmp_path: Path) -> None:
    directory = write_tiny_llama(tmp_path / "model", **MODELS["window"])
    bench = Bench(directory, Compiled(), max_batch=1)
    sequence = stream(bench, 70, seed=1)
    for _ in range(3):
        advance(bench, [sequence])
    bench.close()


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_sizes_double_until_all_fit(most: int, sizes: list[int]) -> None:
    assert row_sizes(most) == sizes


def test_greedy_text_is_the_same(make: Callable[..., Bench]) -> None:
    bench = make()
    texts = [pool.greedy(PagedSequence(prompt(37, seed=3)), 24, chunk=16) for pool in (bench.plain, bench.prepared)]
    assert texts[0] == texts[1]
