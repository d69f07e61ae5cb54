"""Work orders: signed work for one life of one worker, taken once.

The signature says that a router of the deployment asks. An order names its worker and epoch, so one that was captured is
worth nothing at another worker or after a restart; and it has a number, so it is worth nothing a second time: what has
been taken is remembered in a window that slides with the highest number, as in IPsec (RFC 4303, section 3.4.3). Nothing
here depends on wall clocks, which hosts need not share and which jump: deadlines are carried over as what is left of them.
What is remembered has a bounded size.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, OrderedDict

import msgspec

from python_backends.core.errors import UNREADABLE, InvalidRequest
from python_backends.core.messages import Work
from python_backends.core.signing import Domain, sign, verify
from python_backends.core.types import Epoch, WorkerId

WINDOW = 1024
"""Orders of one router to one worker may overtake each other by so many; later ones are refused."""
_MOST_SENDERS = 1000  # lives of routers that are remembered


class Order(msgspec.Struct, frozen=True):
    worker: WorkerId
    epoch: Epoch
    sender: str  # another one in every life of a router
    number: int  # counts by one per sender and worker
    sent: float  # monotonic seconds of the sender, as are the deadlines of the work
    work: list[Work]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Order)


class OrderBook:
    """The router's side: numbers and seals. Thread-safe."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sender = secrets.token_hex(8)
        self._numbers: Counter[tuple[WorkerId, Epoch]] = Counter()
        self._lock = threading.Lock()

    def seal(self, worker: WorkerId, epoch: Epoch, work: list[Work]) -> bytes:
        """Several pieces of work may share one order."""
        with self._lock:
            self._numbers[worker, epoch] += 1
            number = self._numbers[worker, epoch]
        return sign(Domain.WORK, _encoder.encode(Order(worker, epoch, self._sender, number, time.monotonic(), work)), self._key)


class OrderReader:
    """One worker's side. Thread-safe."""

    def __init__(self, key: bytes, worker: WorkerId, epoch: Epoch) -> None:
        self._key = key
        self._worker = worker
        self._epoch = epoch
        self._taken: OrderedDict[str, _Window] = OrderedDict()  # by sender, heard from last at the end
        self._lock = threading.Lock()

    def take(self, sealed: bytes) -> list[Work]:
        """Work with deadlines by this process's clock; the way here is not counted.

        Raises InvalidRequest when no router of this deployment signed it, or not for this worker, or it came before.
        """
        body = verify(Domain.WORK, sealed, self._key)
        if body is None:
            raise InvalidRequest("this is an internal model of a Baton deployment: send requests to the model 'router'")
        try:
            order = _decoder.decode(body)
        except UNREADABLE as error:
            raise InvalidRequest(f"work: {error}; router and workers must be of the same version") from error
        if (order.worker, order.epoch) != (self._worker, self._epoch):
            raise InvalidRequest(f"work: it is for another worker than {self._worker}, or for an earlier life of it")
        with self._lock:
            if not self._window(order.sender).take(order.number):
                raise InvalidRequest(f"work: worker {self._worker} has taken order {order.number} before")
        passed = time.monotonic() - order.sent
        return [_shifted(piece, passed) for piece in order.work]

    def _window(self, sender: str) -> _Window:
        window = self._taken.setdefault(sender, _Window())
        self._taken.move_to_end(sender)
        if len(self._taken) > _MOST_SENDERS:
            self._taken.popitem(last=False)
        return window


def _shifted(work: Work, by_s: float) -> Work:
    request = msgspec.structs.replace(work.request, deadline=work.request.deadline + by_s)
    return msgspec.structs.replace(work, request=request)


class _Window:
    """Which numbers have been taken: bit i of `_bits` stands for the highest number less i."""

    def __init__(self) -> None:
        self._highest = 0
        self._bits = 0

    def take(self, number: int) -> bool:
        """Whether it is new. A number below the window counts as taken."""
        ahead = number - self._highest
        if ahead > 0:
            self._bits = (self._bits << ahead | 1) & (1 << WINDOW) - 1 if ahead < WINDOW else 1
            self._highest = number
            return True
        if -ahead >= WINDOW or self._bits >> -ahead & 1:
            return False
        self._bits |= 1 << -ahead
        return True
