"""What is refused, when, and by which error - and that time runs out for everybody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.errors import ConfigError, DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from python_backends.core.messages import Work
from python_backends.core.types import SamplingParams
from python_backends.worker.service import Worker
from router.lifecycle import State
from router.seams import Destination
from router.types import MAX_INPUT_IDS, MAX_NAME_CHARS, ClientRequest, Outcome, Wish
from tests.flow.house import GREEDY, VOCABULARY, Answer, FlowHouse, deployment, eventually, fake_engine, prompt, reference

ENDLESS = SamplingParams(temperature=0, max_tokens=100_000)
SHORTER = SamplingParams(temperature=0, max_tokens=200)


@pytest.fixture(scope="module")
def house() -> Iterator[FlowHouse]:
    with FlowHouse(deployment(engine=fake_engine(step_us=2000))) as house:
        yield house


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (ClientRequest(GREEDY, input_ids=[]), "empty"),
        (ClientRequest(GREEDY, input_ids=[5, -1]), "input_ids"),
        (ClientRequest(GREEDY, input_ids=[5, VOCABULARY]), "input_ids"),
        (ClientRequest(SamplingParams(logit_bias={VOCABULARY: 1.0}), input_ids=[5]), "logit_bias"),
        (ClientRequest(GREEDY, input_ids=[5] * 8192), "8192"),
        (ClientRequest(GREEDY, text="x" * 1_000_001), "max_prompt_bytes"),
        (ClientRequest(GREEDY, input_ids=[5], salt="s" * (MAX_NAME_CHARS + 1)), "cache_salt"),
        (ClientRequest(GREEDY, input_ids=[5], client_id="i" * (MAX_NAME_CHARS + 1)), "id has 1001 characters"),
        (ClientRequest(GREEDY, input_ids=[5] * (MAX_INPUT_IDS + 1)), "input_ids has 1000001 tokens"),
    ],
)
def test_bad_requests_are_refused_at_once(house: FlowHouse, request_: ClientRequest, named: str) -> None:
    answer = Answer()
    began = time.monotonic()
    house.service.accept(request_, answer)
    answer.wait()
    assert time.monotonic() - began < 1
    assert isinstance(answer.error, InvalidRequest)
    assert named in str(answer.error)
    assert house.counts.outcomes[-1] is Outcome.REFUSED
    house.assert_nothing_held()


def test_long_texts_are_tokenised_off_the_loop(house: FlowHouse) -> None:
    ids = prompt(2000, 4)
    answer = Answer()
    house.service.accept(ClientRequest(GREEDY, text="".join(f"<{token}>" for token in ids)), answer)
    assert answer.wait().ids == reference(ids, GREEDY)


@pytest.mark.parametrize("wish", [Wish.REMOTE, Wish.LOCAL])
def test_the_deadline_ends_a_running_request(house: FlowHouse, wish: Wish) -> None:
    for seed in range(3):
        began = time.monotonic()
        answer = house.begin(prompt(30, seed), ENDLESS, wish, timeout_s=0.2).wait()
        assert time.monotonic() - began < 0.5
        assert type(answer.error) is DeadlineExceeded
        assert answer.ids == reference(prompt(30, seed), SHORTER)[: len(answer.ids)]
        assert answer.late == 0
    house.assert_nothing_held()


def test_the_deadline_ends_a_waiting_request() -> None:
    with FlowHouse(workers_up=False) as house:
        answer = house.begin(prompt(30), timeout_s=0.1).wait(1)
        assert type(answer.error) is DeadlineExceeded
        house.assert_nothing_held()


def test_without_workers_there_is_one_clear_error() -> None:
    with FlowHouse(deployment(router=RouterConfig(worker_wait_s=0.2)), workers_up=False) as house:
        began = time.monotonic()
        answer = house.ask(prompt(30))
        assert 0.2 <= time.monotonic() - began < 1
        assert type(answer.error) is Unavailable
        assert "no decode or aggregated worker is up" in str(answer.error)
        house.assert_nothing_held()


def test_a_full_house_refuses_at_once() -> None:
    with FlowHouse(deployment(router=RouterConfig(max_requests=4))) as house:
        running = [house.begin(prompt(30, i), ENDLESS) for i in range(4)]
        began = time.monotonic()
        refused = [house.begin(prompt(30, i)).wait(1) for i in range(10)]
        assert time.monotonic() - began < 0.5
        assert all(type(answer.error) is QueueFull for answer in refused)
        for answer in running:
            house.cancel(answer)
            answer.wait()
        house.assert_nothing_held()
        assert house.ask(prompt(30)).error is None


def test_too_many_waiting_tokens_are_refused_at_once() -> None:
    config = deployment(router=RouterConfig(mode="always-remote", max_queued_tokens=1000, worker_wait_s=5))
    with FlowHouse(config, workers_up=False) as house:
        first = house.begin(prompt(5000))  # one may always wait
        assert eventually(lambda: house.service.house.admission.queued_tokens == 5000)
        refused = house.begin(prompt(5)).wait(1)
        assert type(refused.error) is QueueFull
        house.start("prefill_0", "decode_0")
        assert first.wait().ids == reference(prompt(5000), GREEDY)
        assert house.ask(prompt(900)).error is None
        house.assert_nothing_held()


def test_requests_wait_for_the_first_worker() -> None:
    with FlowHouse(deployment(router=RouterConfig(worker_wait_s=10)), workers_up=False) as house:
        answers = [house.begin(prompt(60, i)) for i in range(3)]
        assert eventually(lambda: all(answer.state is State.QUEUED for answer in answers))
        house.start("decode_0")
        for i, answer in enumerate(answers):
            assert answer.wait().ids == reference(prompt(60, i), GREEDY)


def test_a_stop_token_outside_the_vocabulary_never_stops(house: FlowHouse) -> None:
    sampling = msgspec.structs.replace(GREEDY, stop_token_ids=(VOCABULARY, 2**31 - 1), min_tokens=2)
    assert house.ask(prompt(20), sampling).ids == house.ask(prompt(20)).ids


def test_a_prompt_that_only_a_prefill_worker_can_take_is_refused_at_once() -> None:
    config = deployment(engine=fake_engine(kv_pool_mib=1))
    large, small = config.workers
    config = msgspec.structs.replace(config, workers=(msgspec.structs.replace(large, kv_pool_mib=8), small))
    with FlowHouse(config) as house:
        began = time.monotonic()
        answer = house.ask(prompt(2000))
        assert time.monotonic() - began < 1
        assert type(answer.error) is InvalidRequest


def test_a_worker_that_sees_the_deadline_first_ends_the_request_with_the_same_error() -> None:
    with FlowHouse(deployment(engine=fake_engine(step_us=2000))) as house:
        submit = house._submit

        def hurried(worker: Destination, work: Work, failed: Callable[[str], None]) -> None:
            request = msgspec.structs.replace(work.request, deadline=time.monotonic() + 0.1)
            submit(worker, msgspec.structs.replace(work, request=request), failed)

        house.service._submit = hurried
        assert type(house.ask(prompt(30), ENDLESS).error) is DeadlineExceeded
        house.assert_nothing_held()


def test_shutting_down_answers_everybody() -> None:
    with FlowHouse() as house:
        answers = [house.begin(prompt(30, i), ENDLESS) for i in range(5)]
        answers[-1].first.wait(5)
        last = house.begin(prompt(30, 9), ENDLESS)
        house.service.close()
        for answer in [*answers, last]:
            assert type(answer.wait(1).error) is Unavailable
            assert answer.late == 0


def test_a_bad_address_is_an_error_and_leaves_nothing() -> None:
    threads = threading.active_count()
    config = deployment()
    with pytest.raises(ConfigError, match=r"can't listen at ipc:///no/such/place; .*|can't listen at ipc:///no/such/place: "):
        Worker(config, config.workers[0], "ipc:///no/such/place", b"k" * 32)
    assert threading.active_count() <= threads


def test_streams_need_no_threads() -> None:
    with FlowHouse(deployment(engine=fake_engine(step_us=2000))) as house:
        house.ask(prompt(30))
        house.ask(prompt(40, 7))
        before = _router_threads()
        answers = [house.begin(prompt(30, i), ENDLESS) for i in range(32)]
        assert all(answer.first.wait(10) for answer in answers)
        assert _router_threads() == before
        for answer in answers:
            house.cancel(answer)
            answer.wait()
        house.assert_nothing_held()


def _router_threads() -> int:
    """Without those that belong to the workers of this process."""
    return sum(not thread.name.startswith(("engine", "fetch", "channel")) for thread in threading.enumerate())
