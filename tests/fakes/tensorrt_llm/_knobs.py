"""What the fake plays: a release, its speed, and what goes wrong.

FAKE_TENSORRT_LLM names a JSON file with fields of `Knobs`. The release is read when the package is imported; each LLM
remembers the file it was made under and looks into it again whenever it changes, so a test can break a running engine
in another process. Beside it each LLM writes `<file>.state-<pid>-<n>`: counters of its KV cache, which no client sees.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ENV = "FAKE_TENSORRT_LLM"


@dataclass
class Knobs:
    version: str = "1.2.1"
    step_ms: float = 0.5  # one iteration
    prefill_us_per_token: float = 5.0
    transfer_ms: float = 0.0  # one handoff
    load_s: float = 0.0
    load_error: str = ""  # LLM(...) raises this
    wedged: bool = False  # iterations stop, requests wait: a transceiver that blocks
    silent_sender: bool = False  # a prefill engine never answers a pull (block gone from the reuse tree)
    spoiled_kv: bool = False  # a prefill engine sends other KV
    no_events: bool = False  # no KV cache events although configured
    updates: bool = False  # each iteration tells that a block moved between levels, so that events never pause
    lose_event: int = 0  # every n-th event is lost: event ids have gaps
    eos_every: int = 0  # about every n-th token is the end token
    fail_on_token: int = -1  # a prompt with this token fails: RequestError
    crash_on_token: int = -1  # a prompt with this token takes the engine down
    dead: bool = False  # the executor has failed with nothing running: generate_async raises for every request
    gives_up_ms: float = 0.0  # a generation whose KV has not come after this time ends as "timeout"; 0: it waits for ever
    deaf_to_abort: bool = False  # an aborted request never ends by itself


@dataclass
class State:
    """Blocks: used + free == total; leaked ones are used for ever."""

    total_blocks: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    pinned_requests: int = 0
    leaked_blocks: int = 0
    active_requests: int = 0
    context_requests: int = 0  # since start
    generation_requests: int = 0
    plain_requests: int = 0


def path() -> Path | None:
    name = os.environ.get(ENV)
    return Path(name) if name else None


def read(file: Path | None) -> Knobs:
    if file is None or not file.exists():
        return Knobs()
    known = {field.name for field in fields(Knobs)}
    given = json.loads(file.read_text())
    assert given.keys() <= known, f"unknown knobs {given.keys() - known}"
    return Knobs(**given)


def write_state(file: Path, state: State) -> None:
    """Replace the file at once: nobody reads half of it."""
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(json.dumps(asdict(state)))
    fresh.replace(file)


_llms = itertools.count()


def new_state_file(file: Path | None) -> Path | None:
    return file.with_name(f"{file.name}.state-{os.getpid()}-{next(_llms)}") if file else None


VERSION = read(path()).version


def release() -> tuple[int, int]:
    major, minor, *_ = VERSION.split(".")
    return int(major), int(minor)
