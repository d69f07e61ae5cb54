"""Prints where the time of one request went, from the router's memory of the last requests. No collector is needed.

ID is any id of it: the one in the proof, a trace id, x-request-id, the id of a completion (chatcmpl-...), or the beginning of
one; `latest` is the request that ended last, `slowest` the one that took longest.
"""

from __future__ import annotations

import argparse
import os
import sys
from urllib.parse import quote

import httpx2
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from python_backends.core.errors import BatonError, InvalidRequest, Unavailable
from router.journal import Record
from router.phases import Phase, phases
from scripts.proof_text import milliseconds, summary
from scripts.terminal import print_error

_TIMEOUT_S = 10.0
_BAR = 36  # characters
_COLOURS = {"queue": "bright_black", "prefill": "blue", "handoff": "yellow", "transfer": "yellow", "first decode": "cyan"}
_PARTS = "▏▎▍▌▋▊▉█"


class _Found(msgspec.Struct):
    requests: list[Record]


def fetch(server: str, what: str, api_key: str) -> bytes:
    """The front end's answer, JSON. Raises Unavailable or InvalidRequest."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = f"http://{server}/baton/requests/{quote(what, safe='')}"
    try:
        answer = httpx2.get(url, headers=headers, timeout=_TIMEOUT_S)
    except httpx2.HTTPError as error:
        raise Unavailable(f"no front end answers at {server} ({error}); start one with `make serve`") from error
    if answer.is_success:
        return answer.content
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{server} answered {answer.status_code}"
    raise InvalidRequest(message)


def render(record: Record) -> list[Text | Table]:
    """What is printed for one request."""
    return [_heading(record), *_facts(record), _waterfall(phases(record)), *_remarks(record)]


def _heading(record: Record) -> Text:
    how = record.outcome.value if record.outcome else f"in flight ({record.state.value})"
    colour = {"ok": "green", "failed": "red"}.get(how, "yellow")
    counts = f"{record.prompt_tokens} prompt tokens, {record.output_tokens} produced, {milliseconds(record.age_ms)} ms"
    return Text.assemble((record.id, "bold"), "  ", (how, colour), "  ", counts)


def _facts(record: Record) -> list[Text]:
    facts = {"trace": record.trace.trace_id, "client": record.client_id, "answer": record.answer_id, "why": record.why}
    return [Text.assemble((f"{name:<7}", "dim"), text) for name, text in facts.items() if text]


def _waterfall(made: list[Phase]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, show_header=False)
    for width in (16, _BAR, 10, None):
        table.add_column(no_wrap=True, min_width=width)
    begin, end = made[0].start_ms, max(made[0].end_ms, made[0].start_ms + 1e-3)
    depths: dict[str, int] = {"": -1}
    for phase in made:
        depth = depths[phase.name] = depths[phase.parent] + 1
        bar = draw_bar((phase.start_ms - begin) / (end - begin), (phase.end_ms - begin) / (end - begin), _BAR)
        name = "  " * depth + phase.name
        table.add_row(
            name, Text(bar, style=_COLOURS.get(phase.name, "default")), f"{milliseconds(phase.ms):>7} ms", _where(phase)
        )
    return table


def _where(phase: Phase) -> str:
    return str(phase.attributes.get("baton.worker") or phase.attributes.get("baton.transport") or "")


def draw_bar(begin: float, end: float, width: int) -> str:
    """From `begin` to `end`, shares of `width` characters; at least a line."""
    first = min(int(begin * width), width - 1)
    eighths = max(round((end * width - first) * 8), 1)
    full, rest = divmod(min(eighths, (width - first) * 8), 8)
    return (" " * first + "█" * full + (_PARTS[rest - 1] if rest else "")).ljust(width)


def _remarks(record: Record) -> list[Text]:
    lines = [
        Text(f"attempt failed after {milliseconds(trouble.ms)} ms: {trouble.why}", "yellow") for trouble in record.troubles
    ]
    if record.error:
        lines.append(Text(record.error, "red"))
    if record.longest_gap_ms:
        gap, mean = milliseconds(record.longest_gap_ms), milliseconds(record.itl_ms)
        lines.append(Text(f"between tokens: {mean} ms on average, {gap} ms at most", "dim"))
    if record.proof is not None:
        lines.append(Text(summary(record.proof, record.output_tokens), "dim"))
    return lines


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/trace", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("id", nargs="?", default="latest", metavar="ID")
    parser.add_argument("--server", default="127.0.0.1:9000", metavar="HOST:PORT", help="the front end")
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    parser.add_argument("--api-key", default=os.environ.get("BATON_API_KEY", ""), metavar="KEY", help="or $BATON_API_KEY")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        answer = fetch(options.server, options.id, options.api_key)
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    if options.json:
        print(answer.decode())
        return 0
    for number, record in enumerate(msgspec.json.decode(answer, type=_Found).requests):
        for part in [Text(), *render(record)] if number else render(record):
            console.print(part, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
