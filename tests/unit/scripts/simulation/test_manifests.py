from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from python_backends.core.errors import ConfigError
from scripts.simulation.autoscaler import Metric, Policy
from scripts.simulation.manifests import PreStop, load_autoscalers, pre_stop
from scripts.simulation.scaling import check_metrics
from tests.manifests import BASE, OVERLAYS, rendered

HPA = """
kind: HorizontalPodAutoscaler
spec:
  scaleTargetRef: {name: d}
  maxReplicas: 9
  metrics: [{type: %s, %s: {metric: {name: m}, target: {type: Value, value: 1500m}}}]
  behavior:
    scaleUp: {selectPolicy: Min, policies: [{type: Pods, value: 2, periodSeconds: 60}]}
"""


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlays_are_read_as_kubectl_renders_them(overlay: Path, tmp_path: Path) -> None:
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(rendered(overlay, tmp_path)))
    ours, theirs = load_autoscalers(overlay), load_autoscalers(file)
    assert ours == theirs
    assert set(ours) == {"baton-router", "baton-prefill", "baton-decode"}
    for deployment in ours:
        assert pre_stop(overlay, deployment) == pre_stop(file, deployment)


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        ('{preStop: {exec: {command: [sleep, "10"]}}}', PreStop(10.0)),
        ('{preStop: {exec: {command: [/opt/baton/scripts/drain, --grace, "90"]}}}', PreStop(90.0, drains=True)),
        ("{}", PreStop()),
    ],
)
def test_how_pods_end_is_read(hook: str, expected: PreStop, tmp_path: Path) -> None:
    file = tmp_path / "pods.yaml"
    pod = f"{{spec: {{containers: [{{name: c, lifecycle: {hook}}}]}}}}"
    file.write_text(f"{{kind: Deployment, metadata: {{name: it}}, spec: {{template: {pod}}}}}")
    assert pre_stop(file, "it") == expected


def test_all_that_the_manifests_ask_for_is_simulated() -> None:
    for path in (BASE, *OVERLAYS):
        check_metrics(load_autoscalers(path))


def test_routers_are_there_for_a_while_after_their_end_was_decided_and_workers_are_drained() -> None:
    assert pre_stop(BASE, "baton-router") == PreStop(10)
    assert pre_stop(BASE, "baton-decode") == pre_stop(BASE, "baton-prefill") == PreStop(90, drains=True)


def test_what_is_not_said_is_as_kubernetes_has_it(tmp_path: Path) -> None:
    file = tmp_path / "hpa.yaml"
    file.write_text(HPA % ("External", "external"))
    spec = load_autoscalers(file)["d"]
    assert (spec.least, spec.most) == (1, 9)
    assert spec.metrics == (Metric("External", "m", 1.5, per_pod=False),)
    assert (spec.up.window_s, spec.up.select, spec.up.policies) == (0.0, "Min", (Policy("Pods", 2, 60.0),))
    assert (spec.down.window_s, spec.down.select, spec.down.policies) == (300.0, "Max", (Policy("Percent", 100, 15.0),))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("kind: Deployment", "no HorizontalPodAutoscaler"),
        (HPA % ("Resource", "resource"), "metrics of type Resource"),
        ("{", "not YAML"),
        ("kind: HorizontalPodAutoscaler\nspec: {}", "scaleTargetRef"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, wrong: str) -> None:
    file = tmp_path / "hpa.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=wrong):
        load_autoscalers(file)
    with pytest.raises(ConfigError, match="No such file"):
        load_autoscalers(tmp_path / "nothing.yaml")


def test_a_metric_that_nobody_exports_is_named(tmp_path: Path) -> None:
    file = tmp_path / "hpa.yaml"
    file.write_text(HPA % ("External", "external"))
    with pytest.raises(ConfigError, match="no metric 'm' is simulated"):
        check_metrics(load_autoscalers(file))
