"""The doctor as a user runs it: on this machine, on broken ones, and at a running server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.paths import repository_root
from scripts.tritonserver import TritonServer

pytestmark = [pytest.mark.triton, pytest.mark.weights]

ROOT = repository_root()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
FREE_PORTS = ("--ports", 15_031, 15_032, 15_033, 15_034)
FAKE = "workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]\nengine: {kv_pool_mib: 32}\n"


def _doctor(*arguments: object, program: str = "from scripts.doctor import main") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys\n{program}\nsys.exit(main(sys.argv[1:]))", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def _json(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
    """The diagnosis, and its findings by subject."""
    diagnosis: dict[str, Any] = json.loads(done.stdout)
    by_subject: dict[str, list[dict[str, str]]] = {}
    for finding in diagnosis["findings"]:
        by_subject.setdefault(finding["subject"], []).append(finding)
    return diagnosis, by_subject


@pytest.fixture
def fake_config(tmp_path: Path) -> Path:
    path = tmp_path / "fake.yaml"
    path.write_text(FAKE)
    return path


def test_this_machine_is_well() -> None:
    """Everything, measured, in half a minute."""
    began = time.monotonic()
    done = _doctor("--json", *FREE_PORTS)
    took_s = time.monotonic() - began
    diagnosis, found = _json(done)
    assert done.returncode == 0, done.stdout
    assert diagnosis["ok"]
    assert took_s < 30, f"{took_s:.0f} s"
    assert found.keys() >= {
        "Python",
        "libraries",
        "tritonserver",
        "model",
        "ports",
        "memory",
        "shared memory",
        "processor",
        "cores",
    }
    measured = diagnosis["measured"]
    assert measured["bandwidth_one_thread"] > 1e9
    assert measured["matrix_one_thread"] > 1e9
    assert measured["transfers"]["shm"] > 1e8
    smallest = diagnosis["models"][0]
    assert smallest["model"] == "SmolLM2-135M"
    assert 1 < smallest["decode_tokens_s"] < 10_000
    assert diagnosis["split"]["text"]


def test_its_words_for_people(fake_config: Path) -> None:
    done = _doctor("--config", fake_config, *FREE_PORTS)
    assert done.returncode == 0, done.stdout
    assert "Nothing needed is broken" in done.stdout
    assert "GiB/s by one thread" in done.stdout
    assert "one prefill worker with" in done.stdout or "one aggregated worker" in done.stdout


def test_a_taken_port(fake_config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _doctor("--config", fake_config, "--no-measuring", "--ports", port)
    assert done.returncode == 1
    assert f"port {port}: Address already in use" in " ".join(done.stdout.split())
    assert "--openai-port" in done.stdout
    assert "1 broken" in done.stdout


def test_no_tritonserver_and_no_libpython(fake_config: Path) -> None:
    """Neither on PATH nor as a package; and an interpreter without its shared library."""
    arguments = ("--config", fake_config, "--no-measuring", "--json", *FREE_PORTS)
    gone = (
        "import importlib.metadata as metadata, scripts.tritonserver as server\n"
        "server.shutil.which = lambda name: None\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "server.distribution = missing\n"
        "from scripts.doctor import main"
    )
    _, found = _json(done := _doctor(*arguments, program=gone))
    assert done.returncode == 1
    assert found["tritonserver"][0]["level"] == "broken"
    assert "run scripts/install" in found["tritonserver"][0]["text"]
    bare = (
        "import scripts.tritonserver as server\n"
        "server.shutil.which = lambda name: None\n"
        "server.sysconfig.get_config_var = lambda name: '/nowhere'\n"
        "sys.base_prefix = '/nowhere'\n"
        "from scripts.doctor import main"
    )
    _, found = _json(_doctor(*arguments, program=bare))
    assert "apt install libpython3" in found["libpython"][0]["text"]


def test_a_missing_package_is_a_sentence() -> None:
    done = _doctor(program="sys.modules['redis'] = None\nfrom scripts.doctor import main")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: the package redis is missing; run scripts/install"


def test_a_deployment_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("workers: [{role: decode, engine: fake}]\nengine: {kv_pool_mib: 9000000}\n")
    _, found = _json(done := _doctor("--config", path, "--no-measuring", "--json", *FREE_PORTS))
    assert done.returncode == 1
    assert found["memory"][0]["level"] == "broken"
    assert "lower engine.kv_pool_mib" in found["memory"][0]["text"]
    path.write_text("workers: [{role: decode, device: 'cuda:63'}]\n")
    _, found = _json(_doctor("--config", path, "--no-measuring", "--json", *FREE_PORTS))
    assert any("wants cuda:63" in finding["text"] for finding in found["GPUs"])
    done = _doctor("--config", tmp_path / "none.yaml")
    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_redis_that_is_asked_for_and_absent(fake_config: Path) -> None:
    arguments = ("--config", fake_config, "--no-measuring", "--json", *FREE_PORTS)
    _, found = _json(done := _doctor(*arguments, "--redis", "redis://:secret@127.0.0.1:9/0"))
    assert done.returncode == 1
    assert "redis://127.0.0.1:9/0" in found["Redis"][0]["text"]
    assert "secret" not in done.stdout


def test_a_running_server(fake_server: TritonServer, fake_config: Path) -> None:
    address = f"{fake_server.host}:{fake_server.grpc_port}"
    _, found = _json(done := _doctor("--config", fake_config, "--no-measuring", "--json", "--server", address))
    assert done.returncode == 0, done.stdout
    assert "is ready" in found["server"][0]["text"]
    assert "handoff OK" in found["canary"][0]["text"]
    assert "ports" not in found


def test_a_server_that_is_not_there(fake_config: Path) -> None:
    _, found = _json(done := _doctor("--config", fake_config, "--no-measuring", "--json", "--server", "127.0.0.1:9"))
    assert done.returncode == 1
    assert "no server answers at 127.0.0.1:9" in found["server"][0]["text"]


def test_two_doctors(fake_config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.doctor", "--config", str(fake_config), "--listen", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as other:
        assert other.stdout is not None
        assert f"Listening on port {port}" in other.stdout.readline()
        time.sleep(0.5)
        _, found = _json(
            _doctor("--config", fake_config, "--no-measuring", "--json", *FREE_PORTS, "--peer", f"127.0.0.1:{port}")
        )
        assert "has the same" in found["versions"][0]["text"]
        assert other.wait(20) == 0
