"""Several tritonservers that speak TLS with each other and with Redis; and one whose files are wrong."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from python_backends.core.errors import ConfigError
from scripts.tritonserver import TritonServer
from tests.kv.certificates import redis_arguments, write_certificates
from tests.kv.redis_server import RedisServer
from tests.triton.asking import Asking, metrics, total, worker_process
from tests.triton.test_cluster import free_ports

pytestmark = pytest.mark.triton

COMMON = """
engine: {kv_pool_mib: 32, fake: {prefill_us_per_token: 50, step_us: 4000}}
router: {worker_wait_s: 3}
health: {canary_s: 0.2}
"""
PREFILL, DECODE = "{role: prefill, engine: fake}", "{role: decode, engine: fake}"
PROMPT = " ".join(str(number) for number in range(60))


@dataclass
class Cluster:
    """`workers`: prefill and decode; their gRPC speaks TLS and asks for a certificate. `router`: has no workers of its own and
    knows all others. `stranger`: a router that has another authority, and a prefill worker whose gRPC speaks no TLS.
    """

    workers: TritonServer
    router: TritonServer
    stranger: TritonServer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    (directory / "key").write_bytes(os.urandom(32))
    return write_certificates(directory)


def _server(files: Path, name: str, workers: str, cluster: str, more: str = "", **paths: str) -> TritonServer:
    """`more`: further sections. `paths`: keys of `cluster` that name a file."""
    named = "".join(f", {key}: {files / path}" for key, path in paths.items())
    config = files / f"{name}.yaml"
    security = f"security: {{key_file: {files}/key}}\n"
    config.write_text(f"workers: [{workers}]\n{COMMON}{security}cluster: {{{cluster}{named}}}\n{more}")
    return TritonServer(config)


@pytest.fixture(scope="module")
def cluster(files: Path, smollm2_dir: Path) -> Iterator[Cluster]:
    ports = free_ports(5)
    own = {"tls_certificate": "client.pem", "tls_key": "client.key"}
    there = f"{{hosts: [127.0.0.1], channel_ports: [{ports[0]}, {ports[1]}]}}"
    plain = f"{{hosts: [127.0.0.1], channel_ports: [{ports[2]}]}}"
    servers = [
        _server(
            files,
            "workers",
            f"{PREFILL}, {DECODE}",
            f"router: false, listen: 127.0.0.1, channel_port: {ports[0]}, grpc_port: {ports[3]}",
            grpc_certificate="127.0.0.1.pem",
            grpc_key="127.0.0.1.key",
            grpc_client_ca="ca.pem",
        ),
        _server(
            files,
            "stranger",
            PREFILL,
            f"listen: 127.0.0.1, channel_port: {ports[2]}, grpc_port: {ports[4]}, pools: [{there}]",
            tls_ca="other-ca.pem",
            **own,
        ),
        _server(files, "router", "", f"pools: [{there}, {plain}]", tls_ca="ca.pem", **own),
    ]
    workers, stranger, router = servers
    with ThreadPoolExecutor(len(servers)) as threads:
        try:
            workers.start()  # before anybody asks at a port that is not open yet
            list(threads.map(TritonServer.start, (stranger, router)))
            _wait_for(lambda: total(metrics(router), "baton_worker_up") == 3)
            _wait_for(lambda: total(metrics(router), "baton_worker_available") == 2)
            yield Cluster(workers, router, stranger)
        finally:
            list(threads.map(TritonServer.stop, servers))


def _wait_for(condition: Callable[[], bool], within_s: float = 15) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.05)


def _troubles(server: TritonServer, worker: str) -> list[str]:
    """What its log says of the worker alone that is no good news."""
    lines = server.log.path.read_text(errors="replace").splitlines()
    return [line for line in lines if re.match(rf'[WE][^"]*"worker {re.escape(worker)} ', line)]


def test_work_is_handed_over_by_tls(cluster: Cluster) -> None:
    asking = Asking(cluster.router)
    answer = asking.ask(text_input=PROMPT, max_tokens=20, seed=1, route="remote", return_proof=True)
    asking.close()
    proof = json.loads(answer.last("proof"))
    assert proof["prefill_worker"] == f"prefill@127.0.0.1:{cluster.workers.grpc_port}"
    assert proof["decode_worker"] == f"decode@127.0.0.1:{cluster.workers.grpc_port}"
    assert proof["kv_tokens_received"] > 100
    assert proof["attempts"] == 1


def test_a_server_that_speaks_no_tls_is_given_no_work_and_the_log_says_why(cluster: Cluster) -> None:
    plain = f"prefill@127.0.0.1:{cluster.stranger.grpc_port}"
    told = "speaks no TLS: give cluster.grpc_certificate there, or no cluster.tls_ca here"
    _wait_for(lambda: any(told in line for line in _troubles(cluster.router, plain)))
    asking = Asking(cluster.router)
    for number in range(4):
        answer = asking.ask(text_input=f"{number} {PROMPT}", max_tokens=4, seed=1, route="remote", return_proof=True)
        assert plain not in answer.last("proof").decode()
    asking.close()


def test_a_router_with_another_authority_says_so_and_leaves_the_workers_alone(cluster: Cluster) -> None:
    """They are on its host and fail all its canaries, so it could kill them. Its own worker is not asked by gRPC."""
    processes = [worker_process(cluster.workers, role).pid for role in ("prefill", "decode")]
    asking, began = Asking(cluster.stranger), time.monotonic()
    answer = asking.ask(text_input=PROMPT, max_tokens=4)
    asking.close()
    assert time.monotonic() - began < 10
    assert "not vouched for by cluster.tls_ca" in str(answer.error)
    _wait_for(lambda: total(metrics(cluster.stranger), "baton_canaries_total", verdict="failed") > 2 * 12)
    assert total(metrics(cluster.stranger), "baton_worker_available") == 1
    for role in ("prefill", "decode"):
        lines = _troubles(cluster.stranger, f"{role}@127.0.0.1:{cluster.workers.grpc_port}")
        assert ["is given no work" in line or "is left alone" in line for line in lines] == [True, True], lines
        assert all("not vouched for by cluster.tls_ca" in line for line in lines)
    assert [worker_process(cluster.workers, role).pid for role in ("prefill", "decode")] == processes


@pytest.fixture
def redis_server(files: Path) -> Iterator[RedisServer]:
    """With TLS alone, for clients with a certificate, and one user with the rights that registry and store need."""
    rights = "+time +zadd +zrem +zrangebyscore +zremrangebyscore +get +set +exists +unlink +expire +info"
    (files / "users").write_text(f"user default off\nuser baton on >word ~baton:* {rights}\n")
    (files / "word").write_text("word\n")
    server = RedisServer("--aclfile", str(files / "users"), tls=redis_arguments(files))
    yield server
    server.close()


def test_registry_and_store_in_a_redis_with_tls_and_a_user(files: Path, redis_server: RedisServer, smollm2_dir: Path) -> None:
    ports = free_ports(2)
    registry = f"registry: {redis_server.url.replace('//', '//baton@')}"
    own = {"tls_ca": "ca.pem", "tls_certificate": "client.pem", "tls_key": "client.key", "registry_password_file": "word"}
    login = f"username: baton, password_file: {files}/word"
    certificates = f"ca_file: {files}/ca.pem, cert_file: {files}/client.pem, key_file: {files}/client.key"
    servers = [
        _server(
            files,
            "registered",
            DECODE,
            f"router: false, listen: 127.0.0.1, channel_port: {ports[0]}, grpc_port: {ports[1]}, {registry}",
            f"store: {{remote: {{servers: ['{redis_server.url}'], {login}, {certificates}}}}}\n",
            grpc_certificate="127.0.0.1.pem",
            grpc_key="127.0.0.1.key",
            **own,
        ),
        _server(files, "finder", "", registry, **own),
    ]
    with ThreadPoolExecutor(len(servers)) as threads:
        try:
            list(threads.map(TritonServer.start, servers))
            router = servers[1]
            _wait_for(lambda: total(metrics(router), "baton_worker_available") == 1)
            asking = Asking(router)
            assert len(asking.ask(text_input=PROMPT, max_tokens=20, seed=1).text) > 0
            asking.close()
            _wait_for(lambda: total(metrics(router), "baton_store_blocks_total", tier="remote", event="written") > 0)
            assert total(metrics(router), "baton_store_up", tier="remote") == 1
        finally:
            list(threads.map(TritonServer.stop, servers))


def test_files_that_are_wrong_are_named_before_a_server_starts(files: Path) -> None:
    for paths, names in (
        ({"grpc_certificate": "none.pem", "grpc_key": "127.0.0.1.key"}, r"cluster\.grpc_certificate, grpc_key: .*none\.pem"),
        ({"grpc_certificate": "127.0.0.1.pem", "grpc_key": "client.key"}, r"cluster\.grpc_certificate, grpc_key"),
        (
            {"grpc_certificate": "127.0.0.1.pem", "grpc_key": "127.0.0.1.key", "grpc_client_ca": "client.key"},
            r"cluster\.grpc_client_ca: .*client\.key",
        ),
    ):
        with pytest.raises(ConfigError, match=names):
            _server(files, "wrong", DECODE, "listen: 127.0.0.1", **paths)
