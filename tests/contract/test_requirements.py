"""requirements-container.txt against the code that runs in NVIDIA's container."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from python_backends.core.paths import repository_root

ROOT = repository_root()
_STARTED = (  # what runs there: router, front end, workers with engine trtllm, and the scripts
    "router.service",
    "router.grammar",
    "router.http.__main__",
    "router.door.door",
    "python_backends.worker.service",
    "python_backends.engines.trtllm.engine",
    "scripts.serve",
    "scripts.demo",
    "scripts.verify_gpu",
)
_IN_THE_CONTAINER = {"numpy", "tensorrt_llm", "grpcio"}  # the last by tritonclient


def test_everything_that_is_imported_there_is_required() -> None:
    program = (
        f"import importlib, sys\nfor name in {_STARTED!r}: importlib.import_module(name)\n"
        "print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    ours = [
        line
        for line in done.stdout.splitlines()
        if re.match(rf"{re.escape(str(ROOT))}/(router|python_backends|scripts)/", line)
    ]
    assert len(ours) > 50
    imported = {name.partition(".")[0] for file in ours for name in _imports(file)} - sys.stdlib_module_names
    foreign = imported - {"router", "python_backends", "scripts", "tests"}
    known = packages_distributions()
    needed = {_plain(known[name][0]) for name in foreign if name in known} - {_plain(name) for name in _IN_THE_CONTAINER}
    lines = (ROOT / "requirements-container.txt").read_text().splitlines()
    required = {_plain(re.split(r"[\[=<>;]", line)[0]) for line in lines if line and not line.startswith("#")}
    assert needed <= required, f"missing: {sorted(needed - required)}"


def test_versions_are_those_of_requirements_txt() -> None:
    """Where one is given; the others are the container's."""
    pinned = set()
    for name in ("requirements.txt", "requirements-dev.txt"):
        pinned |= {re.split(r"[;\s]", line.replace("[all]", ""))[0] for line in (ROOT / name).read_text().splitlines()}
    ours = (ROOT / "requirements-container.txt").read_text().replace("[grpc]", "").splitlines()
    given = {line for line in ours if "==" in line}
    assert given
    assert given <= pinned


def _imports(file: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def _plain(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()
