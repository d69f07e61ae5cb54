"""Makes a Llama of any size with random weights: for measuring, where what the model says does not matter.

Same seed and sizes, same bytes. The tokenizer is the demo model's, cut to the vocabulary: ids below it keep their text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from python_backends.core.errors import ConfigError

_STANDARD_DEVIATION = 0.02  # of every matrix, as in untrained models elsewhere
_SPECIAL_TOKENS = 17  # of the demo model's tokenizer; they come first, then all bytes
_LEAST_VOCABULARY = _SPECIAL_TOKENS + 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in elements. The defaults make a model of 25 million parameters."""

    layers: int = 8
    hidden: int = 384
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 1024
    vocabulary: int = 32_000
    positions: int = 8192

    def check(self, largest_vocabulary: int) -> None:
        """Raises ConfigError for sizes that no model can have."""
        if min(self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.ffn, self.positions) < 1:
            raise ConfigError("--layers, --hidden, --heads, --kv-heads, --head-dim, --ffn and --positions must be 1 or more")
        if self.heads % self.kv_heads:
            raise ConfigError(f"--kv-heads: {self.kv_heads} does not divide --heads {self.heads}")
        if self.head_dim % 2:
            raise ConfigError(f"--head-dim: {self.head_dim} is odd; rotary positions need pairs")
        if not _LEAST_VOCABULARY <= self.vocabulary <= largest_vocabulary:
            raise ConfigError(
                f"--vocabulary: {self.vocabulary} must be {_LEAST_VOCABULARY} to {largest_vocabulary}, the demo model's"
            )


def make_random_model(target: Path, shape: Shape, seed: int, demo_model: Path) -> int:
    """Write a Hugging Face directory with tied embeddings, float32. Returns the number of parameters.

    `demo_model`: whose tokenizer it gets. Raises ConfigError when `target` has files already, or for impossible sizes.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already; give a directory that is new or empty")
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text(encoding="utf-8"))
    shape.check(len(tokenizer["model"]["vocab"]))
    tensors = dict(_tensors(shape, np.random.default_rng(seed)))
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    _write_json(target / "tokenizer.json", _cut(tokenizer, shape.vocabulary))
    demo = json.loads((demo_model / "config.json").read_text(encoding="utf-8"))
    ids = {name: demo[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(target / "config.json", {**_config(shape), **ids})
    _write_json(target / "generation_config.json", ids)
    names = json.loads((demo_model / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(target / "tokenizer_config.json", {**names, "model_max_length": shape.positions})
    return sum(values.size for values in tensors.values())


def _tensors(shape: Shape, rng: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(_STANDARD_DEVIATION)

    def norm() -> npt.NDArray[np.float32]:
        return np.ones(shape.hidden, np.float32)

    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", matrix(shape.vocabulary, shape.hidden)
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", norm()
        yield f"{layer}.self_attn.q_proj.weight", matrix(queries, shape.hidden)
        yield f"{layer}.self_attn.k_proj.weight", matrix(keys, shape.hidden)
        yield f"{layer}.self_attn.v_proj.weight", matrix(keys, shape.hidden)
        yield f"{layer}.self_attn.o_proj.weight", matrix(shape.hidden, queries)
        yield f"{layer}.post_attention_layernorm.weight", norm()
        yield f"{layer}.mlp.gate_proj.weight", matrix(shape.ffn, shape.hidden)
        yield f"{layer}.mlp.up_proj.weight", matrix(shape.ffn, shape.hidden)
        yield f"{layer}.mlp.down_proj.weight", matrix(shape.hidden, shape.ffn)
    yield "model.norm.weight", norm()


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def _cut(tokenizer: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Without the tokens from `vocabulary` on, and the merges that make them."""
    model = tokenizer["model"]
    vocab = {token: number for token, number in model["vocab"].items() if number < vocabulary}
    merges = [pair for pair in model["merges"] if "".join(pair) in vocab]
    return {**tokenizer, "model": {**model, "vocab": vocab, "merges": merges}}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
