"""The whole router with real workers, without Triton: `FlowHouse`.

Workers run the engine `fake`, in this process or each in its own, where SIGKILL and SIGSTOP are real. Everything that
waits has a time-out.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import queue
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np

from python_backends.core.config import (
    Deployment,
    EngineConfig,
    FakeConfig,
    HealthConfig,
    RouterConfig,
    StoreConfig,
    TransferConfig,
    WorkerConfig,
)
from python_backends.core.curve import CurveKeys
from python_backends.core.errors import BatonError, Unavailable
from python_backends.core.messages import Work
from python_backends.core.orders import OrderBook
from python_backends.core.types import FinishReason, Role, SamplingParams, WorkerId
from python_backends.worker.service import Worker
from router.fleet import WorkerView
from router.journal import Record
from router.lifecycle import State
from router.run import Run
from router.seams import Destination, Snapshot
from router.service import Channels, RouterService
from router.tokenizer import Tokenizer
from router.types import ClientRequest, Outcome, Piece, Proof, Way, Wish

TIMEOUT_S = 20.0
VOCABULARY = 50_000
GREEDY = SamplingParams(temperature=0, max_tokens=8)

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", "numpy", "tests.flow.house", "python_backends.engines.fake"])

Transport = Literal["auto", "shm", "tcp", "nixl", "inline"]
Fault = Literal["delay", "drop", "corrupt", "truncate", "hang"]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that share no prefix with those of another seed."""
    return [300 + (seed * 7919 + i * 31) % 20_000 for i in range(length)]


def reference(prompt_ids: Sequence[int], sampling: SamplingParams) -> list[int]:
    """What the fake model says to a prompt, computed without any engine."""
    tokens = list(prompt_ids)
    while len(tokens) < len(prompt_ids) + sampling.max_tokens:
        num_output = len(tokens) - len(prompt_ids)
        draw = f"{sampling.seed}/{num_output}" if sampling.temperature else "greedy"
        seen = np.array([tokens, range(len(tokens))], np.uint32).tobytes() + draw.encode()
        tokens.append(300 + int.from_bytes(hashlib.blake2b(seen, digest_size=8).digest(), "big") % 20_000)
    return tokens[len(prompt_ids) :]


def eventually(condition: Callable[[], object], within: float = 1.0) -> bool:
    """Whether the condition becomes true in time."""
    give_up = time.monotonic() + within
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.005)
    return True


def deployment(
    prefill: int = 1,
    decode: int = 1,
    aggregated: int = 0,
    *,
    engine: EngineConfig | None = None,
    router: RouterConfig | None = None,
    transport: Transport = "auto",
    listen: str = "",
    codec: Literal["auto", "raw", "lossless"] = "auto",
    faults: Mapping[Fault, float] | None = None,
    lease_s: float = 10.0,
    transfer_timeout_s: float = 2.0,
    silent_s: float = 10.0,
    store: StoreConfig | None = None,
    canary_s: float = 0.0,
    canary_timeout_s: float = 0.5,
) -> Deployment:
    """Workers are named prefill_0, prefill_1 ..., decode_0 ..., aggregated_0 ..."""
    roles = [(Role.PREFILL, prefill), (Role.DECODE, decode), (Role.AGGREGATED, aggregated)]
    return Deployment(
        workers=tuple(
            WorkerConfig(role=role, name=f"{role.value}_{i}", engine="fake") for role, count in roles for i in range(count)
        ),
        engine=engine or fake_engine(),
        transfer=TransferConfig(
            transport=transport,
            listen=listen,
            codec=codec,
            lease_s=lease_s,
            timeout_s=transfer_timeout_s,
            faults=dict(faults or {}),
        ),
        store=store or StoreConfig(),
        router=router or RouterConfig(mode="always-remote", worker_wait_s=5.0, default_deadline_s=TIMEOUT_S),
        health=HealthConfig(heartbeat_s=0.05, silent_s=silent_s, canary_s=canary_s, canary_timeout_s=canary_timeout_s),
    )


def fake_engine(prefill_us_per_token: int = 0, step_us: int = 200, kv_pool_mib: int = 8) -> EngineConfig:
    """1 MiB holds 64 blocks, 1024 tokens."""
    return EngineConfig(kv_pool_mib=kv_pool_mib, fake=FakeConfig(prefill_us_per_token=prefill_us_per_token, step_us=step_us))


class NumberTokenizer:
    """Text is token ids in angle brackets: <17><4>. Stands for router.tokenizer.Tokenizer."""

    vocab_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [int(part) for part in text.strip("<>").split("><")]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in token_ids)

    def is_silent(self, token_id: int) -> bool:
        return False


class Answer:
    """One request's answer as it comes in. Implements router.seams.Reply."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.error: BatonError | None = None
        self.run: Run | None = None
        self.first = threading.Event()  # something was sent
        self.first_at = 0.0  # monotonic, s
        self.ended = threading.Event()
        self.late = 0  # what came after the end

    def send(self, piece: Piece) -> None:
        self.late += self.ended.is_set()
        self.pieces.append(piece)
        self.first_at = self.first_at or time.monotonic()
        self.first.set()
        if piece.finish_reason is not None:
            self.ended.set()

    def fail(self, error: BatonError) -> None:
        self.late += self.ended.is_set()
        self.error = error
        self.ended.set()

    def wait(self, within: float = TIMEOUT_S) -> Answer:
        assert self.ended.wait(within), f"no end within {within} s, in state {self.state}, after {len(self.pieces)} pieces"
        return self

    @property
    def ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.token_ids]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.pieces[-1].finish_reason if self.pieces else None

    @property
    def proof(self) -> Proof:
        assert self.error is None, repr(self.error)
        proof = self.pieces[-1].proof
        assert proof is not None
        return proof

    @property
    def state(self) -> State | None:
        return self.run.state if self.run is not None else None


class Counts:
    """Counts what the router says about itself. Implements router.seams.Observer."""

    def __init__(self) -> None:
        self.ways: list[Way] = []
        self.outcomes: list[Outcome] = []
        self.warm_ups: list[str] = []
        self.canaries: list[tuple[str, str]] = []  # worker, verdict
        self.pairs: list[tuple[str, str, str]] = []  # prefill, decode, verdict
        self.retries = 0

    def refresh(self, snapshot: Snapshot) -> None:
        """Nothing to show."""

    def decided(self, way: Way) -> None:
        self.ways.append(way)

    def retried(self) -> None:
        self.retries += 1

    def warmed(self, verdict: str) -> None:
        self.warm_ups.append(verdict)

    def probed(self, worker: WorkerView, verdict: str) -> None:
        self.canaries.append((worker.id, verdict))

    def paired(self, prefill: WorkerId, decode: WorkerId, verdict: str) -> None:
        self.pairs.append((prefill, decode, verdict))

    def tokens(self, count: int, gap_s: float) -> None:
        """Only the journal keeps times."""

    def ended(self, record: Record) -> None:
        assert record.outcome is not None
        self.outcomes.append(record.outcome)


class InProcess:
    """A worker in this process."""

    def __init__(self, config: Deployment, worker: WorkerConfig, address: str, key: bytes) -> None:
        self.worker = Worker(config, worker, address, key)
        self._orders = OrderBook(key)

    def ready(self) -> None:
        self.worker.start()

    def hand_over(self, worker: Destination, work: Work, failed: Callable[[str], None]) -> None:
        try:
            self.worker.submit(self._orders.seal(worker.worker, worker.epoch, [work]))
        except BatonError as error:
            failed(str(error))

    def close(self) -> None:
        self.worker.close()


class OwnProcess:
    """A worker in a process of its own; handing over blocks a thread of this worker alone, as a call by Triton does."""

    def __init__(self, config: Deployment, worker: WorkerConfig, address: str, key: bytes) -> None:
        self._orders = OrderBook(key)
        self._line, theirs = _processes.Pipe()
        self.process = _processes.Process(target=_work, args=(config, worker, address, key, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._is_ready = threading.Event()  # until then the line says nothing but that
        self._queue: queue.SimpleQueue[tuple[Destination, Work, Callable[[str], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._call, name=f"submit-{worker.name}", daemon=True)
        self._thread.start()

    def ready(self) -> None:
        assert self._line.poll(TIMEOUT_S), "the worker process does not start"
        assert self._line.recv_bytes() == b"ready"
        self._is_ready.set()

    def hand_over(self, worker: Destination, work: Work, failed: Callable[[str], None]) -> None:
        self._queue.put((worker, work, failed))

    def _call(self) -> None:
        while (item := self._queue.get()) is not None:
            worker, work, failed = item
            self._is_ready.wait(TIMEOUT_S)
            try:
                self._line.send_bytes(self._orders.seal(worker.worker, worker.epoch, [work]))
                error = self._line.recv_bytes().decode()
            except (EOFError, OSError):
                error = "its process is gone"
            if error:
                with suppress(RuntimeError):  # the router is closed
                    failed(error)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def unload(self) -> None:
        """Told to end, it says goodbye."""
        if self.process.is_alive():
            self.signal(signal.SIGTERM)
            self.process.join(TIMEOUT_S)

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.process.join(TIMEOUT_S)
        self._queue.put(None)
        self._thread.join(TIMEOUT_S)
        self._line.close()


def _work(config: Deployment, worker: WorkerConfig, address: str, key: bytes, line: Connection) -> None:
    """The life of a worker process."""
    service = Worker(config, worker, address, key)
    service.start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    line.send_bytes(b"ready")
    try:
        while True:
            sealed = line.recv_bytes()
            try:
                service.submit(sealed)
                line.send_bytes(b"")
            except BatonError as error:
                line.send_bytes(str(error).encode())
    except EOFError:
        return
    except SystemExit:
        service.close()


class FlowHouse:
    """A context manager: router and workers are up inside it, and nothing of them is left after it.

    processes: each worker in its own process. restart: dead and wedged ones are started again (needs processes).
    workers_up: False starts none; `start(name)` does later.
    """

    def __init__(
        self, config: Deployment | None = None, *, processes: bool = False, restart: bool = False, workers_up: bool = True
    ) -> None:
        assert processes or not restart
        self.config = config or deployment()
        self.counts = Counts()
        self.workers: dict[str, Any] = {}
        self._loaded: dict[str, WorkerConfig] = {}  # those that were restarted, as Triton knows them
        self._marks: set[Destination] = set()  # as files in the run directory are
        self._own_processes = processes
        self._restarts = restart
        self._workers_up = workers_up
        self._directory = Path(tempfile.mkdtemp(prefix="baton"))
        self.key = secrets.token_bytes(32)  # its own, hence a node store of its own
        self.service = self._router()

    def __enter__(self) -> FlowHouse:
        try:
            self.service.start()
            if self._workers_up:
                self.start(*(worker.name for worker in self.config.workers))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._own_processes:
            self.service.close()  # first, or it would restart them
        for worker in self.workers.values():
            worker.close()  # first, or they would wait for a router to say goodbye to
        self.service.close()
        shutil.rmtree(self._directory)

    def _router(self) -> RouterService:
        tokenizer = cast(Tokenizer, NumberTokenizer())
        control = self if self._restarts else None
        own = [self.address(worker.name) for worker in self.config.workers]
        channels = Channels(str(self._directory), CurveKeys.derive(self.key), own)
        return RouterService(self.config, channels, tokenizer, self._submit, control, self.counts)

    def address(self, worker: str) -> str:
        """Of its channel."""
        return f"ipc://{self._directory}/{worker}"

    # --- workers ---

    def start(self, *names: str, config: Deployment | None = None) -> None:
        """Returns when the router knows of them. `config`: of another server, which the workers are of."""
        before = {view.id: view.epoch for view in self.service.house.fleet.up()}
        make = OwnProcess if self._own_processes else InProcess
        made = {name: make(config or self.config, self.config.worker(name), self.address(name), self.key) for name in names}
        self.workers.update(made)
        for worker in made.values():
            worker.ready()
        assert eventually(lambda: all(self.is_up(name, before.get(WorkerId(name))) for name in names), TIMEOUT_S)

    def is_up(self, name: str, other_than: int | None = None) -> bool:
        view = self.service.house.fleet.get(WorkerId(name))
        return view is not None and view.up and view.epoch != other_than

    def epoch(self, name: str) -> int:
        view = self.service.house.fleet.get(WorkerId(name))
        assert view is not None
        return view.epoch

    def signal(self, name: str, number: int) -> None:
        self.workers[name].signal(number)

    def kill(self, name: str) -> None:
        """Sudden death: no last words."""
        self.signal(name, signal.SIGKILL)

    def _submit(self, worker: Destination, work: Work, failed: Callable[[str], None]) -> None:
        self.workers[worker.model].hand_over(worker, work, failed)

    def reach(self, worker: Destination) -> None:
        """See router.supervisor.ModelControl."""

    @contextmanager
    def marked(self, worker: Destination) -> Iterator[None]:
        """See router.supervisor.ModelControl."""
        self._marks.add(worker)
        try:
            yield
        finally:
            self._marks.discard(worker)

    def interrupted(self) -> list[Destination]:
        """See router.supervisor.ModelControl."""
        return list(self._marks)

    def restart(self, worker: Destination, role: Role | None = None) -> None:
        """See router.supervisor.ModelControl."""
        name = worker.model
        former = self._loaded.get(name) or self.config.worker(name)
        config = former if role is None else msgspec.structs.replace(former, role=role)
        self.workers[name].unload()
        self.workers[name].close()
        made = self.workers[name] = OwnProcess(self.config, config, self.address(name), self.key)
        try:
            made.ready()
        except (AssertionError, EOFError) as error:
            raise Unavailable(str(error)) from error
        self._loaded[name] = config

    # --- the router ---

    def replace_router(self) -> None:
        """The router's process dies without a word to anybody, and another takes its place."""
        self.service._loop.call_soon_threadsafe(setattr, self.service._channel, "send", lambda *_: None)
        self.service.close()
        self.service = self._router()
        self.service.start()

    def on_loop(self, call: Callable[[], Any]) -> Any:
        """Run something where the router's state belongs, and return its result."""
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.service._loop.call_soon_threadsafe(lambda: done.put(call()))
        return done.get(timeout=TIMEOUT_S)

    # --- requests ---

    def begin(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams = GREEDY,
        wish: Wish | None = None,
        timeout_s: float | None = None,
        salt: str = "",
    ) -> Answer:
        answer = Answer()
        request = ClientRequest(sampling, input_ids=list(prompt_ids), wish=wish, timeout_s=timeout_s, salt=salt)
        answer.run = self.service.accept(request, answer)
        return answer

    def ask(self, prompt_ids: Sequence[int], sampling: SamplingParams = GREEDY, wish: Wish | None = None) -> Answer:
        return self.begin(prompt_ids, sampling, wish).wait()

    def cancel(self, answer: Answer) -> None:
        assert answer.run is not None
        self.service.cancel(answer.run)

    # --- what must be so afterwards ---

    def assert_nothing_held(self, within: float = 1.0) -> None:
        """Router and workers give back everything in time, as the workers themselves report it from now on."""
        now = time.monotonic()
        assert eventually(lambda: not self.held(now), within), self.held(now)

    def held(self, heard_after: float) -> dict[str, object]:
        """What is still held, by name; workers that were not heard since are named too."""
        service = self.service
        held: dict[str, object] = {}
        counts = {
            "admission": service.house.admission.requests,
            "queued tokens": service.house.admission.queued_tokens,
            "boxes": len(service.house.mailroom._boxes),
            "tasks": len(service._tasks),
        }
        held.update({name: count for name, count in counts.items() if count})
        for view in list(service.house.fleet):
            if view.requests or view.prefill_tokens:
                held[f"charges of {view.id}"] = (view.requests, view.prefill_tokens)
            if view.up and (view.heard < heard_after or _busy(view)):
                held[view.id] = view.heartbeat.load
        return held


def _busy(view: WorkerView) -> bool:
    load = view.heartbeat.load
    return any((load.held_blocks, load.active_leases, load.running_requests, load.queued_requests, load.queued_tokens))


def ask_all(house: FlowHouse, prompts: Sequence[Sequence[int]], sampling: SamplingParams = GREEDY) -> list[Answer]:
    """All at once, from several threads."""
    with ThreadPoolExecutor(4) as pool:
        return [answer.wait() for answer in pool.map(lambda ids: house.begin(ids, sampling), prompts)]
