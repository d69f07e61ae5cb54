"""Load tests as a user runs them, against a real tritonserver with the fake engine."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from loadtest.record import Record, Run, read_run
from loadtest.summary import figures
from python_backends.core.paths import repository_root
from scripts.tritonserver import TritonServer
from tests.triton.asking import wait_until_nothing_is_held
from tests.unit.loadtest.openai_server import openai_server

pytestmark = [pytest.mark.triton, pytest.mark.weights]

ROOT = repository_root()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
SHORT = ("--duration", 3, "--warmup", 0.5, "--drain", 10)


def _command(verb: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"scripts.{verb}", *map(str, arguments)]


def _run(verb: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(verb, *arguments), capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def _urls(server: TritonServer) -> dict[str, str]:
    return {"gRPC": f"grpc://{server.host}:{server.grpc_port}", "generate_stream": f"http://{server.host}:{server.http_port}"}


def _measured(url: str, out: Path, *arguments: object) -> tuple[Run, list[Record]]:
    done = _run("loadtest", "--server", url, "--out", out, *SHORT, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"Report: {out}/report.html"
    assert {path.name for path in out.iterdir()} >= {"report.html", "report.md", "requests.csv", "tokens.csv", "run.json"}
    return read_run(out)


@pytest.mark.parametrize("protocol", ["gRPC", "generate_stream"])
def test_the_mixed_load(fake_server: TritonServer, tmp_path: Path, protocol: str) -> None:
    """A step of the fake engine takes 4 ms and a prompt token 50 us."""
    url = _urls(fake_server)[protocol]
    run, records = _measured(url, tmp_path, "--streams", 3, "--period", 1.2, "--length-scale", 0.25)
    assert run.protocol == protocol
    assert not [record.error for record in records if not record.ok]
    assert all(record.output_tokens == record.output_tokens_asked for record in records)
    assert {record.route for record in records} <= {"remote", "local", "aggregated"}
    stream, long, _ = figures(run, records)
    assert stream.requests >= 3 * 2
    assert long.requests == 2
    assert 4 <= stream.itl.p50 < 40
    assert long.ttft.p50 > 500 * 0.05, "the engine sleeps that long over the prompt"
    assert 0 < run.client.cpu_s < 5
    wait_until_nothing_is_held(fake_server, within_s=3)


def test_prefixes_are_shared_at_the_server_as_planned(fake_server: TritonServer, tmp_path: Path) -> None:
    """The prompts of conversations begin with the turns before, so the server finds their KV; another run's are new."""
    arguments = ("--scenario", "conversation", "--rate", 8, "--time-scale", 200, "--length-scale", 0.1, "--max-input", 900)
    shares = []
    for number in range(2):
        run, records = _measured(_urls(fake_server)["gRPC"], tmp_path / str(number), *arguments)
        first = min(records, key=lambda record: record.sent_s)
        assert first.cached_tokens == 0, "nothing of an earlier run is found"
        shares.append(figures(run, records)[0].cached_share)
    assert all(0.1 < share < 0.9 for share in shares)


def test_text_prompts_and_fields(fake_server: TritonServer, tmp_path: Path) -> None:
    arguments = ("--scenario", "fixed", "--rate", 5, "--input-tokens", 100, "--output-tokens", 8, "--prompt", "text")
    _, records = _measured(_urls(fake_server)["gRPC"], tmp_path, *arguments, "--fields", '{"route": "aggregated"}')
    assert {record.route for record in records} == {"aggregated"}
    assert all(record.ok and record.output_tokens == 8 for record in records)


def test_a_trace_replayed_at_an_openai_server(tmp_path: Path) -> None:
    """On time: as the trace says, ten times as fast."""
    trace = tmp_path / "trace.jsonl"
    times_ms = [0, 5_000, 20_000, 20_100, 25_000, 90_000]
    rows = [{"timestamp": t, "input_length": 600, "output_length": 6, "hash_ids": [0, n + 1]} for n, t in enumerate(times_ms)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    with openai_server() as (url, behaviour):
        _, records = _measured(url, tmp_path / "out", "--scenario", trace, "--time-scale", 10, "--warmup", 0)
        prompts = [body["messages"][0]["content"] for body in behaviour.bodies]
    assert [record.due_s for record in records] == pytest.approx([0.0, 0.5, 2.0, 2.01, 2.5])
    assert all(0 <= record.sent_s - record.due_s < 0.25 for record in records)
    assert all(record.ok and record.output_tokens == 6 and record.input_tokens_counted == 7 for record in records)
    words = [prompt.split() for prompt in prompts]
    assert {len(prompt) for prompt in words} == {600}
    assert len({tuple(prompt[:512]) for prompt in words}) == 1
    assert len({tuple(prompt[512:]) for prompt in words}) == 5


def test_completions_of_an_openai_server(tmp_path: Path) -> None:
    with openai_server() as (url, behaviour):
        arguments = ("--scenario", "fixed", "--streams", 2, "--output-tokens", 5, "--api", "completions", "--model", "big")
        run, records = _measured(url, tmp_path, *arguments)
        assert run.protocol == "OpenAI completions"
        assert len(records) > 20
        assert all(record.ok for record in records)
        assert isinstance(behaviour.bodies[0]["prompt"][0], int)
        assert behaviour.bodies[0]["model"] == "big"


def test_what_is_wrong_is_said_in_one_line(fake_server: TritonServer, tmp_path: Path) -> None:
    url = _urls(fake_server)["gRPC"]
    for arguments, said in (
        (("--server", "grpc://127.0.0.1:9"), "no server answers at 127.0.0.1:9"),
        (("--server", url, "--scenario", "mixd"), "'mixd' is not a file and none of"),
        (("--server", url, "--fields", '{"tempature": 1}'), "no request was answered"),
    ):
        done = _run("loadtest", "--out", tmp_path, "--duration", 2, "--warmup", 1, *arguments)
        assert done.returncode == 1, done.stdout
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        assert line.startswith("error: ")
        assert said in line
        assert "Traceback" not in done.stdout + done.stderr
    assert "the router has no input 'tempature'" in done.stdout
    assert len(read_run(tmp_path)[1]) < 500, "streams whose requests fail ask ten times per second each"


def test_ctrl_c_keeps_what_was_measured(fake_server: TritonServer, tmp_path: Path) -> None:
    arguments = ("--server", _urls(fake_server)["gRPC"], "--out", tmp_path, "--duration", 60, "--warmup", 0, "--drain", 1)
    with subprocess.Popen(_command("loadtest", *arguments), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert "in flight" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        told = process.stdout.read()
        assert process.wait(30) == 0
    assert "Interrupted; this is what there is" in told
    assert f"Report: {tmp_path}/report.html" in told
    assert sum(len(record.arrival_s) for record in read_run(tmp_path)[1]) > 100
    wait_until_nothing_is_held(fake_server, within_s=3)


# --- Locust's page -----------------------------------------------------------------------------------------------------


def test_a_run_can_be_started_and_watched_in_locusts_page(fake_server: TritonServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    slo = ("--slo", "ttft=60000,itl=60000")  # so that all are good
    arguments = ("--server", _urls(fake_server)["gRPC"], "--out", tmp_path, "--web", port, *slo, *SHORT)
    with subprocess.Popen(_command("loadtest", *arguments), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            page = f"http://127.0.0.1:{port}"
            _until(lambda: b"length_scale" in _get(page), "the page has a field for every option")
            form = urllib.parse.urlencode({"streams": 2, "length_scale": "0.25", "period": "1.2"}).encode()
            assert json.loads(_get(f"{page}/swarm", form))["success"]
            _until(lambda: _rows(page).get(("ITL", "stream"), {}).get("num_requests", 0) > 50, "gaps show while it runs")
            _until(lambda: json.loads(_get(f"{page}/stats/requests"))["state"] == "stopped", "it ends by itself")
            _until(lambda: _requests(page, "gRPC") == _requests(page, "GOOD"), "what was asked last is counted as well")
            rows = _rows(page)
            assert set(rows) >= {(row, kind) for row in ("gRPC", "TTFT", "ITL", "GOOD") for kind in ("stream", "long")}
            whole = sum(row["num_requests"] for (kind, _), row in rows.items() if kind == "gRPC")
            assert rows["", "Aggregated"]["num_requests"] == whole, "only whole requests are in the total"
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    run, records = read_run(tmp_path)
    assert (run.options.streams, run.options.length_scale) == (2, 0.25)
    assert len(records) == whole


def _get(url: str, form: bytes | None = None) -> bytes:
    try:
        with urllib.request.urlopen(url, form, timeout=10) as response:
            return bytes(response.read())
    except (urllib.error.URLError, ConnectionError):
        return b""


def _rows(page: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"] or "", row["name"]): row for row in json.loads(_get(f"{page}/stats/requests"))["stats"]}


def _requests(page: str, row: str) -> int:
    return int(_rows(page).get((row, "stream"), {}).get("num_requests", -1))


def _until(holds: Any, what: str) -> None:
    end = time.monotonic() + 40
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.1)


# --- servers of its own ------------------------------------------------------------------------------------------------

DISAGGREGATED = """
workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]
engine: {kv_pool_mib: 32, fake: {prefill_us_per_token: 400, step_us: 5000}}
"""


def test_a_comparison_of_two_deployments(fake_server: TritonServer, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(DISAGGREGATED)
    sides = (f"together={_urls(fake_server)['gRPC']}", f"apart={tmp_path}/two.yaml")
    load = ("--streams", 3, "--period", 1.2, "--length-scale", 0.25, "--out", tmp_path / "out")
    done = _run("compare", *sides, "--rounds", 2, *load, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    order = re.findall(r"^round (\d) of 2: (\w+)$", done.stdout, re.MULTILINE)
    assert order == [("1", "together"), ("1", "apart"), ("2", "apart"), ("2", "together")]
    assert done.stdout.strip().splitlines()[-1] == f"Report: {tmp_path}/out/report.html"
    table = (tmp_path / "out" / "report.md").read_text()
    ratio = re.search(r"^\| stream: ITL p99 \|.*\| ([\d.]+)x \([^|]*\|$", table, re.MULTILINE)
    assert ratio, table
    assert float(ratio[1]) > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "role: prefill" in page, "what was compared is in the page"
    rounds = [read_run(tmp_path / "out" / name)[0].options.seed for name in ("together-1", "apart-1", "together-2", "apart-2")]
    assert rounds == [0, 0, 1, 1]
    with (tmp_path / "out" / "apart-2" / "requests.csv").open(newline="") as file:
        assert {row["route"] for row in csv.DictReader(file)} <= {"remote", "local"}
