"""What a running server has learned of its workers, read from its metrics port."""

from __future__ import annotations

import math
import re
import statistics
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from random import Random

from python_backends.core.errors import Unavailable
from python_backends.core.step_model import TERMS
from python_backends.core.types import Role
from scripts.simulation.hardware import Rates
from scripts.simulation.workload import PLAIN_BLOCK, Arrival, Workload

_LINE = re.compile(r"^(baton_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_SOURCES = ("reused", "received", "recomputed", "computed")
_MANY_TOKENS = 1 << 20  # of a pool whose size is of no interest
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
    workers = {(found["worker"], Role(found["role"])) for found, _ in metrics.get("baton_step_cost_seconds", [])}
    if not workers:
        raise Unavailable("the server's router has learned no step times yet; try again when it has served some requests")
    rates = {}
    for role in {role for _, role in workers}:
        names = [name for name, its_role in workers if its_role is role]
        rates[role] = Rates(
            coefficients=tuple(_median(metrics, "baton_step_cost_seconds", names, term=term) * 1e3 for term in TERMS),
            token_bytes=token_bytes,
            pool_tokens=pool_tokens[role],
            link_bytes_per_ms=max(_over_decode(metrics, "baton_link_bytes_per_second") / 1e3, 1.0),
            link_ms=_over_decode(metrics, "baton_link_overhead_seconds") * 1e3,
            hop_ms=_median(metrics, "baton_hop_seconds", names) * 1e3,
            tokens_per_step=max(_median(metrics, "baton_step_tokens_per_stream", names), 1.0),
            noise=min(_median(metrics, "baton_step_cost_error_ratio", names) * _DEVIATION, _MOST_NOISE),
        )
    return rates


def _median(metrics: Metrics, name: str, workers: list[str], **labels: str) -> float:
    return statistics.median(value(metrics, name, worker=worker, **labels) for worker in workers)


def _over_decode(metrics: Metrics, name: str) -> float:
    found = [number for _, number in metrics.get(name, [])]
    return statistics.median(found) if found else 1e9 if name.endswith("per_second") else 0.0


class MeasuredServer:
    """A server between two looks at its metrics."""

    def __init__(self, before: Metrics, after: Metrics, seconds: float) -> None:
        """Raises Unavailable when it has served nobody yet."""
        self._after = after
        self._tokens = {part: _lengths(after, part) for part in ("prompt", "output")}
        if not all(self._tokens.values()):
            raise Unavailable("the server has served no request yet; ask again when it has")
        requests = "baton_requests_total"
        self.rate = (value(after, requests) - value(before, requests)) / seconds
        self.workers = int(value(after, "baton_worker_up"))
        sources = {source: value(after, "baton_prompt_tokens_total", source=source) for source in _SOURCES}
        self.reused = sources["reused"] / max(sum(sources.values()), 1.0)
        if self.rate <= 0:
            raise Unavailable(f"no request ended within {seconds:.0f} s; watch longer, or when there is load (--watch)")

    def workload(self, seconds: float, random: Random) -> Workload:
        """Requests as the server has seen them: Poisson arrivals, lengths as counted. What was reused is left out."""
        arrivals, at = [], random.expovariate(self.rate)
        while at < seconds:
            prompt, output = (_draw_length(self._tokens[part], random) for part in ("prompt", "output"))
            arrivals.append(Arrival(at, max(int(prompt * (1 - self.reused)), 1), output))
            at += random.expovariate(self.rate)
        if not arrivals:
            raise Unavailable(f"{self.rate:.3f} requests per second are too few to say anything")
        return Workload("measured", arrivals, PLAIN_BLOCK)

    def rates(self) -> dict[Role, Rates]:
        received = value(self._after, "baton_prompt_tokens_total", source="received")
        token_bytes = int(value(self._after, "baton_kv_received_bytes_total") / received) if received else 1
        rates = learned_rates(self._after, token_bytes, dict.fromkeys(Role, _MANY_TOKENS))
        if Role.DECODE not in rates:
            rates[Role.DECODE] = rates.get(Role.AGGREGATED) or next(iter(rates.values()))
        return rates


def _lengths(metrics: Metrics, part: str) -> list[tuple[int, int, float]]:
    """(shortest, longest, requests) of each of a histogram's buckets that has any."""
    found = metrics.get(f"baton_request_{part}_tokens_bucket", [])
    upto = sorted((float(labels["le"]), count) for labels, count in found if "le" in labels)
    buckets, below, before = [], 0, 0.0
    for bound, count in upto:
        longest = int(bound) if math.isfinite(bound) else 2 * below
        if count > before:
            buckets.append((below + 1, longest, count - before))
        below, before = longest, count
    return buckets


def _draw_length(buckets: list[tuple[int, int, float]], random: Random) -> int:
    ((shortest, longest, _),) = random.choices(buckets, [count for _, _, count in buckets])
    return random.randint(shortest, longest)
