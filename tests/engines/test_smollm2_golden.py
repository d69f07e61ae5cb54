"""Greedy text of the real SmolLM2 weights against transformers, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from python_backends.core.config import ModelConfig, WorkerConfig
from python_backends.core.types import Role
from python_backends.engines.torch.runner import TorchRunner
from tests.engines.paged_sequences import PagedSequence, SequencePool

pytestmark = pytest.mark.weights

CHUNK = 256  # tokens
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "chat": CHAT.format("What is the capital of France?"),
    "prose": "The old lighthouse keeper opened the door and saw",
    "code": "def fibonacci(n: int) -> int:\n",
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def served(smollm2_dir: Path) -> Iterator[SequencePool]:
    pool = SequencePool(TorchRunner(ModelConfig(), WorkerConfig(role=Role.AGGREGATED), 16, smollm2_dir), num_blocks=160)
    yield pool
    pool.close()


@torch.inference_mode()
def _expected(reference: Any, prompt: list[int], count: int) -> list[int]:
    output = reference(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    tokens = [int(output.logits[0, -1].argmax())]
    while len(tokens) < count:
        output = reference(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("name", PROMPTS)
def test_short_prompts(name: str, served: SequencePool, reference: Any, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPTS[name]).ids
    assert served.greedy(PagedSequence(list(prompt)), 40, CHUNK) == _expected(reference, prompt, 40)


def test_long_prompt_in_chunks(served: SequencePool, reference: Any, tokenizer: Tokenizer) -> None:
    ledger = "".join(f"On day {day} the harbour master counted {day * day % 97} ships.\n" for day in range(1, 160))
    prompt = tokenizer.encode(ledger).ids[:2000]
    assert len(prompt) == 2000
    assert served.greedy(PagedSequence(list(prompt)), 12, CHUNK) == _expected(reference, prompt, 12)


def test_the_capital_of_france(served: SequencePool, tokenizer: Tokenizer) -> None:
    answer = served.greedy(PagedSequence(tokenizer.encode(PROMPTS["chat"]).ids), 12, CHUNK)
    assert "Paris" in tokenizer.decode(answer)
