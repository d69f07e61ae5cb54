"""Models with random weights, as an engine and a tokenizer read them. The tokenizer here is a stand-in of bytes and a merge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from rich.console import Console
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from python_backends.core.errors import ConfigError
from python_backends.engines.torch.architecture import load_architecture
from scripts.random_weights import Shape, make_random_model
from scripts.rivalry.gguf_model import write_gguf
from scripts.weights import convert

_BYTES = 273  # and special tokens: the least vocabulary
SMALL = Shape(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=64, vocabulary=_BYTES + 1, positions=64)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory such as the demo model's, with two tokens beyond bytes."""
    directory = tmp_path_factory.mktemp("demo")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [f"<{number}>" for number in range(17)] + alphabet + ["th", "the"]
    tokenizer = Tokenizer(BPE({token: n for n, token in enumerate(tokens)}, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": 275}')
    (directory / "tokenizer_config.json").write_text('{"unk_token": "<0>", "model_max_length": 8192, "chat_template": "x"}')
    return directory


def test_the_model_has_the_shape_that_was_asked_for(demo: Path, tmp_path: Path) -> None:
    parameters = make_random_model(tmp_path / "a", SMALL, 0, demo)
    architecture = load_architecture(tmp_path / "a")
    assert (architecture.num_layers, architecture.hidden_size, architecture.num_kv_heads) == (2, 32, 2)
    assert (architecture.max_positions, architecture.tied_embeddings, architecture.vocab_size) == (64, True, 274)
    with safe_open(tmp_path / "a" / "model.safetensors", "numpy") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(value.size for value in values.values()) == parameters
    assert values["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    assert 0.015 < values["model.embed_tokens.weight"].std() < 0.025


def test_the_same_seed_makes_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make_random_model(tmp_path / name, SMALL, seed, demo)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_the_tokenizer_ends_where_the_vocabulary_does(demo: Path, tmp_path: Path) -> None:
    make_random_model(tmp_path / "a", SMALL, 0, demo)
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SMALL.vocabulary
    encoded = tokenizer.encode("the")
    assert encoded.tokens == ["th", "e"]
    assert tokenizer.decode(encoded.ids) == "the"
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["model_max_length"] == 64


@pytest.mark.parametrize(
    ("matrices", "lost"),  # at most, of the greatest of 32 values that share a scale, which is a float16
    [(GGMLQuantizationType.F32, 0.0), (GGMLQuantizationType.F16, 2.0**-11), (GGMLQuantizationType.Q8_0, 0.5 / 127 + 2.0**-11)],
)
def test_a_gguf_file_has_the_same_model(demo: Path, tmp_path: Path, matrices: GGMLQuantizationType, lost: float) -> None:
    """Read by what makes the demo model of such a file."""
    model, back = tmp_path / "a", tmp_path / "b"
    make_random_model(model, SMALL, 0, demo)
    back.mkdir()
    write_gguf(model, tmp_path / "model.gguf", matrices)
    convert(tmp_path / "model.gguf", back, Console(quiet=True))
    with safe_open(model / "model.safetensors", "numpy") as a, safe_open(back / "model.safetensors", "numpy") as b:
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118
            written, read = a.get_tensor(name), b.get_tensor(name)
            assert written.shape == read.shape, name
            most = np.abs(written.reshape(-1, 32)).max(axis=1, keepdims=True) * (lost if written.ndim > 1 else 0.0)
            assert (np.abs(written - read).reshape(-1, 32) <= most).all(), name
    assert load_architecture(back) == load_architecture(model)
    one, other = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (model, back))
    assert one.encode("the other").ids == other.encode("the other").ids


def test_models_that_gguf_is_not_written_for_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(ConfigError, match="only Llama"):
        write_gguf(tmp_path, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(heads=6, kv_heads=4), "does not divide --heads 6"),
        (Shape(vocabulary=100), "must be 273 to 275"),
        (Shape(head_dim=7), "is odd"),
        (Shape(layers=0), "must be 1 or more"),
    ],
)
def test_impossible_sizes_are_told(demo: Path, tmp_path: Path, shape: Shape, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_random_model(tmp_path / "a", shape, 0, demo)


def test_nothing_is_overwritten(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is there already"):
        make_random_model(tmp_path, SMALL, 0, demo)
