"""One cluster for the tests of this folder: the CPU demo's pods, each on a host of its own, with engine `fake`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.manifests import base_documents, find
from tests.network.hosts import Network, require_namespaces
from tests.network.pods import Pod, make_pods, start_all, write_deployment
from tests.tools import require_program
from tests.triton.asking import Asking

_START_S = 100.0
CHANGES = {
    "engine": {"kv_pool_mib": 32, "fake": {"prefill_us_per_token": 50, "step_us": 4000}},
    "health": {"heartbeat_s": 0.1, "silent_s": 1.5},
    "router": {"worker_wait_s": 3},
    "transfer": {"lease_s": 2},  # KV that is held for one who was cut off is free after it
}


@dataclass
class Cluster:
    network: Network
    router: Pod
    prefill: list[Pod]
    decode: list[Pod]
    redis: Pod

    @property
    def pods(self) -> list[Pod]:
        return [self.router, *self.prefill, *self.decode]


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Cluster]:
    require_namespaces()
    require_program("redis-server", "redis-server")
    directory = tmp_path_factory.mktemp("pods")
    write_deployment(directory, CHANGES)
    documents = base_documents()
    network = Network()
    pods: dict[str, list[Pod]] = {}
    try:
        pods["redis"] = make_pods(network, find(documents, "StatefulSet", "baton-redis"), 1, directory)
        for role, count in (("prefill", 2), ("decode", 2), ("router", 1)):
            pods[role] = make_pods(network, find(documents, "Deployment", f"baton-{role}"), count, directory)
        everybody = [pod for each in pods.values() for pod in each]
        start_all(everybody, _START_S)
        yield Cluster(network, pods["router"][0], pods["prefill"], pods["decode"], pods["redis"][0])
    finally:
        network.heal()
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(Pod.stop, [pod for each in pods.values() for pod in each]))
        network.close()


@pytest.fixture
def asking(cluster: Cluster) -> Iterator[Asking]:
    client = Asking(cluster.router)
    yield client
    client.close()
