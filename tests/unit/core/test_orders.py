from __future__ import annotations

import random
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.errors import InvalidRequest
from python_backends.core.messages import DecodeWork, PrefillWork, Work
from python_backends.core.orders import WINDOW, Order, OrderBook, OrderReader
from python_backends.core.signing import Domain, sign
from python_backends.core.types import Epoch, GenerateRequest, RequestId, SamplingParams, WorkerId

KEY = b"k" * 32
WORKER, EPOCH = WorkerId("decode"), Epoch(2**62 + 1)
REQUEST = GenerateRequest(RequestId("r1"), [1, 2, 3], SamplingParams(seed=1), deadline=9.0)
WORK: list[Work] = [PrefillWork(REQUEST), DecodeWork(REQUEST, b"ticket"), DecodeWork(REQUEST)]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("python_backends.core.orders.time", clock)
    return clock


class Clock:
    now = 5.0

    def monotonic(self) -> float:
        return self.now


def sealed(key: bytes = KEY, worker: WorkerId = WORKER, epoch: Epoch = EPOCH) -> bytes:
    return OrderBook(key).seal(worker, epoch, WORK)


def reader() -> OrderReader:
    return OrderReader(KEY, WORKER, EPOCH)


def test_work_survives_the_call() -> None:
    assert reader().take(sealed()) == WORK


def test_deadlines_are_carried_over_to_the_clock_of_another_host(clock: Clock) -> None:
    order = sealed()  # four seconds are left
    clock.now = 86_400.0
    work = reader().take(order)
    assert [piece.request.deadline for piece in work] == [86_404.0] * 3
    assert [msgspec.structs.replace(piece, request=REQUEST) for piece in work] == WORK


def test_work_of_a_foreign_caller_is_refused_with_the_way_in() -> None:
    with pytest.raises(InvalidRequest, match="send requests to the model 'router'"):
        reader().take(sealed(b"x" * 32))


def test_every_flipped_bit_is_refused() -> None:
    order = sealed()
    for index in range(len(order)):
        for bit in range(8):
            forged = bytearray(order)
            forged[index] ^= 1 << bit
            with pytest.raises(InvalidRequest, match="router"):
                reader().take(bytes(forged))


@given(st.binary(max_size=200))
def test_random_bytes_are_no_work(order: bytes) -> None:
    with pytest.raises(InvalidRequest, match="router"):
        reader().take(order)


def test_signed_text_that_is_no_utf8_is_no_work() -> None:
    body = msgspec.msgpack.encode(Order(WORKER, EPOCH, "sender", 1, 0.0, WORK)).replace(b"sender", b"sende\xff")
    with pytest.raises(InvalidRequest, match="of the same version"):
        reader().take(sign(Domain.WORK, body, KEY))


def test_ticket_is_no_work() -> None:
    body = msgspec.msgpack.encode(Order(WORKER, EPOCH, "s", 1, 0.0, WORK))
    with pytest.raises(InvalidRequest, match="router"):
        reader().take(sign(Domain.HANDOFF, body, KEY))


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgspec.msgpack.encode(WORK), msgspec.msgpack.encode({"worker": "decode"}), b"\x90\x90"],
)
def test_signed_work_of_another_version_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="same version"):
        reader().take(sign(Domain.WORK, body, KEY))


@pytest.mark.parametrize(("worker", "epoch"), [(WorkerId("decode_1"), EPOCH), (WORKER, Epoch(EPOCH - 1))])
def test_work_for_another_worker_or_life_is_refused(worker: WorkerId, epoch: Epoch) -> None:
    with pytest.raises(InvalidRequest, match=r"another worker than decode, or for an earlier life"):
        reader().take(sealed(worker=worker, epoch=epoch))


def test_an_order_is_taken_once() -> None:
    book, taker = OrderBook(KEY), reader()
    orders = [book.seal(WORKER, EPOCH, WORK) for _ in range(10)]
    for order in random.Random(1).sample(orders, 10):
        assert taker.take(order) == WORK
    for order in orders:
        with pytest.raises(InvalidRequest, match=r"has taken order [0-9]+ before"):
            taker.take(order)


def test_routers_are_counted_apart() -> None:
    taker = reader()
    for _ in range(3):
        assert taker.take(sealed()) == WORK


def test_what_is_remembered_is_bounded_and_what_is_forgotten_counts_as_taken() -> None:
    book, taker = OrderBook(KEY), reader()
    orders = [book.seal(WORKER, EPOCH, []) for _ in range(WINDOW + 1)]
    taker.take(orders[-1])
    with pytest.raises(InvalidRequest):
        taker.take(orders[0])
    assert taker.take(orders[1]) == []
    for _ in range(2_000):
        taker.take(sealed())
    assert len(taker._taken) <= 1000


@given(st.lists(st.integers(1, 3 * WINDOW), max_size=60))
def test_no_number_is_taken_twice_and_none_in_the_window_is_lost(numbers: list[int]) -> None:
    taker = reader()
    taken: set[int] = set()
    for number in numbers:
        order = sign(Domain.WORK, msgspec.msgpack.encode(Order(WORKER, EPOCH, "s", number, 0.0, [])), KEY)
        new = number not in taken and number > max(taken, default=0) - WINDOW
        try:
            taker.take(order)
            assert new
        except InvalidRequest:
            assert not new
        taken.add(number)


def test_of_many_threads_one_gets_it() -> None:
    taker, order = reader(), sealed()
    got: list[list[Work]] = []

    def take() -> None:
        try:
            got.append(taker.take(order))
        except InvalidRequest:
            return

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [WORK]


def test_one_book_may_be_used_by_many_threads() -> None:
    book, taker = OrderBook(KEY), reader()
    orders: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: orders.extend(book.seal(WORKER, EPOCH, []) for _ in range(200))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for order in orders:
        assert taker.take(order) == []
