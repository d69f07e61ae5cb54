"""scripts/profile as a user runs it, at a real tritonserver with the fake engine, which sleeps over prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from python_backends.core.paths import repository_root
from scripts.tritonserver import TritonServer

pytestmark = [pytest.mark.triton, pytest.mark.weights]

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(repository_root()), "COLUMNS": "160"}
LOAD = ("--streams", 3, "--period", 1, "--length-scale", 0.5, "--duration", 4, "--warmup", 0.5, "--drain", 10)
ALONE = ("--fields", '{"route": "aggregated"}')


def _profile(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.profile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def test_a_running_server_is_profiled(fake_server: TritonServer, tmp_path: Path) -> None:
    url = f"grpc://{fake_server.host}:{fake_server.grpc_port}"
    done = _profile("--server", url, "--out", tmp_path, *LOAD, *ALONE, "--slo", "ttft=2000,itl=10", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    profile = found["profile"]
    assert profile["disturbed"]["p50"] > profile["undisturbed"]["p50"], "the engine sleeps over chunks of the prompt"
    assert profile["lost_share"] > 0.03
    assert found["verdict"]["level"] == "yes", found["verdict"]
    assert "Load on grpc://" in done.stderr
    assert (tmp_path / "profile.html").read_text().count("<figure>") == 2
    assert (tmp_path / "report.html").exists()


def test_a_deployment_that_is_disaggregated_already_is_told(fake_server: TritonServer, tmp_path: Path) -> None:
    url = f"http://{fake_server.host}:{fake_server.http_port}"
    remote = ("--fields", '{"route": "remote"}')
    done = _profile("--server", url, "--out", tmp_path, *LOAD[:6], *remote, "--duration", 2, "--warmup", 0.2, "--drain", 10)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not known: this deployment is disaggregated already." in done.stdout
    assert done.stdout.strip().splitlines()[-1] == f"Page: {tmp_path}/profile.html"
    assert "is not known: --config says what runs at the server" in done.stdout


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        (("--server", "grpc://127.0.0.1:9"), "no server answers at 127.0.0.1:9"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
    ):
        done = _profile("--out", tmp_path, *arguments)
        assert done.returncode == 1, done.stdout
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        assert line.startswith("error: ")
        assert said in line
