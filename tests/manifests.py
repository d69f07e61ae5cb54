"""The Kubernetes manifests as Python sees them: read from the files, or rendered by kubectl."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from python_backends.core.paths import repository_root
from tests.tools import require_program

KUBERNETES = repository_root() / "configs" / "kubernetes"
BASE = KUBERNETES / "base"
REDIS = KUBERNETES / "redis"
OVERLAYS = sorted(path for path in (KUBERNETES / "overlays").iterdir() if path.is_dir())

Document = dict[str, Any]


def base_documents() -> list[Document]:
    """What base and store hold, without kubectl: they patch nothing."""
    return [
        document
        for folder in (BASE, REDIS)
        for file in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        for document in yaml.safe_load_all((folder / file).read_text())
    ]


def find(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [each for each in documents if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def container(deployment: Document) -> Document:
    """A pod's only one."""
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def rendered(overlay: Path, scratch: Path) -> list[Document]:
    """As `kubectl apply -k` would send it. Skipped without kubectl, which fails in CI."""
    kubectl = require_program("kubectl", "kubernetes-client")
    tree = scratch / "kubernetes"
    shutil.copytree(KUBERNETES, tree, dirs_exist_ok=True)
    if _is_old(kubectl):
        for file in tree.rglob("kustomization.yaml"):
            _rewrite_for_old(file)
    path = tree / overlay.relative_to(KUBERNETES)
    done = subprocess.run([kubectl, "kustomize", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return list(yaml.safe_load_all(done.stdout))


def _is_old(kubectl: str) -> bool:
    """kubectl before 1.21, which Debian 12 has, brings kustomize 2.0."""
    done = subprocess.run(
        [kubectl, "version", "--client", "-o", "json"], capture_output=True, text=True, timeout=30, check=True
    )
    minor = re.match(r"\d+", json.loads(done.stdout)["clientVersion"]["minor"])
    assert minor
    return int(minor[0]) < 21


def _rewrite_for_old(file: Path) -> None:
    """The same in the words of kustomize 2.0."""
    content = yaml.safe_load(file.read_text())
    folders = [each for each in content["resources"] if (file.parent / each).is_dir()]
    content["resources"] = [each for each in content["resources"] if each not in folders]
    content["bases"] = folders
    content["patchesStrategicMerge"] = [patch["path"] for patch in content.pop("patches", [])]
    file.write_text(yaml.safe_dump(content))
