"""Writes a Hugging Face Llama with tied embeddings as a GGUF file, which is what llama.cpp and OpenVINO read.

The other way round, and the names: scripts/weights.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, LlamaFileType
from safetensors import safe_open

from python_backends.core.errors import ConfigError
from scripts import weights

_TENSORS = {theirs: ours for ours, theirs in weights.TENSORS.items()}
_LAYER_TENSORS = {theirs: ours for ours, theirs in weights.LAYER_TENSORS.items()}


FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
"""Of files, by what their matrices are."""


def write_gguf(model: Path, target: Path, matrices: GGMLQuantizationType = GGMLQuantizationType.F32) -> None:
    """`matrices`: one of FILE_TYPES; vectors are float32. Raises ConfigError for a model that is no such Llama."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["architectures"] != ["LlamaForCausalLM"] or not config.get("tie_word_embeddings"):
        raise ConfigError(f"{model}: only Llama models with tied embeddings are written as GGUF")
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, config)
    writer.add_file_type(FILE_TYPES[matrices])
    _add_tokenizer(writer, model, config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                ours, kind = _tensor_name(name)
                values = file.get_tensor(name).astype(np.float32, copy=False)
                values = _permute(values, heads[kind]) if kind in heads else values
                form = matrices if values.ndim > 1 else GGMLQuantizationType.F32
                writer.add_tensor(ours, gguf.quantize(values, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer: Any, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    names = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = [token for token, _ in sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_unk_token_id(tokenizer["model"]["vocab"][names["unk_token"]])
    writer.add_chat_template(names["chat_template"])


def _tensor_name(name: str) -> tuple[str, str]:
    """(GGUF name, kind): `model.layers.3.self_attn.q_proj.weight` -> (`blk.3.attn_q.weight`, `attn_q`)."""
    bare = name.removesuffix(".weight")
    if bare.startswith("model.layers."):
        number, _, rest = bare.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{_LAYER_TENSORS[rest]}.weight", _LAYER_TENSORS[rest]
    return f"{_TENSORS[bare]}.weight", _TENSORS[bare]


def _permute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """[heads * head_dim, hidden], the halves of each head's rotary pairs interleaved, as llama.cpp has them."""
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(rows, columns)
