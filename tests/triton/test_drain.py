"""Workers drained and restarted under load on a real server, and a server that is stopped while streams run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from python_backends.core.types import Role
from router.door.messages import WorkerNews
from scripts import drain, role, rolling_restart
from scripts.injection.load import Load, known_requests
from scripts.router_door import RouterDoor, find_server
from scripts.tritonserver import TritonServer
from tests.triton.asking import Asking, metrics, total, wait_until_nothing_is_held

pytestmark = pytest.mark.triton

DEPLOYMENT = """
workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}, {role: decode, engine: fake}]
engine: {kv_pool_mib: 32, fake: {prefill_us_per_token: 100, step_us: 6000}}
router: {mode: always-remote}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[TritonServer]:
    config = tmp_path_factory.mktemp("drained") / "drained.yaml"
    config.write_text(DEPLOYMENT)
    with TritonServer(config) as server:
        yield server


def test_drained_resumed_and_restarted_under_load(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = ["--run-dir", str(server.run_dir)]
    load = Load(server, 4, known_requests(8))
    load.learn()
    load.begin()
    try:
        began = time.monotonic()
        assert drain.main(["decode_1", *run_dir]) == 0
        assert "decode_1 is drained" in capsys.readouterr().err
        _wait_for(lambda: total(metrics(server), "baton_worker_available", worker="decode_1") == 0)
        assert total(metrics(server), "baton_worker_up", worker="decode_1") == 1
        drained = _news_of(server, "decode_1")
        assert drained.resting == "drained"
        assert drained.requests == 0
        assert drain.main(["decode_1", "--resume", *run_dir]) == 0
        _wait_for(lambda: total(metrics(server), "baton_worker_available", worker="decode_1") == 1)
        assert rolling_restart.main(["prefill", "decode", *run_dir]) == 0
        said = capsys.readouterr().err
        assert "1/2 prefill was restarted" in said
        assert "2/2 decode was restarted" in said
    finally:
        load.stop()
    samples = load.between(began, time.monotonic())
    assert len(samples) > 10
    assert [sample.error for sample in samples if sample.error] == []
    assert not any(sample.wrong for sample in samples)
    assert total(metrics(server), "baton_worker_starts_total") == 5
    assert total(metrics(server), "baton_retries_total") == 0
    wait_until_nothing_is_held(server, within_s=2)


def test_another_role_under_load_is_kept_when_the_worker_dies(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = ["--run-dir", str(server.run_dir)]
    load = Load(server, 4, known_requests(8))
    load.learn()
    load.begin()
    try:
        began = time.monotonic()
        assert role.main(["decode_1", "prefill", *run_dir]) == 0
        assert "decode_1 is prefill, after" in capsys.readouterr().err
        news = _news_of(server, "decode_1")
        assert news.role is Role.PREFILL
        os.kill(news.pid, signal.SIGKILL)
        _wait_for(lambda: _news_of(server, "decode_1").pid != news.pid and _news_of(server, "decode_1").up, 20)
        assert _news_of(server, "decode_1").role is Role.PREFILL
        _wait_for(lambda: total(metrics(server), "baton_worker_available", worker="decode_1", role="prefill") == 1)
        assert total(metrics(server), "baton_worker_up", worker="decode_1", role="decode") == 0
        assert role.main(["decode", "prefill", *run_dir]) == 1
        assert "worker decode can't become prefill" in " ".join(capsys.readouterr().err.split())
        assert role.main(["decode_1", "decode", *run_dir]) == 0
        assert _news_of(server, "decode_1").role is Role.DECODE
    finally:
        load.stop()
    samples = load.between(began, time.monotonic())
    assert len(samples) > 10
    assert [sample.error for sample in samples if sample.error] == []
    assert not any(sample.wrong for sample in samples)
    wait_until_nothing_is_held(server, within_s=2)


def test_what_can_not_be_done_is_one_sentence(server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drain.main(["nobody", "--run-dir", str(server.run_dir)]) == 1
    assert "no worker nobody is up" in capsys.readouterr().err
    assert drain.main(["decode", "--run-dir", str(tmp_path)]) == 1
    assert "there is no router's door in it" in capsys.readouterr().err.replace("\n", " ")
    assert find_server(server.run_dir) == server.run_dir


def test_a_stopped_server_lets_streams_end(server: TritonServer) -> None:
    """The last test of this server. What comes later is refused at once; when the stream has ended, so does the server."""
    running, late = Asking(server), Asking(server, with_codes=True)
    running.send("r", text_input="a long one", max_tokens=250, stream=True, temperature=0)
    running.next_response()
    stopping = threading.Thread(target=server.stop, args=(30.0,))
    stopping.start()
    _wait_for(lambda: (server.run_dir / "draining").exists())
    time.sleep(0.5)  # the router looks a few times a second
    refused = late.ask(text_input="too late", max_tokens=1).error
    assert isinstance(refused, InferenceServerException)
    assert "shutting down" in str(refused)
    (answer,) = running.collect("r")
    assert len(answer.text) > 250
    running.close()
    late.close()
    stopping.join(15)
    assert not stopping.is_alive()
    assert not server.run_dir.exists()


def _news_of(server: TritonServer, name: str) -> WorkerNews:
    with RouterDoor(server.run_dir) as door:
        news = next(filter(None, (door.news() for _ in range(10))))  # a busy router may be late
    (worker,) = [worker for worker in news.workers if worker.id == name]
    return worker


def _wait_for(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.05)
