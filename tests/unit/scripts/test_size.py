"""The calculator against figures computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from python_backends.core.errors import ConfigError
from scripts.size import main, parse_links
from scripts.sizing import SHAPES, KVShape, Work, handoff, link_rate, shape_of, store

MIB = 1 << 20


@pytest.mark.parametrize(
    ("model", "dtype", "kib"),
    [
        ("llama-3.1-8b", "bfloat16", 128),  # 32 layers x 2 x 8 heads x 128 x 2 bytes
        ("llama-3.1-70b", "bfloat16", 320),
        ("llama-3.1-70b", "fp8", 160),
        ("smollm2-135m", "float32", 45),
        ("llama-3.1-8b", "int8", 66),  # and a float32 scale per token and head: 32 x 2 x 8 x 4 bytes
        ("DeepSeek-V3", "bfloat16", 68.625),  # 61 layers x 576 x 2 bytes
    ],
)
def test_bytes_per_token(model: str, dtype: str, kib: float) -> None:
    assert shape_of(model).token_bytes(dtype) == kib * 1024


def _write(path: Path, **fields: object) -> str:
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


def test_shapes_of_config_files(tmp_path: Path) -> None:
    heads = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512}
    assert shape_of(_write(tmp_path, **heads)) == KVShape(tmp_path.name, 4, 8, 64)
    assert shape_of(str(tmp_path / "config.json")) == KVShape(tmp_path.name, 4, 8, 64)
    grouped = heads | {"num_key_value_heads": 2, "head_dim": 96, "torch_dtype": "float16"}
    assert shape_of(_write(tmp_path, **grouped)) == KVShape(tmp_path.name, 4, 2, 96, dtype="float16")
    assert shape_of(_write(tmp_path, text_config=grouped)) == KVShape(tmp_path.name, 4, 2, 96, dtype="float16")
    latent = shape_of(_write(tmp_path, num_hidden_layers=61, kv_lora_rank=512, qk_rope_head_dim=64))
    assert latent.token_bytes("bfloat16") == shape_of("deepseek-v3").token_bytes("bfloat16")


def test_what_is_no_model_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gpt-9' is no model directory, no config\.json and no known shape"):
        shape_of("gpt-9")
    with pytest.raises(ConfigError, match="num_attention_heads is 0; a positive number is needed"):
        shape_of(_write(tmp_path, num_hidden_layers=4, num_attention_heads=0))
    with pytest.raises(ConfigError, match="num_hidden_layers is None"):
        shape_of(_write(tmp_path, hidden_size=4))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="its top level is no object"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not a JSON file"):
        shape_of(str(tmp_path))
    with pytest.raises(ConfigError, match="--kv-dtype: 'fp3' is not one of"):
        SHAPES[0].token_bytes("fp3")


def test_a_handoff_over_a_link_that_keeps_up() -> None:
    """2,000 tokens of 128 KiB are 250 MiB; at 10,000 tokens/s computed in 0.2 s, in 8 chunks of 25 ms."""
    work = Work(2000, 250, 10_000.0, 128 << 10)
    assert work.prompt_bytes == 250 * MIB
    found = handoff(work, "fast", 2500 * MIB)
    assert found.whole_s == pytest.approx(0.1)
    assert found.whole_share == pytest.approx(0.5)
    assert found.overlapped_s == pytest.approx(0.0125)  # the last of 8 chunks
    assert found.overlapped_share == pytest.approx(0.0625)
    assert found.prompts_s == pytest.approx(10)


def test_a_handoff_over_a_link_that_does_not() -> None:
    """Sent in 1 s from 25 ms on: 1.025 s in all, of which prefill takes 0.2 s."""
    found = handoff(Work(2000, 250, 10_000.0, 128 << 10), "slow", 250 * MIB)
    assert found.whole_s == pytest.approx(1)
    assert found.overlapped_s == pytest.approx(0.825)


def test_one_chunk_can_overlap_with_nothing() -> None:
    found = handoff(Work(100, 256, 1000.0, 1000), "any", 1e6)
    assert found.overlapped_s == found.whole_s == pytest.approx(0.1)


def test_what_pays_for_a_store() -> None:
    """Computed in 0.2 s, read in 0.1 s, written in 0.5 s: five hits."""
    work = Work(2000, 250, 10_000.0, 128 << 10)
    kept = store(work, 2500 * MIB, 500 * MIB)
    assert kept.saved_s == pytest.approx(0.1)
    assert kept.hits == pytest.approx(5)
    assert kept.tokens_per_gib == 8192
    assert work.break_even == 1250 * MIB
    assert math.isinf(store(work, 1250 * MIB, 500 * MIB).hits)


def test_links() -> None:
    assert link_rate(40, 0.8) == 4e9
    assert parse_links(["a=b=25", "mine=0.04"]) == {"a=b": 25.0, "mine": 0.04}
    for wrong in ("mine", "=3", "mine=fast", "mine=0", "mine=-1", "mine=inf"):
        with pytest.raises(ConfigError, match="is not NAME=GBIT/S"):
            parse_links([wrong])


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama-3.1-70b", "--link", "mine=100", "--prefill-rate", "5000"]) == 0
    out = capsys.readouterr().out
    assert "llama-3.1-70b: 320.0 KiB of KV per token (bfloat16); 2,000 tokens are 625.0 MiB, computed in 400.0 ms" in out
    assert "above 13.11 Gbit/s" in out  # 320 KiB x 5,000/s
    (row,) = [line.split() for line in out.splitlines() if line.startswith("mine")]
    assert row == ["mine", "80.0", "65.5", "ms", "16.4%", "8.2", "ms", "2.0%", "15.3"]
    assert "this store never pays" in out  # 625 MiB at 1 GiB/s take 610 ms


def test_json_is_of_numbers_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama-3.1-8b", "--json", "--store-read", "2.5", "--store-write", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["work"]["prompt_bytes"] == 250 * MIB
    assert told["store"]["hits"] == pytest.approx((250 / 512) / (0.2 - 250 / 2560))
    assert len(told["handoffs"]) == 8
    assert main(["llama-3.1-8b", "--json", "--store-read", "0.1"]) == 0
    assert json.loads(capsys.readouterr().out)["store"]["hits"] is None


@pytest.mark.parametrize("arguments", [["nothing"], ["llama-3.1-8b", "--link", "x"], ["llama-3.1-8b", "--kv-dtype", "x"]])
def test_wrong_input_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


def test_numbers_have_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["llama-3.1-8b", "--prompt", "0"])
    assert "0 is not above 0" in capsys.readouterr().err
