"""What a running server has learned of its workers, read from its metrics port."""

from __future__ import annotations

import re
import statistics
import urllib.request
from collections import defaultdict
from collections.abc import Mapping

from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from router.cost_model import TERMS
from scripts.simulation.hardware import Rates

_LINE = re.compile(r"^(baton_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_MOST_NOISE = 0.5
_DEVIATION = 1.25  # of a normal distribution's mean absolute deviation

Metrics = dict[str, list[tuple[dict[str, str], float]]]
"""Name -> [(labels, value)]."""


def read_metrics(address: str, timeout_s: float = 10.0) -> Metrics:
    """address: HOST:PORT of the metrics. Raises Unavailable."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=timeout_s) as response:
            return parse_metrics(response.read().decode())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise Unavailable(f"no metrics at {address}: {error}; give HOST:PORT of a running server's metrics") from error


def parse_metrics(text: str) -> Metrics:
    """Baton's own of a page in Prometheus' text format."""
    metrics: Metrics = defaultdict(list)
    for name, labels, value in _LINE.findall(text):
        metrics[name].append((dict(_LABEL.findall(labels)), float(value)))
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Sum of the metric over all that have these labels; 0 when there are none."""
    return sum(number for found, number in metrics.get(name, []) if labels.items() <= found.items())


def learned_rates(metrics: Metrics, token_bytes: int, pool_tokens: Mapping[Role, int]) -> dict[Role, Rates]:
    """Of the roles that the server has; the median over the workers of a role.

    token_bytes: of KV. Raises Unavailable when the router has learned nothing yet.
    """
    workers = {(found["worker"], Role(found["role"])) for found, _ in metrics.get("baton_step_model_ms", [])}
    if not workers:
        raise Unavailable("the server's router has learned no step times yet; try again when it has served some requests")
    rates = {}
    for role in {role for _, role in workers}:
        names = [name for name, its_role in workers if its_role is role]
        rates[role] = Rates(
            coefficients=tuple(_median(metrics, "baton_step_model_ms", names, term=term) for term in TERMS),
            token_bytes=token_bytes,
            pool_tokens=pool_tokens[role],
            link_bytes_per_ms=max(_over_decode(metrics, "baton_link_bytes_per_second") / 1e3, 1.0),
            link_ms=_over_decode(metrics, "baton_link_overhead_seconds") * 1e3,
            hop_ms=_median(metrics, "baton_hop_seconds", names) * 1e3,
            noise=min(_median(metrics, "baton_step_model_error_ratio", names) * _DEVIATION, _MOST_NOISE),
        )
    return rates


def _median(metrics: Metrics, name: str, workers: list[str], **labels: str) -> float:
    return statistics.median(value(metrics, name, worker=worker, **labels) for worker in workers)


def _over_decode(metrics: Metrics, name: str) -> float:
    found = [number for _, number in metrics.get(name, [])]
    return statistics.median(found) if found else 1e9 if name.endswith("per_second") else 0.0
