"""More load than a deployment can serve: what is accepted keeps its targets, the rest is refused at once, memory stays.

    scripts/bench overload                                       # the default deployment, three times its load, five minutes
    scripts/bench overload --config my.yaml --times 5 --minutes 1

Starts the deployment, first with a target for the first token if it has none (--ttft-ms). Clients that ask again as soon as
they are answered show how many requests it can serve per second; then --times as many arrive, whatever it does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from loadtest.options import Options
from loadtest.record import Floats, Record, read_run
from loadtest.summary import Spread, spread
from loadtest.workload import Slo
from python_backends.core.errors import BatonError, ConfigError, Unavailable
from python_backends.core.paths import repository_root
from scripts.loadtest import PROTOCOLS, command_line, interrupt_on_signals, run_load, started
from scripts.terminal import print_error

_STREAMS = 8  # that find out what can be served
_FIND_OUT_S = 40.0
_WARM_UP_S = 10.0
_SAMPLE_S = 5.0
_IN_FLIGHT = 4096


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run beyond what can be served. Times in ms, rates per second, memory in MiB as (begin, end) of the run."""

    sustainable: float
    offered: float
    accepted: int
    on_time: int
    refused: int
    failed: int  # neither answered nor refused for want of room
    ttft: Spread
    itl: Spread
    joining: Spread  # the first gap of each: from the prefill worker's token to the decode worker's first
    running: Spread  # the others
    refusal: Spread  # from sending to the refusal
    goodput: float
    memory: tuple[float, float]
    late_ms_p99: float  # the load's own: from when a request was due to when it was sent


def outcome(
    records: Sequence[Record], slo: Slo, seconds: float, sustainable: float, memory: Sequence[float], late_ms_p99: float
) -> Outcome:
    """records: those that count, due within `seconds`. memory: MiB, in the order it was sampled, at least one."""
    accepted = [record for record in records if record.ok]
    refused = [record for record in records if not record.ok and not record.arrival_s and _is_refusal(record.error)]
    gaps = [gaps for record in accepted if (gaps := record.gaps()).size]
    share = max(len(memory) // 5, 1)
    return Outcome(
        sustainable=sustainable,
        offered=len(records) / seconds,
        accepted=len(accepted),
        on_time=sum(record.ttft_ms <= slo.ttft_ms for record in accepted),
        refused=len(refused),
        failed=len(records) - len(accepted) - len(refused),
        ttft=spread(np.array([record.ttft_ms for record in accepted])),
        itl=_spread_of(gaps),
        joining=_spread_of([each[:1] for each in gaps]),
        running=_spread_of([each[1:] for each in gaps]),
        refusal=spread(np.array([(record.ended_s - record.sent_s) * 1e3 for record in refused])),
        goodput=sum(record.meets(slo) for record in accepted) / seconds,
        memory=(float(np.median(memory[:share])), float(np.median(memory[-share:]))),
        late_ms_p99=late_ms_p99,
    )


def _spread_of(parts: Sequence[Floats]) -> Spread:
    return spread(np.concatenate(parts) if parts else np.empty(0))


def _is_refusal(error: str) -> bool:
    """Whether it is what the router's door says to whom it does not let in (router.admission): it names the limit's key."""
    return any(f"router.{key}" in error for key in ("max_requests", "max_queued_tokens", "slo.ttft_ms"))


def table(found: Outcome, slo: Slo) -> Table:
    shown = Table(box=None, padding=(0, 2), pad_edge=False, show_header=False)
    shown.add_column("")
    shown.add_column("", justify="right")
    total = found.accepted + found.refused + found.failed
    for name, value in (
        ("can be served, requests/s", f"{found.sustainable:.2f}"),
        ("offered, requests/s", f"{found.offered:.2f}"),
        ("accepted", f"{found.accepted} of {total}"),
        ("of these with their first token in time", f"{found.on_time / max(found.accepted, 1):.1%}"),
        (f"TTFT of the accepted, p50 / p99, ms (target {slo.ttft_ms:.0f})", _percentiles(found.ttft)),
        (f"ITL, p50 / p99, ms (target {slo.itl_ms:.0f})", _percentiles(found.itl)),
        ("from the first token to the second, p50 / p99, ms", _percentiles(found.joining)),
        ("between later tokens, p50 / p99, ms", _percentiles(found.running)),
        ("good requests/s", f"{found.goodput:.2f}"),
        ("refused", f"{found.refused}"),
        ("after, p50 / p99, ms", _percentiles(found.refusal)),
        ("failed otherwise", f"{found.failed}"),
        ("memory of all processes, first and last fifth, MiB", f"{found.memory[0]:,.0f} / {found.memory[1]:,.0f}"),
        ("requests were sent late by, p99, ms", f"{found.late_ms_p99:.1f}"),
    ):
        shown.add_row(name, value)
    return shown


def _percentiles(values: Spread) -> str:
    return f"{values.p50:,.0f} / {values.p99:,.0f}" if values.n else "-"


@contextmanager
def _memory_of(pid: int) -> Iterator[list[float]]:
    """Samples of the memory that a process and its descendants have of their own, MiB, as long as the block runs."""
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(_own_mib(pid))
            done.wait(_SAMPLE_S)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _own_mib(pid: int) -> float:
    own = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                own += each.memory_full_info().uss
    return own / (1 << 20)


def _deployment(config: Path, ttft_ms: float, directory: Path) -> tuple[Path, Slo]:
    """The deployment with its targets. Raises ConfigError."""
    try:
        content = yaml.safe_load(config.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {config}: {error}") from error
    targets = content.setdefault("router", {}).setdefault("slo", {})
    targets.setdefault("ttft_ms", ttft_ms)
    path = directory / "deployment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, Slo(ttft_ms=float(targets["ttft_ms"]), itl_ms=float(targets.get("itl_ms") or np.inf))


def measure(parsed: argparse.Namespace, console: Console) -> tuple[Outcome, Slo]:
    """Raises ConfigError or Unavailable."""
    command = command_line("bench overload", None)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config, slo = _deployment(parsed.config, parsed.ttft_ms, directory)
        with started(config, console) as server:
            address = PROTOCOLS["grpc"](server)
            base = Options(
                scenario="fixed",
                input_tokens=parsed.input_tokens,
                output_tokens=parsed.output_tokens,
                warmup=_WARM_UP_S,
                max_in_flight=_IN_FLIGHT,
            )
            # Without a target nobody is refused: refused clients would ask again at once, and use the cores for that.
            found = msgspec.structs.replace(
                base,
                streams=_STREAMS,
                duration=_FIND_OUT_S,
                fields='{"slo_ttft_ms": 0.0}',
                out=str(directory / "capacity"),
            )
            run_load(address, found, command, quiet=True)
            sustainable = _served_per_second(*_counted(directory / "capacity"))
            if not sustainable:
                raise Unavailable(f"the deployment answered none of {_STREAMS} streams within {_FIND_OUT_S:.0f} s")
            console.print(f"{sustainable:.2f} requests/s can be served; now {parsed.times:g} times as many", highlight=False)
            load = msgspec.structs.replace(
                base,
                rate=parsed.times * sustainable,
                duration=60 * parsed.minutes + _WARM_UP_S,
                out=str(directory / "overload"),
            )
            with _memory_of(server.pid) as memory:
                run_load(address, load, command, quiet=True)
            late = read_run(directory / "overload")[0].client.late_ms_p99
            records, seconds = _counted(directory / "overload")
    return outcome(records, slo, seconds, sustainable, memory, late), slo


def _counted(directory: Path) -> tuple[list[Record], float]:
    """Requests that were due in the window, and its seconds."""
    run, records = read_run(directory)
    first, last = run.window
    return [record for record in records if first <= record.due_s < last], last - first


def _served_per_second(records: Sequence[Record], seconds: float) -> float:
    return sum(record.ok for record in records) / seconds


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = repository_root() / "configs" / "default.yaml"
    parser.add_argument(
        "--config", type=Path, default=default, metavar="FILE", help="the deployment (default: configs/default.yaml)"
    )
    parser.add_argument("--times", type=float, default=3.0, metavar="N", help="what can be served (default: 3)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of overload (default: 5)")
    parser.add_argument("--ttft-ms", type=float, default=3000.0, help="target, where the deployment has none (default: 3000)")
    parser.add_argument("--input-tokens", type=int, default=256, help="of every prompt (default: 256)")
    parser.add_argument("--output-tokens", type=int, default=64, help="of every answer (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parsed = parser.parse_args(arguments)
    for name in ("times", "minutes", "ttft_ms", "input_tokens", "output_tokens"):
        if getattr(parsed, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parse(arguments)
    interrupt_on_signals()
    console = Console()
    try:
        found, slo = measure(parsed, console)
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; nothing was measured")
        return 130
    console.print(table(found, slo))
    if parsed.json:
        parsed.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
