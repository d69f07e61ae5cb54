"""Options: one flag each, and sentences for what can't be."""

from __future__ import annotations

import argparse

import pytest

from loadtest.options import Options, add_options, flags, read_options
from python_backends.core.errors import ConfigError


def _read(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return read_options(parser.parse_args(arguments))


def test_defaults_and_values() -> None:
    assert _read() == Options()
    read = _read("--scenario=azure-code", "--rate=2.5", "--streams", "4", "--shape", "ramp", "--length-scale", "0.1")
    assert (read.scenario, read.rate, read.streams, read.shape, read.length_scale) == ("azure-code", 2.5, 4, "ramp", 0.1)


def test_flags_give_the_same_options_again() -> None:
    options = Options(scenario="azure-code", rate=1.5, seed=3, fields='{"route": "local"}', out="/tmp/x")
    assert _read(*flags(options)) == options
    assert flags(Options()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--duration=0"], "--duration: Expected `float` > 0"),
        (["--rate=-1"], "--rate: Expected `float` >= 0"),
        (["--streams=-1"], "--streams"),
        (["--token-ids=5"], "--token-ids"),
        (["--warmup=60"], "--warmup: 60 s is all of --duration 60"),
        (["--slo=fast"], "--slo: 'fast' is not like"),
        (["--second-slo=ttft=1"], "--second-slo: 'ttft=1' is not like ttft=2000,itl=100"),
    ],
)
def test_bounds_name_the_flag(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _read(*arguments)


def test_structured_values_name_the_flag() -> None:
    for options, said in (
        (Options(slo="fast"), "--slo: 'fast' is not like"),
        (Options(slo="ttft=1"), "--slo"),
        (Options(fields="{"), "--fields: not JSON"),
        (Options(fields="[1]"), "not a JSON object"),
        (Options(token_ids="9-9"), "--token-ids: 9-9 is empty"),
    ):
        with pytest.raises(ConfigError, match=said):
            _ = (options.wanted_slo, options.extra_fields, options.token_range)


def test_every_flag_has_its_help() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    told = parser.format_help()
    assert "None" not in told
    assert "mixed: seconds from one long prompt to the next" in " ".join(told.split())
