"""A profile as a page: the verdict, what it rests on, and two pictures beside the load test's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from loadtest.charts import INK, MUTED, SERIES, Curve, cdf, draw
from loadtest.interference import gaps_of
from loadtest.plots import Plot, place_legend, smoothness
from loadtest.record import Record, Run
from loadtest.report import Page, duration, facts, warnings, write_page
from loadtest.tables import Row, client_line, milliseconds
from scripts.profile_verdict import Profile, Use, Verdict

_QUIET, _DISTURBED = "no prompt in prefill", "a prompt in prefill"


def write_profile(
    directory: Path, run: Run, records: Sequence[Record], profile: Profile, verdict: Verdict, remarks: Sequence[str]
) -> Path:
    """profile.html in `directory`; returns its path. `remarks`: what could not be measured, and why."""
    plots = [_interference(run, records), smoothness(run, records)]
    if profile.use is not None:
        plots.insert(1, _limits(profile.use))
    tokens = sum(sum(record.arrival_tokens) for record in records)
    page = Page(
        title=verdict.headline,
        subtitle=f"Would disaggregation help? A profile of {run.server} by {run.protocol}, {run.began}",
        columns=["measured"],
        rows=table(profile),
        warnings=[*warnings(run, records), *remarks],
        notes=[client_line(run, tokens)],
        plots=plots,
        facts=facts(run),
        caption=f"{duration(run)}. {run.command}. {run.machine}.",
        lead=[*verdict.reasons, *(f"What to do: {advice}" for advice in verdict.advice)],
    )
    return write_page(directory, page, "profile.html")


def table(profile: Profile) -> list[Row]:
    """What terminal and page show alike."""
    quiet, disturbed, use = profile.undisturbed, profile.disturbed, profile.use
    found = [
        ("ITL, no prompt in prefill: p50 / p99 (n)", f"{milliseconds(quiet.p50)} / {milliseconds(quiet.p99)} ({quiet.n:,})"),
        (
            "ITL, a prompt in prefill: p50 / p99 (n)",
            f"{milliseconds(disturbed.p50)} / {milliseconds(disturbed.p99)} ({disturbed.n:,})",
        ),
        ("streams' time lost to prompts", f"{profile.lost_share:.0%}"),
        ("time with a prompt in prefill", f"{profile.prefill_share:.0%}"),
        ("streams at once", f"{profile.streams:.1f}"),
    ]
    if use is not None:
        found += [
            (
                "arithmetic: in prefill / streams only / all",
                _shares(use.arithmetic_in_prefill, use.arithmetic_in_decode, use.arithmetic),
            ),
            ("memory bandwidth: in prefill / streams only", _shares(use.bandwidth_in_prefill, use.bandwidth_in_decode)),
        ]
    found.append(("prompt tokens a cache could find / found", _shares(profile.cache_potential, profile.cache_found)))
    for kind in profile.kinds:
        found.append((f"{kind.name}: TTFT p50 / p99", f"{milliseconds(kind.ttft_p50)} / {milliseconds(kind.ttft_p99)}"))
        found.append((f"{kind.name}: ITL p50 / p99", f"{milliseconds(kind.itl_p50)} / {milliseconds(kind.itl_p99)}"))
        found.append((f"{kind.name}: met the SLO", f"{kind.good:.0%} of {kind.requests}"))
    return [Row(name, (value,)) for name, value in found]


def _shares(*values: float) -> str:
    return " / ".join(f"{value:.0%}" for value in values)


def _interference(run: Run, records: Sequence[Record]) -> Plot:
    gaps = gaps_of(run, records)
    quiet, disturbed = gaps.only(False).ms, gaps.only(True).ms
    curves = [Curve(_QUIET, SERIES[0], quiet), Curve(_DISTURBED, SERIES[1], disturbed)]

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        cdf(axes, curves, "Between tokens (ITL)")
        axes.set_ylabel("gaps")
        place_legend(figure, axes, narrow)

    text = "The further apart the curves, the more prompts disturb running streams. The axis stretches towards 100%."
    n = f"{quiet.size:,} gaps without, {disturbed.size:,} with a prompt in prefill"
    return Plot("What prefill does to running streams", draw("interference", paint, 3.2, 3.6), n, text)


def _limits(use: Use) -> Plot:
    names = ("arithmetic", "memory bandwidth")
    pairs = (
        (_DISTURBED, SERIES[1], (use.arithmetic_in_prefill, use.bandwidth_in_prefill)),
        (_QUIET, SERIES[0], (use.arithmetic_in_decode, use.bandwidth_in_decode)),
    )

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for number, (label, colour, shares) in enumerate(pairs):
            places = [place + (number - 0.5) * 0.36 for place in range(len(names))]
            axes.barh(places, shares, height=0.32, color=colour, label=label)
            for place, share in zip(places, shares, strict=True):
                axes.text(share + 0.01, place, f"{share:.0%}", va="center", fontsize=9, color=INK)
        axes.axvline(1.0, color=MUTED, linestyle=":", linewidth=1.0)
        axes.set_yticks(range(len(names)), names if not narrow else ("arithmetic", "bandwidth"))
        axes.set_xlim(0, max(1.1, 1.15 * max(max(shares) for _, _, shares in pairs)))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="y")
        axes.set_title("Share of the machine's limit")
        place_legend(figure, axes, narrow)

    text = (
        "Computed from tokens, steps and the model's size against what this machine reached when measured: two operations per "
        "weight and token, every weight once a step, each stream's KV. Attention's own arithmetic is left out."
    )
    return Plot("What is used up", draw("limits", paint, 2.6, 3.0), "all tokens of the window", text)
