"""Decode workers that fetch a long prompt's KV while the rest of it is computed, through the router."""

from __future__ import annotations

import signal
import threading

import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.messages import Followed
from python_backends.core.types import GenerateRequest, WorkerId
from router.house import House
from router.types import Proof, Way
from tests.flow.house import GREEDY, TIMEOUT_S, FlowHouse, deployment, fake_engine, prompt, reference

REMOTE = RouterConfig(mode="always-remote", worker_wait_s=10.0, default_deadline_s=TIMEOUT_S)
LONG = prompt(2100, 1)  # nine steps


def house(prefill: int, decode: int, *, kv_pool_mib: int = 16, processes: bool = False, **more: object) -> FlowHouse:
    engine = fake_engine(prefill_us_per_token=300, kv_pool_mib=kv_pool_mib)
    return FlowHouse(deployment(prefill, decode, engine=engine, router=REMOTE, **more), processes=processes)  # type: ignore[arg-type]


def moved_once(proof: Proof) -> bool:
    """Every token but the last came over, and none twice."""
    return (proof.kv_tokens_reused, proof.kv_tokens_received, proof.kv_tokens_recomputed) == (0, len(LONG), 0)


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("processes", [False, True])
def test_most_of_a_long_prompt_comes_before_its_first_token(processes: bool, transport: str) -> None:
    with house(1, 1, processes=processes, transport=transport) as flow:
        answer = flow.ask(LONG)
        assert answer.ids == reference(LONG, GREEDY)
        proof = answer.proof
        assert proof.route == Way.REMOTE
        assert moved_once(proof)
        assert proof.kv_tokens_ahead >= 1024, "at most three of nine steps were left for the handoff"
        assert proof.kv_bytes == 132 * (1 << 20) // 64, "2,100 tokens are 132 blocks"
        flow.assert_nothing_held()


def test_a_short_prompt_is_moved_at_once() -> None:
    with house(1, 1) as flow:
        proof = flow.ask(prompt(200, 2)).proof
        assert (proof.kv_tokens_ahead, proof.kv_tokens_received) == (0, 200)


@pytest.mark.parametrize(("comes_from", "comes"), [(3, True), (99, False)])
def test_a_part_that_did_not_come_is_tried_again_twice(comes_from: int, comes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    whole = House.follow

    async def follow(self: House, worker: WorkerId, request: GenerateRequest, loan: bytes) -> Followed | None:
        tried.append(len(request.prompt_ids))
        return await whole(self, worker, request, loan) if len(tried) >= comes_from else None

    monkeypatch.setattr(House, "follow", follow)
    with house(1, 1) as flow:
        proof = flow.ask(LONG).proof
        assert moved_once(proof)
        assert (proof.kv_tokens_ahead > 0) is comes
        assert len(tried) > 3 if comes else len(tried) == 3
        flow.assert_nothing_held()


def test_an_evicted_part_is_moved_by_the_handoff() -> None:
    """The decode worker has room for one such prompt only, and two are under way."""
    with house(2, 1, kv_pool_mib=3) as flow:
        others = prompt(2100, 3)
        answers = [flow.begin(LONG), flow.begin(others)]
        assert answers[0].wait().ids == reference(LONG, GREEDY)
        assert answers[1].wait().ids == reference(others, GREEDY)
        for answer in answers:
            proof = answer.proof
            tokens = proof.kv_tokens_reused + proof.kv_tokens_received + proof.kv_tokens_recomputed + proof.kv_tokens_computed
            assert tokens == len(LONG)
        flow.assert_nothing_held()


@pytest.mark.parametrize("victim", ["prefill_0", "decode_0"])
@pytest.mark.parametrize("after_s", [0.15, 0.4])
def test_death_of_either_side_meanwhile_costs_no_text(victim: str, after_s: float) -> None:
    with house(2, 2, processes=True) as flow:
        answers = [flow.begin(LONG), flow.begin(prompt(2100, 3))]
        timer = threading.Timer(after_s, flow.signal, args=(victim, signal.SIGKILL))
        timer.start()
        assert answers[0].wait().ids == reference(LONG, GREEDY)
        assert answers[1].wait().ids == reference(prompt(2100, 3), GREEDY)
        timer.join()
        flow.assert_nothing_held(within=5.0)


@pytest.mark.parametrize("fault", ["corrupt", "drop", "truncate", "hang"])
def test_what_the_transport_spoils_is_not_used(fault: str) -> None:
    with house(1, 1, faults={fault: 0.5}, transfer_timeout_s=0.3) as flow:
        for seed in range(3):
            ids = prompt(1500, 10 + seed)
            answer = flow.ask(ids)
            assert answer.ids == reference(ids, GREEDY)
        flow.assert_nothing_held(within=5.0)


def test_cancelled_while_it_follows() -> None:
    with house(1, 1) as flow:
        for wait_s in (0.1, 0.2, 0.3, 0.5):
            answer = flow.begin(prompt(2100, int(wait_s * 100)))
            threading.Event().wait(wait_s)
            flow.cancel(answer)
            answer.wait()
            flow.assert_nothing_held(within=1.0)
