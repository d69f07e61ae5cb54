"""Puts the fake tensorrt_llm of `tests/fakes` where `import tensorrt_llm` finds it, as one release of it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from python_backends.core.trtllm import CacheTransceiverConfig, KvCacheConfig, LlmConfig, TrtllmConfig

FAKES = Path(__file__).parents[2] / "fakes"
RELEASES = {"1.1": "1.1.0", "1.2": "1.2.1", "1.3": "1.3.0"}
_ENV = "FAKE_TENSORRT_LLM"


@dataclass(frozen=True)
class Knobs:
    """The file that tells LLMs made under it what to play; `state` is what the one that spoke last says of itself."""

    file: Path
    version: str

    def set(self, **knobs: object) -> None:
        """See tests/fakes/tensorrt_llm/_knobs.py. A running LLM notices; what isn't given is as by default."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps({"version": self.version, **knobs}))
        fresh.replace(self.file)

    @property
    def state(self) -> dict[str, int]:
        files = [path for path in self.file.parent.glob(f"{self.file.name}.state-*") if path.suffix != ".new"]
        state: dict[str, int] = json.loads(max(files, key=lambda path: path.stat().st_mtime_ns).read_text())
        return state

    def wait_state(self, within_s: float = 3.0, **wanted: int) -> None:
        """Until the LLM's own counters are as wanted."""
        end = time.monotonic() + within_s
        while any(self.state[name] != value for name, value in wanted.items()):
            assert time.monotonic() < end, f"{self.state}, but wanted {wanted}"
            time.sleep(0.01)

    @contextmanager
    def apply(self) -> Iterator[None]:
        """LLMs made inside are ruled by this file."""
        before = os.environ.get(_ENV)
        os.environ[_ENV] = str(self.file)
        try:
            yield
        finally:
            if before is not None:
                os.environ[_ENV] = before


@contextmanager
def playing(version: str, directory: Path, **knobs: object) -> Iterator[Knobs]:
    """`import tensorrt_llm` gives that release inside, and nothing afterwards; the environment is as it was."""
    environment = dict(os.environ)
    given = Knobs(directory / "knobs.json", version)
    given.set(**knobs)
    os.environ[_ENV] = str(given.file)
    sys.path.insert(0, str(FAKES))
    _forget()
    try:
        yield given
    finally:
        _forget()
        sys.path.remove(str(FAKES))
        os.environ.clear()
        os.environ.update(environment)


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def trtllm_config(max_tokens: int, **changes: Any) -> TrtllmConfig:
    """A TrtllmConfig whose workers share GPU 0."""
    llm = LlmConfig(kv_cache_config=KvCacheConfig(max_tokens=max_tokens), max_num_tokens=changes.pop("max_num_tokens", 0))
    transceiver = CacheTransceiverConfig(backend="UCX")
    usual = TrtllmConfig(prefill=llm, decode=llm, aggregated=llm, cache_transceiver_config=transceiver)
    return msgspec.structs.replace(usual, **changes)
