"""What came back: one record per request, and the directory of files that a run leaves.

    requests.csv   one row per request
    tokens.csv     one row per arrival of tokens: request, time_s, tokens
    run.json       what was asked for, of whom, on which machine, and what it cost the client

The report is made from these files alone. Times are seconds since the run began.
"""

from __future__ import annotations

import csv
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from loadtest.machine import Machine
from loadtest.options import Options
from loadtest.workload import Slo
from python_backends.core.errors import ConfigError

Floats = npt.NDArray[np.float64]

UNFINISHED = "not finished when the run ended"
RUN_FILE = "run.json"
_REQUESTS, _TOKENS = "requests.csv", "tokens.csv"


@dataclass(slots=True)
class Record:
    """One request. `arrival_s` and `arrival_tokens` go together: when tokens came, and how many. Filled in by one thread.

    Arrays and not lists of objects, so that Python's garbage collector has nothing to walk through during a run.
    """

    number: int
    kind: str
    due_s: float
    input_tokens: int
    output_tokens_asked: int
    sent_s: float = 0.0
    ended_s: float = float("nan")  # when the answer was complete or the error came; NaN while neither has happened
    arrival_s: array[float] = field(default_factory=lambda: array("d"))
    arrival_tokens: array[int] = field(default_factory=lambda: array("l"))
    input_tokens_counted: int = 0  # by the server; 0: it does not say
    cached_tokens: int = 0
    output_tokens_counted: int = 0
    finish_reason: str = ""
    route: str = ""
    error: str = UNFINISHED  # empty: it ended well

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def output_tokens(self) -> int:
        """The server's count where it gives one."""
        return self.output_tokens_counted or sum(self.arrival_tokens)

    @property
    def ttft_ms(self) -> float:
        """From sending to the first token. NaN when none came."""
        return (self.arrival_s[0] - self.sent_s) * 1e3 if self.arrival_s else float("nan")

    @property
    def e2e_ms(self) -> float:
        return (self.arrival_s[-1] - self.sent_s) * 1e3 if self.arrival_s else float("nan")

    @property
    def tpot_ms(self) -> float:
        """Mean time per token after the first. NaN when there was one only."""
        tokens = self.output_tokens
        return (self.e2e_ms - self.ttft_ms) / (tokens - 1) if tokens > 1 else float("nan")

    def gaps(self) -> Floats:
        """Milliseconds between arrivals that follow each other. Tokens that come in one piece are one arrival."""
        return np.diff(np.frombuffer(self.arrival_s, np.float64)) * 1e3

    def meets(self, slo: Slo) -> bool:
        """Whether it ended well, its first token came in time, and 99% of its gaps were short enough."""
        gaps = self.gaps()
        smooth = gaps.size == 0 or float(np.percentile(gaps, 99)) <= slo.itl_ms
        return self.ok and bool(self.arrival_s) and self.ttft_ms <= slo.ttft_ms and smooth


class Client(msgspec.Struct, frozen=True):
    """What the measuring itself did. Lateness: from when a request was due to when it was sent, milliseconds."""

    cpu_s: float
    late_ms_p50: float
    late_ms_p99: float
    late_ms_max: float


class Run(msgspec.Struct, frozen=True):
    """Everything about a run that is not a request."""

    command: str
    server: str  # address
    protocol: str
    options: Options
    levels: list[tuple[float, float]]  # (second, level) of the shape
    slos: dict[str, Slo]
    began: str  # wall clock, ISO 8601 with offset
    machine: Machine
    client: Client
    deployment: str = ""  # the file, where the server was started for the run

    @property
    def window(self) -> tuple[float, float]:
        """The seconds that count."""
        return self.options.warmup, self.options.duration


_COLUMNS = (
    "request",
    "kind",
    "due_s",
    "sent_s",
    "first_token_s",
    "last_token_s",
    "ended_s",
    "input_tokens",
    "input_tokens_counted",
    "cached_tokens",
    "output_tokens_asked",
    "output_tokens",
    "ttft_ms",
    "tpot_ms",
    "itl_p99_ms",
    "e2e_ms",
    "good",
    "route",
    "finish_reason",
    "error",
)


def write_run(directory: Path, run: Run, records: list[Record]) -> None:
    """Write all files. What is there of an earlier run is replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _REQUESTS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(_row(record, run.slos[record.kind]) for record in records)
    with (directory / _TOKENS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("request", "time_s", "tokens"))
        for record in records:
            arrivals = zip(record.arrival_s, record.arrival_tokens, strict=True)
            writer.writerows((record.number, f"{time_s:.6f}", tokens) for time_s, tokens in arrivals)
    write_meta(directory, run)


def write_meta(directory: Path, run: Run) -> None:
    (directory / RUN_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def _row(record: Record, slo: Slo) -> list[object]:
    gaps = record.gaps()
    first, last = (record.arrival_s[0], record.arrival_s[-1]) if record.arrival_s else (float("nan"), float("nan"))
    measured = {
        "due_s": record.due_s,
        "sent_s": record.sent_s,
        "first_token_s": first,
        "last_token_s": last,
        "ended_s": record.ended_s,
        "ttft_ms": record.ttft_ms,
        "tpot_ms": record.tpot_ms,
        "itl_p99_ms": float(np.percentile(gaps, 99)) if gaps.size else float("nan"),
        "e2e_ms": record.e2e_ms,
    }
    values: dict[str, object] = {
        **{name: "" if value != value else f"{value:.6f}" for name, value in measured.items()},
        "request": record.number,
        "output_tokens": record.output_tokens,
        "good": int(record.meets(slo)),
        "error": " ".join(record.error.split()),
    }
    return [values[name] if name in values else getattr(record, name) for name in _COLUMNS]


def read_run(directory: Path) -> tuple[Run, list[Record]]:
    """What `write_run` wrote. Raises ConfigError that names the file."""
    try:
        run = msgspec.json.decode((directory / RUN_FILE).read_bytes(), type=Run)
        with (directory / _REQUESTS).open(newline="") as file:
            records = {int(row["request"]): _record(row) for row in csv.DictReader(file)}
        with (directory / _TOKENS).open(newline="") as file:
            for number, time_s, tokens in list(csv.reader(file))[1:]:
                records[int(number)].arrival_s.append(float(time_s))
                records[int(number)].arrival_tokens.append(int(tokens))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; {directory} is not the directory of a load test") from error
    except (msgspec.DecodeError, KeyError, ValueError) as error:
        raise ConfigError(f"{directory}: not the files of a load test of this version: {error}") from error
    return run, list(records.values())


def _record(row: dict[str, str]) -> Record:
    return Record(
        number=int(row["request"]),
        kind=row["kind"],
        due_s=float(row["due_s"]),
        input_tokens=int(row["input_tokens"]),
        output_tokens_asked=int(row["output_tokens_asked"]),
        sent_s=float(row["sent_s"]),
        ended_s=float(row["ended_s"] or "nan"),
        input_tokens_counted=int(row["input_tokens_counted"]),
        cached_tokens=int(row["cached_tokens"]),
        output_tokens_counted=int(row["output_tokens"]),
        finish_reason=row["finish_reason"],
        route=row["route"],
        error=row["error"],
    )
