from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.errors import ConfigError
from python_backends.engines.torch.architecture import Architecture, Rope, load_architecture

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": 32}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 32}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _load(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Architecture:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return load_architecture(directory)


def test_llama_with_only_what_old_checkpoints_say(tmp_path: Path) -> None:
    architecture = _load(tmp_path, LLAMA)
    assert (architecture.num_kv_heads, architecture.head_dim) == (8, 8)
    assert architecture.rope == Rope("default", 10_000.0)
    assert architecture.windows == (None,) * 4
    assert architecture.eos_token_ids == ()
    assert not architecture.tied_embeddings


def test_biases(tmp_path: Path) -> None:
    def biases(config: dict[str, Any]) -> tuple[bool, bool, bool]:
        architecture = _load(tmp_path, config)
        return architecture.qkv_bias, architecture.o_bias, architecture.mlp_bias

    assert biases(LLAMA | {"attention_bias": True, "mlp_bias": True}) == (True, True, True)
    assert biases(QWEN2) == (True, False, False)
    assert biases(QWEN3) == (False, False, False)
    assert biases(QWEN3 | {"attention_bias": True}) == (True, True, False)
    assert biases(MISTRAL) == (False, False, False)


def test_only_qwen3_normalises_queries_and_keys(tmp_path: Path) -> None:
    assert [_load(tmp_path, config).qk_norm for config in (LLAMA, MISTRAL, QWEN2, QWEN3)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 5e5}, Rope("default", 5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope("default", 5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope("default", 1e6)),
        ({"rope_parameters": {"rope_theta": 1e6}}, Rope("default", 1e6)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope("linear", 1e4, 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}, Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}}, Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_rope_of_old_and_new_configurations(tmp_path: Path, keys: dict[str, Any], rope: Rope) -> None:
    assert _load(tmp_path, LLAMA | keys).rope == rope


def test_windows(tmp_path: Path) -> None:
    def windows(config: dict[str, Any]) -> tuple[int | None, ...]:
        return _load(tmp_path, config).windows

    assert windows(MISTRAL) == (32,) * 4
    assert windows(MISTRAL | {"sliding_window": None}) == (None,) * 4
    assert windows(QWEN2) == (None,) * 4
    used = QWEN3 | {"use_sliding_window": True}
    assert windows(used | {"max_window_layers": 3}) == (None, None, None, 32)
    assert windows(used | {"max_window_layers": 28}) == (None,) * 4
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(used | {"layer_types": types, "max_window_layers": 28}) == (32, None, 32, None)


def test_eos_of_generation_config_wins(tmp_path: Path) -> None:
    assert _load(tmp_path, LLAMA | {"eos_token_id": 2}).eos_token_ids == (2,)
    assert _load(tmp_path, LLAMA | {"eos_token_id": [2, 3]}).eos_token_ids == (2, 3)
    assert _load(tmp_path, LLAMA | {"eos_token_id": 2}, {"temperature": 0.7}).eos_token_ids == (2,)
    assert _load(tmp_path, LLAMA | {"eos_token_id": 2}, {"eos_token_id": [5, 0]}).eos_token_ids == (5, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures: GemmaForCausalLM is not supported"),
        ({"architectures": []}, "architectures: none"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": "64"}, r"hidden_size"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_size": 63}, "head_dim"),
        ({"head_dim": 7}, "head_dim"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters: rope_type 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters: rope_type 'missing'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 4.0}}, "rope_scaling: high_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, r"rope_scaling\.factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        _load(tmp_path, LLAMA | keys)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, "sliding_window is missing"),
        ({key: value for key, value in QWEN3.items() if key != "head_dim"}, "head_dim is missing"),
        ({key: value for key, value in LLAMA.items() if key != "vocab_size"}, "vocab_size"),
        (QWEN2 | {"use_sliding_window": True}, "layer_types is missing"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ],
)
def test_incomplete_or_foreign_keys(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, config)


def test_missing_or_malformed_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: No such file.*model\.path"):
        load_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_architecture(tmp_path)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        _load(tmp_path, LLAMA, {"eos_token_id": "</s>"})
