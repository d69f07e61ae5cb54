from __future__ import annotations

import fcntl
import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from python_backends.core.errors import ConfigError
from python_backends.engines.torch import weights as weights_module
from python_backends.engines.torch.architecture import Architecture, Rope
from python_backends.engines.torch.weights import Weights, expected_tensors, load_weights

CPU = torch.device("cpu")
ARCHITECTURE = Architecture(
    name="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    ffn_size=12,
    vocab_size=10,
    max_positions=64,
    rms_eps=1e-5,
    rope=Rope("default", 10_000.0),
    tied_embeddings=True,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=True,
    windows=(None, None),
    eos_token_ids=(),
)


def _tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in expected_tensors(ARCHITECTURE).items()}


def _load(directory: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(directory, ARCHITECTURE, dtype, CPU, directory / "cache")


def _assert_equal(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)


def test_stored_dtype_is_mapped_as_it_is(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    weights = _load(tmp_path)
    _assert_equal(weights.tensors, _tensors())
    assert not (tmp_path / "cache").exists()
    assert len({tensor.untyped_storage().data_ptr() >> 20 for tensor in weights.tensors.values()}) <= 2  # one mapping


def test_other_dtype_is_converted_once(tmp_path: Path) -> None:
    stored = _tensors(torch.bfloat16)
    stored["model.norm.weight"] = stored["model.norm.weight"].float()  # mixed files are converted too
    save_file(stored, tmp_path / "model.safetensors")
    expected = {name: tensor.float() for name, tensor in stored.items()}
    first = _load(tmp_path)
    _assert_equal(first.tensors, expected)
    (converted,) = (tmp_path / "cache" / "prepared").glob("*.safetensors")
    written = converted.stat().st_mtime_ns
    second = _load(tmp_path)
    _assert_equal(second.tensors, expected)
    assert converted.stat().st_mtime_ns == written
    assert first.digest == second.digest
    assert not list(converted.parent.glob("*.partial"))


def test_digest_is_of_the_original_bytes(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    digest = _load(tmp_path).digest
    assert _load(tmp_path, torch.bfloat16).digest == digest
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert _load(tmp_path).digest != digest


def test_shards(tmp_path: Path) -> None:
    tensors = _tensors()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _assert_equal(_load(tmp_path).tensors, tensors)
    assert len(_load(tmp_path, torch.float16).tensors) == len(tensors)
    assert len(list((tmp_path / "cache" / "prepared").glob("*-float16.safetensors"))) == 2
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"b\.safetensors"):
        _load(tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = _tensors()
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        _load(tmp_path)


def test_foreign_tensor_is_named(tmp_path: Path) -> None:
    save_file(_tensors() | {"model.layers.0.router.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.router\.weight"):
        _load(tmp_path)


def test_redundant_tensors_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    redundant = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
        "lm_head.weight": torch.zeros(10, 8),
    }
    save_file(_tensors() | redundant, tmp_path / "model.safetensors")
    assert _load(tmp_path).tensors.keys() == _tensors().keys()


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    save_file(_tensors() | {"model.norm.weight": torch.zeros(9)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \(9,\); config\.json asks for \(8,\)"):
        _load(tmp_path)


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    save_file(_tensors() | {"model.norm.weight": torch.zeros(8, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is I8"):
        _load(tmp_path)


def test_no_damaged_or_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        _load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ConfigError, match="weight_map"):
        _load(tmp_path)
    save_file(_tensors(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*fetch the model again"):
        _load(tmp_path)


def test_half_written_conversion_is_made_again(tmp_path: Path) -> None:
    save_file(_tensors(torch.bfloat16), tmp_path / "model.safetensors")
    _load(tmp_path)
    (converted,) = (tmp_path / "cache" / "prepared").glob("*.safetensors")
    converted.rename(converted.with_suffix(".partial"))  # what a worker leaves that is killed meanwhile
    assert _load(tmp_path).tensors.keys() == _tensors().keys()


def test_waiting_for_another_worker_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(_tensors(torch.bfloat16), tmp_path / "model.safetensors")
    _load(tmp_path)
    (converted,) = (tmp_path / "cache" / "prepared").glob("*.safetensors")
    monkeypatch.setattr(weights_module, "_LOCK_TIMEOUT_S", 0.2)
    with converted.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="held by another worker"):
            _load(tmp_path)


def test_unwritable_cache_says_what_to_do(tmp_path: Path) -> None:
    save_file(_tensors(torch.bfloat16), tmp_path / "model.safetensors")
    (tmp_path / "cache").write_text("not a directory")
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        _load(tmp_path)


BIG = 48 << 20  # bytes of the embedding


def _anonymous_bytes_of_a_reader(directory: Path, big: Architecture) -> int:
    """Of this process, added by mapping and reading all weights."""
    before = _rss_anon()
    weights = load_weights(directory, big, torch.float32, CPU, directory / "cache")
    total = sum(float(tensor.sum()) for tensor in weights.tensors.values())
    assert total == total
    return _rss_anon() - before


def _rss_anon() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_workers_share_the_weights(tmp_path: Path) -> None:
    """Mapped weights are no memory of the process's own: neither as stored nor converted by another process."""
    big = msgspec.structs.replace(ARCHITECTURE, vocab_size=BIG // 32)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in expected_tensors(big).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        pool.apply_async(_anonymous_bytes_of_a_reader, (tmp_path, big)).get(timeout=60)  # converts
        own = pool.apply_async(_anonymous_bytes_of_a_reader, (tmp_path, big)).get(timeout=60)
    assert own < BIG // 2
