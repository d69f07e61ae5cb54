"""The TensorRT-LLM that is installed on this machine, under the conformance suite in place of the fake.

`scripts/verify-gpu` sets the variables below. Each engine lives in a process of its own, as it does under Triton, and is lent
to one test after the other, since loading takes long. A test sees it as new: request ids and salts are its own.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from python_backends.core.config import Deployment, WorkerConfig, load_deployment
from python_backends.core.errors import ConfigError
from python_backends.core.messages import Output, PrefillDone
from python_backends.core.types import Epoch, GenerateRequest, LeaseEnd, RequestId, Role, WorkerLoad
from python_backends.engines.base import CacheChange, EngineInfo, OnOutputs, create_engine
from tests.engines.bench import KEY

DEPLOYMENT = "BATON_CONFORMANCE_DEPLOYMENT"  # a deployment file, whose transceiver, environment and GPUs are used
MODEL = "BATON_CONFORMANCE_MODEL"  # a model directory: small, several engines have it at once. Default: the deployment's

_MOST_AT_ONCE = 4
_ANSWER_S = 60.0
_CLOSE_S = 60.0


def installed_deployment() -> Deployment | None:
    """None: nothing is asked for, the fakes are tested."""
    name = os.environ.get(DEPLOYMENT)
    if name is None:
        return None
    deployment = load_deployment(Path(name))
    path = os.environ.get(MODEL, deployment.model.path)
    return msgspec.structs.replace(deployment, model=msgspec.structs.replace(deployment.model, path=path))


def gpu_of(deployment: Deployment, role: Role) -> str:
    """One GPU for an engine of the suite: prefill has the deployment's first for prefill, others that for decode."""
    wanted = [worker for worker in deployment.workers if (worker.role is Role.PREFILL) == (role is Role.PREFILL)]
    return (wanted or list(deployment.workers))[0].gpus.partition(",")[0]


class Apart:
    """An engine in a process of its own. `take` gets what it delivers. Raises ConfigError when it does not start."""

    def __init__(self, deployment: Deployment, epoch: Epoch) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, deployment, epoch), daemon=True)
        self._process.start()
        theirs.close()
        self._sending = threading.Lock()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.take: OnOutputs = lambda outputs, change: None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.closed = False
        started = self._ask("start", timeout_s=deployment.load_timeout_s + _ANSWER_S)
        if isinstance(started, ConfigError):
            self.close()
            raise started
        self.info: EngineInfo = started

    def tell(self, name: str, *arguments: object) -> None:
        with self._sending, suppress(OSError):
            self._line.send((name, arguments))

    def load(self) -> WorkerLoad:
        load: WorkerLoad = self._ask("load", timeout_s=_ANSWER_S)
        return load

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        with suppress(queue.Empty):
            self._ask("close", timeout_s=_CLOSE_S)
        self._process.join(_CLOSE_S)
        self._process.kill()
        self._process.join()
        self._reader.join()
        self._line.close()

    def _ask(self, name: str, timeout_s: float) -> Any:
        self.tell(name)
        return self._answers.get(timeout=timeout_s)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                outputs, change, *answer = self._line.recv()
                if answer:
                    self._answers.put(answer[0])
                else:
                    self.take(outputs, change)
        self._answers.put(ConfigError("the engine's process has ended; what it said last is above"))


def _live(line: Connection, deployment: Deployment, epoch: Epoch) -> None:
    """The life of an engine's process."""
    (worker,) = deployment.workers
    sending = threading.Lock()

    def say(*message: object) -> None:
        with sending, suppress(OSError):
            line.send(message)

    engine = create_engine(deployment, worker, epoch, KEY)
    while True:
        try:
            name, arguments = line.recv()
        except EOFError:
            return
        if name == "start":
            try:
                engine.start(lambda outputs, change: say(list(outputs), change))
            except ConfigError as error:
                say(None, None, error)
            else:
                say(None, None, engine.info)
            continue
        result = getattr(engine, name)(*arguments)
        if name in ("load", "close"):
            say(None, None, result)
        if name == "close":
            return


class Lent:
    """An Apart as one test has it. Implements engines.base.Engine."""

    def __init__(self, apart: Apart, key: object, test: int) -> None:
        self.apart = apart
        self.key = key
        self._prefix = f"{test}."
        self._salt = f"test {test} "
        self._before: frozenset[bytes] | None = None  # blocks of earlier tests, once they are told
        self._started = threading.Event()
        self._requests: set[RequestId] = set()
        self._leases: set[str] = set()

    @property
    def info(self) -> EngineInfo:
        return self.apart.info

    def start(self, on_outputs: OnOutputs) -> None:
        self._on_outputs = on_outputs
        self.apart.take = self._take
        self.apart.tell("resync")
        assert self._started.wait(_ANSWER_S), "the engine does not tell its prefix cache"

    def prefill(self, request: GenerateRequest) -> None:
        self.apart.tell("prefill", self._own(request))

    def decode(self, request: GenerateRequest, ticket: bytes | None) -> None:
        self.apart.tell("decode", self._own(request), ticket)

    def abort(self, request_id: RequestId) -> None:
        self.apart.tell("abort", RequestId(self._prefix + request_id))

    def release(self, lease_id: str, end: LeaseEnd = LeaseEnd.UNWANTED) -> None:
        self.apart.tell("release", lease_id, end)

    def resync(self) -> None:
        self.apart.tell("resync")

    def load(self) -> WorkerLoad:
        return self.apart.load()

    def close(self) -> None:
        self.apart.close()

    def give_back(self) -> None:
        """End what the test has left. Its KV that nobody fetched is no longer counted; TensorRT-LLM drops it in its time."""
        self.apart.take = lambda outputs, change: None
        for request_id in self._requests:
            self.apart.tell("abort", request_id)
        for lease_id in self._leases:
            self.apart.tell("release", lease_id, LeaseEnd.FETCHED)

    def _own(self, request: GenerateRequest) -> GenerateRequest:
        request_id = RequestId(self._prefix + request.request_id)
        self._requests.add(request_id)
        return msgspec.structs.replace(request, request_id=request_id, salt=self._salt + request.salt)

    def _take(self, outputs: Sequence[Output], change: CacheChange | None) -> None:
        own: list[Output] = []
        for output in outputs:
            if output.request_id.startswith(self._prefix):
                if isinstance(output, PrefillDone) and output.lease_id:
                    self._leases.add(output.lease_id)
                request_id = RequestId(output.request_id.removeprefix(self._prefix))
                own.append(msgspec.structs.replace(output, request_id=request_id))
        news = self._news(change) if change is not None else None
        if own or news is not None:
            self._on_outputs(own, news)
        if self._before is not None:
            self._started.set()

    def _news(self, change: CacheChange) -> CacheChange | None:
        if self._before is None:
            if not change.reset:
                return None
            self._before = frozenset(change.stored)
        before = self._before
        stored = [block for block in change.stored if block not in before]
        return CacheChange(stored, [block for block in change.removed if block not in before], change.reset)


class Lender:
    """Keeps engines from test to test, no more than a GPU has room for."""

    def __init__(self) -> None:
        self._idle: list[Lent] = []
        self._lent: list[Lent] = []
        self._epochs = itertools.count(1)

    def lend(self, deployment: Deployment, worker: WorkerConfig, test: int) -> Lent:
        """An engine for a deployment of this worker alone. `test`: its number."""
        alone = msgspec.structs.replace(deployment, workers=(worker,))
        key = msgspec.json.encode(alone)
        known = next((idle for idle in self._idle if idle.key == key), None)
        if known is not None:
            self._idle.remove(known)
            apart = known.apart
        else:
            while self._idle and len(self._idle) + len(self._lent) >= _MOST_AT_ONCE:
                self._idle.pop(0).close()
            apart = Apart(alone, Epoch(next(self._epochs)))
        self._lent.append(Lent(apart, key, test))
        return self._lent[-1]

    def take_back(self) -> None:
        """Of the test that has ended. Engines that it closed or broke are not lent again."""
        lent, self._lent = self._lent, []
        for engine in lent:
            if not engine.apart.closed:
                engine.give_back()
                if engine.load().fault:
                    engine.close()
                else:
                    self._idle.append(engine)

    def close(self) -> None:
        for engine in (*self._idle, *self._lent):
            engine.close()
