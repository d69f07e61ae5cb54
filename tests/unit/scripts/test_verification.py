"""What scripts/verify-gpu reports, and how; its checks are tested through a real server in tests/triton."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from python_backends.core.paths import repository_root
from scripts.client import Client
from scripts.conformance import results_of
from scripts.tritonserver import TritonServer
from scripts.verification import Result, Verification, common, percentile, verify
from scripts.verify_gpu import Report, machine, main

CONFIG = repository_root() / "configs" / "trtllm-1p1d.yaml"


def test_the_report_says_what_held_and_what_did_not(tmp_path: Path) -> None:
    shown = StringIO()
    report = Report(Console(file=shown, width=40))
    for result in (Result("GPUs", None, "none"), Result("first token", True, "5 ms"), Result("  test[x]", False, "a [b] c")):
        report.add(result)
    lines = shown.getvalue().splitlines()
    assert lines[0].split() == ["GPUs", "none"]
    assert lines[1].split() == ["ok", "first", "token", "5", "ms"]
    assert lines[2].split() == ["FAILED", "test[x]", "a", "[b]", "c"]
    assert report.failed == ["test[x]"]
    report.write(tmp_path / "r.json", "workers: []")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["deployment"] == "workers: []"
    assert [result["ok"] for result in written["results"]] == [None, True, False]


def test_a_check_that_breaks_does_not_keep_the_next_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise KeyError("kv_tokens_received")

    checks: list[tuple[str, Callable[[], str]]] = [("first token", broken), ("load", lambda: "5 requests/s")]
    monkeypatch.setattr(Verification, "checks", lambda _: checks)
    results = verify(TritonServer(CONFIG), Client("127.0.0.1:1"), lambda _: None)
    assert [(result.name, result.ok, result.detail) for result in results] == [
        ("first token", False, "KeyError: 'kv_tokens_received'"),
        ("load", True, "5 requests/s"),
    ]


def test_what_the_results_depend_on_is_told() -> None:
    told = {result.name: result.detail for result in machine(CONFIG)}
    assert '"gpus": "0"' in told["deployment"]
    assert told["TensorRT-LLM"] == "not installed here"
    assert {"Baton", "machine", "GPUs", "GPU links", "UCX"} <= told.keys()


def test_failures_of_the_conformance_suite_are_named(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(
        """<testsuites><testsuite>
        <testcase name="test_a[installed]" time="1.5"/>
        <testcase name="test_b[installed]" time="2"><failure message="assert [5]\n == [6]">long</failure></testcase>
        <testcase name="test_c[installed]"><skipped message="one model"/></testcase>
        <testcase name="test_d[installed]"><error>ConfigError: no GPU</error></testcase>
        </testsuite></testsuites>"""
    )
    suite, *failed = results_of(file, 9.0)
    assert suite == Result("conformance", False, "1 of 3 tests held, 1 skipped", 9.0)
    assert [(result.name, result.detail) for result in failed] == [
        ("  test_b[installed]", "assert [5] == [6]"),
        ("  test_d[installed]", "ConfigError: no GPU"),
    ]


def test_a_suite_without_tests_did_not_hold(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text("<testsuites/>")
    assert [result.ok for result in results_of(file, 1.0)] == [False]


def test_a_wrong_deployment_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(CONFIG.read_text().replace("backend: UCX", "backend: ucx"))
    assert main(["--config", str(config)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "write UCX: TensorRT-LLM refuses lower case" in said
    assert said.endswith("verify FAILED: start")


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (50, 3.0), (90, 5.0), (99, 5.0)])
def test_percentiles(percent: int, value: float) -> None:
    assert percentile([5.0, 1.0, 3.0, 2.0, 4.0], percent) == value
    assert percentile([], percent) == 0.0


def test_common_beginnings() -> None:
    assert [common([1, 2], other) for other in ([1, 2, 3], [1], [2], [])] == [2, 1, 0, 0]
