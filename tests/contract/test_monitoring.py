"""Dashboard and alert rules against the table of metrics, and in Prometheus's own eyes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from python_backends.core.paths import repository_root
from router.metrics import exported_names
from tests.tools import require_program

ROOT = repository_root()
DASHBOARD = ROOT / "configs" / "grafana" / "baton.json"
RULES = ROOT / "configs" / "prometheus" / "baton.rules.yaml"


def dashboard_expressions() -> list[str]:
    """As Prometheus gets them: Grafana's variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [expression.replace("$__rate_interval", "1m").replace("$instance", ".*") for expression in found]


def _alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def _names(expression: str) -> set[str]:
    return set(re.findall(r"\bbaton_\w+", expression))


def test_dashboard_and_rules_ask_only_for_what_there_is() -> None:
    asked = set().union(*map(_names, dashboard_expressions()), *(_names(rule["expr"]) for rule in _alerts()))
    assert asked <= set(exported_names()), sorted(asked - set(exported_names()))


def test_the_dashboard_shows_every_family() -> None:
    shown = set().union(*map(_names, dashboard_expressions()))
    whole = {re.sub("_(bucket|sum|count)$", "", name) for name in exported_names()}
    left_out = {"baton_router_requests", "baton_traces_dropped_total", "baton_requests_total"}  # in other figures already
    missing = {name for name in whole if not any(each.startswith(name) for each in shown)} - left_out
    assert not missing


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_alert_says_what_and_what_to_do() -> None:
    for rule in _alerts():
        assert rule["alert"].startswith("Baton")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_promtool_accepts_rules_and_dashboard(tmp_path: Path) -> None:
    require_program("promtool", "prometheus")
    as_rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(dashboard_expressions())]
    panels = tmp_path / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": as_rules}]}))
    _promtool("check", "rules", str(RULES), str(panels))


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    require_program("promtool", "prometheus")
    shutil.copy(RULES, tmp_path / RULES.name)
    (tmp_path / "test.yaml").write_text(_ALERT_TESTS)
    _promtool("test", "rules", str(tmp_path / "test.yaml"))


def _promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


_ALERT_TESTS = """
rule_files: [baton.rules.yaml]
evaluation_interval: 30s
tests:
  - interval: 30s
    input_series:
      - {series: 'baton_ready{instance="a"}', values: '1+0x40'}
      - {series: 'baton_worker_up{instance="a",worker="decode",role="decode"}', values: '1+0x9 0+0x30'}
      - {series: 'baton_kv_block_bytes{instance="a",worker="decode",role="decode"}', values: '4096+0x40'}
      - {series: 'baton_worker_up{instance="a",worker="gone",role="decode"}', values: '0+0x40'}
      - {series: 'baton_prefix_events{instance="a",worker="gone",role="decode"}', values: '0+0x40'}
      - {series: 'baton_kv_block_bytes{instance="a",worker="gone",role="decode"}', values: '0+0x40'}
      - {series: 'baton_prefix_events{instance="a",worker="decode",role="decode"}', values: '1+0x9 0+0x30'}
      - {series: 'baton_requests_total{instance="a",outcome="ok",route="remote"}', values: '0+95x40'}
      - {series: 'baton_requests_total{instance="a",outcome="failed",route="remote"}', values: '0+5x40'}
      - {series: 'baton_kv_blocks{instance="a",worker="decode",role="decode",state="held"}', values: '98+0x40'}
      - {series: 'baton_kv_blocks{instance="a",worker="decode",role="decode",state="free"}', values: '1+0x40'}
      - {series: 'baton_kv_blocks{instance="a",worker="decode",role="decode",state="cached"}', values: '1+0x40'}
      - {series: 'baton_ttft_seconds_bucket{instance="a",route="remote",le="1"}', values: '0+0x40'}
      - {series: 'baton_ttft_seconds_bucket{instance="a",route="remote",le="10"}', values: '0+10x40'}
      - {series: 'baton_ttft_seconds_bucket{instance="a",route="remote",le="+Inf"}', values: '0+10x40'}
    alert_rule_test:
      - {eval_time: 4m, alertname: BatonWorkerDown, exp_alerts: []}
      - eval_time: 8m
        alertname: BatonWorkerDown
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, worker: decode, role: decode}
            exp_annotations:
              summary: Worker decode is down
              description: "It was not restarted within a minute. The server's log says why."
      - {eval_time: 8m, alertname: BatonWorkerBlind, exp_alerts: []}
      - eval_time: 12m
        alertname: BatonWorkerBlind
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, worker: decode, role: decode}
            exp_annotations:
              summary: Worker decode does not tell what its prefix cache holds
              description: No prefix is routed to it. With TensorRT-LLM see event_buffer_max_size and the worker's log.
      - {eval_time: 18m, alertname: BatonDown, exp_alerts: []}
      - {eval_time: 18m, alertname: BatonNotReady, exp_alerts: []}
      - eval_time: 18m
        alertname: BatonRequestsFail
        exp_alerts:
          - exp_labels: {severity: critical, instance: a}
            exp_annotations:
              summary: 5% of requests fail
              description: "`scripts/trace` or the page shows their errors."
      - eval_time: 18m
        alertname: BatonKvPoolFull
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, worker: decode}
            exp_annotations:
              summary: The KV pool of decode is full
              description: Requests wait for blocks. Enlarge engine.kv_pool_mib or add workers.
      - eval_time: 18m
        alertname: BatonTtftSlow
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: p95 time to first token is 9.55s
              description: Compare baton_queue_seconds with baton_prefill_seconds to see whether workers are few or slow.
  - interval: 30s
    input_series:
      - {series: 'up{job="baton"}', values: '0+0x10'}
    alert_rule_test:
      - eval_time: 3m
        alertname: BatonDown
        exp_alerts:
          - exp_labels: {severity: critical}
            exp_annotations:
              summary: No Baton router reports metrics
              description: "Neither router nor Triton answers at the metrics port. Look at the server's log."
"""
