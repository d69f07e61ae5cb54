"""What is counted per kind of injection, and how sure one can be of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

import msgspec

_Z = 1.959964  # of a two-sided 95% interval


def wilson(events: int, n: int) -> tuple[float, float]:
    """95% interval of a share, from `events` in `n` trials (Wilson, JASA 22, 1927). (0, 1) without trials."""
    if not n:
        return 0.0, 1.0
    share = events / n
    centre = share + _Z**2 / (2 * n)
    spread = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = ((centre + sign * spread) / (1 + _Z**2 / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else None


class Row(msgspec.Struct, kw_only=True):
    """One kind of injection. Requests: those that ran between an injection and the recovery from it."""

    what: str
    where: str  # the role that was hit
    when: str  # the state of a request that was waited for
    injected: int = 0
    hit: int = 0  # requests that were at the very worker, or the router, when it was hit
    requests: int = 0
    failed: int = 0
    wrong: int = 0  # ended well, with another text
    pauses_s: list[float] = []  # of those hit: from the injection to their next token
    back_s: list[float] = []  # from the injection until what was hit serves again
    leaked_blocks: int = 0  # KV blocks and leases held when nobody is served any more
    problems: list[str] = []
    skipped: str = ""  # what this machine lacks for it

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.what, self.where, self.when)))

    @property
    def verdict(self) -> str:
        if self.skipped:
            return "skipped"
        return "holds" if self.ok else "BROKEN"

    @property
    def ok(self) -> bool:
        """Also where nothing was tried because it can't be here; `skipped` says so wherever the row is shown."""
        if self.skipped:
            return True
        return not (self.failed or self.wrong or self.leaked_blocks or self.problems) and self.injected > 0


class Table(msgspec.Struct, kw_only=True):
    """A run: what was asked for, and a row per kind of injection."""

    command: str
    began: str  # wall clock, ISO 8601
    engine: str
    seconds: float
    rows: list[Row]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows) and not all(row.skipped for row in self.rows)

    def problems(self) -> list[str]:
        """Every sentence of every row."""
        return [f"{row.name}: {problem}" for row in self.rows for problem in row.problems]

    def skipped(self) -> dict[str, list[str]]:
        """Rows by what this machine lacks for them."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.skipped:
                found.setdefault(row.skipped, []).append(row.name)
        return found

    def markdown(self) -> str:
        """The table of promises. Intervals are 95%, of the share of requests."""
        return "\n".join(
            ["| " + " | ".join(cells) + " |" for cells in (_HEAD, ["---"] * len(_HEAD), *map(cells_of, self.rows))]
        )

    def json(self) -> bytes:
        """With intervals and quantiles, as they are in the Markdown."""
        rows = [
            {
                **msgspec.to_builtins(row),
                "ok": row.ok,
                "failed_95": wilson(row.failed, row.requests),
                "wrong_95": wilson(row.wrong, row.requests),
                "pause_s_p50": quantile(row.pauses_s, 0.5),
                "pause_s_p99": quantile(row.pauses_s, 0.99),
                "back_s_p50": quantile(row.back_s, 0.5),
                "back_s_p99": quantile(row.back_s, 0.99),
            }
            for row in self.rows
        ]
        return msgspec.json.format(msgspec.json.encode({**msgspec.to_builtins(self), "rows": rows, "ok": self.ok}), indent=1)


_HEAD = [
    "injection",
    "where",
    "when",
    "injected",
    "requests",
    "failed (95%)",
    "wrong texts (95%)",
    "hit",
    "pause p50 / p99",
    "back p50 / p99",
    "leaked blocks",
    "",
]


def cells_of(row: Row) -> list[str]:
    """A row as it is printed."""
    return [
        row.what,
        row.where,
        row.when or "any",
        str(row.injected),
        str(row.requests),
        _share(row.failed, row.requests),
        _share(row.wrong, row.requests),
        str(row.hit),
        _times(row.pauses_s),
        _times(row.back_s),
        str(row.leaked_blocks),
        row.verdict,
    ]


def _share(events: int, n: int) -> str:
    low, high = wilson(events, n)
    return f"{events} ({low:.2%} to {high:.2%})"


def _times(values: Sequence[float]) -> str:
    middle, worst = quantile(values, 0.5), quantile(values, 0.99)
    return "-" if middle is None or worst is None else f"{middle:.2f} / {worst:.2f} s"
