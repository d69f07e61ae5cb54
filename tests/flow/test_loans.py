"""Prefixes that one worker lends to another through the router."""

from __future__ import annotations

import signal
import threading

import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.types import SamplingParams
from router.types import Way, Wish
from tests.flow.house import GREEDY, TIMEOUT_S, FlowHouse, deployment, fake_engine, prompt, reference

AUTO = RouterConfig(mode="adaptive", worker_wait_s=10.0, default_deadline_s=TIMEOUT_S)
SHARED = prompt(1024, 1)  # 64 full blocks: a long system prompt


def house(prefill: int, decode: int, *, processes: bool = False) -> FlowHouse:
    engine = fake_engine(prefill_us_per_token=300, kv_pool_mib=16)
    return FlowHouse(deployment(prefill, decode, engine=engine, router=AUTO), processes=processes)


def ids(seed: int) -> list[int]:
    """A prompt of its own behind the shared one."""
    return [*SHARED, *prompt(100, 100 + seed)]


@pytest.mark.parametrize("processes", [False, True])
def test_a_busy_worker_lends_to_an_idle_one(processes: bool) -> None:
    with house(2, 1, processes=processes) as flow:
        flow.ask(ids(0), wish=Wish.REMOTE)
        answers = [flow.begin(ids(seed), wish=Wish.REMOTE) for seed in range(1, 9)]
        for seed, answer in enumerate(answers, 1):
            assert answer.wait().ids == reference(ids(seed), GREEDY)
        proofs = [answer.proof for answer in answers]
        assert {proof.route for proof in proofs} == {Way.REMOTE}
        borrowed = [proof for proof in proofs if proof.prefill_tokens_peer]
        assert borrowed, "nobody borrowed"
        assert all(proof.prefill_tokens_peer == 1024 for proof in borrowed)
        assert "lent by" in borrowed[0].why
        assert {proof.prefill_worker for proof in proofs} == {"prefill_0", "prefill_1"}
        for proof in proofs:
            tokens = proof.prefill_tokens_computed + proof.prefill_tokens_reused + proof.prefill_tokens_peer
            assert tokens == 1124
            assert proof.prefill_tokens_computed <= 116, "the shared part was computed again"
        flow.assert_nothing_held(within=5.0)


def test_a_decode_worker_lends_what_a_conversation_left_there() -> None:
    with house(1, 1) as flow:
        first = flow.ask(SHARED, SamplingParams(temperature=0, max_tokens=200))
        longer = [*SHARED, *first.ids, *prompt(100, 5)]
        answer = flow.ask(longer, wish=Wish.REMOTE)
        assert answer.ids == reference(longer, GREEDY)
        proof = answer.proof
        assert proof.route == Way.REMOTE
        assert proof.prefill_tokens_reused + proof.prefill_tokens_peer >= 1024
        assert proof.kv_tokens_reused >= 1200
        flow.assert_nothing_held(within=5.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lender_that_is_lost_costs_nothing_but_the_loan(number: int) -> None:
    with house(2, 1, processes=True) as flow:
        flow.ask(ids(0), wish=Wish.REMOTE)
        lender = next(name for name in ("prefill_0", "prefill_1") if flow.service.house.index._blocks.get(name))  # type: ignore[call-overload]
        timer = threading.Timer(0.05, flow.signal, args=(lender, number))
        timer.start()
        answers = [flow.begin(ids(seed), wish=Wish.REMOTE) for seed in range(1, 9)]
        if number == signal.SIGSTOP:
            threading.Timer(1.0, flow.signal, args=(lender, signal.SIGCONT)).start()
        for seed, answer in enumerate(answers, 1):
            answer.wait()
            assert answer.error is None, repr(answer.error)
            assert answer.ids == reference(ids(seed), GREEDY)
        timer.join()
        flow.assert_nothing_held(within=5.0)


def test_cancelled_requests_leave_no_loan() -> None:
    with house(2, 1) as flow:
        flow.ask(ids(0), wish=Wish.REMOTE)
        answers = [flow.begin(ids(seed), wish=Wish.REMOTE) for seed in range(1, 13)]
        for answer in answers[::2]:
            flow.cancel(answer)
        for answer in answers:
            answer.wait()
        flow.assert_nothing_held(within=5.0)
