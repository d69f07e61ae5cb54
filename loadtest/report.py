"""The report of a run: report.html (one file, nothing to fetch), report.md; the CSV files are there already.

`python -m loadtest.report DIRECTORY` makes it again from the files of a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import msgspec

from loadtest.plots import Plot, make_plots
from loadtest.record import Record, Run, read_run
from loadtest.summary import figures
from loadtest.tables import Row, client_line, markdown, rows
from python_backends.core.errors import BatonError

_LATE_MS = 20.0  # p99 of lateness beyond which the client itself was a bottleneck
_TOP_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Page:
    """What templates/report.html shows."""

    title: str
    subtitle: str
    columns: Sequence[str]
    rows: Sequence[Row]
    warnings: Sequence[str]
    notes: Sequence[str]
    plots: Sequence[Plot]
    facts: Sequence[tuple[str, str]]
    caption: str  # under every figure, after its n
    lead: Sequence[str] = ()  # what comes first of all


def write_report(directory: Path) -> Path:
    """Read a run's files, write report.html and report.md beside them; returns the page's path. Raises ConfigError."""
    run, records = read_run(directory)
    found = figures(run, records)
    tokens = sum(sum(record.arrival_tokens) for record in records)
    notes = [client_line(run, tokens), f"{duration(run)}. Command: `{run.command}`. Machine: {run.machine}."]
    columns = [figures.kind for figures in found]
    (directory / "report.md").write_text(markdown(columns, rows(found), [*warnings(run, records), *notes]))
    page = Page(
        title=f"Load test: {Path(run.options.scenario).name}",
        subtitle=f"{run.server} by {run.protocol}, {run.began}",
        columns=columns,
        rows=rows(found),
        warnings=warnings(run, records),
        notes=[client_line(run, tokens)],
        plots=make_plots(run, records),
        facts=facts(run),
        caption=f"{duration(run)}. {run.command}. {run.machine}.",
    )
    return write_page(directory, page)


def write_page(directory: Path, page: Page, name: str = "report.html") -> Path:
    """Fill the template. `directory`: where the page goes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["unbroken"] = lambda text: text.replace(" ms", "\u00a0ms").replace(" s", "\u00a0s")
    path = directory / name
    path.write_text(environment.get_template("report.html").render(page=page))
    return path


def duration(run: Run) -> str:
    low, high = run.window
    return f"{high - low:g} s counted of {run.options.duration:g} s"


def facts(run: Run) -> list[tuple[str, str]]:
    """Names and values for the table at the end of a page."""
    options = msgspec.structs.asdict(run.options)
    return [
        ("command", run.command),
        ("machine", str(run.machine)),
        ("began", run.began),
        ("counted", duration(run)),
        *([("deployment", run.deployment)] if run.deployment else []),
        ("options", ", ".join(f"{name} {value}" for name, value in options.items())),
    ]


def warnings(run: Run, records: Sequence[Record]) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    failures = [record.error for record in records if not record.ok]
    if failures:
        kinds = sorted({error: failures.count(error) for error in failures}.items(), key=lambda item: -item[1])
        reasons = "; ".join(f"{count} x {error}" for error, count in kinds[:_TOP_ERRORS])
        found.append(f"{len(failures)} of {len(records)} requests failed: {reasons}.")
    if run.client.late_ms_p99 > _LATE_MS:
        found.append(
            f"The client sent 1% of the requests more than {run.client.late_ms_p99:.0f} ms late: this machine has no core to "
            "spare for it; figures of that size are its own."
        )
    short = [record for record in records if record.ok and record.output_tokens < record.output_tokens_asked]
    if short:
        found.append(f"{len(short)} answers were shorter than asked: the server ends them at the model's end of text.")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.report", description=__doc__)
    parser.add_argument("directory", type=Path)
    try:
        print(write_report(parser.parse_args(arguments).directory))
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
