"""Servers of rivals beside ours: with which settings, and how they are kept from disturbing while others are measured.

A rival may take more than a minute to start, and some are busy while they have nothing to do. So each is started once, and
its processes are stopped by the kernel (SIGSTOP) except while it is measured.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from loadtest.options import Options
from loadtest.protocols.openai import OpenAIConnection
from python_backends.core.errors import BatonError, ConfigError, Unavailable
from python_backends.core.paths import repository_root
from scripts.rivalry.environments import ENVIRONMENTS
from scripts.rivalry.models import gguf_of, most_tokens
from scripts.tritonserver import free_port

_START_TIMEOUT_S = 600.0
_WAKE_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.2
_KV_GIB = 3
_WARM_UP_TOKENS = 600
_LAST_WORDS = 1500  # characters of a log


@dataclass(frozen=True, slots=True)
class Served:
    """What a rival is to serve. `cores`: numbers of those it may use."""

    model: Path
    port: int
    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rival:
    """A server with its settings. `command`, `variables`: what starts it. `fields`: what its requests need."""

    name: str
    about: str
    environment: str
    command: Callable[[Served], list[str]]
    variables: Callable[[Served], dict[str, str]]
    fields: dict[str, Any] = field(default_factory=dict)

    def options(self, options: Options) -> Options:
        """The same load, asked in its way: /completions, since only they take token ids."""
        fields = json.dumps({**options.extra_fields, **self.fields})
        return msgspec.structs.replace(options, api="completions", model="", fields=fields)


def _vllm_instance(served: Served) -> list[str]:
    command = [str(ENVIRONMENTS["vllm"].program("vllm")), "serve", str(served.model), "--dtype", "float32"]
    return [*command, "--max-model-len", str(most_tokens(served.model))]


def _vllm(chunk: int | None, served: Served) -> list[str]:
    command = [*_vllm_instance(served), "--host", "127.0.0.1", "--port", str(served.port)]
    return [*command, *(["--max-num-batched-tokens", str(chunk), "--max-num-seqs", "64"] if chunk else [])]


def vllm_variables(cores: Sequence[int]) -> dict[str, str]:
    """One instance, with a thread on each of these cores."""
    return {**_vllm_instance_variables(_KV_GIB), "VLLM_CPU_OMP_THREADS_BIND": _joined(cores)}


def _vllm_instance_variables(kv_gib: int) -> dict[str, str]:
    return {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "86400",  # a step that was stopped with the others' turns is not lost
    }


_PAIR_KV_GIB = 2  # of each instance
_PAIR_PORTS = 5
_NIXL = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"}


def _vllm_pair(served: Served) -> list[str]:
    """Each instance has half of the cores.

    All ports are chosen here: free_port knows which ones the kernel doesn't give away before they are used, a minute later.
    """
    if len(served.cores) < 2:
        raise ConfigError("vllm-disaggregated: its two instances need a core each, and only one may be used here")
    program = [str(ENVIRONMENTS["vllm"].program("python")), "-m", "scripts.rivalry.vllm_pair"]
    ports = [served.port]
    while len(ports) < _PAIR_PORTS:
        ports.append(free_port("127.0.0.1", set(ports)))
    program += ["--ports", _joined(ports), "--cores", _joined(served.cores), "--transfer", json.dumps(_NIXL)]
    return [*program, "--", *_vllm_instance(served)]


def _vllm_pair_variables(served: Served) -> dict[str, str]:
    return {**_vllm_instance_variables(_PAIR_KV_GIB), "PYTHONPATH": str(repository_root()), "PYTHONSAFEPATH": "1"}


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


_EVERY_TOKEN = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_VLLM_CHUNK = 256


def _vllm_with(name: str, about: str, chunk: int | None) -> Rival:
    return Rival(name, about, "vllm", partial(_vllm, chunk), lambda served: vllm_variables(served.cores), _EVERY_TOKEN)


_SLOTS = 12  # requests that llama.cpp computes at once; others wait
_SLOT_TOKENS = 4608  # its longest request; each slot's KV is taken at start


def _llamacpp(served: Served) -> list[str]:
    """KV in float32, as the others have it, and of each slot its own: shared by all it is several times slower."""
    context = min(most_tokens(served.model), _SLOT_TOKENS)
    threads = str(len(served.cores))
    command = [str(ENVIRONMENTS["llama.cpp"].program("llama-server")), "--model", str(gguf_of(served.model))]
    command += ["--host", "127.0.0.1", "--port", str(served.port), "--threads", threads, "--threads-batch", threads]
    command += ["--parallel", str(_SLOTS), "--ctx-size", str(_SLOTS * context), "--no-kv-unified"]
    return [*command, "--cache-type-k", "f32", "--cache-type-v", "f32"]


RIVALS = {
    rival.name: rival
    for rival in (
        _vllm_with("vllm", f"vLLM with small chunks ({_VLLM_CHUNK} tokens): smoothest streams", _VLLM_CHUNK),
        _vllm_with("vllm-default", "vLLM with its own chunk size", None),
        Rival(
            "vllm-disaggregated",
            "vLLM's own disaggregated prefill: two instances on half of the cores each, NIXL",
            "vllm",
            _vllm_pair,
            _vllm_pair_variables,
            _EVERY_TOKEN,
        ),
        Rival("llama.cpp", "llama.cpp's server, a slot per request", "llama.cpp", _llamacpp, lambda served: {}),
    )
}
"""By name."""


def find_rival(name: str) -> Rival | None:
    """`vllm:N` is vLLM with chunks of N tokens. None when there is no such rival."""
    base, colon, chunk = name.partition(":")
    if colon and base == "vllm" and chunk.isdecimal() and int(chunk):
        return _vllm_with(name, f"vLLM with chunks of {chunk} tokens", int(chunk))
    return RIVALS.get(name)


class RivalServer:
    """One running rival. Stands still from `start` on, except within `awake`. Started and stopped once."""

    def __init__(self, rival: Rival, model: Path, log: Path) -> None:
        """`log`: the file of its output. Raises ConfigError when the rival is not installed."""
        self.rival = rival
        served = Served(model, free_port("127.0.0.1"), tuple(sorted(os.sched_getaffinity(0))))
        self.command = rival.command(served)
        self.variables = rival.variables(served)
        self.address = f"http://127.0.0.1:{served.port}/v1"
        self._port = served.port
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def description(self) -> str:
        """How it was started, as one would type it."""
        return shlex.join([*(f"{name}={value}" for name, value in self.variables.items()), *self.command])

    def start(self) -> None:
        """Return when it has answered a request. Raises Unavailable with its last words when it does not."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # all its processes get our signals, and none of the terminal's
            )
        try:
            self._await_health(_START_TIMEOUT_S)
            self._warm_up()
        except BaseException:
            self.stop()
            raise
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[str]:
        """Its address, while it runs. Raises Unavailable when it no longer answers."""
        self._signal(signal.SIGCONT)
        try:
            self._await_health(_WAKE_TIMEOUT_S)
            yield self.address
        finally:
            self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        """End all its processes. Idempotent."""
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while self._signal(signal.SIGKILL) and time.monotonic() < deadline:
            self._process.poll()  # so that the kernel forgets it
            time.sleep(_POLL_S)  # its memory is given back when the last of them is gone
        self._process.wait()
        self._process = None

    def _signal(self, number: int) -> bool:
        """To all its processes. Whether there was one."""
        if self._process is None:
            return False
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _await_health(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._is_healthy():
            if self._process is None or self._process.poll() is not None:
                raise Unavailable(f"{self.rival.name} has ended: {self._last_words()}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.rival.name} does not answer after {timeout_s:.0f} s: {self._last_words()}")
            time.sleep(_POLL_S)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _warm_up(self) -> None:
        """What is compiled or allocated by the first request is not the first measured one's matter."""
        connection = OpenAIConnection(self.address, self.rival.options(Options()))
        try:
            connection.wait_ready(_WAKE_TIMEOUT_S)
            for _ in connection.prepare(list(range(1000, 1000 + _WARM_UP_TOKENS)), 16).parts():
                pass
        except BatonError as error:
            raise Unavailable(f"{self.rival.name} can't serve this model: {error}. {self._last_words()}") from error
        finally:
            connection.close()

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace").strip()
        return f"the end of {self._log} is:\n{text[-_LAST_WORDS:]}"
