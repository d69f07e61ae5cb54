"""What Locust's page shows while a test runs: events for first tokens, gaps, and requests, and the rows made from them.

Rows are named by kind. gRPC, generate_stream or OpenAI: whole requests. TTFT. ITL, whose requests per second are tokens per
second. GOOD: requests that met the SLO, so its requests per second are the goodput. Only whole requests are in the total.
"""

from __future__ import annotations

from collections import defaultdict

import gevent
from locust.env import Environment
from locust.event import EventHook
from locust.stats import StatsEntry

from loadtest.record import Record
from loadtest.run import LoadTest

_EVERY_S = 0.5
_LINE_EVERY_S = 5.0

first_token = EventHook()
"""Fired with kind: str, ttft_ms: float."""
token_gaps = EventHook()
"""Fired about twice a second with kind: str, gaps_ms: list[float], tokens: int: all that came for a kind since the last."""
request_end = EventHook()
"""Fired with record: Record, good: bool."""


class Live:
    """Turns what the threads received into events, and the events into Locust's statistics. Runs until killed."""

    def __init__(self, test: LoadTest, environment: Environment) -> None:
        self._test = test
        self._environment = environment
        self._last_s: dict[int, float] = {}  # request in flight -> its last arrival
        self._tokens = 0
        self._counts = {"sent": 0, "failed": 0}
        self._listeners = ((first_token, self._on_first_token), (token_gaps, self._on_gaps), (request_end, self._on_end))
        for event, listener in self._listeners:
            event.add_listener(listener)

    def run(self) -> None:
        next_line_s = _LINE_EVERY_S
        while True:
            gevent.sleep(_EVERY_S)
            self.look()
            if self._test.now_s >= next_line_s:
                print(self._line(), flush=True)
                next_line_s += _LINE_EVERY_S

    def close(self) -> None:
        self.look()
        for event, listener in self._listeners:
            event.remove_listener(listener)

    def end(self, record: Record) -> None:
        """A request is over: what has arrived for it is told first."""
        self.look()
        self._last_s.pop(record.number, None)
        request_end.fire(record=record, good=record.meets(self._test.plan.slos[record.kind]))

    def look(self) -> None:
        """Fire events for all that has arrived since the last look."""
        gaps: defaultdict[str, list[float]] = defaultdict(list)
        tokens: defaultdict[str, int] = defaultdict(int)
        news = self._test.news
        for _ in range(len(news)):
            record, at_s, count = news.popleft()
            last_s = self._last_s.get(record.number)
            if last_s is None:
                first_token.fire(kind=record.kind, ttft_ms=(at_s - record.sent_s) * 1e3)
            else:
                gaps[record.kind].append((at_s - last_s) * 1e3)
            self._last_s[record.number] = at_s
            tokens[record.kind] += count
        for kind, count in tokens.items():
            token_gaps.fire(kind=kind, gaps_ms=gaps[kind], tokens=count)

    def _on_first_token(self, kind: str, ttft_ms: float) -> None:
        _log(self._environment.stats.get(kind, "TTFT"), ttft_ms)

    def _on_gaps(self, kind: str, gaps_ms: list[float], tokens: int) -> None:
        self._tokens += tokens
        entry = self._environment.stats.get(kind, "ITL")
        for gap_ms in gaps_ms:
            _log(entry, gap_ms)

    def _on_end(self, record: Record, good: bool) -> None:
        error = None if record.ok else Exception(record.error)
        took_ms = record.e2e_ms if record.arrival_s else (self._test.now_s - record.sent_s) * 1e3
        self._environment.events.request.fire(
            request_type=self._test.connection.name,
            name=record.kind,
            response_time=took_ms,
            response_length=record.output_tokens,
            exception=error,
            context={},
        )
        if good:
            _log(self._environment.stats.get(record.kind, "GOOD"), took_ms)

    def _line(self) -> str:
        """Where the run stands, for the terminal."""
        parts = [f"{self._test.now_s:4.0f} s  {self._test.in_flight} in flight  {self._tokens / _LINE_EVERY_S:.0f} tok/s"]
        self._tokens = 0
        for kind in self._test.plan.kinds:
            ttft, itl = (self._environment.stats.get(kind, row) for row in ("TTFT", "ITL"))
            if not ttft.num_requests:
                continue
            p99 = itl.get_response_time_percentile(0.99)
            parts.append(
                f"{kind}: TTFT p50 {ttft.median_response_time:.0f} ms, ITL p50 {itl.median_response_time:.0f} p99 {p99:.0f} ms"
            )
        failed = self._environment.stats.num_failures
        return "  ".join([*parts, f"{failed} failed"] if failed else parts)


def _log(entry: StatsEntry, milliseconds: float) -> None:
    entry.log(milliseconds, 0)  # type: ignore[arg-type]  # Locust's own requests give it floats too
