"""The pods of the Kubernetes manifests, each on a host of its own: ready by their probes, and then in trouble.

Under broken, lossy, slow and long networks: no wrong text, no hang, errors only where nobody could serve.

With BATON_LONG=1 also long partitions and random trouble, which takes minutes.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from tests.network.conftest import Cluster
from tests.network.hosts import Host
from tests.network.pods import Pod
from tests.triton.asking import Answer, Asking, metrics, total, wait_until_nothing_is_held

pytestmark = pytest.mark.triton

LONG = bool(os.environ.get("BATON_LONG"))
_PROMPTS = [" ".join(str(number) for number in range(i, 40 + i)) for i in range(6)]
_FIELDS: dict[str, Any] = {"max_tokens": 60, "seed": 3, "temperature": 0.8, "stream": True, "return_output_ids": True}
_ids = count()


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[list[int]]:
    """What every prompt is answered with on a sound network."""
    client = Asking(cluster.router)
    try:
        return [client.ask(text_input=prompt, **_FIELDS).ids for prompt in _PROMPTS]
    finally:
        client.close()


@pytest.fixture(autouse=True)
def healed(cluster: Cluster) -> Iterator[None]:
    """Afterwards the network is sound, all workers are back and nothing is held."""
    _await_workers(cluster, 4)
    yield
    cluster.network.heal()
    _await_workers(cluster, 4)
    wait_until_nothing_is_held(cluster.router, within_s=5)


def _await_workers(cluster: Cluster, up: int, within_s: float = 40) -> None:
    _wait_for(lambda: total(metrics(cluster.router), "baton_worker_up") == up, within_s)


def _await_available(cluster: Cluster, count: int) -> None:
    """So many are given work."""
    _wait_for(lambda: total(metrics(cluster.router), "baton_worker_available") == count, 15)


def _wait_for(condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.05)


def _send(asking: Asking, route: str = "") -> list[str]:
    """One request per prompt, none of which finds its prefix cached."""
    names = []
    for prompt in _PROMPTS:
        names.append(f"n{next(_ids)}")
        more = {"route": route} if route else {}
        asking.send(names[-1], text_input=prompt, cache_salt=names[-1], **_FIELDS, **more)
    return names


def _check(answers: list[Answer], expected: list[list[int]]) -> None:
    assert [answer.ids for answer in answers] == expected * (len(answers) // len(expected))


@contextmanager
def _timed(within_s: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < within_s, f"{took:.1f} s"


def _under(asking: Asking, expected: list[list[int]], trouble: Callable[[], None], route: str = "") -> None:
    """Some requests are under way when trouble begins, others come after."""
    before = _send(asking, route)
    for _ in range(12):
        asking.next_response()
    trouble()
    after = _send(asking, route)
    with _timed(30):
        _check(asking.collect(*before, *after), expected)


def _pairs(cluster: Cluster) -> dict[str, tuple[Host, Host]]:
    router, prefill, decode = (pod.machine for pod in (cluster.router, cluster.prefill[0], cluster.decode[0]))
    return {"router-prefill": (router, prefill), "router-decode": (router, decode), "prefill-decode": (prefill, decode)}


# --- what the manifests start ---


def test_probes_succeed(cluster: Cluster) -> None:
    for pod in (*cluster.pods, cluster.redis):
        pod.await_probe("readinessProbe", 20)
        assert pod.probe("livenessProbe")


def test_a_request_goes_through_both_pools(cluster: Cluster, asking: Asking) -> None:
    """Pools are found by the names of their Services; prefill and decode are other hosts."""
    answer = asking.ask(text_input="one two three " * 30, max_tokens=8, seed=1, route="remote", return_proof=True)
    proof = json.loads(answer.last("proof"))
    assert proof["prefill_worker"] in {f"prefill@{pod.host}:8001" for pod in cluster.prefill}
    assert proof["decode_worker"] in {f"decode@{pod.host}:8001" for pod in cluster.decode}
    assert proof["kv_tokens_received"] > 50
    assert proof["kv_tokens_recomputed"] == 0
    assert proof["transport"] == "tcp"


def test_the_store_is_found_and_filled(cluster: Cluster, asking: Asking) -> None:
    """Redis by the name of its pod, with the password of its secret."""
    asking.ask(text_input="nine ten eleven " * 40, max_tokens=8, seed=1, route="remote")
    _wait_for(lambda: total(metrics(cluster.router), "baton_store_blocks_total", tier="remote", event="written") > 0, 10)
    assert total(metrics(cluster.router), "baton_store_up", tier="remote") == 4


def test_the_openai_api_answers_where_the_service_points(cluster: Cluster) -> None:
    url = f"http://{cluster.router.host}:{cluster.router.port('openai')}"
    body = {"model": "smollm2-135m-instruct", "prompt": "Hello", "max_tokens": 4}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 4


def test_prometheus_finds_what_scaling_needs(cluster: Cluster) -> None:
    """At the port that the annotations name, and passed on by the front end."""
    seen = metrics(cluster.router)
    assert total(seen, "baton_worker_up") == 4
    for role, pods in (("prefill", cluster.prefill), ("decode", cluster.decode)):
        for pod in pods:
            assert f'baton_worker_queued_tokens{{role="{role}",worker="{role}@{pod.host}:8001"}}' in seen
    assert "baton_router_requests" in seen
    assert "baton_router_queued_tokens" in seen
    url = f"http://{cluster.router.host}:{cluster.router.port('openai')}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        assert b"baton_worker_queued_tokens{" in response.read()


# --- trouble ---


@pytest.mark.parametrize("pair", ["router-prefill", "router-decode", "prefill-decode"])
def test_a_pair_is_cut(pair: str, cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    one, other = _pairs(cluster)[pair]
    _under(asking, expected, lambda: cluster.network.cut(one, other), route="remote")
    _await_workers(cluster, 4 if pair == "prefill-decode" else 3, within_s=5)


@pytest.mark.parametrize("way", ["to the worker", "from the worker"])
def test_a_link_is_cut_one_way(way: str, cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    router, worker = cluster.router.machine, cluster.decode[0].machine
    ends = (router, worker) if way == "to the worker" else (worker, router)
    _under(asking, expected, lambda: cluster.network.cut_one_way(*ends))
    _await_workers(cluster, 3, within_s=10)


def test_packets_are_lost(cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    def trouble() -> None:
        for pod in cluster.pods:
            cluster.network.lose(pod.machine, 0.01)

    _under(asking, expected, trouble, route="remote")


def _pods(cluster: Cluster, where: str) -> list[Pod]:
    return {
        "router": [cluster.router],
        "prefill": cluster.prefill,
        "decode": cluster.decode,
        "redis": [cluster.redis],
        "everybody": [*cluster.pods, cluster.redis],
    }[where]


def _slow(cluster: Cluster, where: str, rate: str) -> None:
    for pod in _pods(cluster, where):
        cluster.network.slow(pod.machine, rate)


def _delay(cluster: Cluster, where: str) -> None:
    """By 20 ms, as between cities. Of everybody it is a delay of both ways."""
    for pod in _pods(cluster, where):
        cluster.network.delay(pod.machine, 0.02)


def _assert_kv_moves(asking: Asking) -> None:
    """Late it may be, but it comes."""
    answer = asking.ask(text_input=_PROMPTS[0], max_tokens=8, cache_salt=f"k{next(_ids)}", route="remote", return_proof=True)
    proof = json.loads(answer.last("proof"))
    assert proof["kv_tokens_received"] > 50
    assert proof["kv_tokens_recomputed"] == 0


@pytest.mark.parametrize("link", ["router 40mbit", "prefill 4mbit", "decode 4mbit", "redis 1mbit"])
def test_slow_links(link: str, cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    """All that these hosts send and are sent. At 4 Mbit/s the KV of one prompt takes a sixth of a second."""
    _under(asking, expected, lambda: _slow(cluster, *link.split()), route="remote")
    _assert_kv_moves(asking)


@pytest.mark.parametrize("where", ["router", "prefill", "decode", "redis", "everybody"])
def test_long_links(where: str, cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    _under(asking, expected, lambda: _delay(cluster, where), route="remote")
    assert total(metrics(cluster.router), "baton_worker_up") == 4
    _assert_kv_moves(asking)


@pytest.mark.parametrize("trouble", ["slow", "long"])
def test_what_only_a_far_store_has(trouble: str, cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    """The pools that hold these prompts' KV are cut off: others read it from Redis, or compute it where that is faster."""
    written = _written(cluster)
    names = _send(asking, "local")
    _check(asking.collect(*names), expected)
    _wait_for(lambda: _written(cluster) > written, 10)
    _slow(cluster, "redis", "1mbit") if trouble == "slow" else _delay(cluster, "redis")
    cluster.network.cut(cluster.router.machine, cluster.decode[0].machine)
    _await_workers(cluster, 3)
    for salt, prompt in zip(names, _PROMPTS, strict=True):
        asking.send(f"{salt} again", text_input=prompt, cache_salt=salt, **_FIELDS)
    with _timed(20):
        _check(asking.collect(*[f"{salt} again" for salt in names]), expected)


def _written(cluster: Cluster) -> float:
    """Blocks in Redis, in all."""
    return total(metrics(cluster.router), "baton_store_blocks_total", tier="remote", event="written")


def test_the_store_is_cut_off(cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    """Only hits are lost."""

    def trouble() -> None:
        for pod in cluster.pods:
            cluster.network.cut(pod.machine, cluster.redis.machine)

    _under(asking, expected, trouble)


def test_all_workers_are_cut_off_and_come_back_at_once(cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    """Nobody can serve: an error, in time. Then everybody connects again at the same moment."""
    for pod in (*cluster.prefill, *cluster.decode):
        cluster.network.cut(cluster.router.machine, pod.machine)
    _await_workers(cluster, 0)
    _wait_for(lambda: not cluster.router.probe("readinessProbe"), 5)
    assert cluster.router.probe("livenessProbe")
    with _timed(15):
        (answer,) = asking.collect(_send(asking)[0])
    assert "no decode or aggregated worker is up" in str(answer.error)
    waiting = _send(asking)
    cluster.network.heal()
    with _timed(20):
        _check(asking.collect(*waiting), expected)
    cluster.router.await_probe("readinessProbe", 5)


def test_a_worker_that_stands_still_is_not_ready(cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    """Nor is it restarted for that, until it has lasted. What it had goes on elsewhere."""
    pod = cluster.decode[0]
    worker = pod.worker()

    def trouble() -> None:
        worker.suspend()
        try:
            _await_workers(cluster, 3, within_s=5)
            assert not pod.probe("readinessProbe")
            assert pod.probe("livenessProbe")
            assert cluster.decode[1].probe("readinessProbe")
        finally:
            worker.resume()

    _under(asking, expected, trouble)
    assert pod.process is not None
    time.sleep(1)  # Triton 24.10 aborts at times, when work was handed to it while its model's process stood still
    if pod.process.process.poll() is not None:
        pod.start()  # as the kubelet does
    pod.await_probe("readinessProbe", 40)


def _name(pod: Pod) -> str:
    """Of its worker."""
    return f"{pod.machine.name.split('-')[1]}@{pod.host}:8001"


def _end(cluster: Cluster, pods: list[Pod], asking: Asking) -> None:
    """What the first of them has ends there, as long as it may. Nothing new is sent there, and nothing is tried again."""
    pod, *others = pods
    _await_available(cluster, 4)
    for other in others:
        other.execute("/opt/baton/scripts/drain")
    fields = {**_FIELDS, "max_tokens": 1500, "return_proof": True, "route": "remote"}
    prompts = [f"{prompt} {next(_ids)}" for prompt in _PROMPTS]
    before, after = ([f"{when}{number}" for number in range(len(prompts))] for when in (f"b{next(_ids)}-", f"a{next(_ids)}-"))
    for name, prompt in zip(before, prompts, strict=True):
        asking.send(name, text_input=prompt, **fields)
    for _ in range(40):
        asking.next_response()
    for other in others:
        other.execute("/opt/baton/scripts/drain", "--resume")
    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(pod.end)
        _wait_for(lambda: not total(metrics(cluster.router), "baton_worker_available", worker=_name(pod)), 15)
        _await_available(cluster, 3)
        assert not pod.probe("readinessProbe")
        assert pod.probe("livenessProbe")
        at_work = total(metrics(cluster.router), "baton_worker_requests", worker=_name(pod), state="running")
        for name, prompt in zip(after, prompts, strict=True):
            asking.send(name, text_input=prompt, **fields)
        answers = asking.collect(*before), asking.collect(*after)
        ended.result()
    assert [answer.ids for answer in answers[0]] == [answer.ids for answer in answers[1]]
    proofs = [[json.loads(answer.last("proof")) for answer in some] for some in answers]
    assert [proof["attempts"] for some in proofs for proof in some] == [1] * 2 * len(prompts)
    was_used = [[_name(pod) in (proof["prefill_worker"], proof["decode_worker"]) for proof in some] for some in proofs]
    assert was_used == [[True] * len(prompts), [False] * len(prompts)]
    assert at_work or pods is cluster.prefill, "it had nothing to wait for"


def _replace(cluster: Cluster, pods: list[Pod], asking: Asking, expected: list[list[int]]) -> None:
    """The first of a Service's pods ends under load, is gone from the name and from the figures, and comes back."""
    pod, service = pods[0], pods[0].machine.name.rpartition("-")[0]

    def known() -> bool:
        return total(metrics(cluster.router), "baton_kv_block_bytes", worker=_name(pod)) > 0

    _end(cluster, pods, asking)
    cluster.network.name(service, [other.machine for other in pods[1:]])
    _wait_for(lambda: not known(), 10)
    pod.start()
    _check(asking.collect(*_send(asking)), expected)
    pod.await_probe("startupProbe", 60)
    cluster.network.name(service, [each.machine for each in pods])
    _await_workers(cluster, 4)


def test_rolling_update_under_load(cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    for pods in [cluster.decode, *([cluster.prefill] if LONG else [])]:
        _replace(cluster, pods, asking, expected)


@pytest.mark.skipif(not LONG, reason="BATON_LONG=1 runs it: minutes")
def test_long_partitions_leave_no_scars(cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    """Whoever was only cut off is not restarted when the network is whole again, and is back within seconds."""
    lives = total(metrics(cluster.router), "baton_worker_starts_total")
    for seconds in (6, 12, 30, 60):
        for pod in (cluster.prefill[0], cluster.decode[0]):
            cluster.network.cut(cluster.router.machine, pod.machine)
        _await_workers(cluster, 2)
        time.sleep(seconds)
        cluster.network.heal()
        _await_workers(cluster, 4, within_s=5)
        _check(asking.collect(*_send(asking, "remote")), expected)
    assert total(metrics(cluster.router), "baton_worker_starts_total") == lives


@pytest.mark.skipif(not LONG, reason="BATON_LONG=1 runs it: minutes")
def test_random_trouble(cluster: Cluster, asking: Asking, expected: list[list[int]]) -> None:
    """Two kinds at once, at random, but never so that nobody could serve: one decode worker is spared."""
    dice = random.Random(7)
    for _ in range(12):

        def trouble() -> None:
            for _ in range(2):
                one, other = dice.sample([pod.machine for pod in cluster.pods[:-1]], 2)
                kind = dice.choice(["cut", "one way", "loss", "slow", "long"])
                if kind == "cut":
                    cluster.network.cut(one, other)
                elif kind == "one way":
                    cluster.network.cut_one_way(one, other)
                elif kind == "loss":
                    cluster.network.lose(one, 0.05)
                elif kind == "slow":
                    cluster.network.slow(one, "20mbit")
                else:
                    cluster.network.delay(one, 0.02)

        _under(asking, expected, trouble, route=dice.choice(["", "remote", "local"]))
        cluster.network.heal()
        _await_workers(cluster, 4)
