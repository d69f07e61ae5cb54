"""The torch engine's forward pass against transformers, on tiny random models of every supported architecture."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.errors import ConfigError
from python_backends.core.types import Role
from python_backends.engines.paged.runner import Draw, Sampled, Slice
from python_backends.engines.torch import runner as runner_module
from python_backends.engines.torch.runner import TorchRunner
from tests.engines.paged_sequences import PagedSequence, SequencePool, greedy_draw

VOCAB = 199
BLOCK_SIZE = 4
NUM_BLOCKS = 160
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 7,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama2": lambda: transformers.LlamaConfig(**{**COMMON, "num_key_value_heads": 6}, tie_word_embeddings=False),
    "llama_biases": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama_linear_rope": lambda: transformers.LlamaConfig(
        **COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
    ),
    "llama31": lambda: transformers.LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=9, head_dim=10),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2_windows": lambda: transformers.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=16),
}


class ArgmaxSampler:
    """Greedy, and keeps the logits it saw last, [draws, vocab]."""

    logits: ClassVar[torch.Tensor]

    def __init__(self, vocab_size: int) -> None:
        assert vocab_size == VOCAB

    def sample(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        assert logits.dtype == torch.float32
        assert len(logits) == len(draws)
        ArgmaxSampler.logits = logits.clone()
        return [Sampled(int(token), None) for token in logits.argmax(-1)]


class Served(SequencePool):
    """A model in a TorchRunner, and the same model in transformers."""

    def __init__(self, directory: Path, reference: Any, dtype: str = "float32") -> None:
        self.reference = reference
        worker = WorkerConfig(role=Role.AGGREGATED)
        model = ModelConfig(dtype=dtype)  # type: ignore[arg-type]
        super().__init__(TorchRunner(model, worker, BLOCK_SIZE, directory), NUM_BLOCKS)

    def logits(self, sequence: PagedSequence, count: int) -> torch.Tensor:
        """Of the last of the next `count` tokens, [vocab]."""
        self.runner.step([self.slice(sequence, count, draw=True)])
        return ArgmaxSampler.logits[0]

    def expected_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """transformers' logits of all positions, [tokens, vocab]."""
        with torch.inference_mode():
            logits: torch.Tensor = self.reference(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return logits.float()

    def expected_greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self.expected_logits(tokens)[-1].argmax()))
        return tokens[-count:]


def _prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def _random_model(config: Any) -> Any:
    """Seeded weights, wide enough that every bias, norm and position matters to the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25)
    return model


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    assert float((actual - expected).abs().max()) < 1e-4 * scale


@pytest.fixture(autouse=True)
def _argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "Sampler", ArgmaxSampler)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=CONFIGS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    reference = _random_model(CONFIGS[request.param]())
    reference.save_pretrained(tmp_path)
    served = Served(tmp_path, reference)
    yield served
    served.close()


def test_logits_of_uneven_chunks_equal_transformers(served: Served) -> None:
    sequence = PagedSequence(_prompt(75, seed=2))
    expected = served.expected_logits(sequence.tokens)
    for count in (1, 3, 17, 4, 1, 30, 19):
        _assert_close(served.logits(sequence, count), expected[sequence.computed - 1])
    assert sequence.computed == len(sequence.tokens)


def test_greedy_continuation_equals_transformers(served: Served) -> None:
    prompt = _prompt(37, seed=3)
    assert served.greedy(PagedSequence(list(prompt)), 24, chunk=16) == served.expected_greedy(prompt, 24)


def test_mixed_batch_equals_each_alone(served: Served) -> None:
    lengths = {"short": 5, "middle": 22, "long": 90, "chunked": 40, "fresh": 13}
    sequences = {name: PagedSequence(_prompt(length, seed=length)) for name, length in lengths.items()}
    for name, computed in (("short", 4), ("middle", 21), ("long", 89), ("chunked", 15)):
        served.runner.step([served.slice(sequences[name], computed, draw=False)])
    order = ["chunked", "long", "fresh", "short", "middle"]
    counts = {"chunked": 20, "fresh": 13}
    batch = [served.slice(sequences[name], counts.get(name, 1), draw=name != "chunked") for name in order]

    sampled = served.runner.step(batch)

    assert len(ArgmaxSampler.logits) == 4
    assert sampled[0] is None  # the middle of a prompt draws nothing
    for name, token in zip(order[1:], sampled[1:], strict=True):
        expected = served.expected_logits(sequences[name].tokens)[-1]
        assert token is not None
        assert token.token_id == int(expected.argmax()), name
    # The chunk wrote its KV although it drew nothing.
    expected = served.expected_logits(sequences["chunked"].tokens)[-1]
    _assert_close(served.logits(sequences["chunked"], 5), expected)


def test_kv_lies_in_the_pool_memory(served: Served) -> None:
    """Copying blocks to other places of the pool, as a transfer does, continues the sequence unchanged."""
    prompt = _prompt(21, seed=5)
    expected = served.expected_greedy(prompt, 3)
    sequence = PagedSequence([*prompt, expected[0]])
    served.runner.step([served.slice(sequence, len(prompt), draw=False)])
    served.runner.export_blocks(sequence.blocks)
    moved = [served.free.pop() for _ in sequence.blocks]
    served.memory.blocks[moved] = served.memory.blocks[sequence.blocks]
    served.memory.blocks[sequence.blocks] = 0xFF
    served.runner.import_blocks(moved)
    sequence.blocks = moved
    assert served.greedy(sequence, 2, chunk=16) == expected[1:]


def test_runner_knows_its_model(served: Served) -> None:
    config = served.reference.config
    assert served.runner.max_positions == 512
    assert served.runner.eos_token_ids == (7,)
    assert served.runner.layout.num_layers == 3
    assert served.runner.layout.num_kv_heads == config.num_key_value_heads
    assert served.runner.layout.block_size == BLOCK_SIZE
    assert len(served.runner.fingerprint) == 32


def test_windows_much_shorter_than_the_context(tmp_path: Path) -> None:
    """Most keys that a chunk gathers are hidden from most of its tokens."""
    reference = _random_model(transformers.MistralConfig(**{**COMMON, "max_position_embeddings": 2048}, sliding_window=3))
    reference.save_pretrained(tmp_path)
    served = Served(tmp_path, reference)
    sequence = PagedSequence(_prompt(600, seed=6))
    expected = served.expected_logits(sequence.tokens)
    for count in (590, 10):
        _assert_close(served.logits(sequence, count), expected[sequence.computed - 1])


def test_sharded_checkpoint(tmp_path: Path) -> None:
    reference = _random_model(CONFIGS["llama2"]())
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    served = Served(tmp_path, reference)
    prompt = _prompt(20, seed=8)
    _assert_close(served.logits(PagedSequence(prompt), 20), served.expected_logits(prompt)[-1])


def test_bfloat16_checkpoint_served_as_float32(tmp_path: Path) -> None:
    reference = _random_model(CONFIGS["qwen2"]())
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    prompt = _prompt(20, seed=9)
    for _ in range(2):  # the second start finds the converted file
        served = Served(tmp_path, reference)
        _assert_close(served.logits(PagedSequence(list(prompt)), 20), served.expected_logits(prompt)[-1])
    assert len(list((tmp_path / "cache" / "prepared").glob("*-float32.safetensors"))) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    reference = _random_model(CONFIGS["llama31"]())
    reference.save_pretrained(tmp_path)
    served = Served(tmp_path, reference, dtype)
    prompt = _prompt(40, seed=10)
    sequence = PagedSequence(prompt)
    served.logits(sequence, 30)
    logits, expected = served.logits(sequence, 10), served.expected_logits(prompt)[-1]
    assert float((logits - expected).abs().max()) < 0.15 * float(expected.abs().max())


def test_fingerprint_follows_weights_dtype_and_configuration(tmp_path: Path) -> None:
    reference = _random_model(CONFIGS["qwen3"]())
    reference.save_pretrained(tmp_path)
    first = Served(tmp_path, reference).runner.fingerprint
    assert Served(tmp_path, reference).runner.fingerprint == first
    assert Served(tmp_path, reference, "bfloat16").runner.fingerprint != first
    with torch.no_grad():
        reference.model.norm.weight[0] += 1
    reference.save_pretrained(tmp_path)
    assert Served(tmp_path, reference).runner.fingerprint != first


def test_close_is_idempotent_also_after_a_failed_start(tmp_path: Path) -> None:
    runner = TorchRunner(ModelConfig(), WorkerConfig(role=Role.DECODE), BLOCK_SIZE, tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        runner.start()
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError, match="before start"):
        runner.step([Slice([1], 0, [0], greedy_draw())])
