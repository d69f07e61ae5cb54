"""The scripts as a user runs them: real processes, real servers, real signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from python_backends.core.paths import repository_root
from scripts.tritonserver import TritonServer, find_tritonserver
from tests.triton.asking import metrics, total

pytestmark = [pytest.mark.triton, pytest.mark.weights]

ROOT = repository_root()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
FREE_PORTS = ("--openai-port", "0", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
FAKE = "workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]\nengine: {kv_pool_mib: 32}\n"


def _command(verb: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"scripts.{verb}", *map(str, arguments)]


def _run(verb: str, *arguments: object, typed: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(verb, *arguments), input=typed, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, cwd=cwd
    )


def _grpc(server: TritonServer) -> str:
    return f"{server.host}:{server.grpc_port}"


def _one_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed command leaves on stderr."""
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


# --- demo and chat -----------------------------------------------------------------------------------------------------


def test_demo_against_a_running_server_ends_with_the_verdict(real_server: TritonServer) -> None:
    done = _run("demo", "--server", _grpc(real_server))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout
    verdict = done.stdout.strip().splitlines()[-1]
    match = re.fullmatch(r"handoff OK: (\d+) tokens, \S+ MiB in \S+ ms \(\S+ \S+/s\), 0 recomputed, digest verified", verdict)
    assert match, verdict
    assert int(match[1]) > 50
    assert "aggregated worker: same text" in done.stdout
    assert re.search(r"follow-up: [1-9]\d+ prompt tokens reused on decode", done.stdout)


def test_demo_says_when_no_server_answers() -> None:
    done = _run("demo", "--server", "127.0.0.1:9")
    assert "no server answers at 127.0.0.1:9" in _one_error(done)


def test_chat_answers_lines_of_a_pipe(real_server: TritonServer) -> None:
    typed = "/set temperature 0\n/set max_tokens 12\nWhat is the capital of France?\n/set tempature 1\nAnd of Italy?\n/set\n"
    done = _run("chat", "--server", _grpc(real_server), typed=typed)
    assert done.returncode == 1, "a failed line is a failed run"
    assert "Paris" in done.stdout
    assert "did you mean temperature?" in done.stdout
    assert "max_tokens 12" in done.stdout
    assert done.stdout.count("TTFT") == 2
    assert "no server answers" in _one_error(_run("chat", "--server", "127.0.0.1:9", typed="hello\n"))


def test_ctrl_c_in_the_chat_stops_the_answer_at_the_server(fake_server: TritonServer) -> None:
    before = total(metrics(fake_server), "baton_requests_total", outcome="cancelled")
    chat = subprocess.Popen(
        _command("chat", "--server", _grpc(fake_server)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    with chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("/set max_tokens 3000\nTell me a long story\n")
        chat.stdin.flush()
        _wait_for(lambda: metrics(fake_server)["baton_router_requests"] == 1)
        chat.send_signal(signal.SIGINT)
        _wait_for(lambda: total(metrics(fake_server), "baton_requests_total", outcome="cancelled") == before + 1)
        chat.stdin.write("/help\n")
        chat.stdin.close()
        assert "(stopped)" in (told := chat.stdout.read())
        assert "Ctrl-D quits" in told
        assert chat.wait(20) == 0


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "not within 10 s"
        time.sleep(0.05)


# --- serve -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_deployment(tmp_path: Path) -> Path:
    path = tmp_path / "deployment.yaml"
    path.write_text(FAKE)
    return path


def test_serve_prints_a_curl_line_that_works_and_stops_on_ctrl_c(fake_deployment: Path, tmp_path: Path) -> None:
    """Two servers at once, from another directory; one with streams in flight when it is stopped."""
    ports = FREE_PORTS
    first, second = (_serving("--config", fake_deployment.name, *ports, "--grace", "1", cwd=tmp_path) for _ in range(2))
    (one, one_curl), (two, two_curl) = first, second
    assert '"text_output":"' in _pasted(one_curl)
    endless = one_curl.replace('"max_tokens": 32', '"max_tokens": 3000')
    with subprocess.Popen(["bash", "-c", endless], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as stream:
        assert stream.stdout is not None
        assert "data: " in stream.stdout.readline()
        _stop(one)
    assert '"text_output":"' in _pasted(two_curl)
    _stop(two)


def _serving(*arguments: str, cwd: Path) -> tuple[subprocess.Popen[str], str]:
    """A server that is ready, and the curl line it printed."""
    process = subprocess.Popen(
        _command("serve", *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=cwd
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("curl "):
            return process, line
    raise AssertionError(f"serve ended with code {process.wait()}")


def _pasted(line: str) -> str:
    assert shutil.which("curl"), "the tests need curl"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True).stdout


def _stop(process: subprocess.Popen[str]) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    commands = "\n".join(" ".join(child.cmdline()) for child in children)
    run_ids = set(re.findall(r"/baton-\d+/(\w+)/models", commands))
    assert len(run_ids) == 1
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert time.monotonic() - began < 10
    assert process.stderr is not None
    process.stderr.close()
    assert not [child for child in children if psutil.pid_exists(child.pid)]
    assert not [path for path in Path("/dev/shm").iterdir() if any(run_id in path.name for run_id in run_ids)]


def test_serve_says_in_one_sentence_what_is_wrong(tmp_path: Path, fake_deployment: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _run("serve", "--config", fake_deployment, "--http-port", port)
        assert f"port {port} on 127.0.0.1: Address already in use; give another with --http-port" in _one_error(done)
    assert "nowhere.yaml: No such file" in _one_error(_run("serve", "--config", "nowhere.yaml", *FREE_PORTS))
    fake_deployment.write_text("workers: [{role: decode}]\nmodel: {path: /no/such/model}\n")
    assert "'/no/such/model' is not a directory" in _one_error(_run("serve", "--config", fake_deployment, *FREE_PORTS))
    fake_deployment.write_text("workers: [{role: decode}]\nengine: {block_sice: 16}\n")
    assert "block_sice" in _one_error(_run("serve", "--config", fake_deployment, *FREE_PORTS))
    fake_deployment.write_text("workers: [{role: decode}]\nengine: {kv_pool_mib: 99000000}\n")
    assert "lower engine.kv_pool_mib" in _one_error(_run("serve", "--config", fake_deployment, *FREE_PORTS))


def test_a_missing_libpython_is_told_with_the_fix(fake_deployment: Path) -> None:
    program = (
        "import sys, sysconfig; sysconfig.get_config_var = lambda name: '/nowhere'; sys.base_prefix = '/nowhere'\n"
        "from scripts.serve import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", str(fake_deployment), *FREE_PORTS],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, "PATH": _path_without_tritonserver()},
        cwd=ROOT,
    )
    assert re.search(r"needs libpython3\.\d+\.so\.1\.0, .* apt install libpython3", _one_error(done))


def _path_without_tritonserver() -> str:
    return os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "tritonserver").exists())


# --- without scripts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_server(tmp_path: Path, fake_deployment: Path) -> Iterator[int]:
    """`tritonserver --model-repository=...` by hand, in a directory that has nothing to do with it; its HTTP port."""
    binary = find_tritonserver()
    port, grpc_port, metrics_port = _free_ports(3)
    command = [str(binary.executable), f"--model-repository={ROOT / 'model_repository'}", f"--http-port={port}"]
    command += [f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if binary.backend_files:  # not in a container: what its image would have in place
        backend = tmp_path / "backends" / "python"
        backend.mkdir(parents=True)
        for file in binary.backend_files:
            (backend / file.name).symlink_to(file)
        command.append(f"--backend-directory={tmp_path / 'backends'}")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, binary.libraries))
    log = (tmp_path / "log").open("wb")
    with (
        log,
        subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            _wait_for_port(port, process, tmp_path / "log")
            yield port
        finally:
            process.terminate()
            process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a stub outlives a server whose start has failed


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    ready = f"curl -sf -o /dev/null 127.0.0.1:{port}/v2/health/ready"
    while subprocess.run(["bash", "-c", ready], timeout=10).returncode:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


def test_plain_tritonserver_serves_the_default_deployment_from_any_directory(plain_server: int) -> None:
    body = json.dumps({"text_input": "The capital of France is", "max_tokens": 5})
    assert "Paris" in _pasted(f"curl -s 127.0.0.1:{plain_server}/v2/models/router/generate -d '{body}'")
