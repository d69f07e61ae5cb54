"""Whole requests over every transport: the same text, the way in the proof, and recomputing when the source is gone."""

from __future__ import annotations

import signal
import threading
from typing import Literal

import msgspec
import pytest

from python_backends.core.types import SamplingParams
from python_backends.kv.transfer.auto import AutoTransport
from router.types import Way
from tests.flow.house import FlowHouse, Transport, ask_all, deployment, eventually, fake_engine, prompt, reference
from tests.kv.test_transports import nixl

SAMPLING = SamplingParams(seed=3, max_tokens=12)
TRANSPORTS: list[Transport] = ["auto", "shm", "tcp"]  # nixl's failures: tests/kv/test_nixl.py


def house(transport: Transport, *, prefill: int = 1, transfer_timeout_s: float = 5.0) -> FlowHouse:
    config = deployment(
        prefill, 1, transport=transport, engine=fake_engine(kv_pool_mib=16), transfer_timeout_s=transfer_timeout_s
    )
    return FlowHouse(config, processes=transport != "nixl")  # which takes seconds to load


def test_workers_of_two_hosts_hand_over_by_tcp() -> None:
    with FlowHouse(deployment(1, 1, engine=fake_engine(), listen="127.0.0.1")) as flow:
        source = flow.workers["prefill_0"].worker._engine._transport
        assert isinstance(source, AutoTransport)
        source._host = "another"
        answer = flow.ask(prompt(200), SAMPLING)
        assert answer.ids == reference(prompt(200), SAMPLING)
        proof = answer.proof
        assert (proof.transport, proof.transport_why) == ("tcp", "another host; no other fabric in common")
        assert (proof.kv_tokens_received, proof.kv_tokens_recomputed, proof.digest) == (200, 0, "verified")
        flow.assert_nothing_held()


@pytest.mark.parametrize("codec", ["auto", "lossless"])
def test_the_text_is_the_same_however_kv_travels_and_the_proof_says_how(codec: Literal["auto", "lossless"]) -> None:
    with FlowHouse(deployment(1, 1, transport="tcp", codec=codec)) as flow:
        answer = flow.ask(prompt(200), SAMPLING)
        assert answer.ids == reference(prompt(200), SAMPLING)
        proof = answer.proof
        assert (proof.kv_tokens_received, proof.kv_tokens_recomputed, proof.digest) == (200, 0, "verified")
        if codec == "lossless":
            assert proof.kv_codec == "lossless"
            assert 0 < proof.kv_wire_bytes < proof.kv_bytes * 1.01
        else:
            assert (proof.kv_codec, proof.kv_wire_bytes) == ("raw", proof.kv_bytes)


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_servers_with_other_block_sizes_hand_over_to_each_other(transport: Transport) -> None:
    config = deployment(1, 1, transport=transport)
    other = msgspec.structs.replace(config, engine=msgspec.structs.replace(config.engine, block_size=32))
    with FlowHouse(config, workers_up=False) as flow:
        flow.start("prefill_0")
        flow.start("decode_0", config=other)
        for _ in range(2):
            answer = flow.ask(prompt(200), SAMPLING)
            assert answer.ids == reference(prompt(200), SAMPLING)
            proof = answer.proof
            assert (proof.route, proof.digest, proof.kv_rounded) == (Way.REMOTE, "verified", "")
            assert (proof.kv_tokens_received + proof.kv_tokens_reused, proof.kv_tokens_recomputed) == (200, 0)
        assert proof.kv_tokens_reused == 192
        flow.assert_nothing_held()


@pytest.mark.parametrize("transport", [*TRANSPORTS, "nixl"])
def test_everything_is_received_and_the_proof_says_how(transport: Transport) -> None:
    if transport == "nixl":
        nixl().close()  # skips where it isn't installed
    prompts = [prompt(50 + 37 * i, i) for i in range(12)]
    with house(transport) as flow:
        for answer, ids in zip(ask_all(flow, prompts, SAMPLING), prompts, strict=True):
            assert answer.ids == reference(ids, SAMPLING)
            proof = answer.proof
            assert (proof.route, proof.digest) == (Way.REMOTE, "verified")
            assert (proof.kv_tokens_received, proof.kv_tokens_recomputed) == (len(ids), 0)
            expected = ("shm", "same host") if transport == "auto" else (transport, "")
            assert (proof.transport, proof.transport_why) == expected
        flow.assert_nothing_held()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_source_killed_under_way_costs_a_recompute_or_a_retry(transport: Transport) -> None:
    prompts = [prompt(100 + 50 * i, i) for i in range(10)]
    with house(transport, prefill=2) as flow:
        flow.ask(prompt(60, 99), SAMPLING)
        killer = threading.Timer(0.03, flow.kill, args=("prefill_0",))
        killer.start()
        for answer, ids in zip(ask_all(flow, prompts, SAMPLING), prompts, strict=True):
            assert answer.error is None, repr(answer.error)
            assert answer.ids == reference(ids, SAMPLING)
        killer.join()
        flow.assert_nothing_held()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stopped_source_costs_the_time_out_and_a_recompute(transport: Transport) -> None:
    """The decode worker is held up, too, until the source can't answer any more."""
    with house(transport, transfer_timeout_s=0.5) as flow:
        flow.ask(prompt(60, 99), SAMPLING)
        flow.signal("decode_0", signal.SIGSTOP)
        answer = flow.begin(prompt(300), SAMPLING)
        assert answer.first.wait(10)
        flow.signal("prefill_0", signal.SIGSTOP)
        flow.signal("decode_0", signal.SIGCONT)
        assert answer.wait().ids == reference(prompt(300), SAMPLING)
        proof = answer.proof
        if transport in ("auto", "shm"):  # memory can be read whether its owner runs or not
            assert proof.digest == "verified"
        else:
            assert (proof.digest, proof.kv_tokens_recomputed) == ("transfer_timeout", 300)
        flow.signal("prefill_0", signal.SIGCONT)
        assert eventually(lambda: flow.is_up("prefill_0"), 5)
        again = flow.ask(prompt(200, 5), SAMPLING)
        assert again.ids == reference(prompt(200, 5), SAMPLING)
        flow.assert_nothing_held()
