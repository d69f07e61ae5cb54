"""The scaling rules as Kubernetes is given them: HorizontalPodAutoscalers out of a YAML file or a kustomize folder.

Of kustomize only what configs/kubernetes/ uses: resources, and patches that are files, merged by name as its strategic merge
does. tests/unit/scripts/simulation/test_manifests.py compares what comes out with what kubectl makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, cast

import yaml

from python_backends.core.errors import ConfigError
from scripts.simulation.autoscaler import DEFAULT_DOWN, DEFAULT_UP, Metric, Policy, Rules, Spec

_KUSTOMIZATION = "kustomization.yaml"
_SUFFIXES = {"m": Decimal("0.001"), "": Decimal(1), "k": Decimal(1000), "M": Decimal(10**6), "Ki": Decimal(2**10)}

Document = dict[str, Any]


def load_autoscalers(path: Path) -> dict[str, Spec]:
    """By the name of the Deployment that each scales. path: a file, or a folder of kustomize. Raises ConfigError."""
    try:
        documents = _documents(path)
        found = [each for each in documents if each.get("kind") == "HorizontalPodAutoscaler"]
        specs = [_spec(each["spec"]) for each in found]
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except (KeyError, TypeError, ValueError, InvalidOperation) as error:
        raise ConfigError(f"{path}: a HorizontalPodAutoscaler (autoscaling/v2) is not as it should be: {error!r}") from error
    if not specs:
        raise ConfigError(f"{path}: no HorizontalPodAutoscaler in it; give configs/kubernetes/overlays/gpu-trtllm, for example")
    return {spec.target: spec for spec in specs}


@dataclass(frozen=True, slots=True)
class PreStop:
    """A preStop hook. seconds: that it takes at most.

    drains: the pod is given no more work meanwhile, and ends when it has none.
    """

    seconds: float = 0.0
    drains: bool = False


def pre_stop(path: Path, deployment: str) -> PreStop:
    """The hook of the Deployment's pods: `sleep SECONDS`, or `scripts/drain --grace SECONDS`."""
    for document in _documents(path):
        if document.get("kind") == "Deployment" and document["metadata"]["name"] == deployment:
            (container,) = document["spec"]["template"]["spec"]["containers"]
            command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            return PreStop(float(command[-1]), command[0].endswith("/drain")) if command else PreStop()
    return PreStop()


def _documents(path: Path) -> list[Document]:
    if not path.is_dir():
        return [each for each in yaml.safe_load_all(path.read_text()) if isinstance(each, dict)]
    kustomization = yaml.safe_load((path / _KUSTOMIZATION).read_text())
    documents = [each for resource in kustomization["resources"] for each in _documents(path / resource)]
    for patch in kustomization.get("patches", []):
        for change in _documents(path / patch["path"]):
            documents = [_merged(each, change) if _name(each) == _name(change) else each for each in documents]
    return documents


def _name(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def _merged(old: Any, new: Any) -> Any:
    """Objects key by key; lists of named things name by name, any other list as a whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merged(old[key], value) if key in old else value for key, value in new.items()}
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(each, dict) and "name" in each for each in old + new):
        changes = {each["name"]: each for each in new}
        kept = [_merged(each, changes.pop(each["name"], {})) for each in old]
        return kept + list(changes.values())
    return new


def _spec(spec: Document) -> Spec:
    behavior = spec.get("behavior", {})
    return Spec(
        target=spec["scaleTargetRef"]["name"],
        least=int(spec.get("minReplicas", 1)),
        most=int(spec["maxReplicas"]),
        metrics=tuple(_metric(each) for each in spec["metrics"]),
        up=_rules(behavior.get("scaleUp", {}), DEFAULT_UP),
        down=_rules(behavior.get("scaleDown", {}), DEFAULT_DOWN),
    )


def _metric(metric: Document) -> Metric:
    kind = metric["type"]
    if kind not in ("Pods", "External"):
        raise ValueError(f"metrics of type {kind}; only Pods and External are simulated")
    source = metric[kind.lower()]
    target = source["target"]
    per_pod = target["type"] == "AverageValue"
    return Metric(kind, source["metric"]["name"], _quantity(target["averageValue" if per_pod else "value"]), per_pod)


def _rules(rules: Document, default: Rules) -> Rules:
    policies = tuple(_policies(rules.get("policies", []))) or default.policies
    return Rules(
        float(rules.get("stabilizationWindowSeconds", default.window_s)),
        policies,
        rules.get("selectPolicy", default.select),
        float(_quantity(rules.get("tolerance", str(default.tolerance)))),
    )


def _policies(policies: list[Document]) -> Iterator[Policy]:
    for policy in policies:
        yield Policy(policy["type"], int(policy["value"]), float(policy["periodSeconds"]))


def _quantity(text: str | int) -> float:
    """`700m` is 0.7."""
    number = str(text).rstrip("".join(cast("dict[str, Any]", _SUFFIXES)))
    return float(Decimal(number) * _SUFFIXES[str(text)[len(number) :]])
