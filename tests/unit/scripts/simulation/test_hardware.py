from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from python_backends.core.errors import ConfigError
from python_backends.core.paths import repository_root
from python_backends.core.step_model import StepModel
from scripts.simulation.hardware import Rates, load_catalogue, load_rates

CATALOGUE = repository_root() / "configs" / "simulation" / "gpus.yaml"


def test_every_entry_names_its_source_and_fits_somewhere() -> None:
    catalogue = load_catalogue(CATALOGUE)
    sources = [gpu.source for gpu in catalogue.gpus.values()] + [model.source for model in catalogue.models.values()]
    assert all([*sources, catalogue.efficiency.source])
    for model in catalogue.models:
        assert catalogue.rates("h100-80gb", model, 4).pool_tokens > 100_000


def test_an_8b_model_on_an_h100_is_in_the_known_range() -> None:
    """Published: some 15,000 to 30,000 prompt tokens per second, steps of 7 to 12 ms."""
    rates = load_catalogue(CATALOGUE).rates("h100-80gb", "llama-3.1-8b", 1)
    assert 15_000 < 2048 / rates.step_ms(2048, 2048 * 1024, 0, 0) * 1e3 < 35_000
    assert 7 < rates.step_ms(0, 0, 16, 16_000) < 12
    assert rates.token_bytes == 131_072


def test_two_gpus_are_faster_and_hold_more() -> None:
    catalogue = load_catalogue(CATALOGUE)
    one, two = (catalogue.rates("h100-80gb", "qwen3-32b", count) for count in (1, 2))
    assert two.step_ms(2048, 0, 0, 0) < 0.6 * one.step_ms(2048, 0, 0, 0)
    assert two.pool_tokens > 2 * one.pool_tokens


def test_what_does_not_fit_or_is_unknown_is_refused() -> None:
    catalogue = load_catalogue(CATALOGUE)
    with pytest.raises(ConfigError, match="does not fit into 1 x l40s-48gb"):
        catalogue.rates("l40s-48gb", "llama-3.1-70b", 1)
    with pytest.raises(ConfigError, match="'tpu' is no GPU of the catalogue"):
        catalogue.rates("tpu", "llama-3.1-8b", 1)
    with pytest.raises(ConfigError, match="is no model"):
        catalogue.rates("h100-80gb", "gpt-9", 1)


def test_a_router_learns_these_rates_from_their_calibration() -> None:
    rates = load_catalogue(CATALOGUE).rates("h100-80gb", "llama-3.1-8b", 1)
    model = StepModel(rates.calibration())
    for shape in ((2048, 2048 * 2000, 20, 20_000), (0, 0, 60, 60_000)):
        assert model.step_ms(*shape) == pytest.approx(rates.step_ms(*shape), rel=0.15)


def test_measured_rates_are_read_back(tmp_path: Path) -> None:
    rates = Rates((1.0, 2.0, 3.0, 4.0, 5.0), 100, 1000, 1e6, 0.5, 1.0)
    file = tmp_path / "rates.json"
    file.write_bytes(msgspec.json.encode(rates))
    assert load_rates(file) == rates
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(rates, coefficients=(1.0,))))
    with pytest.raises(ConfigError, match="5 numbers are needed"):
        load_rates(file)
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"rates\.json"):
        load_rates(file)


@pytest.mark.parametrize("text", ["gpus: {}", "[", "gpus: {a: {tflops: -1}}"])
def test_a_bad_catalogue_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"gpus\.yaml"):
        load_catalogue(file)
