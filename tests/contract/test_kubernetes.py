"""The Kubernetes manifests: valid for the API, of one piece, and about a Baton that is really there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from python_backends.core.config import load_deployment
from python_backends.core.paths import repository_root
from python_backends.core.types import Role
from router.metrics import exported_names
from scripts import drain
from scripts.serve import parse_options
from tests.manifests import BASE, KUBERNETES, OVERLAYS, REDIS, Document, base_documents, container, find, rendered
from tests.tools import require_program

ROOT = repository_root()
ADAPTER = KUBERNETES / "prometheus-adapter.yaml"
_VERSIONS = ("1.27", "1.37")  # the oldest with all that is used here, and the latest
_ROLES = ("router", "prefill", "decode")


def _deployments(documents: list[Document]) -> dict[str, Document]:
    return {role: find(documents, "Deployment", f"baton-{role}") for role in _ROLES}


# --- what needs no kubectl ---


@pytest.mark.parametrize("document", base_documents(), ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_the_base_is_valid(document: Document) -> None:
    for version in _VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def test_every_file_is_used() -> None:
    for folder in (BASE, REDIS, *OVERLAYS):
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        used = {*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))}
        used |= {file for generator in kustomization.get("configMapGenerator", []) for file in generator["files"]}
        there = {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")} - {"kustomization.yaml"}
        assert there == {path for path in used if path.endswith(".yaml")}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_deployment_files_fit_together_and_to_the_pods(overlay: Path) -> None:
    documents = base_documents()
    files = {role: load_deployment(overlay / "deployment" / f"{role}.yaml") for role in _ROLES}
    router = files["router"]
    assert router.workers == ()
    for each in files.values():
        for section in ("model", "engine", "transfer", "store", "security"):
            assert getattr(each, section) == getattr(router, section), section
    pools = {pool.dns: pool for pool in router.cluster.pools}
    for role in ("prefill", "decode"):
        (worker,) = files[role].workers
        assert worker.role is Role(role)
        cluster = files[role].cluster
        assert (cluster.router, cluster.listen) == (False, "0.0.0.0")
        ports = {port["name"]: port["containerPort"] for port in container(_deployments(documents)[role])["ports"]}
        assert (ports["channel"], ports["grpc"]) == (cluster.channel_port, cluster.grpc_port)
        assert files[role].transfer.ports in ("", str(ports["kv"]))
        service = find(documents, "Service", f"baton-{role}")
        assert service["spec"]["clusterIP"] == "None"
        assert pools[service["metadata"]["name"]].channel_ports == (cluster.channel_port,)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_the_store_is_where_the_pods_look_for_it(overlay: Path) -> None:
    documents = base_documents()
    redis = find(documents, "StatefulSet", "baton-redis")
    for server in load_deployment(overlay / "deployment" / "router.yaml").store.remote.servers:
        pod, service, port = re.fullmatch(r"redis://([\w-]+)\.([\w-]+):(\d+)/0", server).groups()  # type: ignore[union-attr]
        assert pod in [f"baton-redis-{number}" for number in range(redis["spec"]["replicas"])]
        assert service == redis["spec"]["serviceName"]
        assert find(documents, "Service", service)["spec"]["ports"][0]["port"] == int(port)


def test_pods_start_what_there_is() -> None:
    for role, deployment in _deployments(base_documents()).items():
        pod, found = deployment["spec"]["template"], container(deployment)
        (command,) = found["command"]
        assert (ROOT / command.removeprefix("/opt/baton/")).is_file()
        options = parse_options(found["args"])
        ports = {port["name"]: port["containerPort"] for port in found["ports"]}
        wanted = {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
        assert wanted.items() <= ports.items()
        assert ports["openai" if role == "router" else "health"] == options.openai_port
        assert options.config == Path(f"/etc/baton/deployment/{role}.yaml")
        assert {mount["name"] for mount in found["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert found[probe]["httpGet"]["port"] in ports
        assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
        assert "replicas" not in deployment["spec"], "the autoscaler's; a second owner would undo its work at each apply"


def test_everything_selects_somebody() -> None:
    documents = base_documents()
    pods = [
        each["spec"]["template"]["metadata"]["labels"] for each in documents if each["kind"] in ("Deployment", "StatefulSet")
    ]
    selectors = [
        each["spec"].get("selector", {}).get("matchLabels") or each["spec"].get("podSelector", {}).get("matchLabels")
        for each in documents
        if each["kind"] in ("Deployment", "PodDisruptionBudget", "NetworkPolicy")
    ]
    selectors += [each["spec"]["selector"] for each in documents if each["kind"] == "Service"]
    assert len(selectors) == 13
    for selector in selectors:
        assert selector
        assert any(selector.items() <= labels.items() for labels in pods)
    targets = [each["spec"]["scaleTargetRef"]["name"] for each in documents if each["kind"] == "HorizontalPodAutoscaler"]
    assert sorted(targets) == sorted(f"baton-{role}" for role in _ROLES)


def test_only_routers_and_peers_reach_workers() -> None:
    documents = base_documents()
    rules = find(documents, "NetworkPolicy", "baton-worker")["spec"]["ingress"]
    component = "app.kubernetes.io/component"
    by_router, by_peer, by_prometheus = rules
    assert by_router["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "baton", component: "router"}}}]
    ports = {port["name"]: port["containerPort"] for port in container(_deployments(documents)["prefill"])["ports"]}
    assert {rule["port"] for rule in by_router["ports"]} == {ports["channel"], ports["grpc"]}
    ((peer,),) = by_peer.values()
    assert peer["podSelector"]["matchExpressions"] == [{"key": component, "operator": "In", "values": ["prefill", "decode"]}]
    assert "namespaceSelector" in by_prometheus["from"][0]
    assert [rule["port"] for rule in by_prometheus["ports"]] == [ports["metrics"]]


def test_scaling_asks_for_metrics_that_are_exported() -> None:
    adapter = yaml.safe_load(ADAPTER.read_text())["rules"]
    own = re.findall(r"baton_\w+", adapter["custom"][0]["seriesQuery"])
    external = {rule["name"]["as"] for rule in adapter["external"]}
    files = [BASE / "autoscaling.yaml", *(path for overlay in OVERLAYS for path in overlay.glob("*.yaml"))]
    asked: dict[str, set[str]] = {"Pods": set(), "External": set()}
    for document in (each for file in files for each in yaml.safe_load_all(file.read_text())):
        for metric in document.get("spec", {}).get("metrics", []):
            asked[metric["type"]].add(metric[metric["type"].lower()]["metric"]["name"])
    assert asked == {"Pods": set(own), "External": external}
    queries = [rule["metricsQuery"] + rule["seriesQuery"] for rule in adapter["external"]]
    names = {*own, *(name for query in queries for name in re.findall(r"\bbaton_\w+", query))}
    assert names <= set(exported_names())


def test_scaling_counts_workers_once_and_only_living_ones(tmp_path: Path) -> None:
    """By Prometheus: two routers report the same two workers, one of which is gone."""
    require_program("promtool", "prometheus")
    rules = [
        {"record": f"scaling:{rule['name']['as']}", "expr": rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="n"')}
        for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["external"]
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "scaling", "rules": rules}]}))
    series: list[tuple[str, object]] = []
    for router in ("a", "b"):
        series.append((f'baton_router_queued_tokens{{namespace="n",pod="{router}"}}', 400))
        for worker, up, busy, fill in (("x", 1, 0.5, 0.25), ("y", 1, 0.8, 0.75), ("z", 0, 1, 1)):
            for role in ("prefill", "decode"):
                labels = f'namespace="n",pod="{router}",worker="{role}@{worker}",role="{role}"'
                series += [
                    (f"baton_worker_up{{{labels}}}", up),
                    (f"baton_worker_busy_seconds_total{{{labels}}}", f"0+{15 * busy}x20"),
                    (f"baton_worker_fill_ratio{{{labels}}}", fill),
                ]
    test = {
        "rule_files": ["rules.yaml"],
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": str(value)} for name, value in series],
                "promql_expr_test": [
                    {
                        "expr": f"scaling:{name}",
                        "eval_time": "4m",
                        "exp_samples": [{"labels": f"scaling:{name}", "value": value}],
                    }
                    for name, value in (
                        ("baton_prefill_busy_ratio", 0.65),
                        ("baton_waiting_prompt_tokens", 800),
                        ("baton_decode_full_workers", 1),
                    )
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- images ---


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "docker").glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_images_are_made_of_what_there_is(file: Path) -> None:
    text = file.read_text().replace("\\\n", " ")
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources)
    for script in re.findall(r"(?:^| )(scripts/[\w-]+)", text):
        assert (ROOT / script).is_file()
    (command,) = re.findall(r"^CMD (.+)$", text, re.MULTILINE)
    program, *arguments = json.loads(command)
    assert program == container(_deployments(base_documents())["router"])["command"][0]
    load_deployment(ROOT / str(parse_options(arguments).config).removeprefix("/opt/baton/"))
    exposed = set(re.findall(r"^EXPOSE (.+)$", text, re.MULTILINE)[0].split())
    assert exposed == {
        str(port["containerPort"])
        for deployment in _deployments(base_documents()).values()
        for port in container(deployment)["ports"]
    }


def test_the_container_is_the_one_that_the_page_speaks_of() -> None:
    (image,) = re.findall(r"^ARG TRITON_IMAGE=(.+)$", (ROOT / "configs/docker/trtllm.Dockerfile").read_text(), re.MULTILINE)
    assert image in (ROOT / "docs" / "tensorrt-llm.md").read_text()


# --- what kubectl makes of it ---


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_what_is_applied_is_valid_and_complete(overlay: Path, tmp_path: Path) -> None:
    documents = rendered(overlay, tmp_path)
    for document in documents:
        for version in _VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    config_maps = {each["metadata"]["name"]: each for each in documents if each["kind"] == "ConfigMap"}
    claims = {each["metadata"]["name"] for each in documents if each["kind"] == "PersistentVolumeClaim"}
    by_hand = set(re.findall(r"create secret generic (\S+)", (ROOT / "docs" / "cluster.md").read_text()))
    for role, deployment in _deployments(documents).items():
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+", container(deployment)["image"])
        for volume in deployment["spec"]["template"]["spec"]["volumes"]:
            if "configMap" in volume:
                assert f"{role}.yaml" in config_maps[volume["configMap"]["name"]]["data"]
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in (None, *claims)
            assert volume.get("secret", {}).get("secretName") in (None, *by_hand)
        _check_probes_allow(deployment)


def _check_probes_allow(deployment: Document) -> None:
    """A start takes as long as scripts/serve gives it; an end is not cut short."""
    pod, found = deployment["spec"]["template"]["spec"], container(deployment)
    startup = found["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    program, *arguments = found["lifecycle"]["preStop"]["exec"]["command"]
    if program == "sleep":
        hook_s = float(arguments[0])
    else:
        assert program == "/opt/baton/scripts/drain"
        hook = drain.parse_options(arguments)
        assert (hook.workers, hook.resume) == ([], False), "all of the pod's own"
        hook_s = hook.grace + 5  # its start, and what is handed back
    assert pod["terminationGracePeriodSeconds"] >= hook_s + parse_options(found["args"]).grace + 20


def test_no_secret_is_in_the_files() -> None:
    kinds: list[Any] = [
        document["kind"]
        for file in KUBERNETES.rglob("*.yaml")
        if "deployment" not in file.parts and file != ADAPTER
        for document in yaml.safe_load_all(file.read_text())
    ]
    assert "Secret" not in kinds
    assert len(kinds) > 15
