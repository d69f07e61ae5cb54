from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.errors import ConfigError
from python_backends.engines.trtllm.model_dir import ModelDir, read_model_dir, weights_digest

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 4096,
    "eos_token_id": 7,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model-00001-of-00002.safetensors").write_bytes(b"one" * 1000)
    (path / "model-00002-of-00002.safetensors").write_bytes(b"two" * 1000)
    (path / "tokenizer.json").write_text("{}")
    return path


def read(
    directory: Path, dtype: str = "bfloat16", block_size: int = 32, version: str = "1.2.1", kv_dtype: str = "auto"
) -> ModelDir:
    return read_model_dir(
        directory, dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, max_context=4096, library_version=version
    )


def test_the_shape_of_its_kv(directory: Path) -> None:
    layout = read(directory).layout
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (4, 2, 64)
    assert (layout.block_size, layout.dtype, layout.tp) == (32, "bfloat16", 1)
    assert read(directory, kv_dtype="fp8").layout.dtype == "fp8"
    (directory / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 128, "num_key_value_heads": None}))
    layout = read(directory).layout
    assert (layout.num_kv_heads, layout.head_dim) == (8, 128)


def test_a_quantised_checkpoint_says_of_what_type_its_kv_is(directory: Path) -> None:
    whole = read(directory).layout.block_bytes
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}')
    assert read(directory).layout.dtype == "fp8"
    assert read(directory).layout.block_bytes == whole / 2
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": null}}')
    assert read(directory).layout.dtype == "bfloat16"


def test_the_fingerprint_is_a_stable_name_of_the_files(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(directory, other)
    (other / "tokenizer.json").write_text("[]")
    assert read(directory).fingerprint == read(other).fingerprint, "neither place nor tokenizer make other KV"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (d / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 5.0})),
        lambda d: (d / "hf_quant_config.json").write_text('{"quantization": {"kv_cache_quant_algo": "FP8"}}'),
        lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(b"onf" * 1000),
        lambda d: (d / "model-00001-of-00002.safetensors").rename(d / "model-00003-of-00002.safetensors"),
        lambda d: (d / "model-00002-of-00002.safetensors").unlink(),
        lambda d: (d / "extra.bin").write_bytes(b"x"),
    ],
)
def test_other_files_have_another_fingerprint(directory: Path, change: Any) -> None:
    before = read(directory).fingerprint
    change(directory)
    assert read(directory).fingerprint != before


def test_dtypes_block_size_and_release_are_part_of_it(directory: Path) -> None:
    prints = {read(directory, *args).fingerprint for args in [("bfloat16", 32), ("float16", 32), ("bfloat16", 64)]}
    prints |= {read(directory, version="1.3.0").fingerprint, read(directory, kv_dtype="fp8").fingerprint}
    assert len(prints) == 5


def test_bytes_can_not_move_between_files_unseen(directory: Path) -> None:
    before = weights_digest(directory)
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"one" * 999)
    (directory / "model-00002-of-00002.safetensors").write_bytes(b"one" + b"two" * 1000)
    assert weights_digest(directory) != before


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(7, None, (7,)), ([7, 8], None, (7, 8)), (7, [8, 9], (8, 9)), (None, None, ()), (None, 5, (5,))],
)
def test_end_tokens(directory: Path, config: Any, generation: Any, expected: tuple[int, ...]) -> None:
    (directory / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": config}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read(directory).eos_token_ids == expected


def test_what_is_wrong_is_named(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_context is 8192, but .*config\.json has max_position_embeddings 4096; lower"):
        read_model_dir(directory, dtype="bfloat16", kv_dtype="auto", block_size=32, max_context=8192, library_version="1.2.1")
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    with pytest.raises(ConfigError, match=r"config\.json: .*num_attention_heads"):
        read(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: No such file.*Hugging Face"):
        read(directory)


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no weight files"):
        read(directory)
