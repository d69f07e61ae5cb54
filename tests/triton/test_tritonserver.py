"""Starting and stopping a real tritonserver, with models that do nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from python_backends.core.errors import ConfigError, Unavailable
from python_backends.core.paths import repository_root
from scripts.tritonserver import TritonServer

pytestmark = pytest.mark.triton

MODEL_CONFIG = """
backend: "python"
input [{ name: "X" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_INT32 dims: [1] }]
"""

MODEL = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        {execute}
        return [pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(r, "X")]) for r in requests]
"""


class Models:
    """A deployment of one aggregated worker and a router, both of them trivial."""

    def __init__(self, directory: Path) -> None:
        self.repository = directory / "repository"
        self.config = directory / "deployment.yaml"
        self.config.write_text("workers: [{role: aggregated}]\nhttp: {enabled: false}\n")
        self.write("router")
        self.write("aggregated")

    def write(self, name: str, initialize: str = "pass", execute: str = "pass") -> None:
        model = self.repository / name
        (model / "1").mkdir(parents=True, exist_ok=True)
        (model / "config.pbtxt").write_text(MODEL_CONFIG)
        (model / "1" / "model.py").write_text(MODEL.format(initialize=initialize, execute=execute))

    def server(self, http_port: int = 0, start_timeout_s: float = 30.0) -> TritonServer:
        return TritonServer(self.config, http_port=http_port, model_repository=self.repository, start_timeout_s=start_timeout_s)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def processes(server: TritonServer) -> list[psutil.Process]:
    """The server and its model processes."""
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def shared_memory(server: TritonServer) -> list[Path]:
    return list(Path("/dev/shm").glob(f"baton_{server.run_dir.name}_*"))


def assert_nothing_left(server: TritonServer, had: list[psutil.Process]) -> None:
    assert [process for process in had if process.is_running()] == []
    assert shared_memory(server) == []
    assert not server.run_dir.exists()


def eventually(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def send_request(server: TritonServer) -> socket.socket:
    """An inference request in flight; the socket is to be closed by the caller."""
    body = b'{"inputs":[{"name":"X","shape":[1],"datatype":"INT32","data":[1]}]}'
    head = f"POST /v2/models/aggregated/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection((server.host, server.http_port), 5)
    connection.sendall(head.encode() + body)
    return connection


def test_two_servers_run_side_by_side_and_leave_nothing(models: Models) -> None:
    loaded: list[str] = []
    models.write("router", 'import os; print("KNOWS", os.environ["BATON_CONFIG"], os.environ["BATON_RUN_DIR"], flush=True)')
    with models.server() as first:
        assert f"KNOWS {models.config} {first.run_dir}\n" in first.log.path.read_text()
        assert first.run_dir.stat().st_mode & 0o777 == 0o700
        assert len(os.fsencode(first.run_dir)) < 80
        second = models.server()
        second.start(loaded.append)
        had = processes(second)
        assert sorted(loaded) == ["aggregated", "router"]
        assert len(had) == 3
        assert len(shared_memory(second)) == 2
        second.stop()
        assert_nothing_left(second, had)
        second.stop()
        assert not first.has_ended()
        had = processes(first)
        with send_request(first) as connection:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
    assert_nothing_left(first, had)


def test_taken_port_is_named_with_its_flag(models: Models) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            models.server(http_port=port)
    told = f"port {port} on 127.0.0.1: Address already in use; give another with --http-port, or 0 for a free one"
    assert str(caught.value) == told


def test_failed_initialize_is_told_in_the_models_words_and_a_bug_with_its_place(models: Models) -> None:
    models.write("aggregated", 'raise pb_utils.TritonModelException("engine.kv_pool_mib is 0; give at least 1")')
    models.write("router", '{}["missing"]')
    server = models.server()
    with pytest.raises(ConfigError) as caught:
        server.start()
    told, _, log = str(caught.value).partition("; its log is ")
    start, _, reasons = told.partition(": ")
    assert start == "tritonserver ended with code 1 at start"
    bug = f"model router: KeyError: 'missing' (at {server.run_dir}/models/router/1/model.py(7))"
    assert sorted(reasons.split("; ")) == sorted(["engine.kv_pool_mib is 0", "give at least 1", bug])
    assert "KeyError" in Path(log).read_text()
    assert_nothing_left(server, [])


def test_start_that_hangs_is_given_up(models: Models) -> None:
    models.write("aggregated", "time.sleep(60)")
    server = models.server(start_timeout_s=2)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="not ready after 2 s"):
        server.start()
    assert time.monotonic() - began < 6
    assert_nothing_left(server, [])


def test_killed_server_is_noticed_and_cleaned_up(models: Models) -> None:
    server = models.server()
    server.start()
    had = processes(server)
    os.kill(server.pid, signal.SIGKILL)
    assert server.has_ended(5)
    assert server.end == "was killed by SIGKILL (out of memory?)"
    server.stop()
    assert_nothing_left(server, had)


def test_stop_is_bounded_with_a_request_that_never_ends(models: Models) -> None:
    models.write("aggregated", execute="time.sleep(600)")
    server = models.server()
    server.start()
    had = processes(server)
    with send_request(server):
        time.sleep(0.3)
        began = time.monotonic()
        server.stop()
    assert time.monotonic() - began < 9
    assert_nothing_left(server, had)


def test_kill_hurries(models: Models) -> None:
    models.write("aggregated", execute="time.sleep(600)")
    server = models.server()
    server.start()
    had = processes(server)
    with send_request(server):
        began = time.monotonic()
        server.kill()
        server.stop()
    assert time.monotonic() - began < 3
    assert_nothing_left(server, had)


def test_nothing_survives_a_killed_parent(models: Models) -> None:
    program = f"""
        import time
        from pathlib import Path
        from scripts.tritonserver import TritonServer
        server = TritonServer(Path({str(models.config)!r}), model_repository=Path({str(models.repository)!r}))
        server.start()
        print(server.pid, server.run_dir, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=repository_root(), stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid, run_dir = parent.stdout.readline().split()
        process = psutil.Process(int(pid))
        had = [process, *process.children()]
        parent.kill()
    assert eventually(lambda: not Path(run_dir).exists(), 9)
    assert [process for process in had if process.is_running()] == []
    assert list(Path("/dev/shm").glob(f"baton_{Path(run_dir).name}_*")) == []
