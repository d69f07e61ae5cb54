"""The whole router with TensorRT-LLM workers, each in a process of its own over the fake: what a client sees, and what is
left in TensorRT-LLM's KV cache afterwards."""

from __future__ import annotations

import logging
import os
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.config import Deployment, EngineConfig, HealthConfig, RouterConfig, TransferConfig, WorkerConfig
from python_backends.core.config import ModelConfig as Model
from python_backends.core.types import Role, SamplingParams, WorkerId
from router.lifecycle import State
from tests.engines.trtllm.playing import FAKES, Knobs, trtllm_config
from tests.flow import house as flow_house
from tests.flow.house import Answer, FlowHouse, eventually, prompt, reference

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=300)
LEASE_S = 1.0


def _work(directory: Path, config: Deployment, worker: WorkerConfig, address: str, key: bytes, line: Connection) -> None:
    """The life of a worker process, with the fake where tensorrt_llm is looked for."""
    sys.path.insert(0, str(FAKES))
    os.environ["FAKE_TENSORRT_LLM"] = str(directory / f"{worker.name}.json")
    _flow_work(config, worker, address, key, line)


_flow_work = flow_house._work


class Fleet:
    """`house` and the knobs of each worker by name."""

    def __init__(self, directory: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._model = model
        monkeypatch.setattr(flow_house, "_work", partial(_work, directory))
        self.knobs: dict[str, Knobs] = {}

    def house(self, prefill: int, decode: int, *, restart: bool = True, knobs: Any = None, **trtllm: Any) -> FlowHouse:
        roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode
        workers = tuple(WorkerConfig(role, f"{role.value}_{i}", "trtllm", gpus="0") for i, role in enumerate(roles))
        for worker in workers:
            self.knobs[worker.name] = Knobs(self._directory / f"{worker.name}.json", "1.2.1")
            self.knobs[worker.name].set(**{"step_ms": 1.0, **(knobs or {})})
        trtllm.setdefault("first_output_s", 0.8)
        config = Deployment(
            model=Model(str(self._model), max_context=2048),
            workers=workers,
            engine=EngineConfig(trtllm=trtllm_config(16_384, **trtllm)),
            transfer=TransferConfig(lease_s=LEASE_S, timeout_s=0.2),
            router=RouterConfig(mode="always-remote", worker_wait_s=20, default_deadline_s=40),
            health=HealthConfig(heartbeat_s=0.05, silent_s=5),
        )
        return FlowHouse(config, processes=True, restart=restart)

    def assert_clean(self, house: FlowHouse) -> None:
        """Nothing held: as the workers report it, and as TensorRT-LLM itself knows it."""
        house.assert_nothing_held(within=LEASE_S + 1.5)
        for knobs in self.knobs.values():
            knobs.wait_state(used_blocks=0, leaked_blocks=0, pinned_requests=0, active_requests=0)


@pytest.fixture
def fleet(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    return Fleet(tmp_path, tiny, monkeypatch)


def _assert_whole(answers: list[Answer], sampling: SamplingParams, first: int = 0) -> None:
    for i, answer in enumerate(answers, start=first):
        answer.wait(within=40)
        assert answer.error is None, repr(answer.error)
        assert answer.ids == reference(prompt(200 + i, i), sampling)
        assert answer.late == 0


def _begin(house: FlowHouse, count: int, sampling: SamplingParams, first: int = 0) -> list[Answer]:
    return [house.begin(prompt(200 + i, i), sampling) for i in range(first, first + count)]


def test_prefill_hands_over_to_decode_in_another_process(fleet: Fleet) -> None:
    with fleet.house(1, 1) as house:
        answer = house.ask(prompt(200, 0), GREEDY)
        assert answer.ids == reference(prompt(200, 0), GREEDY)
        proof = answer.proof
        assert (proof.route, proof.prefill_worker, proof.decode_worker) == ("remote", "prefill_0", "decode_1")
        assert (proof.kv_tokens_received, proof.kv_tokens_recomputed) == (200, 0)
        assert (proof.digest, proof.transport) == ("unchecked", "UCX")
        fleet.assert_clean(house)


def test_every_pair_has_a_first_handoff_before_clients_need_it(fleet: Fleet) -> None:
    with fleet.house(2, 2) as house:
        assert eventually(lambda: len(house.counts.warm_ups) == 4, 10)
        assert set(house.counts.warm_ups) == {"unchecked"}
        assert fleet.knobs["decode_2"].state["generation_requests"] == 2
        fleet.assert_clean(house)


def test_a_pair_that_can_not_hand_over_is_told_before_a_client_asks(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "router")
    with fleet.house(1, 1, restart=False, knobs={"silent_sender": True}, first_output_s=0.2) as house:
        assert eventually(lambda: house.counts.warm_ups.count("transfer_timeout") == 3, 15)
        assert eventually(lambda: "KV does not move from prefill_0 to decode_1" in caplog.text, 5)


def test_thirty_two_at_once_over_two_and_two(fleet: Fleet) -> None:
    with fleet.house(2, 2) as house:
        answers = _begin(house, 32, GREEDY)
        _assert_whole(answers, GREEDY)
        assert {answer.proof.prefill_worker for answer in answers} == {"prefill_0", "prefill_1"}
        assert all(answer.proof.kv_tokens_recomputed == 0 for answer in answers)
        fleet.assert_clean(house)


def test_a_known_prefix_is_found_by_the_engines_events(fleet: Fleet) -> None:
    with fleet.house(1, 1) as house:
        house.ask(prompt(200, 1), GREEDY)
        assert eventually(lambda: len(house.service.house.index) >= 192 // 16, 3)
        assert house.ask(prompt(200, 1), GREEDY).proof.prefill_tokens_reused == 192


def test_bursts_of_cancelled_requests_leave_nothing(fleet: Fleet) -> None:
    """In every state: waiting, being computed, handed over, streaming."""
    with fleet.house(1, 1, knobs={"transfer_ms": 30, "prefill_us_per_token": 20}, max_handoffs=8) as house:
        for burst in range(3):
            answers = _begin(house, 40, LONG, first=40 * burst)
            assert eventually(lambda: any(a.state is State.DECODING for a in answers), 10)  # noqa: B023
            for answer in answers:
                house.cancel(answer)
            for answer in answers:
                answer.wait()
        fleet.assert_clean(house)
        assert fleet.knobs["decode_1"].state["generation_requests"] > 3, "some were handed over"
        _assert_whole(_begin(house, 4, GREEDY, first=500), GREEDY, first=500)


@pytest.mark.parametrize("when", [State.PREFILLING, State.DECODING])
def test_a_dead_prefill_worker_costs_no_request(fleet: Fleet, when: State) -> None:
    with fleet.house(2, 1, knobs={"prefill_us_per_token": 200, "step_ms": 2}) as house:
        answers = _begin(house, 12, GREEDY)
        assert eventually(lambda: any(answer.state is when for answer in answers), 10)
        house.kill("prefill_0")
        _assert_whole(answers, GREEDY)
        assert eventually(lambda: house.is_up("prefill_0"), 20)
        _assert_whole(_begin(house, 4, GREEDY, first=100), GREEDY, first=100)


def test_the_only_prefill_worker_dies_with_kv_on_its_way(fleet: Fleet) -> None:
    """The decode worker gets none of it, computes the prompts, and lives on without a restart."""
    with fleet.house(1, 1, knobs={"transfer_ms": 400}) as house:
        epoch = house.epoch("decode_1")
        answers = _begin(house, 6, GREEDY)
        assert eventually(lambda: sum(answer.state is State.HANDING_OFF for answer in answers) > 3, 10)
        house.kill("prefill_0")
        _assert_whole(answers, GREEDY)
        assert any(answer.proof.kv_tokens_recomputed for answer in answers)
        assert house.epoch("decode_1") == epoch
        assert eventually(lambda: house.is_up("prefill_0"), 20)
        _assert_whole(_begin(house, 2, GREEDY, first=50), GREEDY, first=50)


def test_a_dead_decode_worker_costs_no_request(fleet: Fleet) -> None:
    with fleet.house(1, 2, knobs={"step_ms": 3}) as house:
        answers = _begin(house, 8, LONG)
        assert eventually(lambda: all(answer.state is State.DECODING for answer in answers), 15)
        house.kill("decode_1")
        _assert_whole(answers, LONG)
        assert house.counts.retries > 0


def test_a_wedged_worker_says_so_and_is_restarted(fleet: Fleet) -> None:
    """Its heartbeats go on; only its engine is stuck."""
    with fleet.house(1, 2, knobs={"step_ms": 3}, stall_s=0.8) as house:
        epoch = house.epoch("decode_1")
        answers = _begin(house, 8, LONG)
        assert eventually(lambda: all(answer.state is State.DECODING for answer in answers), 15)
        fleet.knobs["decode_1"].set(wedged=True)
        assert eventually(lambda: not house.is_up("decode_1"), 3)
        fleet.knobs["decode_1"].set(step_ms=3)
        _assert_whole(answers, LONG)
        assert eventually(lambda: house.is_up("decode_1", other_than=epoch), 20)
        _assert_whole(_begin(house, 4, GREEDY, first=50), GREEDY, first=50)


def test_a_stuck_transceiver_is_noticed_and_restarted(fleet: Fleet) -> None:
    """Prompts and streams still work, only KV no longer arrives: no heartbeat and no health check would tell."""
    with fleet.house(1, 1, first_output_s=0.3) as house:
        assert eventually(lambda: house.counts.warm_ups == ["unchecked"], 10)
        epochs = house.epoch("prefill_0"), house.epoch("decode_1")
        fleet.knobs["prefill_0"].set(silent_sender=True)
        for i in range(5):
            if house.epoch("decode_1") != epochs[1]:
                break
            _assert_whole(_begin(house, 1, GREEDY, first=i), GREEDY, first=i)
        fleet.knobs["prefill_0"].set()
        assert eventually(lambda: house.is_up("decode_1", other_than=epochs[1]), 20)
        assert eventually(lambda: house.is_up("prefill_0", other_than=epochs[0]), 20)
        answer = house.ask(prompt(90, 77), GREEDY)
        assert (answer.ids, answer.proof.kv_tokens_recomputed) == (reference(prompt(90, 77), GREEDY), 0)


def test_a_faulty_worker_stays_out_where_nobody_restarts_it(fleet: Fleet) -> None:
    with fleet.house(1, 1, restart=False) as house:
        fleet.knobs["prefill_0"].set(crash_on_token=49_999)
        house.ask(prompt(50, 2), GREEDY)  # so that it looks into the file
        poison = [*prompt(50, 3), 49_999]
        answer = house.ask(poison, GREEDY)
        assert (answer.ids, answer.proof.route, answer.proof.attempts) == (reference(poison, GREEDY), "local", 2)
        assert eventually(lambda: not house.is_up("prefill_0"), 2)
        time.sleep(0.5)
        assert not house.is_up("prefill_0"), "its heartbeats don't bring it back"
        _assert_whole(_begin(house, 2, GREEDY), GREEDY)


def test_a_worker_without_events_is_told_of(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "router")
    with fleet.house(1, 1, knobs={"no_events": True}) as house:
        assert eventually(lambda: "worker prefill_0 does not tell what its prefix cache holds" in caplog.text, 10)
        view = house.service.house.fleet.get(WorkerId("prefill_0"))
        assert view is not None
        assert not view.heartbeat.load.tells_blocks
        _assert_whole(_begin(house, 2, GREEDY), GREEDY)
