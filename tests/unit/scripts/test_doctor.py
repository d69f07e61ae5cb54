"""The doctor finds out the truth: about made-up control groups, real ports, a real Redis, and a real link."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from python_backends.core.config import load_deployment
from python_backends.core.errors import ConfigError, Unavailable
from scripts import doctor_facts as facts
from scripts import doctor_measures as measures
from scripts.doctor_link import listen, measure_link


def test_pins_that_apply_here(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# a comment\n\ntorch==2.13.0\ntritonclient[all]==2.73.0  # why\n"
        'old==1; python_version < "3.0"\nnew==2; python_version >= "3.0"\n'
    )
    wanted = facts.wanted_libraries(path)
    assert {name: str(pin) for name, pin in wanted.items()} == {"torch": "==2.13.0", "tritonclient": "==2.73.0", "new": "==2"}
    assert facts.found_libraries(["numpy", "no-such-package"]).keys() == {"numpy"}


def test_a_taken_port_is_named_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = facts.ports("127.0.0.1", {"--http-port": port, "--grpc-port": 0})
        assert set(found) == {"--http-port"}
        assert "Address already in use by" in found["--http-port"][1]
    assert facts.ports("127.0.0.1", {"--http-port": port}) == {"--http-port": (port, "")}


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("0::/pod/box\n")
    v2 = tmp_path / "v2"
    _write(v2, {"pod/box/memory.max": "max\n", "pod/box/memory.current": "5\n"})
    assert facts.cgroup_memory_left(v2, own) is None
    _write(v2, {"pod/memory.max": "1000\n", "pod/memory.current": "700\n", "pod/memory.stat": "anon 1\ninactive_file 50\n"})
    assert facts.cgroup_memory_left(v2, own) == 350, "the parent's limit counts, page cache can be given up"
    own.write_text("4:memory:/pod\n1:cpu:/\n0::/\n")
    v1 = tmp_path / "v1"
    _write(v1, {"memory/pod/memory.limit_in_bytes": "800\n", "memory/pod/memory.usage_in_bytes": "900\n"})
    _write(v1, {"memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert facts.cgroup_memory_left(v1, own) == 0


def test_cpu_quota_of_both_versions(tmp_path: Path) -> None:
    assert facts.cpu_quota(tmp_path) is None
    _write(tmp_path, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"})
    assert facts.cpu_quota(tmp_path) is None
    _write(tmp_path, {"cpu/cpu.cfs_quota_us": "150000\n"})
    assert facts.cpu_quota(tmp_path) == 1.5
    _write(tmp_path, {"cpu.max": "max 100000\n"})
    assert facts.cpu_quota(tmp_path) is None
    _write(tmp_path, {"cpu.max": "250000 100000\n"})
    assert facts.cpu_quota(tmp_path) == 2.5


def test_rdma_devices_with_an_active_port(tmp_path: Path) -> None:
    _write(tmp_path, {"mlx5_0/ports/1/state": "4: ACTIVE\n", "mlx5_0/ports/1/rate": "200 Gb/sec (4X HDR)\n"})
    _write(tmp_path, {"mlx5_1/ports/1/state": "1: DOWN\n", "mlx5_1/ports/1/rate": "10 Gb/sec (4X SDR)\n"})
    assert facts.rdma_devices(tmp_path) == ["mlx5_0 port 1: 200 Gb/sec (4X HDR)"]


def test_threads_and_pools_of_a_deployment(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(
        "workers: [{role: prefill, threads: 3}, {role: decode, cpus: '0-1'}, {role: aggregated, kv_pool_mib: 64}]\n"
        "engine: {kv_pool_mib: 128}\n"
    )
    deployment = load_deployment(path)
    assert facts.compute_threads(deployment, 8) == {"prefill": 3, "decode": 2}
    assert facts.pool_bytes(deployment) == [128 << 20, 128 << 20, 64 << 20]
    path.write_text("workers: [{role: aggregated}]\nmodel: {path: /no/such/model}\n")
    alone = load_deployment(path)
    assert facts.compute_threads(alone, 8) == {"aggregated": 8}
    assert "is not a directory" in facts.model(alone)[2]
    assert facts.versions(alone)["model"] == "missing"


def test_limits_are_measured() -> None:
    assert 1e8 < measures.memory_bandwidth(1) < 1e12
    assert 1e8 < measures.matrix_rate(1) < 1e13
    assert "shm" in measures.transports()
    for name in measures.transports():
        rate, problem = measures.transfer_rate(name)
        assert problem or rate > 1e8


# --- Redis -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on PATH")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [binary, "--port", str(port), "--save", "", "--dir", str(tmp_path), "--maxmemory-policy", "allkeys-lru"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        url = f"redis://127.0.0.1:{port}/0"
        try:
            end = time.monotonic() + 10
            while facts.redis_state(url)[0]:
                assert time.monotonic() < end
                time.sleep(0.05)
            yield url
        finally:
            process.terminate()


def test_a_redis_that_answers(redis_url: str) -> None:
    problem, took_ms, policy = facts.redis_state(redis_url)
    assert (problem, policy) == ("", "allkeys-lru")
    assert 0 < took_ms < 1000


def test_a_redis_that_does_not() -> None:
    assert "refused" in facts.redis_state("redis://127.0.0.1:9/0")[0]
    assert facts.redis_state("carrier-pigeon://x")[0]
    assert facts.without_password("redis://me:secret@host:1/0") == "redis://host:1/0"


# --- two hosts ---------------------------------------------------------------------------------------------------------


def test_two_doctors_measure_the_link_between_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told: list[str] = []
    thread = threading.Thread(target=lambda: told.append(listen("127.0.0.1", port, {"torch": "1"}, 10.0)), daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while True:
        try:
            link = measure_link(f"127.0.0.1:{port}")
            break
        except Unavailable:
            assert time.monotonic() < end
    thread.join(timeout=10)
    assert told == ["127.0.0.1"]
    assert link.versions == {"torch": "1"}
    assert link.bytes_s > 1e7
    assert 0 < link.round_trip_ms < 100


def test_links_that_can_not_be() -> None:
    with pytest.raises(Unavailable, match="run scripts/doctor --listen 9 there"):
        measure_link("127.0.0.1:9")
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        measure_link("host")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="Address already in use"):
        listen("127.0.0.1", taken.getsockname()[1], {}, 1.0)
    with pytest.raises(Unavailable, match="no doctor came"):
        listen("127.0.0.1", 0, {}, 0.1)


def test_somebody_else_at_the_other_end() -> None:
    """A web server, say, that answers something else."""

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(Unavailable, match="that was no doctor"):
            measure_link(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join(timeout=5)
