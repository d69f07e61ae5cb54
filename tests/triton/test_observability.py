"""Metrics, traces and scripts/trace on a real server: names, sums, and what Prometheus makes of them."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
import yaml

from python_backends.core.paths import repository_root
from router.metrics import FAMILIES, Kind, exported_names
from scripts.tritonserver import TritonServer
from tests.collector import Collector, Span
from tests.contract.test_monitoring import RULES, dashboard_expressions
from tests.tools import require_program
from tests.triton.asking import metrics, tensors

pytestmark = pytest.mark.triton

MODEL = "smollm2-135m-instruct"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
WITHOUT_TRAFFIC = {
    "baton_prediction_error_ratio",
    "baton_retries_total",
    "baton_traces_dropped_total",
    "baton_warm_ups_total",  # of engines that need them
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path, collector: Collector) -> Iterator[TritonServer]:
    config = tmp_path_factory.mktemp("observed") / "observed.yaml"
    config.write_text(
        "workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}, {role: aggregated, engine: fake}]\n"
        "engine: {fake: {prefill_us_per_token: 500, step_us: 30000}}\n"
        f"tracing: {{otlp_endpoint: '{collector.url}', service_name: observed}}\n"
    )
    with TritonServer(config) as server:
        yield server


@dataclass
class Streamed:
    """ms: after the request was sent."""

    headers: dict[str, str]
    first_ms: float
    second_ms: float
    tokens: list[int]  # in each chunk: more than one where a token alone is no text
    proof: dict[str, Any]


def _stream(server: TritonServer, words: int, headers: dict[str, str] | None = None, **fields: Any) -> Streamed:
    """A streamed completion of a prompt that no cache has, timed as close to the socket as can be."""
    prompt = f"{time.time_ns()} " + " ".join(f"w{number * 7919 % 1000}" for number in range(words))
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": 6,
        "stream": True,
        "logprobs": 0,
        "baton": {"proof": True, **fields},
    }
    connection = http.client.HTTPConnection(server.host, server.openai_port, timeout=60)
    connection.connect()
    began = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    times: list[float] = []
    tokens: list[int] = []
    proof: dict[str, Any] = {}
    for line in response:
        if line.startswith(b"data: {"):
            times.append((time.monotonic() - began) * 1e3)
            chunk = json.loads(line[6:])
            tokens.append(len(chunk["choices"][0]["logprobs"]["tokens"]))
            proof = chunk.get("baton", {}).get("proof", proof)
    connection.close()
    return Streamed({name.lower(): value for name, value in response.getheaders()}, times[0], times[1], tokens, proof)


# --- traces ------------------------------------------------------------------------------------------------------------


def test_a_trace_goes_through_all_parts_and_back(server: TritonServer, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=7", "x-request-id": "mine-1"}
    streamed = _stream(server, 100, headers, route="remote")
    assert streamed.headers["x-request-id"] == "mine-1"
    assert streamed.proof["trace_id"] == TRACE
    spans = collector.trace(TRACE)
    assert spans["generate"].parent_id == PARENT
    assert streamed.headers["traceparent"] == f"00-{TRACE}-{spans['generate'].span_id}-01"
    assert {"front end", "tokenize", "router", "queue", "prefill", "handoff", "transfer", "decode"} < set(spans)
    assert spans["generate"].service == "observed"
    assert spans["generate"].attributes["baton.client_id"] == "mine-1"
    for span in spans.values():
        assert spans["generate"].start_ns <= span.start_ns <= span.end_ns <= spans["generate"].end_ns


def _sums(spans: dict[str, Span]) -> tuple[float, float]:
    """ms to the first and to the second token, as the spans have it."""
    first = sum(spans[name].ms for name in ("front end", "queue", "prefill"))
    return first, first + sum(spans[name].ms for name in ("handoff", "first decode") if name in spans)


@pytest.mark.parametrize("route", ["remote", "local", "aggregated"])
def test_spans_add_up_to_what_the_client_sees(server: TritonServer, collector: Collector, route: str) -> None:
    """Within 3% of the client's own clock, in the best of some tries: the machine has other things to do."""
    off: list[float] = []
    while len(off) < 25:
        streamed = _stream(server, 800, route=route)
        if streamed.tokens[:2] != [1, 1]:
            continue
        first, second = _sums(collector.trace(streamed.proof["trace_id"]))
        assert first < streamed.first_ms, "spans claim more than there was"
        off.append(max(1 - first / streamed.first_ms, abs(1 - second / streamed.second_ms)))
        if off[-1] < 0.03:
            return
    pytest.fail(f"off by {[f'{share:.1%}' for share in off]}")


def test_triton_s_own_protocols_carry_traces(server: TritonServer, collector: Collector) -> None:
    by_parameter, by_metadata, by_body = ("1" * 32, "2" * 32, "3" * 32)
    with triton.InferenceServerClient(f"{server.host}:{server.grpc_port}") as client:
        seen: list[Any] = []
        for trace, headers in ((by_parameter, None), (by_metadata, {"traceparent": f"00-{by_metadata}-{PARENT}-01"})):
            client.start_stream(lambda result, error: seen.append((result, error)), headers=headers)
            given = {} if headers else {"traceparent": f"00-{trace}-{PARENT}-01"}
            inputs = tensors({"text_input": "hello", "max_tokens": 2})
            client.async_stream_infer("router", inputs, request_id=f"id-{trace}", parameters=given)
            collector.trace(trace)
            client.stop_stream()
        assert all(error is None for _, error in seen)
    body = json.dumps({"text_input": "hello", "max_tokens": 2, "traceparent": f"00-{by_body}-{PARENT}-00"}).encode()
    url = f"http://{server.host}:{server.http_port}/v2/models/router/generate"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as response:
        assert response.status == 200
    for trace in (by_parameter, by_metadata):
        spans = collector.trace(trace)
        assert spans["generate"].parent_id == PARENT
        assert spans["generate"].attributes["baton.client_id"] == f"id-{trace}"
        assert "front end" not in spans
    time.sleep(1)
    assert by_body not in {span.trace_id for span in collector.spans}, "its client said that it is not sampled"
    (record,) = json.loads(_get(server, f"/baton/requests/{by_body}"))["requests"]
    assert record["trace"]["parent_id"] == PARENT


class _TracingServer(TritonServer):
    """With Triton's own tracing switched on."""

    def __init__(self, config: Path, url: str) -> None:
        super().__init__(config)
        self._url = url

    def _command(self) -> list[str]:
        options = ["mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={self._url}"]
        return [*super()._command(), *(f"--trace-config={option}" for option in options)]


def test_triton_s_own_trace_is_gone_on_with(collector: Collector, tmp_path: Path) -> None:
    """Its span is the parent of ours, in the client's trace."""
    config = tmp_path / "traced.yaml"
    config.write_text(f"workers: [{{role: aggregated, engine: fake}}]\ntracing: {{otlp_endpoint: '{collector.url}'}}\n")
    trace = "5" * 32
    with _TracingServer(config, collector.url) as server:
        body = json.dumps({"text_input": "hello", "max_tokens": 2}).encode()
        url = f"http://{server.host}:{server.http_port}/v2/models/router/generate"
        headers = {"traceparent": f"00-{trace}-{PARENT}-01"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as response:
            assert response.status == 200
        root = collector.trace(trace)["generate"]
    assert root.parent_id not in ("", PARENT, root.span_id)


def test_several_choices_are_one_trace(server: TritonServer, collector: Collector) -> None:
    trace = "4" * 32
    body = json.dumps({"model": MODEL, "prompt": ["one", "two"], "n": 2, "max_tokens": 2}).encode()
    headers = {"traceparent": f"00-{trace}-{PARENT}-01"}
    url = f"http://{server.host}:{server.openai_port}/v1/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as response:
        assert len(json.loads(response.read())["choices"]) == 4
    collector.wait_for(lambda: len(_roots(collector, trace)) == 4)
    assert len({span.span_id for span in collector.spans if span.trace_id == trace}) == len(
        [span for span in collector.spans if span.trace_id == trace]
    )


def _roots(collector: Collector, trace: str) -> list[Span]:
    return [span for span in collector.spans if span.trace_id == trace and span.name == "generate"]


# --- scripts/trace -----------------------------------------------------------------------------------------------------


def _trace_script(server: TritonServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.trace", "--server", f"{server.host}:{server.openai_port}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=repository_root())


def test_scripts_trace_finds_a_request_by_any_id(server: TritonServer) -> None:
    proof = _stream(server, 60, {"x-request-id": "find-me-please"}, route="remote").proof
    for what in (proof["request_id"], proof["trace_id"], proof["trace_id"][:12], "find-me-please", "latest"):
        done = _trace_script(server, what)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{proof['request_id']}  ok")
        for name in ("queue", "prefill", "handoff", "transfer", "first decode"):
            assert re.search(rf"^ +{name} +[▏▎▍▌▋▊▉█]+ +[\d.]+ ms", done.stdout, re.MULTILINE), done.stdout
    as_json = json.loads(_trace_script(server, "--json", proof["request_id"]).stdout)
    assert as_json["requests"][0]["proof"]["ttft_ms"] == proof["ttft_ms"]
    missing = _trace_script(server, "nobody-knows-this")
    assert missing.returncode == 1
    assert missing.stderr == "error: no request 'nobody-knows-this' is among the last that the router remembers\n"


def test_scripts_trace_without_a_server_says_so() -> None:
    command = [sys.executable, "-m", "scripts.trace", "--server", "127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=repository_root())
    assert done.returncode == 1
    assert done.stderr.startswith("error: no front end answers at 127.0.0.1:9")
    assert len(done.stderr.splitlines()) == 1


def _get(server: TritonServer, path: str) -> bytes:
    with urllib.request.urlopen(f"http://{server.host}:{server.openai_port}{path}", timeout=10) as response:
        body: bytes = response.read()
        return body


# --- metrics -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(server: TritonServer) -> TritonServer:
    """The server after requests of every kind, its metrics settled."""
    for route in ("remote", "local", "aggregated"):
        for _ in range(3):
            _stream(server, 80, route=route)
    time.sleep(2)
    return server


def test_every_family_is_exported_with_its_type_and_labels(served: TritonServer) -> None:
    url = f"http://{served.host}:{served.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    types = dict(re.findall(r"^# TYPE (baton\S+) (\S+)$", text, re.MULTILINE))
    values = metrics(served)
    labels: dict[str, set[str]] = {}
    for key in values:
        name, _, rest = key.partition("{")
        labels.setdefault(name, set()).update(re.findall(r"(\w+)=", rest))
    for family in FAMILIES:
        if family.name in WITHOUT_TRAFFIC or family.name.startswith("baton_store"):
            continue
        for name in family.exported:
            assert types[name] == ("gauge" if family.kind is Kind.GAUGE else "counter")
            assert labels[name] == {*family.labels, *(["le"] if name.endswith("_bucket") else [])}
    assert set(labels) <= set(exported_names())
    assert len(values) < 600, "labels are bounded"


def test_an_idle_server_changes_no_metric(served: TritonServer) -> None:
    before = metrics(served)
    time.sleep(1.5)
    changed = {key.partition("{")[0] for key, value in metrics(served).items() if before.get(key) != value}
    learned = {"baton_link_overhead_seconds", "baton_link_bytes_per_second", "baton_hop_seconds"} | {
        "baton_step_cost_seconds",
        "baton_step_cost_error_ratio",
    }
    canaries = {"baton_canaries_total", "baton_handoff_canaries_total", "baton_worker_busy_seconds_total"}
    assert changed <= canaries | learned  # these run, keep workers busy for a moment, and teach


def test_prometheus_can_answer_every_panel_and_rule(served: TritonServer, tmp_path: Path) -> None:
    """A real Prometheus scrapes the server; only what needs stores or predictions may be empty."""
    program = require_program("prometheus", "prometheus")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = {
        "global": {"scrape_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "baton", "static_configs": [{"targets": [f"{served.host}:{served.metrics_port}"]}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [program, f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        _await_samples(port)
        for route in ("remote", "local", "aggregated"):
            _stream(served, 60, route=route)
        time.sleep(4)
        for expression in dashboard_expressions():
            result = _query(port, expression)
            optional = any(name in expression for name in (*WITHOUT_TRAFFIC, "baton_store"))
            assert result or optional, f"nothing for {expression}"
        p95 = _query(port, "histogram_quantile(0.95, sum by (le) (rate(baton_ttft_seconds_bucket[1m])))")
        assert 0.005 < float(p95[0]["value"][1]) < 10
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/rules", timeout=10) as response:
            rules = [rule for group in json.loads(response.read())["data"]["groups"] for rule in group["rules"]]
        assert all(rule["health"] in ("ok", "unknown") for rule in rules), rules
    finally:
        process.kill()
        process.wait(10)


def _await_samples(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            if _query(port, "baton_ready"):
                return
        except OSError:
            pass
        assert time.monotonic() < end, "prometheus does not scrape"
        time.sleep(0.2)


def _query(port: int, expression: str) -> list[dict[str, Any]]:
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=10) as response:
        result: list[dict[str, Any]] = json.loads(response.read())["data"]["result"]
        return result
