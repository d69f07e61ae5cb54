"""Throughput from 1+1 to 2+2 to 4+4 workers on hosts of their own, whose time is slept. BATON_LONG=1 runs it: minutes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.manifests import base_documents, find
from tests.network.hosts import Network, require_namespaces
from tests.network.pods import Pod, make_pods, start_all, write_deployment
from tests.triton.asking import Asking, metrics, total

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not os.environ.get("BATON_LONG"), reason="BATON_LONG=1 runs it: minutes"),
]

_MOST = 4
_REQUESTS, _TOKENS = 96, 20
CHANGES: dict[str, Any] = {  # four streams at once, 25 steps a second: a decode worker makes 100 tokens/s
    "engine": {"kv_pool_mib": 32, "max_batch": 4, "fake": {"prefill_us_per_token": 1000, "step_us": 40_000}},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[tuple[Network, dict[str, list[Pod]]]]:
    """All pods run from the beginning; how many of them are used is said by the names that routers look up."""
    require_namespaces()
    directory = tmp_path_factory.mktemp("scaling")
    write_deployment(directory, CHANGES)
    documents = base_documents()
    network = Network()
    pods: dict[str, list[Pod]] = {}
    try:
        for role, count in (("prefill", _MOST), ("decode", _MOST), ("router", 1)):
            pods[role] = make_pods(network, find(documents, "Deployment", f"baton-{role}"), count, directory)
        start_all([pod for each in pods.values() for pod in each], 200)
        yield network, pods
    finally:
        with ThreadPoolExecutor(9) as threads:
            list(threads.map(Pod.stop, [pod for each in pods.values() for pod in each]))
        network.close()


def _throughput(router: Pod) -> float:
    """Tokens per second of as many requests as keep all workers busy."""
    client = Asking(router)
    try:
        client.ask(text_input="one", max_tokens=2)
        began = time.monotonic()
        for number in range(_REQUESTS):
            client.send(f"s{number}", text_input=f"{number} of many", max_tokens=_TOKENS, seed=number, route="remote")
        answers = client.collect(*[f"s{number}" for number in range(_REQUESTS)])
        took = time.monotonic() - began
    finally:
        client.close()
    assert all(answer.error is None for answer in answers)
    return _REQUESTS * _TOKENS / took


def test_throughput_grows_with_the_workers(cluster: tuple[Network, dict[str, list[Pod]]]) -> None:
    network, pods = cluster
    (router,) = pods["router"]
    found = {}
    for count in (1, 2, _MOST):
        for role in ("prefill", "decode"):
            network.name(f"baton-{role}", [pod.machine for pod in pods[role][:count]])
        end = time.monotonic() + 30
        while total(metrics(router), "baton_worker_up") != 2 * count:
            assert time.monotonic() < end, [key for key, value in metrics(router).items() if "worker_up" in key and value]
            time.sleep(0.1)
        found[count] = _throughput(router)
    print({count: round(rate, 1) for count, rate in found.items()})
    assert found[2] > 1.9 * found[1]
    assert found[4] > 3.7 * found[1]
