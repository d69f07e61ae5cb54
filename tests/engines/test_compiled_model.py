"""The compiled forward pass: against transformers on every architecture, and bit for bit against itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.errors import ConfigError, EngineFailure
from python_backends.core.types import Role
from python_backends.engines.paged.runner import Draw, Sampled, Slice
from python_backends.engines.torch.cores import AT_WORK, CoreBoard, shared_cores
from python_backends.engines.torch.kernels import sampler as sampler_module
from python_backends.engines.torch.kernels.executor import CompiledExecutor
from python_backends.engines.torch.kernels.forward import LAST_PHASES, LAYER_PHASES
from python_backends.engines.torch.kernels.team import cycles
from python_backends.engines.torch.kernels.tile import GROUP
from python_backends.engines.torch.runner import TorchRunner
from tests.engines.paged_sequences import PagedSequence, SequencePool, greedy_draw
from tests.engines.test_torch_model import LLAMA3_ROPE, _prompt, _random_model

VOCAB = 199
NUM_BLOCKS = 120
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 83,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "eos_token_id": 7,
    "attn_implementation": "eager",
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama2": lambda: transformers.LlamaConfig(**{**COMMON, "num_key_value_heads": 6}, tie_word_embeddings=False),
    "llama_biases": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama31": lambda: transformers.LlamaConfig(**{**COMMON, "head_dim": 32}, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=40),
    "qwen2": lambda: transformers.Qwen2Config(**{**COMMON, "hidden_size": 96}, tie_word_embeddings=True),
    "qwen2_windows": lambda: transformers.Qwen2Config(
        **{**COMMON, "hidden_size": 96}, use_sliding_window=True, sliding_window=270, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
}


class ArgmaxSampler:
    """Greedy, and keeps the logits it saw last, [draws, vocab]."""

    logits: ClassVar[torch.Tensor]

    def __init__(self, vocab_size: int) -> None:
        assert vocab_size == VOCAB

    def sample(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        assert len(logits) == len(draws)
        ArgmaxSampler.logits = logits.clone()
        return [Sampled(int(token), None) for token in logits.argmax(-1)]


class Served(SequencePool):
    def __init__(self, directory: Path, threads: int = 1, board: CoreBoard | None = None, **model: Any) -> None:
        torch.set_num_threads(threads)
        worker = WorkerConfig(role=Role.AGGREGATED)
        runner = TorchRunner(ModelConfig(**model), worker, 16, directory, "compiled", board)
        super().__init__(runner, NUM_BLOCKS)
        torch.set_num_threads(1)

    def logits(self, sequence: PagedSequence, count: int) -> torch.Tensor:
        """Of the last of the next `count` tokens, [vocab]."""
        self.runner.step([self.slice(sequence, count, draw=True)])
        return ArgmaxSampler.logits[0]


@torch.inference_mode()
def _expected(reference: Any, tokens: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = reference(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits.float()


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((actual - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.fixture(autouse=True)
def _argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "CompiledSampler", ArgmaxSampler)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    reference = _random_model(CONFIGS[request.param]())
    reference.save_pretrained(tmp_path)
    return reference, tmp_path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    _random_model(CONFIGS["llama_biases"]()).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def served(directory: Path) -> Iterator[Served]:
    served = Served(directory)
    yield served
    served.close()


def test_chunks_equal_transformers(model: tuple[Any, Path]) -> None:
    reference, directory = model
    served = Served(directory, threads=2)
    sequence = PagedSequence(_prompt(600, seed=2))
    expected = _expected(reference, sequence.tokens)
    for count in (1, 3, 50, 17, 400, 100, 29):
        _assert_close(served.logits(sequence, count), expected[sequence.computed - 1])
    served.close()


def test_cores_that_come_and_go_change_no_bit(directory: Path, tmp_path: Path) -> None:
    names = ("prefill", "decode")
    prefill, decode = (shared_cores(names, name, 1, b"k" * 32, tmp_path) for name in names)
    served = Served(directory, board=prefill)
    assert served.runner.cores == prefill.name
    tokens = _prompt(700, seed=5)
    first = PagedSequence(list(tokens))
    decode.work()
    served.runner.rest()  # it has loaded: from now on it borrows
    expected = served.logits(first, 700)
    served.free += first.blocks
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            decode.rest()
            decode.work()

    owner = threading.Thread(target=come_and_go)
    owner.start()
    try:
        for _ in range(20):
            decode.rest()  # else the borrower might never begin
            sequence = PagedSequence(list(tokens))
            assert torch.equal(served.logits(sequence, 700), expected)
            served.free += sequence.blocks
    finally:
        ended.set()
        owner.join()
    served.runner.rest()
    assert decode.rows[prefill.row, AT_WORK] == 0
    served.close()
    decode.close()


def test_chunks_batches_and_threads_change_no_bit(model: tuple[Any, Path]) -> None:
    _, directory = model
    tokens, target = _prompt(330, seed=3), 330
    results = []
    for threads, chunks in ((1, [330]), (1, [256, 1, 1, 72]), (2, [7, 100, 222, 1]), (2, [1] * 12 + [318])):
        served = Served(directory, threads)
        sequence = PagedSequence(list(tokens))
        for count in chunks:
            others = [PagedSequence(_prompt(40, seed=count + i)) for i in range(3)]
            slices = [served.slice(other, 13 * i + 1, draw=True) for i, other in enumerate(others)]
            slices.insert(2, served.slice(sequence, count, draw=True))
            served.runner.step(slices)
            result = ArgmaxSampler.logits[2].clone()
            served.free += [block for other in others for block in other.blocks]
        assert sequence.computed == target
        results.append(result)
        served.close()
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_greedy_continuation_equals_transformers(model: tuple[Any, Path]) -> None:
    reference, directory = model
    served = Served(directory)
    prompt, expected = _prompt(37, seed=3), _prompt(37, seed=3)
    for _ in range(24):
        expected.append(int(_expected(reference, expected)[-1].argmax()))
    assert served.greedy(PagedSequence(list(prompt)), 24, chunk=16) == expected[37:]
    served.close()


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_sixteen_bit_checkpoints_keep_their_size_and_change_no_bit(tmp_path: Path, stored: str) -> None:
    reference = _random_model(CONFIGS["qwen2"]()).to(getattr(torch, stored))
    reference.save_pretrained(tmp_path)
    tokens = _prompt(40, seed=4)
    kept, widened = Served(tmp_path), Served(tmp_path, weights="float32")
    assert kept.runner.fingerprint == widened.runner.fingerprint
    for count in (30, 1, 9):
        first, second = (served.logits(PagedSequence(list(tokens)), count) for served in (kept, widened))
        assert torch.equal(first, second)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    _assert_close(kept.logits(PagedSequence(list(tokens)), 40), _expected(reference, tokens)[-1])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_are_what_the_format_says(tmp_path: Path, precision: str) -> None:
    """Logits equal those of a model with the weights that codes and scales stand for."""
    reference = _random_model(CONFIGS["llama_biases"]())
    reference.save_pretrained(tmp_path)
    served = Served(tmp_path, weights=precision)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 2:
                bits = 8 if precision == "int8" or "embed" in name or "lm_head" in name else 4
                parameter.copy_(_rounded(parameter, bits))
    tokens = _prompt(70, seed=5)
    expected = _expected(reference, tokens)
    sequence = PagedSequence(list(tokens))
    for count in (1, 2, 3, 5, 50, 9):
        _assert_close(served.logits(sequence, count), expected[sequence.computed - 1])


def _rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """INT8: code * scale, around zero. INT4: code * scale + offset, 16 steps between the group's extremes."""
    rounded = torch.empty_like(weight)
    for first in range(0, weight.shape[1], GROUP):
        group = weight[:, first : first + GROUP]
        least, greatest = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        scale = _half_up(torch.maximum(greatest, -least) / 127 if bits == 8 else (greatest - least) / 15)
        offset = torch.zeros_like(scale) if bits == 8 else (least + 8 * scale).half().float()
        codes = torch.round((group - offset) / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        rounded[:, first : first + GROUP] = codes * scale + offset
    return rounded


def _half_up(values: torch.Tensor) -> torch.Tensor:
    halves = values.numpy().astype(np.float16)
    up = np.where(halves.astype(np.float32) < values.numpy(), np.nextafter(halves, np.float16(np.inf)), halves)
    return torch.from_numpy(up.astype(np.float32))


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("float16", 0.01), ("int8", 0.15)])
def test_narrow_kv_is_close(model: tuple[Any, Path], kv_dtype: str, tolerance: float) -> None:
    reference, directory = model
    served = Served(directory, threads=2, kv_dtype=kv_dtype)
    sequence = PagedSequence(_prompt(330, seed=6))
    expected = _expected(reference, sequence.tokens)
    for count in (280, 1, 49):
        logits, wanted = served.logits(sequence, count), expected[sequence.computed - 1]
        assert float((logits - wanted).norm() / wanted.norm()) < tolerance
    served.close()


def test_narrow_kv_depends_on_no_batch(directory: Path) -> None:
    served = Served(directory, kv_dtype="int8")
    tokens = _prompt(80, seed=7)
    whole, parts = PagedSequence(list(tokens)), PagedSequence(list(tokens))
    first = served.logits(whole, 80)
    served.logits(parts, 47)
    assert torch.equal(served.logits(parts, 33), first)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_narrow_weights_depend_on_no_batch(directory: Path, weights: str) -> None:
    """Few rows turn them into float32 in registers, many rows in memory."""
    served = Served(directory, weights=weights)
    tokens = _prompt(40, seed=12)
    whole, parts = PagedSequence(list(tokens)), PagedSequence(list(tokens))
    expected = served.logits(whole, 40)
    for count in (1, 2, 3, 4, 5, 12):
        served.logits(parts, count)
    assert torch.equal(served.logits(parts, 13), expected)
    served.close()


def test_phases_of_a_step_are_timed(served: Served) -> None:
    served.logits(PagedSequence(_prompt(20, seed=1)), 20)
    executor = served.runner._executor
    assert isinstance(executor, CompiledExecutor)
    took = executor.phase_cycles()
    assert set(took) == {*LAYER_PHASES, *LAST_PHASES}
    if cycles() > 0:
        assert all(took[name] > 0 for name in ("qkv", "attend", "down", "output"))
    assert min(took.values()) >= 0


def test_kv_lies_in_the_pool_memory(served: Served) -> None:
    """Copying blocks to other places of the pool, as a transfer does, continues the sequence unchanged."""
    tokens = _prompt(45, seed=8)
    expected = served.logits(PagedSequence(list(tokens)), 45)
    sequence = PagedSequence(list(tokens))
    served.logits(sequence, 40)
    moved = [served.free.pop() for _ in sequence.blocks]
    served.memory.blocks[moved] = served.memory.blocks[sequence.blocks]
    served.memory.blocks[sequence.blocks] = 0xFF
    sequence.blocks = moved
    assert torch.equal(served.logits(sequence, 5), expected)


def test_drafts_draw_at_every_position(served: Served) -> None:
    """Right drafts give the tokens that single steps give, wrong ones end the list."""
    prompt = _prompt(20, seed=9)
    truth = served.greedy(PagedSequence(list(prompt)), 5, chunk=64)
    for wrong in range(5):
        sequence = PagedSequence(list(prompt))
        served.logits(sequence, 19)
        drafts = truth[:4]
        if wrong < 4:
            drafts[wrong] = (drafts[wrong] + 1) % VOCAB
        sequence.tokens += drafts
        piece = served.slice(sequence, 5, draw=True)
        piece.drafts = 4
        (sampled,) = served.runner.step([piece])
        assert sampled is not None
        assert [sampled.token_id, *(token.token_id for token in sampled.following)] == truth[: wrong + 1]


def test_workers_with_other_weights_have_other_fingerprints_unless_told(directory: Path) -> None:
    def fingerprint(**model: Any) -> str:
        served = Served(directory, **model)
        served.close()
        return served.runner.fingerprint

    plain = fingerprint()
    assert fingerprint(weights="int8") != plain
    assert fingerprint(weights="int8", mixed_weights=True) == plain
    assert fingerprint(kv_dtype="int8", mixed_weights=True) != plain


def test_what_kernels_cannot_do_is_refused_by_name(directory: Path) -> None:
    worker = WorkerConfig(role=Role.DECODE)
    with pytest.raises(ConfigError, match=r"engine\.kernels.*block_size 8"):
        TorchRunner(ModelConfig(), worker, 8, directory, "compiled").start()
    with pytest.raises(ConfigError, match=r"model\.weights: int8 needs compiled kernels"):
        TorchRunner(ModelConfig(weights="int8"), worker, 8, directory).start()
    with pytest.raises(ConfigError, match=r"model\.kv_dtype: int8"):
        TorchRunner(ModelConfig(kv_dtype="int8"), worker, 16, directory, "torch").start()


@pytest.mark.parametrize("token", [-1, VOCAB, 10**9])
def test_a_foreign_token_id_is_refused(served: Served, token: int) -> None:
    with pytest.raises(EngineFailure, match="vocabulary of 199"):
        served.runner.step([Slice([1, token], 0, [served.free.pop()], greedy_draw())])


def test_idle_threads_use_no_processor(directory: Path) -> None:
    served = Served(directory, threads=2)
    served.logits(PagedSequence(_prompt(20, seed=1)), 20)
    before = os.times()
    time.sleep(0.5)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 0.1
    served.close()


def test_compiled_is_what_a_cpu_gets(served: Served) -> None:
    assert isinstance(served.runner._executor, CompiledExecutor)
    assert served.runner.layout.keys == "columns"
    served.runner.step([Slice([1], 0, [served.free.pop()], greedy_draw())])
