"""Clients that go away while their request is in each state: at a real server all is free in a second."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from router.lifecycle import State
from scripts.tritonserver import TritonServer
from tests.triton.asking import Asking, metrics, total, wait_until_nothing_is_held, worker_process

pytestmark = pytest.mark.triton

PROMPT = " ".join(str(number) for number in range(60))
SLOW = """
workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]
engine: {kv_pool_mib: 32, step_tokens: 16, fake: {prefill_us_per_token: 15000, step_us: 4000}}
health: {restart: false}
"""
HANGING = """
workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]
engine: {kv_pool_mib: 32, fake: {step_us: 4000}}
transfer: {timeout_s: 0.6, faults: {hang: 1.0}}
"""
_REFRESHED_S = 0.5  # metrics are as old as the last heartbeat


@contextmanager
def _serving(directory: Path, deployment: str) -> Iterator[TritonServer]:
    config = directory / "deployment.yaml"
    config.write_text(deployment)
    with TritonServer(config) as server:
        yield server


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[TritonServer]:
    with _serving(tmp_path_factory.mktemp("slow"), SLOW) as server:
        yield server


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[TritonServer]:
    with _serving(tmp_path_factory.mktemp("hanging"), HANGING) as server:
        yield server


def test_prefilling(slow: TritonServer) -> None:
    """One is computed, the others wait for the worker to have room."""
    _cancel_in(slow, State.PREFILLING, at_least=1, text_input=PROMPT, route="remote")


def test_prefilling_on_the_decode_worker(slow: TritonServer) -> None:
    _cancel_in(slow, State.DECODING, at_least=1, text_input=PROMPT, route="local")


def test_handing_off(hanging: TritonServer) -> None:
    _cancel_in(hanging, State.HANDING_OFF, text_input=PROMPT, route="remote")


def test_decoding(hanging: TritonServer) -> None:
    _cancel_in(hanging, State.DECODING, tokens_seen=3, text_input=PROMPT, route="local")


def test_http_streams_too(hanging: TritonServer) -> None:
    """Not /generate: of a client that waits there Triton does not say that it has gone."""
    body = json.dumps({"text_input": PROMPT, "max_tokens": 2000, "stream": True}).encode()
    head = f"POST /v2/models/router/generate_stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((hanging.host, hanging.http_port), 5) as connection:
        connection.sendall(head.encode() + body)
        _wait_for(lambda: _in_state(hanging, State.DECODING) == 1, 5)
        before = _cancelled(hanging)
    _assert_all_ends(hanging, before + 1)


def test_waiting_for_a_worker(slow: TritonServer) -> None:
    """The last test of this server: its decode worker is not restarted."""
    process = worker_process(slow, "decode")
    os.kill(process.pid, signal.SIGKILL)
    _wait_for(lambda: total(metrics(slow), "baton_worker_up", worker="decode") == 0, 2)
    assert process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    _cancel_in(slow, State.QUEUED, text_input=PROMPT)


def _cancel_in(server: TritonServer, state: State, *, at_least: int = 3, tokens_seen: int = 0, **fields: Any) -> None:
    """Three requests; `at_least` so many of them are in the state, and none has ended."""
    client = Asking(server)
    for i in range(3):
        client.send(f"c{i}", max_tokens=2000, stream=True, **{**fields, "text_input": f"{i} {fields['text_input']}"})
    for _ in range(tokens_seen * 3):
        client.next_response()
    _wait_for(lambda: _in_state(server, state) >= at_least and metrics(server)["baton_router_requests"] == 3, 5)
    before = _cancelled(server)
    client.close(cancel=True)
    _assert_all_ends(server, before + 3)


def _assert_all_ends(server: TritonServer, cancelled: float) -> None:
    _wait_for(lambda: _cancelled(server) == cancelled, 1)
    wait_until_nothing_is_held(server, within_s=1 + _REFRESHED_S)


def _cancelled(server: TritonServer) -> float:
    return total(metrics(server), "baton_requests_total", outcome="cancelled")


def _in_state(server: TritonServer, state: State) -> float:
    return total(metrics(server), "baton_live_requests", state=state.value)


def _wait_for(condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.02)
