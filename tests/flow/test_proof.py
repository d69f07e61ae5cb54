"""The proof says what really moved, and short answers never reach the decode worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from python_backends.core.messages import Work
from python_backends.core.types import FinishReason, SamplingParams, WorkerId
from python_backends.engines.fake import FakeRunner
from router.seams import Destination
from router.types import Way, Wish
from tests.flow.house import GREEDY, FlowHouse, deployment, prompt, reference


@pytest.fixture(scope="module")
def house() -> Iterator[FlowHouse]:
    with FlowHouse(deployment(prefill=2, decode=1, aggregated=1)) as house:
        yield house


def test_remote_receives_every_prompt_token(house: FlowHouse) -> None:
    proof = house.ask(prompt(100, 1)).proof
    assert proof.route == Way.REMOTE
    assert (proof.kv_tokens_received, proof.kv_tokens_reused) == (100, 0)
    assert (proof.kv_tokens_recomputed, proof.kv_tokens_computed) == (0, 0)
    assert (proof.prefill_tokens_computed, proof.prefill_tokens_reused) == (100, 0)
    assert proof.kv_bytes == 7 * (1 << 20) // 64
    assert (proof.digest, proof.transport, proof.attempts) == ("verified", "shm", 1)
    assert (proof.prefill_worker[:-1], proof.decode_worker) == ("prefill_", "decode_0")


def test_the_second_time_blocks_are_reused_on_both_sides(house: FlowHouse) -> None:
    first = house.ask(prompt(100, 2)).proof
    proof = house.ask(prompt(100, 2)).proof
    assert (proof.kv_tokens_reused, proof.kv_tokens_received, proof.kv_tokens_recomputed) == (96, 4, 0)
    again = proof.prefill_worker == first.prefill_worker  # the other one, where a slow machine makes that look better
    assert (proof.prefill_tokens_reused, proof.prefill_tokens_computed) == ((96, 4) if again else (0, 100))


def test_other_tenants_reuse_nothing(house: FlowHouse) -> None:
    house.begin(prompt(100, 3), salt="a").wait()
    proof = house.begin(prompt(100, 3), salt="b").wait().proof
    assert (proof.kv_tokens_reused, proof.prefill_tokens_reused, proof.kv_tokens_received) == (0, 0, 100)


@pytest.mark.parametrize(("wish", "way"), [(Wish.LOCAL, Way.LOCAL), (Wish.AGGREGATED, Way.AGGREGATED)])
def test_nothing_moves_without_a_prefill_worker(house: FlowHouse, wish: Wish, way: Way) -> None:
    proof = house.ask(prompt(100, 4), wish=wish).proof
    assert proof.route == way
    assert (proof.kv_tokens_received, proof.kv_tokens_recomputed, proof.kv_bytes) == (0, 0, 0)
    assert proof.kv_tokens_computed + proof.kv_tokens_reused >= 99
    assert (proof.digest, proof.transport) == ("none", "")


@pytest.mark.parametrize("wish", [Wish.REMOTE, Wish.LOCAL])
def test_times_add_up(house: FlowHouse, wish: Wish) -> None:
    proof = house.ask(prompt(60, 5), wish=wish).proof
    assert proof.queue_ms + proof.prefill_ms == pytest.approx(proof.ttft_ms)
    parts = (proof.queue_ms, proof.prefill_ms, proof.handoff_ms, proof.first_decode_ms)
    assert all(part >= 0 for part in parts)
    assert sum(parts) <= proof.e2e_ms


def test_max_tokens_1_never_reaches_decode(house: FlowHouse) -> None:
    sent = _submitted(house)
    answer = house.ask(prompt(50, 6), SamplingParams(temperature=0, max_tokens=1))
    assert answer.ids == reference(prompt(50, 6), SamplingParams(temperature=0, max_tokens=1))
    assert answer.finish_reason is FinishReason.LENGTH
    assert [name[:-2] for name in sent] == ["prefill"]
    assert answer.proof.kv_tokens_received == 0
    house.assert_nothing_held()


def test_a_stop_string_in_the_first_token_never_reaches_decode(house: FlowHouse) -> None:
    sent = _submitted(house)
    (first,) = reference(prompt(50, 7), SamplingParams(temperature=0, max_tokens=1))
    answer = house.ask(prompt(50, 7), SamplingParams(temperature=0, max_tokens=8, stop=(f"<{first}>",)))
    assert (answer.text, answer.finish_reason) == ("", FinishReason.STOP)
    assert [name[:-2] for name in sent] == ["prefill"]
    house.assert_nothing_held()


@pytest.mark.parametrize("wish", [Wish.REMOTE, Wish.LOCAL, Wish.AGGREGATED])
def test_a_stop_string_later_ends_the_text_before_it(house: FlowHouse, wish: Wish) -> None:
    ids = reference(prompt(50, 8), GREEDY)
    stop = f"{ids[3]}><{ids[4]}"
    answer = house.ask(prompt(50, 8), SamplingParams(temperature=0, max_tokens=500, stop=(stop,)), wish)
    assert answer.text == "".join(f"<{token}>" for token in ids[:3]) + "<"
    assert (answer.ids, answer.finish_reason) == (ids[:5], FinishReason.STOP)
    house.assert_nothing_held()


@pytest.mark.parametrize("at", [0, 2])
def test_a_stop_token_ends_the_text_before_it(house: FlowHouse, at: int) -> None:
    ids = reference(prompt(50, 9), GREEDY)
    answer = house.ask(prompt(50, 9), SamplingParams(temperature=0, max_tokens=500, stop_token_ids=(ids[at],)))
    assert answer.text == "".join(f"<{token}>" for token in ids[:at])
    assert (answer.ids, answer.finish_reason) == (ids[: at + 1], FinishReason.STOP)


def _submitted(house: FlowHouse) -> list[str]:
    """Names of the workers that are given work from now on."""
    names: list[str] = []
    submit = house._submit

    def watched(worker: Destination, work: Work, failed: Callable[[str], None]) -> None:
        names.append(worker.model)
        submit(worker, work, failed)

    house.service._submit = watched
    return names


def test_the_router_knows_who_lends_cores_to_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRunner, "cores", "board")
    with FlowHouse(deployment(1, 1)) as flow:
        prefill, decode = (flow.service.house.fleet.get(WorkerId(name)) for name in ("prefill_0", "decode_0"))
        assert prefill is not None
        assert decode is not None
        assert prefill.on_cores is decode.on_cores
        assert set(prefill.on_cores) == {prefill, decode}
