"""Throughput as workers and routers are added, each on a host of its own. BATON_LONG=1 runs it: minutes.

Workers' time is slept, so two cores are enough for all of them. Routers really compute, so each is given a small share of a
core, as a pod's CPU limit does, and the sum stays far below what the machine has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.manifests import base_documents, find
from tests.network.hosts import Network, require_namespaces
from tests.network.limits import CpuLimit
from tests.network.pods import Pod, make_pods, start_all, write_deployment
from tests.triton.asking import Asking, metrics, total

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not os.environ.get("BATON_LONG"), reason="BATON_LONG=1 runs it: minutes"),
]

_MOST = 4
_START_S = 200
Pods = dict[str, list[Pod]]


@contextmanager
def cluster(directory: Path, changes: dict[str, Any], **counts: int) -> Iterator[tuple[Network, Pods]]:
    """All pods run from the beginning; `changes` are to the deployment files of all."""
    require_namespaces()
    write_deployment(directory, changes)
    documents = base_documents()
    network = Network()
    pods: Pods = {}
    try:
        for role, count in counts.items():
            pods[role] = make_pods(network, find(documents, "Deployment", f"baton-{role}"), count, directory)
        start_all([pod for each in pods.values() for pod in each], _START_S)
        yield network, pods
    finally:
        with ThreadPoolExecutor(9) as threads:
            list(threads.map(Pod.stop, [pod for each in pods.values() for pod in each]))
        network.close()


def _await_workers(router: Pod, count: int) -> None:
    end = time.monotonic() + 30
    while total(metrics(router), "baton_worker_up") != count:
        assert time.monotonic() < end, [key for key, value in metrics(router).items() if "worker_up" in key and value]
        time.sleep(0.1)


def _throughput(routers: Sequence[Pod], requests: int, tokens: int) -> float:
    """Tokens per second; each router is asked so many requests at once."""

    def ask(client: Asking) -> int:
        names = [f"s{number}" for number in range(requests)]
        for number, name in enumerate(names):
            fields = {"text_input": f"{number} of many", "max_tokens": tokens, "seed": number, "route": "remote"}
            client.send(name, **fields, stream=True, return_output_ids=True)
        answers = client.collect(*names)
        assert [answer.error for answer in answers if answer.error is not None] == []
        return sum(len(answer.ids) for answer in answers)

    clients = [Asking(router) for router in routers]
    try:
        for client in clients:
            client.ask(text_input="one", max_tokens=2)
        began = time.monotonic()
        with ThreadPoolExecutor(len(clients)) as threads:
            made = sum(threads.map(ask, clients))
        return made / (time.monotonic() - began)
    finally:
        for client in clients:
            client.close()


def test_throughput_grows_with_the_workers(tmp_path: Path, smollm2_dir: Path) -> None:
    """Four streams at once, 25 steps a second: a decode worker makes 100 tokens/s."""
    changes = {"engine": {"kv_pool_mib": 32, "max_batch": 4, "fake": {"prefill_us_per_token": 1000, "step_us": 40_000}}}
    with cluster(tmp_path, changes, prefill=_MOST, decode=_MOST, router=1) as (network, pods):
        found = {}
        for count in (1, 2, _MOST):
            for role in ("prefill", "decode"):
                network.name(f"baton-{role}", [pod.machine for pod in pods[role][:count]])
            _await_workers(pods["router"][0], 2 * count)
            found[count] = _throughput(pods["router"], 96, 20)
    print({count: round(rate, 1) for count, rate in found.items()})
    assert found[2] > 1.9 * found[1]
    assert found[4] > 3.7 * found[1]


_SHARE = 0.15  # of a core, for each router's pod


def test_throughput_grows_with_the_routers(tmp_path: Path, smollm2_dir: Path) -> None:
    """Workers that could do several times as much, routers that can't: what limits them is their share of a core."""
    changes = {"engine": {"kv_pool_mib": 32, "max_batch": 128, "fake": {"prefill_us_per_token": 1, "step_us": 10_000}}}
    with cluster(tmp_path, changes, prefill=2, decode=2, router=_MOST) as (_, pods):
        for router in pods["router"]:
            _await_workers(router, 4)
        _throughput(pods["router"], 16, 40)  # the first requests of a process cost more
        with ExitStack() as closing_limits:
            limits = [closing_limits.enter_context(_limited(router)) for router in pods["router"]]
            found = {}
            for count in (1, 2, _MOST):
                before = [limit.throttled() for limit in limits[:count]]
                found[count] = _throughput(pods["router"][:count], 128, 40)
                after = [limit.throttled() for limit in limits[:count]]
                shares = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in zip(before, after, strict=True)]
                print(f"{count} routers: {found[count]:.0f} tokens/s, at their limit in {min(shares):.0%} of the time or more")
                assert min(shares) > 0.8, "something else than the routers' share of a core was the limit"
    assert found[2] > 1.9 * found[1]
    assert found[4] > 3.7 * found[1]


@contextmanager
def _limited(pod: Pod) -> Iterator[CpuLimit]:
    assert pod.process is not None
    limit = CpuLimit(pod.machine.name, _SHARE, psutil.Process(pod.process.process.pid))
    try:
        yield limit
    finally:
        limit.close()
