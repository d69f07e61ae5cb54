"""The engine conformance suite over the TensorRT-LLM of this machine: for scripts/verify-gpu."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from python_backends.core.paths import repository_root
from scripts.verification import Result
from tests.engines import installed

_SUITE = "tests/engines/test_conformance.py"
_TIMEOUT_S = 3600.0  # of the suite: an engine is loaded a dozen times
_TEST_TIMEOUT_S = 900.0
_LONGEST = 300  # characters of a failure's message


def run_conformance(config: Path, model: Path | None, selection: str = "") -> list[Result]:
    """One result for the suite and one for each test that did not hold.

    `config`: the deployment file whose transceiver, environment and GPUs are used. `model`: a directory; None is the
    deployment's. `selection`: names of tests, as pytest's -k has them.
    """
    if find_spec("pytest") is None or find_spec("pytest_timeout") is None:
        return [Result("conformance", False, "pytest is missing: pip install -r requirements-container.txt")]
    environment = {**os.environ, installed.DEPLOYMENT: str(config.absolute())}
    if model is not None:
        environment[installed.MODEL] = str(model.absolute())
    with TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        arguments = ["-q", "-W", "ignore", "-p", "no:cacheprovider", f"--timeout={_TEST_TIMEOUT_S}", f"--junitxml={report}"]
        chosen = f"installed and ({selection})" if selection else "installed"
        began = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", _SUITE, "-k", chosen, *arguments],
                cwd=repository_root(),
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [Result("conformance", False, f"not done after {_TIMEOUT_S:.0f} s", _TIMEOUT_S)]
        seconds = time.monotonic() - began
        if not report.exists():
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            return [Result("conformance", False, f"the suite did not run: {'; '.join(said[-3:])}", seconds)]
        return results_of(report, seconds)


def results_of(report: Path, seconds: float) -> list[Result]:
    """Of a JUnit file."""
    held, failed, skipped = 0, [], 0
    for case in ET.parse(report).getroot().iter("testcase"):
        problems = [*case.iter("failure"), *case.iter("error")]
        if problems:
            message = " ".join((problems[0].get("message") or problems[0].text or "").split())
            failed.append(Result(f"  {case.get('name')}", False, message[:_LONGEST], float(case.get("time", 0))))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            held += 1
    detail = f"{held} of {held + len(failed)} tests held, {skipped} skipped"
    return [Result("conformance", not failed and held > 0, detail, seconds), *failed]
