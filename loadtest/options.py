"""What can be asked of a load test, in one place: Locust's page and command line and scripts/loadtest all take it from here."""

from __future__ import annotations

import argparse
import json
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from loadtest.workload import Slo
from python_backends.core.errors import ConfigError

NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]

SCENARIOS = {
    "mixed": "steady streams (128 tokens in, 256 out) and a long prompt (2,000-4,000 in, 16 out) every --period seconds",
    "conversation": "Mooncake's: long prompts of several turns with shared prefixes",
    "azure-conversation": "Azure's: about 1,000 tokens in, 130 out, nothing shared",
    "azure-code": "Azure's: about 1,500 tokens in, 13 out, in clusters, nothing shared",
    "fixed": "--input-tokens in and --output-tokens out",
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One load test. The comment of a field is its help text; 0 or an empty text leaves it to the scenario."""

    scenario: Annotated[
        str, Meta(description=f"{', '.join(SCENARIOS)}, or a trace file (Mooncake JSONL or Azure CSV) to replay")
    ] = "mixed"
    shape: Annotated[
        Literal["constant", "ramp", "burst"],
        Meta(description="load over time: constant; ramp, six steps up; burst, a quarter and for 5 of every 15 s all of it"),
    ] = "constant"
    rate: Annotated[
        NotNegative, Meta(description="requests per second that arrive; of a trace, conversations are left out")
    ] = 0.0
    streams: Annotated[
        Count,
        Meta(description="clients that send the next request when the last one has ended; replaces arrivals, except in mixed"),
    ] = 0
    period: Annotated[Positive, Meta(description="mixed: seconds from one long prompt to the next")] = 6.0
    duration: Annotated[Positive, Meta(description="seconds of load")] = 60.0
    warmup: Annotated[NotNegative, Meta(description="seconds at the beginning that do not count")] = 5.0
    length_scale: Annotated[Positive, Meta(description="prompts and answers are so many times as long")] = 1.0
    time_scale: Annotated[Positive, Meta(description="a trace, or people in conversations, so many times as fast")] = 1.0
    max_input: Annotated[Count, Meta(description="longer prompts are cut to so many tokens; 0: none is cut")] = 0
    input_tokens: Annotated[int, Meta(ge=1, description="fixed: tokens per prompt")] = 512
    output_tokens: Annotated[int, Meta(ge=1, description="fixed: tokens per answer")] = 128
    slo: Annotated[
        str,
        Meta(
            description="what a good request meets, such as ttft=2000,itl=100: ms to the first token, p99 of ms between tokens"
        ),
    ] = ""
    second_slo: Annotated[
        str, Meta(description="goodput is counted under this one, too; as --slo, for all kinds of requests")
    ] = ""
    seed: Annotated[Count, Meta(description="of lengths and arrivals: same seed, same load")] = 0
    nonce: Annotated[
        Count, Meta(description="of the prompts' tokens; 0 draws one, so that no earlier run is in a prefix cache")
    ] = 0
    prompt: Annotated[
        Literal["auto", "ids", "text"],
        Meta(description="prompts as token ids or as text of words of one token each; auto: ids where the protocol has them"),
    ] = "auto"
    token_ids: Annotated[
        str, Meta(pattern=r"^\d+-\d+$", description="range of the prompts' token ids; plain words in any usual vocabulary")
    ] = "1000-30000"
    api: Annotated[Literal["chat", "completions"], Meta(description="of an OpenAI server: which endpoint")] = "chat"
    model: Annotated[str, Meta(description="of an OpenAI server: which model; empty: its first one")] = ""
    fields: Annotated[
        str, Meta(description='JSON object of further request fields, such as {"route": "aggregated"}; null drops one')
    ] = "{}"
    timeout: Annotated[Positive, Meta(description="seconds a request may take")] = 120.0
    drain: Annotated[Positive, Meta(description="seconds that requests in flight at the end are waited for")] = 30.0
    max_in_flight: Annotated[int, Meta(ge=1, description="requests at once; what arrives beyond is a failure")] = 512
    out: Annotated[str, Meta(description="directory of the results")] = "build/loadtest/latest"

    @property
    def wanted_slo(self) -> Slo | None:
        """None when the scenario's own are to be used."""
        return _slo("--slo", self.slo)

    @property
    def wanted_second_slo(self) -> Slo | None:
        """None when there is one SLO only."""
        return _slo("--second-slo", self.second_slo)

    @property
    def extra_fields(self) -> dict[str, Any]:
        try:
            fields = json.loads(self.fields)
        except ValueError as error:
            raise ConfigError(f"--fields: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"--fields: {self.fields!r} is not a JSON object")
        return fields

    @property
    def token_range(self) -> tuple[int, int]:
        low, high = map(int, self.token_ids.split("-"))
        if low >= high:
            raise ConfigError(f"--token-ids: {self.token_ids} is empty; give LOW-HIGH")
        return low, high


def _slo(flag: str, text: str) -> Slo | None:
    if not text:
        return None
    parts = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    try:
        return Slo(ttft_ms=float(parts.pop("ttft")), itl_ms=float(parts.pop("itl")))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{flag}: {text!r} is not like ttft=2000,itl=100 (milliseconds)") from error


def add_options(parser: argparse._ActionsContainer, **defaults: object) -> None:
    """One flag per field of Options. `defaults` replace theirs."""
    hints = get_type_hints(Options, include_extras=True)
    for field in msgspec.structs.fields(Options):
        bare, *notes = get_args(hints[field.name])  # nested ones come flat, the field's own last
        choices = get_args(bare) or None
        parser.add_argument(
            _flag(field.name),
            type=str if choices else bare,
            choices=choices,
            default=defaults.get(field.name, field.default),
            metavar=None if choices else "SECONDS" if field.name in _SECONDS else field.name.upper(),
            help=str(notes[-1].description).replace("%", "%%"),
        )


_SECONDS = {"period", "duration", "warmup", "timeout", "drain"}


def read_options(parsed: argparse.Namespace) -> Options:
    """Raises ConfigError that names the flag and what it must be."""
    values = {name: getattr(parsed, name) for name in Options.__struct_fields__}
    try:
        options = msgspec.convert(values, Options)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].rstrip("`")
        raise ConfigError(f"{_flag(name)}: {str(error).partition(' - at')[0]}") from error
    if options.warmup >= options.duration:
        raise ConfigError(f"--warmup: {options.warmup:g} s is all of --duration {options.duration:g}; nothing would count")
    _ = options.wanted_slo, options.wanted_second_slo  # what is wrong with them is told before the run, not after it
    return options


def flags(options: Options) -> list[str]:
    """The command line of what differs from the defaults."""
    default = Options()
    changed = {name for name in Options.__struct_fields__ if getattr(options, name) != getattr(default, name)}
    return [f"{_flag(name)}={getattr(options, name)}" for name in Options.__struct_fields__ if name in changed]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
