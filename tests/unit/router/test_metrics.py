"""The meter: what is counted, what is handed on and how often; histograms as counters that PromQL understands."""

from __future__ import annotations

import re

import msgspec
import pytest

from python_backends.core.types import Role, StoreCounts, WorkerLoad
from router.fleet import Fleet, WorkerView
from router.metrics import FAMILIES, Change, Kind, Meter, exported_names
from router.seams import Snapshot
from router.types import Outcome, Way
from tests.unit.router.fleet_views import heartbeat, put
from tests.unit.router.journals import entry, remote_record


class Port:
    """A sink that keeps what it is given, as Triton does. Implements router.metrics.Sink."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.pushes = 0
        self.ready = True

    def push(self, changes: list[Change]) -> None:
        self.pushes += 1
        for change in changes:
            labels = ",".join(f'{name}="{value}"' for name, value in change.labels)
            key = f"{change.name}{{{labels}}}" if labels else change.name
            before = 0.0 if change.is_gauge else self.values.get(key, 0.0)
            self.values[key] = before + change.amount


EMPTY = Snapshot({}, 0, 0, 0, 0, [])


def _metered() -> tuple[Meter, Port]:
    port = Port()
    return Meter(port), port


def _refresh(meter: Meter, snapshot: Snapshot = EMPTY, times: int = 5) -> None:
    for _ in range(times):
        meter.refresh(snapshot)


def test_a_request_is_counted_by_outcome_and_route() -> None:
    meter, port = _metered()
    record = remote_record()
    meter.decided(Way.REMOTE)
    meter.ended(record)
    meter.ended(entry("r").record(Outcome.REFUSED, "the queue is full"))
    _refresh(meter)
    values = port.values
    assert values['baton_requests_total{outcome="ok",route="remote"}'] == 1
    assert values['baton_requests_total{outcome="refused",route="none"}'] == 1
    assert values['baton_requests_total{outcome="failed",route="local"}'] == 0, "it begins at 0, so that a rate shows the first"
    assert values["baton_output_tokens_total"] == 10
    assert values['baton_prompt_tokens_total{source="received"}'] == 84
    assert values['baton_prefill_tokens_total{source="reused"}'] == 32
    assert values["baton_kv_received_bytes_total"] == 1 << 20
    assert values['baton_kv_wire_bytes_total{codec="lossless"}'] == 900_000
    assert values['baton_handoffs_total{verdict="verified"}'] == 1


def test_what_stores_have_done_is_counted() -> None:
    meter, port = _metered()
    record = remote_record()
    assert record.proof is not None
    proof = msgspec.structs.replace(
        record.proof, prefill_tokens_peer=48, kv_tokens_node=32, kv_tokens_remote=16, store_bytes=700
    )
    meter.ended(msgspec.structs.replace(record, proof=proof))
    labels = 'worker="decode",role="decode",tier="node"'
    for epoch, read in ((1, 5), (1, 8), (2, 3)):  # the worker counts from 0 in its new life
        beat = heartbeat("decode", Role.DECODE, epoch=epoch)
        counts = StoreCounts(read=read, used_bytes=100 * read, up=epoch == 1)
        _refresh(
            meter, Snapshot({}, 0, 0, 0, 0, [WorkerView(msgspec.structs.replace(beat, stores={"node": counts}), heard=0.0)])
        )
    values = port.values
    assert values[f'baton_store_blocks_total{{{labels},event="read"}}'] == 8 + 3
    assert values[f"baton_store_used_bytes{{{labels}}}"] == 300
    assert values[f"baton_store_up{{{labels}}}"] == 0
    assert values["baton_store_bytes_total"] == 700
    assert values['baton_prompt_tokens_total{source="node"}'] == 32
    assert values['baton_prompt_tokens_total{source="remote"}'] == 16
    assert values['baton_prefill_tokens_total{source="peer"}'] == 48


def test_histograms_are_cumulative_and_their_parts_agree() -> None:
    meter, port = _metered()
    for _ in range(3):
        meter.ended(remote_record())
    _refresh(meter)
    meter.ended(remote_record())
    _refresh(meter)
    buckets = {
        float(match[1].replace("+Inf", "inf")): value
        for key, value in port.values.items()
        if (match := re.fullmatch(r'baton_ttft_seconds_bucket\{route="remote",le="(.*)"\}', key))
    }
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets[0.01] == 0
    assert buckets[0.025] == buckets[float("inf")] == 4
    assert port.values['baton_ttft_seconds_count{route="remote"}'] == 4
    assert port.values['baton_ttft_seconds_sum{route="remote"}'] == pytest.approx(0.08)
    parts = sum(port.values[f'baton_{part}_seconds_sum{{route="remote"}}'] for part in ("queue", "prefill"))
    assert parts == pytest.approx(port.values['baton_ttft_seconds_sum{route="remote"}'])


def test_several_tokens_share_the_time_before_them() -> None:
    meter, port = _metered()
    meter.tokens(4, 0.04)
    _refresh(meter)
    assert port.values["baton_itl_seconds_count"] == 4
    assert port.values["baton_itl_seconds_sum"] == pytest.approx(0.04)


def test_an_idle_router_hands_on_nothing() -> None:
    meter, port = _metered()
    snapshot = Snapshot({}, 0, 0, 0, 0, [WorkerView(heartbeat(), heard=0.0)])
    meter.ended(remote_record())
    _refresh(meter, snapshot, times=10)
    before = port.pushes
    _refresh(meter, snapshot, times=50)
    assert port.pushes == before


def test_a_sink_that_is_busy_gets_everything_later() -> None:
    meter, port = _metered()
    port.ready = False
    for _ in range(7):
        meter.ended(remote_record())
        _refresh(meter)
    assert port.values == {}
    port.ready = True
    _refresh(meter)
    assert port.values['baton_requests_total{outcome="ok",route="remote"}'] == 7
    assert port.values['baton_e2e_seconds_count{route="remote"}'] == 7


def test_workers_their_deaths_and_new_lives() -> None:
    meter, port = _metered()
    worker = WorkerView(heartbeat("decode", Role.DECODE), heard=0.0)
    _refresh(meter, Snapshot({}, 3, 2, 40, 9, [worker]))
    labels = 'worker="decode",role="decode"'
    assert port.values[f"baton_worker_up{{{labels}}}"] == 1
    assert port.values["baton_ready"] == 1
    assert port.values["baton_router_requests"] == 3
    worker.up = False
    _refresh(meter, Snapshot({}, 0, 0, 0, 9, [worker]))
    assert port.values[f"baton_worker_up{{{labels}}}"] == 0
    assert port.values["baton_ready"] == 0
    _refresh(meter, Snapshot({}, 0, 0, 0, 9, [WorkerView(heartbeat("decode", Role.DECODE, epoch=2), heard=0.0)]))
    assert port.values[f"baton_worker_starts_total{{{labels}}}"] == 2


def test_a_worker_that_is_gone_holds_nothing() -> None:
    """Else alerts on full pools and piled up leases would fire for the dead."""
    meter, port = _metered()
    load = WorkerLoad(running_requests=3, held_blocks=7, free_blocks=1, total_blocks=8, active_leases=2)
    beat = msgspec.structs.replace(heartbeat(), load=load)
    held = 'baton_kv_blocks{worker="decode",role="decode",state="held"}'
    _refresh(meter, Snapshot({}, 0, 0, 0, 0, [WorkerView(beat, 0.0)]))
    assert port.values[held] == 7
    gone = WorkerView(beat, 0.0)
    gone.up = False
    _refresh(meter, Snapshot({}, 0, 0, 0, 0, [gone]))
    assert port.values[held] == port.values['baton_leases{worker="decode",role="decode"}'] == 0


def test_how_full_a_worker_is_is_told_of_those_that_have_streams() -> None:
    meter, port = _metered()
    fleet = Fleet()
    decode, _ = put(fleet, "decode", Role.DECODE, streams=4), put(fleet, "prefill", Role.PREFILL)
    full = 'baton_worker_fill_ratio{worker="decode",role="decode"}'
    _refresh(meter, Snapshot({}, 0, 0, 0, 0, list(fleet)))
    assert port.values[full] == 0.5, "of a batch of eight"
    _refresh(meter, Snapshot({}, 0, 0, 0, 0, list(fleet), longest_step_ms=7.0))
    assert port.values[full] == 0.8, "of five streams whose step takes so long"
    assert not [key for key in port.values if key.startswith("baton_worker_fill_ratio") and "prefill" in key]
    decode.up = False
    _refresh(meter, Snapshot({}, 0, 0, 0, 0, list(fleet)))
    assert port.values[full] == 0.0


def test_names_have_units_and_nobody_is_there_twice() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert re.fullmatch(r"baton_[a-z0-9_]+", family.name)
        assert family.meaning
        if family.kind is Kind.COUNTER:
            assert family.name.endswith("_total")
        if family.kind is Kind.HISTOGRAM:
            assert family.name.endswith(("_seconds", "_tokens", "_ratio"))
            assert list(family.buckets) == sorted(set(family.buckets))
    assert "baton_ttft_seconds_bucket" in exported_names()


def test_only_what_the_table_knows_is_counted_with_the_labels_it_says() -> None:
    meter, port = _metered()
    meter.decided(Way.CACHED)
    meter.retried()
    meter.tokens(1, 0.01)
    meter.ended(remote_record())
    _refresh(meter, Snapshot({}, 1, 0, 1, 1, [WorkerView(heartbeat(), heard=0.0)]))
    labels = {name: set(family.labels) for family in FAMILIES for name in family.exported}
    for key in port.values:
        name, _, rest = key.partition("{")
        assert set(re.findall(r"(\w+)=", rest)) - {"le"} == labels[name], key


def test_of_a_worker_that_left_nothing_stands() -> None:
    """Its last queue would keep an autoscaler from shrinking for ever."""
    meter, port = _metered()
    stays, leaves = (WorkerView(heartbeat(name), 0.0) for name in ("decode", "decode_1"))
    _refresh(meter, Snapshot({}, 0, 0, 0, 0, [stays, leaves]))
    assert port.values[f'baton_worker_up{{worker="decode_1",role="{leaves.role.value}"}}'] == 1
    _refresh(meter, Snapshot({}, 0, 0, 0, 0, [stays]))
    left = {key: value for key, value in port.values.items() if 'worker="decode_1"' in key and "_total" not in key}
    assert len(left) > 5
    assert not any(left.values())
    assert port.values[f'baton_worker_up{{worker="decode",role="{stays.role.value}"}}'] == 1
    _refresh(meter, Snapshot({}, 0, 0, 0, 0, [stays, leaves]))
    assert port.values[f'baton_worker_up{{worker="decode_1",role="{leaves.role.value}"}}'] == 1


def test_computing_is_counted_from_when_the_router_came_and_through_the_workers_lives() -> None:
    """Autoscaling takes its rate: a restarted router must not make days of work look like those of a minute."""
    meter, port = _metered()
    name = 'baton_worker_busy_seconds_total{worker="decode",role="decode"}'
    found = []
    for epoch, busy_s in ((1, 5000.0), (1, 5003.0), (2, 4.0)):
        beat = msgspec.structs.replace(heartbeat("decode", Role.DECODE, epoch=epoch), load=WorkerLoad(busy_s=busy_s))
        for _ in range(21):  # what changes slowly is not looked at each time
            _refresh(meter, Snapshot({}, 0, 0, 0, 0, [WorkerView(beat, 0.0)]))
        found.append(port.values[name])
    assert found == [0, 3, 7]
