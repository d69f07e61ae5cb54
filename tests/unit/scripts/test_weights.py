"""The real conversion is judged by a reference (transformers); locking and repair use a small stand-in for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from python_backends.core.errors import ConfigError
from python_backends.core.paths import DEMO_MODEL
from scripts import weights

QUIET = Console(quiet=True)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """An empty cache, and a conversion that writes one small file; the list grows with every conversion."""
    done: list[Path] = []

    def convert(source: Path, target: Path, console: Console) -> None:
        time.sleep(0.05)  # long enough for a second caller to come in between
        (target / "model.safetensors").write_bytes(b"weights")
        done.append(target)

    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "convert", convert)
    monkeypatch.setattr(weights, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(weights, "_check_source", lambda path: None)
    return done


def test_second_call_finds_the_work_done(conversions: list[Path]) -> None:
    first = weights.prepare_demo_model(QUIET)
    assert (first / "model.safetensors").read_bytes() == b"weights"
    assert weights.prepare_demo_model(QUIET) == first
    assert len(conversions) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "stamp"])
def test_damage_is_repaired(conversions: list[Path], damage: str) -> None:
    directory = weights.prepare_demo_model(QUIET)
    file = directory / "model.safetensors"
    if damage == "flip":
        file.write_bytes(b"wEights")
    elif damage == "truncate":
        file.write_bytes(b"weigh")
    elif damage == "remove":
        file.unlink()
    else:
        (directory / "baton-stamp.json").write_text("[]")
    assert not weights.is_intact(directory)
    weights.prepare_demo_model(QUIET)
    assert file.read_bytes() == b"weights"
    assert len(conversions) == 2


def test_two_at_once_convert_once(conversions: list[Path]) -> None:
    threads = [threading.Thread(target=weights.prepare_demo_model, args=(QUIET,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(conversions) == 1


def test_failed_conversion_leaves_nothing_but_the_lock(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(source: Path, target: Path, console: Console) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "convert", convert)
    with pytest.raises(OSError, match="No space left"):
        weights.prepare_demo_model(QUIET)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{DEMO_MODEL}.lock"]


def test_wrong_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not the weights")
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "find_gguf", lambda: tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="not the expected file"):
        weights.prepare_demo_model(QUIET)


@pytest.fixture(scope="module")
def demo_model() -> Path:
    return weights.prepare_demo_model(QUIET)


@pytest.mark.weights
def test_reference_computes_sense_with_the_weights(demo_model: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    # Rows of Q and K in llama.cpp's order would give a perplexity near 92.
    text = "The sun rises in the east and sets in the west. Water freezes at zero degrees and boils at one hundred degrees."
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.inference_mode():
        assert torch.exp(model(ids, labels=ids).loss).item() < 15
        prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
        assert tokenizer.decode([int(model(prompt).logits[0, -1].argmax())]) == " Paris"
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.config.eos_token_id == 2


@pytest.mark.weights
def test_tokenizer_equals_the_references(demo_model: Path) -> None:
    """Except for digits, whose rule the reference's GGUF loader drops."""
    transformers = pytest.importorskip("transformers")
    source = weights.find_gguf()
    theirs = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ours = transformers.AutoTokenizer.from_pretrained(demo_model)
    texts = [
        "Hello, world! It's  a\ttest;  isn't it?\n\n  def f(x):\r\n\treturn x ** y\n",
        "naïve café, 日本語, العربية, 😀🏳️‍🌈",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "a<|endoftext|>b<|im_end |>",
        "",
        " \n ",
    ]
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    chat = [{"role": "user", "content": "hi"}]
    options = {"add_generation_prompt": True, "tokenize": False}
    assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


@pytest.mark.weights
def test_digits_are_single_tokens_and_control_tokens_special(demo_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    assert tokenizer.encode("in 2024:").tokens == ["in", "Ġ", "2", "0", "2", "4", ":"]
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nhi"
