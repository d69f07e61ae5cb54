"""One run: sends what is planned, keeps what comes back.

Every request in flight blocks a native thread of gevent's pool, and Locust's greenlets wait for it. Nothing is patched: not
the standard library by gevent (LOCUST_SKIP_MONKEY_PATCH), not gRPC by `grpc.experimental.gevent`. Measured with 32 gRPC
streams that costs 40% less CPU per token than gRPC under gevent (docs/loadtest.md), and a token's time is taken in the
thread that read it, whatever Locust is doing.
"""

from __future__ import annotations

import gc
import resource
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import gevent
import msgspec
import numpy as np
from gevent.pool import Group
from gevent.threadpool import ThreadPool

from loadtest.machine import this_machine
from loadtest.options import Options
from loadtest.prompts import Prompts, TextPrompts, TokenPrompts
from loadtest.protocols import connect
from loadtest.protocols.base import Call
from loadtest.record import Client, Record, Run, write_run
from loadtest.scenarios import make_plan
from loadtest.workload import Planned
from python_backends.core.errors import BatonError, ConfigError, EngineFailure

_READY_TIMEOUT_S = 5.0
_SWITCH_S = 0.001  # how long a thread that computes may keep one waiting that has received a token
_LOOK_EVERY_S = 0.2
_CANCEL_TIMEOUT_S = 3.0
_CANCEL_POLL_S = 0.02

Arrival = tuple[Record, float, int]
"""(whose, when in seconds of the run, how many tokens)."""


class LoadTest:
    """Owns a run's connection, records and threads. Used on Locust's event loop, except where a method says otherwise."""

    def __init__(self, address: str, options: Options) -> None:
        """Raises ConfigError for wrong options, BatonError when the server can't be asked."""
        nonce = options.nonce or 1 + secrets.randbelow(2**31)
        self.options = msgspec.structs.replace(options, nonce=nonce)
        self.address = address
        self.plan = make_plan(self.options)
        self.records: list[Record] = []
        self.news: deque[Arrival] = deque()  # filled by the threads, for whoever shows the run live
        self.connection = connect(address, self.options)
        self._threads = ThreadPool(self.options.max_in_flight)
        self._calls: set[Call] = set()
        self._cpu_s = 0.0
        self._began = datetime.now().astimezone()
        self._start = time.monotonic()
        try:
            self._prompts = _prompts(self.options, self.connection.takes_ids)
            self.connection.wait_ready(_READY_TIMEOUT_S)
        except BatonError:
            self.connection.close()
            raise

    @property
    def now_s(self) -> float:
        """Seconds since `begin`."""
        return time.monotonic() - self._start

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    def begin(self) -> None:
        """Second 0 is now."""
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(_SWITCH_S)
        self._began = datetime.now().astimezone()
        self._cpu_s = _cpu_s()
        self._start = time.monotonic()

    def ask(self, planned: Planned, on_end: Callable[[Record], None]) -> None:
        """Send it now and wait for its end; then `on_end` is called. A greenlet that is killed meanwhile cancels it."""
        self._ask(planned, self._prepare(planned), self.now_s, on_end)

    def send_arrivals(self, running: Callable[[], bool], on_end: Callable[[Record], None]) -> None:
        """Send the plan's arrivals, each when it is due, and wait for all of them. Ends early when not `running()`."""
        asked = Group()
        try:
            for planned in due(self.plan.arrivals or iter(()), lambda: self.now_s, gevent.sleep, running):
                asked.spawn(self._ask, planned, self._prepare(planned), planned.time_s, on_end)
            asked.join()
        finally:
            asked.kill()

    def finish(self, command: str) -> Path:
        """Write the files; returns their directory. What is still in flight is cancelled and stays `unfinished`."""
        cpu_s = _cpu_s() - self._cpu_s
        for call in list(self._calls):
            call.cancel()
        end = time.monotonic() + _CANCEL_TIMEOUT_S
        while len(self._threads) and time.monotonic() < end:
            gevent.sleep(_CANCEL_POLL_S)  # until nobody writes into a record any more
        self.connection.close()
        run = Run(
            command=command,
            server=self.address,
            protocol=self.connection.name,
            options=self.options,
            levels=list(self.plan.shape.steps),
            slos=self.plan.slos,
            began=self._began.isoformat(timespec="seconds"),
            machine=this_machine(),
            client=_client(cpu_s, [record for record in self.records if record.due_s >= self.options.warmup]),
        )
        directory = Path(self.options.out)
        write_run(directory, run, self.records)
        return directory

    def _prepare(self, planned: Planned) -> Call:
        return self.connection.prepare(self._prompts.build(planned), planned.output_tokens)

    def _ask(self, planned: Planned, call: Call, due_s: float, on_end: Callable[[Record], None]) -> None:
        if (wait_s := due_s - self.now_s) > 0:
            gevent.sleep(wait_s)
        record = Record(len(self.records), planned.kind, due_s, planned.input_tokens, planned.output_tokens, self.now_s)
        self.records.append(record)
        if len(self._calls) >= self.options.max_in_flight:
            record.error = f"not sent: {self.options.max_in_flight} requests in flight (--max-in-flight)"
            on_end(record)
            return
        self._calls.add(call)
        try:
            self._threads.spawn(self._read, call, record).get()
        finally:
            call.cancel()
            self._calls.discard(call)
        on_end(record)

    def _read(self, call: Call, record: Record) -> None:
        """In a thread of the pool: send and read to the end."""
        record.sent_s = time.monotonic() - self._start
        error = ""
        try:
            for part in call.parts():
                at_s = part.time - self._start
                record.arrival_s.append(at_s)
                record.arrival_tokens.append(part.tokens)
                self.news.append((record, at_s, part.tokens))
        except BatonError as failure:
            error = str(failure) or type(failure).__name__
        except Exception as failure:  # the server sent something that is no answer
            error = str(EngineFailure(f"the answer can't be read: {type(failure).__name__}: {failure}"))
        record.ended_s = time.monotonic() - self._start
        usage = call.usage
        record.input_tokens_counted, record.cached_tokens = usage.input_tokens, usage.cached_tokens
        record.output_tokens_counted = usage.output_tokens
        record.finish_reason, record.route = usage.finish_reason, usage.route
        if not error and not record.arrival_s:
            error = "the answer has no token"
        record.error = error


def due(
    arrivals: Iterator[Planned], now: Callable[[], float], sleep: Callable[[float], object], running: Callable[[], bool]
) -> Iterator[Planned]:
    """Yield each arrival a moment before its time, so that its request is encoded when it is due."""
    for planned in arrivals:
        while (wait_s := planned.time_s - _LOOK_EVERY_S - now()) > 0:
            if not running():
                return
            sleep(min(wait_s, _LOOK_EVERY_S))
        if not running():
            return
        yield planned


def _prompts(options: Options, takes_ids: bool) -> Prompts:
    if options.prompt == "text" or (options.prompt == "auto" and not takes_ids):
        return TextPrompts(options.nonce)
    if not takes_ids:
        raise ConfigError("--prompt ids: chats are text; use --api completions")
    return TokenPrompts(options.nonce, *options.token_range)


def _cpu_s() -> float:
    """Of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _client(cpu_s: float, records: list[Record]) -> Client:
    late_ms = [(record.sent_s - record.due_s) * 1e3 for record in records] or [0.0]
    p50, p99, highest = (float(value) for value in np.percentile(late_ms, (50, 99, 100)))
    return Client(cpu_s, p50, p99, highest)
