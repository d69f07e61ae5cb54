"""What simulations came to: as a table, as JSON, as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from python_backends.core.types import Role
from scripts.simulation.simulator import Result
from scripts.simulation.timeline import Moment


class Summary(msgspec.Struct, frozen=True):
    """One simulated run in numbers. Times in ms, rates per second of simulated time, shares between 0 and 1."""

    workload: str
    fleet: str
    mode: str
    requests: int
    completed: int
    refused: int
    failed: int
    seconds: float
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    tpot_ms: dict[str, float]
    queue_ms: dict[str, float]
    refusal_ms: dict[str, float]  # from arrival to the refusal
    goodput: float
    in_target: float  # of those that were completed
    input_tokens_per_s: float
    output_tokens_per_s: float
    reused: float  # of the prompt tokens, those found in a prefill or aggregated worker's cache
    ways: dict[str, int]
    ways_by_tokens: dict[str, dict[str, int]]  # by uncached prompt tokens: the next power of two
    busy: dict[str, float]
    worker_hours: dict[str, float]
    prediction_error: dict[str, float]  # of TTFT: |predicted - real| / real
    retried: int
    timeline: list[Moment]


def summarise(result: Result) -> Summary:
    seconds = max(result.seconds, 1e-9)
    return Summary(
        workload=result.workload,
        fleet=fleet_name(result.scenario.workers),
        mode=result.scenario.name,
        requests=result.arrived,
        completed=result.completed,
        refused=result.refused,
        failed=result.failed,
        seconds=seconds,
        ttft_ms=result.ttft.quantiles(),
        itl_ms=result.itl.quantiles(),
        tpot_ms=result.tpot.quantiles(),
        queue_ms=result.queue.quantiles(),
        refusal_ms=result.refusal.quantiles(),
        goodput=result.good / seconds,
        in_target=result.good / max(result.completed, 1),
        input_tokens_per_s=result.input_tokens / seconds,
        output_tokens_per_s=result.output_tokens / seconds,
        reused=result.reused_tokens / max(result.input_tokens, 1),
        ways=dict(result.ways),
        ways_by_tokens={str(size): dict(ways) for size, ways in sorted(result.ways_by_tokens.items())},
        busy={role.value: round(share, 3) for role, share in result.busy.items()},
        worker_hours={role.value: paid_s / 3600 for role, paid_s in result.worker_seconds.items()},
        prediction_error=result.ttft_error.quantiles(),
        retried=result.errors["retried"],
        timeline=result.timeline,
    )


def fleet_name(workers: Mapping[Role, int]) -> str:
    """2P:6D, or 8A."""
    prefill, decode, aggregated = (workers.get(role, 0) for role in (Role.PREFILL, Role.DECODE, Role.AGGREGATED))
    parts = ([f"{prefill}P:{decode}D"] if decode else []) + ([f"{aggregated}A"] if aggregated else [])
    return " + ".join(parts)


def print_table(console: Console, summaries: Sequence[Summary]) -> None:
    """Fits a terminal of 80 columns."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for heading in ("fleet", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("refused", "TTFT p50", "p90", "p99", "ITL p50", "p99", "kept", "good/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in summaries:
        table.add_row(
            each.fleet,
            each.mode,
            f"{each.refused / max(each.requests, 1):.1%}",
            *(f"{each.ttft_ms[share]:.0f}" for share in ("p50", "p90", "p99")),
            *(f"{each.itl_ms[share]:.1f}" for share in ("p50", "p99")),
            f"{each.in_target:.1%}",
            f"{each.goodput:.2f}",
        )
    table.caption = "ms; kept: answers that kept the targets; good/s: answers per second that did"
    console.print(table)


def write_json(path: Path, summaries: Sequence[Summary]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(summaries), indent=1))


def write_plot(path: Path, summaries: Sequence[Summary], title: str) -> None:
    """TTFT, ITL and goodput over the fleets, a line per mode. The format is that of the file's name."""
    import matplotlib as mpl  # only now: most runs need no plot, and it takes its time

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fleets = list(dict.fromkeys(each.fleet for each in summaries))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for mode in dict.fromkeys(each.mode for each in summaries):
        mine = [each for each in summaries if each.mode == mode]
        at = [fleets.index(each.fleet) for each in mine]
        axes[0].plot(at, [each.ttft_ms["p90"] for each in mine], "o-", label=mode)
        axes[1].plot(at, [each.itl_ms["p99"] for each in mine], "o-", label=mode)
        axes[2].plot(at, [each.goodput for each in mine], "o-", label=mode)
    for axis, name in zip(axes, ("TTFT p90, ms", "ITL p99, ms", "goodput, requests/s"), strict=True):
        axis.set_title(name)
        axis.set_xticks(range(len(fleets)), fleets, rotation=30)
        axis.grid(visible=True, alpha=0.3)
    for axis in axes[:2]:
        axis.set_yscale("log")
    axes[2].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
