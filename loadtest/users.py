"""Locust's users: streams that ask again and again, and the one that sends what arrives by itself."""

from __future__ import annotations

from typing import ClassVar

from locust import User, task
from locust.runners import STATE_CLEANUP, STATE_STOPPED, STATE_STOPPING
from locust.user.wait_time import constant

from loadtest.live import Live
from loadtest.record import Record
from loadtest.run import LoadTest

_AFTER_FAILURE_S = 0.1  # or a server that is down would be asked thousands of times per second
_STOPPING = {STATE_STOPPING, STATE_STOPPED, STATE_CLEANUP}


class LoadUser(User):
    """Base of both. `test` and `live` are set when a test starts; the address (`host`) says which protocol it is."""

    abstract = True
    test: ClassVar[LoadTest]
    live: ClassVar[Live]

    def running(self) -> bool:
        return self.environment.runner is not None and self.environment.runner.state not in _STOPPING


class StreamUser(LoadUser):
    """One stream: the next request as soon as the last one has ended; after a failure, a moment later."""

    _failed = False

    def wait_time(self) -> float:
        return _AFTER_FAILURE_S if self._failed else 0.0

    @task
    def ask(self) -> None:
        streams = self.test.plan.streams
        if streams is not None:
            self.test.ask(streams.draw(), self._end)

    def _end(self, record: Record) -> None:
        self._failed = not record.ok
        self.live.end(record)


class ArrivalUser(LoadUser):
    """Sends every arrival of the plan at its time, however many are in flight. There is one of it."""

    fixed_count = 1
    wait_time = constant(3600)

    @task
    def send(self) -> None:
        self.test.send_arrivals(self.running, self.live.end)
