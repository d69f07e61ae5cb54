"""What the Kubernetes manifests start: ready by their own probes, and a request goes through it."""

from __future__ import annotations

import json
import shutil
import urllib.request

import pytest

from tests.network.conftest import Cluster
from tests.triton.asking import Asking, metrics, total

pytestmark = pytest.mark.triton


def test_probes_succeed(cluster: Cluster) -> None:
    for pod in cluster.pods:
        pod.await_probe("readinessProbe", 20)
        assert pod.probe("livenessProbe")
        hook = pod.spec.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["true"])
        assert shutil.which(hook[0])


def test_a_request_goes_through_both_pools(cluster: Cluster, asking: Asking) -> None:
    """Pools are found by the names of their Services; prefill and decode are other hosts."""
    answer = asking.ask(text_input="one two three " * 30, max_tokens=8, seed=1, route="remote", return_proof=True)
    proof = json.loads(answer.last("proof"))
    assert proof["prefill_worker"] in {f"prefill@{pod.host}:8001" for pod in cluster.prefill}
    assert proof["decode_worker"] in {f"decode@{pod.host}:8001" for pod in cluster.decode}
    assert proof["kv_tokens_received"] > 50
    assert proof["kv_tokens_recomputed"] == 0


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
