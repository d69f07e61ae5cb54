"""Several tritonservers as one deployment, on loopback: workers elsewhere, several routers, servers that come and go."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts import drain, role
from scripts.tritonserver import TritonServer
from tests.triton.asking import Asking, metrics, total, wait_until_nothing_is_held, worker_process

pytestmark = pytest.mark.triton

PROMPT = " ".join(str(number) for number in range(60))
COMMON = "engine: {kv_pool_mib: 32, fake: {prefill_us_per_token: 50, step_us: 4000}}\nrouter: {worker_wait_s: 15}\n"


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to outgoing connections."""
    ports: list[int] = []
    for port in range(14_000 + os.getpid() % 500, 15_000):
        with socket.socket() as probe:
            if len(ports) < count and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports


@dataclass
class Cluster:
    """Two servers with a router and a decode worker each, and one with two prefill workers that both use."""

    one: TritonServer
    two: TritonServer
    prefill: TritonServer
    third: TritonServer  # without a router, not started, in the place of `one`


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    (directory / "key").write_bytes(os.urandom(32))
    channels = free_ports(7)
    grpc = channels[4:]
    security = f"security: {{key_file: {directory}/key}}\n"

    def server(name: str, workers: str, port: int, grpc_port: int, more: str) -> TritonServer:
        config = directory / f"{name}.yaml"
        listen = f"listen: 127.0.0.1, channel_port: {port}, grpc_port: {grpc_port}"
        config.write_text(f"workers: [{workers}]\n{COMMON}{security}cluster: {{{listen}, {more}}}\n")
        return TritonServer(config)

    prefills, decodes = [channels[0], channels[1]], [channels[2], channels[3]]
    pools = f"pools: [{{hosts: [127.0.0.1], channel_ports: {prefills}}}, {{hosts: [127.0.0.1], channel_ports: {decodes}}}]"
    prefill = "{role: prefill, engine: fake}"
    servers = [
        server("prefill", f"{prefill}, {prefill}", channels[0], grpc[0], "router: false"),
        server("one", "{role: decode, engine: fake}", decodes[0], grpc[1], pools),
        server("two", "{role: decode, engine: fake}", decodes[1], grpc[2], pools),
    ]
    third = server("third", "{role: decode, engine: fake}", decodes[0], grpc[1], "router: false")
    with ExitStack() as running:
        for each in servers:
            running.enter_context(each)
        found = Cluster(servers[1], servers[2], servers[0], third)
        for router in (found.one, found.two):
            _wait_for(lambda: total(metrics(router), "baton_worker_up") == 4, 15)  # noqa: B023
        yield found


@pytest.fixture
def one(cluster: Cluster) -> Iterator[Asking]:
    client = Asking(cluster.one)
    yield client
    client.close(cancel=True)  # Triton never ends the requests of a router that was killed


@pytest.fixture
def two(cluster: Cluster) -> Iterator[Asking]:
    client = Asking(cluster.two)
    yield client
    client.close()


def _wait_for(condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.05)


def test_prefill_elsewhere_and_the_same_text_from_every_router(cluster: Cluster, one: Asking, two: Asking) -> None:
    fields: dict[str, Any] = {"text_input": PROMPT, "max_tokens": 20, "seed": 1, "temperature": 0.7}
    answers = [asking.ask(**fields, route=route, return_proof=True) for asking in (one, two) for route in ("remote", "local")]
    assert len({answer.text for answer in answers}) == 1
    proof = json.loads(answers[0].last("proof"))
    assert f"@127.0.0.1:{cluster.prefill.grpc_port}" in proof["prefill_worker"]
    assert proof["kv_tokens_received"] + proof["kv_tokens_reused"] > 100
    assert proof["kv_tokens_recomputed"] == 0


def test_many_at_once_through_both_routers(cluster: Cluster, one: Asking, two: Asking) -> None:
    """All four workers serve both; each stream hears of its own requests only."""
    for name, asking in (("a", one), ("b", two)):
        for i in range(12):
            asking.send(f"{name}{i}", text_input=f"{i} {PROMPT}", max_tokens=30, seed=i, route="remote", return_proof=True)
    answers = [*one.collect(*[f"a{i}" for i in range(12)]), *two.collect(*[f"b{i}" for i in range(12)])]
    assert [answer.text for answer in answers[:12]] == [answer.text for answer in answers[12:]]
    proofs = [json.loads(answer.last("proof")) for answer in answers]
    assert len({proof["prefill_worker"] for proof in proofs}) == 2
    assert len({proof["decode_worker"] for proof in proofs}) == 2
    assert sum(proof["kv_tokens_recomputed"] for proof in proofs) == 0
    for server in (cluster.one, cluster.two):
        wait_until_nothing_is_held(server, within_s=2)


def test_a_router_that_is_killed_takes_only_its_own_requests(cluster: Cluster, one: Asking, two: Asking) -> None:
    """Those of the other go on, and the workers compute for nobody."""
    expected = two.ask(text_input=f"other {PROMPT}", max_tokens=150, seed=5).text
    for i in range(4):
        one.send(f"k{i}", text_input=f"kill {i} {PROMPT}", max_tokens=3000, stream=True)
    two.send("stay", text_input=f"other {PROMPT}", max_tokens=150, seed=5, stream=True)
    for _ in range(20):
        one.next_response()
    killed = worker_process(cluster.one, "router").pid
    os.kill(killed, signal.SIGKILL)
    assert two.collect("stay")[0].text == expected
    wait_until_nothing_is_held(cluster.two, within_s=12)  # what a handoff of the dead router's canaries held ends as leases do
    _wait_for(lambda: _has_another_router(cluster.one, killed), 60)
    _wait_for(lambda: total(metrics(cluster.one), "baton_worker_up") == 4, 30)


def _has_another_router(server: TritonServer, killed: int) -> bool:
    """That serves. Triton tells the metrics of the one that was killed until then."""
    url = f"http://{server.host}:{server.openai_port}/health"
    with suppress(OSError, AssertionError), urllib.request.urlopen(url, timeout=2) as response:
        return response.status == 200 and worker_process(server, "router").pid != killed
    return False


def test_a_killed_worker_elsewhere_costs_no_request_and_comes_back(cluster: Cluster, two: Asking) -> None:
    fields: dict[str, Any] = {"max_tokens": 60, "seed": 8, "temperature": 0.8, "return_output_ids": True}
    prompts = [f"elsewhere {i} {PROMPT}" for i in range(6)]
    expected = [two.ask(text_input=prompt, route="local", **fields).ids for prompt in prompts]
    victim = worker_process(cluster.prefill, "prefill")
    for i, prompt in enumerate(prompts):
        two.send(f"e{i}", text_input=f"{prompt}", stream=True, route="remote", cache_salt=f"{i}", **fields)
    os.kill(victim.pid, signal.SIGKILL)
    assert [answer.ids for answer in two.collect(*[f"e{i}" for i in range(6)])] == expected
    _wait_for(lambda: total(metrics(cluster.two), "baton_worker_up") == 4, 40)
    assert worker_process(cluster.prefill, "prefill").pid != victim.pid
    wait_until_nothing_is_held(cluster.two, within_s=2)


def test_a_worker_elsewhere_takes_another_role(cluster: Cluster, one: Asking) -> None:
    """Every router hears of it, and no server is restarted."""
    name = f"prefill_1@127.0.0.1:{cluster.prefill.grpc_port}"
    expected = one.ask(text_input=PROMPT, max_tokens=20, seed=2).text
    assert role.main([name, "aggregated", "--run-dir", str(cluster.two.run_dir)]) == 0
    for server in (cluster.one, cluster.two):
        _wait_for(lambda: total(metrics(server), "baton_worker_available", worker=name, role="aggregated") == 1, 5)  # noqa: B023
        assert total(metrics(server), "baton_worker_up", worker=name, role="prefill") == 0
    answer = one.ask(text_input=PROMPT, max_tokens=20, seed=2, route="aggregated", return_proof=True)
    assert answer.text == expected
    assert json.loads(answer.last("proof"))["decode_worker"] == name
    assert role.main([name, "prefill", "--run-dir", str(cluster.two.run_dir)]) == 0


def _health(server: TritonServer, path: str = "/health") -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.host, server.openai_port, timeout=10)
    with closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.load(answer)["trouble"] if answer.status != 404 else ""


def test_a_server_without_a_router_drains_its_workers_and_tells_how_they_are(cluster: Cluster, one: Asking) -> None:
    """While nobody prefills, decode workers do."""
    run_dir = ["--run-dir", str(cluster.prefill.run_dir)]
    _wait_for(lambda: _health(cluster.prefill) == (200, ""), 5)
    expected = one.ask(text_input=PROMPT, max_tokens=20, seed=4, route="remote").text
    assert drain.main(run_dir) == 0
    assert _health(cluster.prefill) == (503, "worker prefill is drained")
    assert _health(cluster.prefill, "/health/live") == (200, "")
    assert _health(cluster.prefill, "/v1/models") == (404, "")
    for server in (cluster.one, cluster.two):
        _wait_for(lambda: total(metrics(server), "baton_worker_available") == 2, 5)  # noqa: B023
    assert one.ask(text_input=PROMPT, max_tokens=20, seed=4).text == expected
    assert drain.main(["--resume", *run_dir]) == 0
    _wait_for(lambda: _health(cluster.prefill) == (200, ""), 5)
    assert drain.main(["--run-dir", str(cluster.prefill.run_dir.parent)]) == 1


def test_a_server_that_is_stopped_costs_the_requests_of_other_routers_nothing(cluster: Cluster, two: Asking) -> None:
    """The server does not come back. What its decode worker had goes on at the other one."""
    fields: dict[str, Any] = {"max_tokens": 600, "seed": 3, "temperature": 0.8, "return_output_ids": True, "stream": True}
    prompts = [f"upgrade {i} {PROMPT}" for i in range(8)]
    for i, prompt in enumerate(prompts):
        two.send(f"before{i}", text_input=prompt, **fields)
    expected = [answer.ids for answer in two.collect(*[f"before{i}" for i in range(8)])]
    own = [f"decode@127.0.0.1:{cluster.two.grpc_port}", "--run-dir", str(cluster.two.run_dir)]
    assert drain.main(own) == 0
    for i, prompt in enumerate(prompts):
        two.send(f"u{i}", text_input=prompt, return_proof=True, **fields)
    for _ in range(40):
        two.next_response()
    assert drain.main([*own, "--resume"]) == 0
    cluster.one.stop()
    answers = two.collect(*[f"u{i}" for i in range(8)])
    assert [answer.ids for answer in answers] == expected
    assert min(json.loads(answer.last("proof"))["attempts"] for answer in answers) > 1, "all were at the one that stopped"
    wait_until_nothing_is_held(cluster.two, within_s=15)  # a canary's handoff to the one that stopped is given up by then


def test_a_server_without_a_router_hands_over_what_it_has_no_time_for(cluster: Cluster, two: Asking) -> None:
    """Last in this file, after the test above: it takes the place of that server. Short streams end there, long ones do not."""
    short: dict[str, Any] = {"max_tokens": 100, "seed": 3, "temperature": 0.8, "stream": True, "route": "remote"}
    long: dict[str, Any] = {**short, "max_tokens": 1500}
    expected = two.ask(text_input=PROMPT, **short).text, two.ask(text_input=PROMPT, **long).text
    with cluster.third as third:
        name = f"decode@127.0.0.1:{third.grpc_port}"
        _wait_for(lambda: total(metrics(cluster.two), "baton_worker_available", worker=name) == 1, 15)
        own = [f"decode@127.0.0.1:{cluster.two.grpc_port}", "--run-dir", str(cluster.two.run_dir)]
        assert drain.main(own) == 0
        for i, fields in enumerate((short, long) * 3):
            two.send(f"h{i}", text_input=PROMPT, return_proof=True, **fields)
        for _ in range(30):
            two.next_response()
        assert drain.main([*own, "--resume"]) == 0
        began = time.monotonic()
        third.stop(2.0)
        assert time.monotonic() - began < 20
    answers = two.collect(*[f"h{i}" for i in range(6)])
    assert [answer.text for answer in answers] == [*expected] * 3
    proofs = [json.loads(answer.last("proof")) for answer in answers]
    assert [(proof["attempts"], proof["decode_worker"] == name) for proof in proofs] == [(1, True), (2, False)] * 3
