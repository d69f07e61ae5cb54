from __future__ import annotations

import time

import msgspec
import pytest

from python_backends.core.messages import PrefillDone
from python_backends.core.types import KVReport, PrefixReport, RequestId, WorkerId
from router.account import Account
from router.clock import Clock
from router.types import RouteDecision, Way

REMOTE = RouteDecision(Way.REMOTE, WorkerId("p"), WorkerId("d"), 100, "because")
LOCAL = RouteDecision(Way.LOCAL, None, WorkerId("d"), 100, "because")
RECEIVED = KVReport(
    received_tokens=100,
    received_bytes=700,
    transfer_ms=2.0,
    digest="verified",
    transport="shm",
    codec="lossless",
    wire_bytes=600,
)
TIMES = ("queue_ms", "prefill_ms", "handoff_ms", "first_decode_ms", "ttft_ms", "e2e_ms")


class StoppedClock(Clock):
    """Time passes only when told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.seconds

    def after_ms(self, ms: float) -> None:
        self.seconds += ms / 1e3


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock()


def prefilled(compute_ms: float) -> PrefillDone:
    return PrefillDone(
        RequestId("r"), 5, None, None, b"t", "lease", reused_tokens=16, computed_tokens=84, compute_ms=compute_ms
    )


def test_what_came_from_stores_is_told_of_both_workers(clock: StoppedClock) -> None:
    account = Account(clock.now(), clock)
    account.routed(REMOTE, 1)
    prefix = PrefixReport(node_tokens=32, peer_tokens=16, bytes=300, ms=1.5)
    account.prefilled(msgspec.structs.replace(prefilled(12.0), prefix=prefix))
    account.tokens(1, None)
    report = msgspec.structs.replace(RECEIVED, prefix=PrefixReport(remote_tokens=48, bytes=400, ms=2.0))
    account.kv_ready(report)
    account.tokens(2, report)
    proof = account.proof()
    assert (proof.kv_tokens_node, proof.kv_tokens_remote) == (0, 48)
    assert (proof.prefill_tokens_node, proof.prefill_tokens_remote, proof.prefill_tokens_peer) == (32, 0, 16)
    assert (proof.store_bytes, proof.store_ms) == (700, 3.5)


def test_the_parts_of_a_handed_over_request(clock: StoppedClock) -> None:
    account = Account(clock.now(), clock)
    clock.after_ms(3)
    account.routed(REMOTE, 1)
    clock.after_ms(17)
    account.prefilled(prefilled(12.0))
    account.tokens(1, None)
    clock.after_ms(4)
    account.kv_ready(RECEIVED)
    clock.after_ms(6)
    account.tokens(2, None)
    clock.after_ms(70)
    account.tokens(3, RECEIVED)
    proof = account.proof()
    measured = [getattr(proof, name) for name in TIMES]
    assert measured == pytest.approx([8, 12, 4, 6, 20, 100])
    assert (proof.kv_tokens_received, proof.kv_bytes, proof.digest, proof.transport) == (100, 700, "verified", "shm")
    assert (proof.kv_codec, proof.kv_wire_bytes) == ("lossless", 600)
    assert (proof.prefill_tokens_reused, proof.prefill_tokens_computed) == (16, 84)
    assert (proof.route, proof.prefill_worker, proof.decode_worker, proof.attempts) == ("remote", "p", "d", 1)
    assert proof.arrival_ns == pytest.approx(100e9)


def test_a_local_prefill_has_no_handoff(clock: StoppedClock) -> None:
    account = Account(clock.now(), clock)
    account.routed(LOCAL, 1)
    clock.after_ms(20)
    account.tokens(1, None)
    clock.after_ms(5)
    account.tokens(2, KVReport(computed_tokens=84, reused_tokens=16, compute_ms=15.0))
    proof = account.proof()
    assert [getattr(proof, name) for name in TIMES] == pytest.approx([5, 15, 0, 0, 20, 25])
    assert (proof.prefill_worker, proof.prefill_tokens_computed, proof.prefill_tokens_reused) == ("d", 84, 16)
    assert (proof.kv_tokens_computed, proof.digest) == (84, "none")


def test_a_request_that_ends_with_its_first_token(clock: StoppedClock) -> None:
    account = Account(clock.now(), clock)
    account.routed(REMOTE, 1)
    clock.after_ms(20)
    account.prefilled(prefilled(12.0))
    account.tokens(1, None)
    proof = account.proof()
    assert [getattr(proof, name) for name in TIMES] == pytest.approx([8, 12, 0, 0, 20, 20])
    assert (proof.kv_tokens_received, proof.digest) == (0, "none")


@pytest.mark.parametrize("compute_ms", [0.0, 5.0, 20.0, 1e6])
def test_queue_and_prefill_are_all_of_ttft_whatever_the_worker_says(clock: StoppedClock, compute_ms: float) -> None:
    account = Account(clock.now(), clock)
    account.routed(REMOTE, 1)
    clock.after_ms(20)
    account.prefilled(prefilled(compute_ms))
    account.tokens(1, None)
    proof = account.proof()
    assert proof.queue_ms + proof.prefill_ms == pytest.approx(proof.ttft_ms)
    assert min(proof.queue_ms, proof.prefill_ms) >= 0


def test_only_the_last_attempt_counts_as_moved(clock: StoppedClock) -> None:
    account = Account(clock.now(), clock)
    account.routed(REMOTE, 1)
    account.prefilled(prefilled(0.0))
    account.tokens(1, None)
    account.kv_ready(RECEIVED)
    account.routed(LOCAL, 2)
    account.tokens(2, KVReport(computed_tokens=101))
    proof = account.proof()
    assert (proof.attempts, proof.route, proof.kv_tokens_received, proof.kv_tokens_computed) == (2, "local", 0, 101)


@pytest.mark.parametrize("lost_after", ["first token", "handoff", "second token"])
def test_a_retry_makes_no_part_negative(clock: StoppedClock, lost_after: str) -> None:
    account = Account(clock.now(), clock)
    account.routed(REMOTE, 1)
    clock.after_ms(10)
    account.prefilled(prefilled(6.0))
    account.tokens(1, None)
    if lost_after != "first token":
        clock.after_ms(10)
        account.kv_ready(RECEIVED)
    if lost_after == "second token":
        clock.after_ms(10)
        account.tokens(2, None)
    account.routed(REMOTE, 2)
    clock.after_ms(50)
    account.prefilled(prefilled(40.0))
    account.tokens(3, None)
    clock.after_ms(5)
    account.kv_ready(RECEIVED)
    clock.after_ms(5)
    account.tokens(4, RECEIVED)
    proof = account.proof()
    parts = [getattr(proof, name) for name in TIMES]
    assert min(parts) >= 0
    assert (proof.ttft_ms, proof.queue_ms, proof.prefill_ms) == pytest.approx((10, 4, 6))
    assert sum(parts[:4]) <= proof.e2e_ms + 1e-6


def test_the_arrival_is_on_the_wall_clock() -> None:
    account = Account(time.monotonic() - 2, Clock())
    account.routed(LOCAL, 1)
    account.tokens(1, None)
    assert account.proof().arrival_ns == pytest.approx(time.time_ns() - 2e9, abs=1e8)


def test_what_was_predicted_is_told_beside_what_was(clock: StoppedClock) -> None:
    account = Account(clock.now(), clock)
    clock.after_ms(30)  # in the queue
    account.routed(RouteDecision(Way.LOCAL, None, WorkerId("d"), 100, "because", ttft_ms=50.0, itl_ms=9.0), 1)
    clock.after_ms(60)
    account.tokens(1, None)
    for _ in range(4):
        clock.after_ms(10)
        account.tokens(2, None)
    account.tokens(5, None)
    proof = account.proof()
    assert (proof.predicted_ttft_ms, proof.ttft_ms) == pytest.approx((80, 90))
    assert (proof.predicted_itl_ms, proof.itl_ms) == pytest.approx((9, 10))


def test_the_prediction_is_that_of_the_attempt_that_made_the_first_token(clock: StoppedClock) -> None:
    account = Account(clock.now(), clock)
    account.routed(RouteDecision(Way.LOCAL, None, WorkerId("d"), 100, "because", ttft_ms=50.0), 1)
    clock.after_ms(100)
    account.routed(RouteDecision(Way.LOCAL, None, WorkerId("d"), 100, "because", ttft_ms=40.0), 2)
    clock.after_ms(40)
    account.tokens(1, None)
    account.routed(RouteDecision(Way.LOCAL, None, WorkerId("d"), 100, "because", ttft_ms=30.0), 3)
    assert account.proof().predicted_ttft_ms == pytest.approx(140)
