"""What the journal says of real requests, and how front ends hear of it through the door."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from python_backends.core.errors import Unavailable
from python_backends.core.types import SamplingParams, WorkerId
from router.door.client import DoorClient
from router.door.door import Door
from router.journal import Record
from router.phases import phases
from router.trace_context import continue_trace
from router.types import ClientRequest, Outcome, Sending, Wish
from tests.flow.house import GREEDY, TIMEOUT_S, FlowHouse, deployment, eventually, fake_engine, prompt

LONG = SamplingParams(seed=1, max_tokens=2000)


def _journal(house: FlowHouse) -> list[Record]:
    records: list[Record] = house.on_loop(lambda: house.service.house.journal.after(0, 1000))
    return records


def test_every_request_leaves_one_record_that_agrees_with_its_proof() -> None:
    with FlowHouse(deployment(1, 1, 1)) as house:
        answers = [house.ask(prompt(100, i), wish=wish) for i, wish in enumerate((Wish.REMOTE, Wish.LOCAL, Wish.AGGREGATED))]
        records = _journal(house)
        assert [record.proof for record in records] == [answer.proof for answer in answers]
        for record in records:
            assert record.outcome is Outcome.OK
            assert (record.prompt_tokens, record.output_tokens) == (100, GREEDY.max_tokens)
            assert record.proof is not None
            assert record.proof.request_id == record.id
            assert record.proof.trace_id == record.trace.trace_id
            assert record.route == record.proof.route
            assert record.arrival_ns == pytest.approx(record.proof.arrival_ns, abs=5e6)


@pytest.mark.parametrize("wish", [Wish.REMOTE, Wish.LOCAL])
def test_phases_add_up_to_what_was_measured(wish: Wish) -> None:
    """Within 3% and half a millisecond: the instants are taken at two places that follow each other."""
    engine = fake_engine(prefill_us_per_token=300, step_us=20_000)
    with FlowHouse(deployment(engine=engine)) as house:
        began = time.monotonic()
        answer = house.ask(prompt(300), wish=wish)
        (record,) = _journal(house)
    ms = {phase.name: phase.ms for phase in phases(record)}
    to_first = ms["queue"] + ms["prefill"]
    to_second = to_first + ms.get("handoff", 0.0) + ms["first decode"]
    assert to_first == pytest.approx((answer.first_at - began) * 1e3, rel=0.03, abs=3)
    assert to_second == pytest.approx(record.second_token_ms, rel=0.03, abs=0.5)
    assert to_second + ms["decode"] - ms["first decode"] == pytest.approx(record.age_ms, rel=0.03, abs=0.5)


def test_refused_failed_and_cancelled_requests_are_told_with_their_reason() -> None:
    with FlowHouse(deployment(engine=fake_engine(step_us=2000))) as house:
        house.begin([]).wait()
        late = house.begin(prompt(50), LONG, timeout_s=0.1).wait()
        gone = house.begin(prompt(50, 1), LONG)
        assert gone.first.wait(TIMEOUT_S)
        house.cancel(gone)
        gone.wait()
        assert eventually(lambda: len(_journal(house)) == 3)
        records = _journal(house)
        assert [record.outcome for record in records] == [Outcome.REFUSED, Outcome.FAILED, Outcome.CANCELLED]
        assert "prompt is empty" in records[0].error
        assert records[1].error == str(late.error)
        assert records[2].output_tokens > 0
        assert house.on_loop(lambda: house.service.house.journal.live(10)) == []


def test_a_worker_that_dies_under_a_request_is_told() -> None:
    config = deployment(1, 2, engine=fake_engine(step_us=5000))
    with FlowHouse(config, processes=True) as house:
        answer = house.begin(prompt(60), SamplingParams(seed=3, max_tokens=60), Wish.REMOTE)
        assert answer.first.wait(TIMEOUT_S)
        assert eventually(lambda: len(answer.ids) > 5, TIMEOUT_S)
        (live,) = house.on_loop(lambda: house.service.house.journal.live(10))
        house.kill(live.decode_worker)
        answer.wait()
        (record,) = _journal(house)
        assert record.outcome is Outcome.OK
        assert record.attempts == 2
        (trouble,) = record.troubles
        assert live.decode_worker in trouble.why
        assert 0 < trouble.ms < record.age_ms


def _with_door(house: FlowHouse, path: Path) -> str:
    address = f"ipc://{path}/door"
    house.service.attend(lambda: Door(house.service, address).attend())
    return address


async def _up(client: DoorClient) -> None:
    while client.router is None:
        await asyncio.sleep(0.01)


def test_whoever_watches_is_told_everything_in_pieces(tmp_path: Path) -> None:
    with FlowHouse() as house:
        address = _with_door(house, tmp_path)
        for number in range(250):
            house.begin([number + 300, 5, 6], SamplingParams(max_tokens=1, temperature=0))
        assert eventually(lambda: len(_journal(house)) == 250, TIMEOUT_S)

        async def watch() -> None:
            async with DoorClient(address, 5.0) as client:
                await _up(client)
                news = await client.news(0)
                assert news is not None
                ids = {record.id for record in news.ended}
                while news.more:
                    assert len(news.ended) <= 200
                    news = await client.news(news.sequence)
                    assert news is not None
                    ids |= {record.id for record in news.ended}
                assert len(ids) == 250
                assert {worker.id for worker in news.workers} == {"prefill_0", "decode_0"}
                assert all(worker.up and worker.load.total_blocks > 0 for worker in news.workers)
                assert (news.live, news.requests, news.trouble) == ([], 0, "")
                again = await client.news(news.sequence)
                assert again is not None
                assert (again.ended, again.sequence) == ([], news.sequence)

        asyncio.run(asyncio.wait_for(watch(), TIMEOUT_S))


def test_requests_in_flight_and_deaths_are_news(tmp_path: Path) -> None:
    config = deployment(engine=fake_engine(step_us=3000))
    with FlowHouse(config, processes=True) as house:
        address = _with_door(house, tmp_path)
        answer = house.begin(prompt(40), LONG)
        assert answer.first.wait(TIMEOUT_S)

        async def watch() -> None:
            async with DoorClient(address, 5.0) as client:
                await _up(client)
                news = await client.news(0)
                assert news is not None
                (live,) = news.live
                assert live.outcome is None
                assert live.output_tokens >= 1
                house.kill("prefill_0")
                while news is None or all(worker.up for worker in news.workers):
                    news = await client.news(0)
                assert [worker.id for worker in news.workers if not worker.up] == [WorkerId("prefill_0")]

        asyncio.run(asyncio.wait_for(watch(), TIMEOUT_S))
        house.cancel(answer)
        answer.wait()


def test_requests_are_found_through_the_door(tmp_path: Path) -> None:
    trace = continue_trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    with FlowHouse() as house:
        address = _with_door(house, tmp_path)

        async def test() -> None:
            async with DoorClient(address, 5.0) as client:
                await _up(client)
                request = ClientRequest(GREEDY, input_ids=prompt(20), client_id="mine", answer_id="cmpl-1", trace=trace)
                await client.ask(request, Sending.WHOLE).whole()
                found = await asyncio.gather(*(client.find(what) for what in ("mine", "cmpl-1", trace.trace_id, "latest")))
                assert [[record.client_id for record in records] for records in found] == [["mine"]] * 4
                assert await client.find("nobody") == []

        asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))


def test_without_a_router_there_is_no_news(tmp_path: Path) -> None:
    async def test() -> None:
        async with DoorClient(f"ipc://{tmp_path}/door", 0.3) as client:
            assert await client.news(0) is None
            with pytest.raises(Unavailable, match="the router is not up"):
                await client.find("latest")

    asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))
