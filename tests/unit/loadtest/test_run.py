"""Sending on time, on a virtual clock; and a whole run against a small server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from loadtest.options import Options
from loadtest.record import UNFINISHED, Record, read_run
from loadtest.run import LoadTest, due
from loadtest.workload import Planned
from python_backends.core.errors import ConfigError, Unavailable
from tests.unit.loadtest.openai_server import Behaviour, openai_server


class Clock:
    """Time passes in `sleep` alone."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def _planned(time_s: float, block: int = 0) -> Planned:
    return Planned(time_s, "fixed", 8, 4, (block,), 8)


def test_each_arrival_is_handed_out_shortly_before_it_is_due() -> None:
    clock = Clock()
    times = [0.0, 0.1, 3.0, 3.0, 3.05, 60.0]
    handed = [(planned.time_s, clock.now_s) for planned in due(map(_planned, times), clock.now, clock.sleep, lambda: True)]
    assert [time_s for time_s, _ in handed] == times
    assert all(0 <= time_s - at_s <= 0.2 + 1e-9 for time_s, at_s in handed)


def test_a_clock_that_is_late_loses_nobody() -> None:
    clock = Clock()
    clock.now_s = 10.0
    handed = list(due(map(_planned, [1.0, 2.0, 11.0]), clock.now, clock.sleep, lambda: True))
    assert len(handed) == 3
    assert clock.now_s == pytest.approx(10.8)


def test_a_stop_is_heard_while_waiting() -> None:
    clock = Clock()
    handed = list(due(map(_planned, [1.0, 500.0]), clock.now, clock.sleep, lambda: clock.now_s < 5.0))
    assert [planned.time_s for planned in handed] == [1.0]
    assert clock.now_s < 5.5


@pytest.fixture
def server() -> Iterator[tuple[str, Behaviour]]:
    with openai_server() as given:
        yield given


def _test(address: str, tmp_path: Path, **options: object) -> LoadTest:
    given = {"scenario": "fixed", "input_tokens": 8, "output_tokens": 4, "duration": 1.0, "warmup": 0.2, **options}
    return LoadTest(address, Options(out=str(tmp_path), **given))  # type: ignore[arg-type]


def test_arrivals_are_sent_on_time_and_recorded(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    address, behaviour = server
    test = _test(address, tmp_path, rate=40.0)
    ended: list[Record] = []
    test.begin()
    test.send_arrivals(lambda: True, ended.append)
    directory = test.finish("make test")
    run, records = read_run(directory)
    assert 15 < len(records) == len(ended) < 80
    assert all(record.ok and len(record.arrival_s) == 4 and record.finish_reason == "length" for record in records)
    assert all(0.05 <= record.ttft_ms / 1e3 < 10.0 for record in records)
    assert all(record.input_tokens_counted == 7 and record.cached_tokens == 3 for record in records)
    assert 0 <= run.client.late_ms_p50 < 2_000
    assert run.client.cpu_s > 0
    assert run.command == "make test"
    assert run.options.nonce > 0, "drawn, so that the run can be repeated"
    assert {body["messages"][0]["content"] for body in behaviour.bodies}.__len__() == len(records), "no prompt twice"
    sent = [record.due_s for record in records]
    assert sent == sorted(sent)


def test_a_broken_answer_is_a_failure_with_its_reason(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    address, behaviour = server
    test = _test(address, tmp_path)
    behaviour.break_after = 2
    ended: list[Record] = []
    test.begin()
    test.ask(_planned(0.0), ended.append)
    behaviour.break_after, behaviour.status = None, 503
    test.ask(_planned(0.0), ended.append)
    assert [len(record.arrival_s) for record in ended] == [2, 0]
    assert "broke" in ended[0].error
    assert "HTTP 503: not today" in ended[1].error
    test.finish("x")


def test_what_is_in_flight_at_the_end_is_cancelled_and_kept(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    address, _ = server
    test = _test(address, tmp_path, output_tokens=10_000)
    test.begin()
    waiting = gevent.spawn(test.ask, Planned(0.0, "fixed", 8, 10_000, (0,), 8), lambda record: None)
    gevent.sleep(0.4)
    assert test.in_flight == 1
    waiting.kill()
    assert test.in_flight == 0
    (record,) = read_run(test.finish("x"))[1]
    assert len(record.arrival_s) > 3
    assert record.error in (UNFINISHED, "cancelled")


def test_beyond_max_in_flight_nothing_is_sent(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    address, behaviour = server
    behaviour.first_s = 0.5
    test = _test(address, tmp_path, max_in_flight=2)
    ended: list[Record] = []
    test.begin()
    gevent.joinall([gevent.spawn(test.ask, _planned(0.0, number), ended.append) for number in range(5)])
    test.finish("x")
    assert sorted(record.ok for record in ended) == [False, False, False, True, True]
    assert all("2 requests in flight" in record.error for record in ended if not record.ok)


def test_what_can_not_run_is_said_before(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    address, _ = server
    with pytest.raises(ConfigError, match="--prompt ids: chats are text"):
        _test(address, tmp_path, prompt="ids")
    with pytest.raises(Unavailable, match="no server answers"):
        LoadTest("grpc://127.0.0.1:9", Options())
