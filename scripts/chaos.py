"""Breaks a deployment in every way there is while clients check each answer to the letter, and prints the table of promises.

Starts deployments of its own on a real tritonserver, on free ports of 127.0.0.1: two prefill, two decode and one aggregated
worker, with the engine `fake` (fast) or the demo model's weights. The right answers are asked for before anything is broken.
Ends with 1 when a promise is broken: a request failed, a text is wrong, a block leaked, or something did not come back.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import yaml
from rich.console import Console
from rich.table import Table as Printed

from python_backends.core.errors import BatonError, InvalidRequest, Unavailable
from python_backends.core.paths import run_base
from scripts.injection.acts import CONDITIONS, STRIKES, Condition
from scripts.injection.load import Load, Sample, known_requests
from scripts.injection.scene import BACK_S, FAKE, LEASE_S, SILENT_S, Scene, Strike
from scripts.injection.small_disks import SmallDisks, enter_own_mounts
from scripts.injection.tally import Row, Table, quantile, wilson
from scripts.router_door import RouterDoor
from scripts.serve import start_with_progress
from scripts.soak import metric_values, metrics_text
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

_SETTLE_S = 0.3
_REFRESHED_S = 1.0  # metrics are a little older
_CONDITION_S = 6.0  # of load, per round


def deployment(engine: str, settings: dict[str, object]) -> dict[str, Any]:
    """What is written into a deployment file. `settings`: by section, over the usual ones."""
    roles = ["prefill", "prefill", "decode", "decode", "aggregated"]
    usual: dict[str, dict[str, Any]] = {
        "engine": {"kv_pool_mib": 16, "fake": FAKE} if engine == "fake" else {"kv_pool_mib": 192},
        "transfer": {"lease_s": LEASE_S, "faults": {"delay": 0.5}},
        "router": {"mode": "always-remote", "worker_wait_s": 30, "default_deadline_s": 60},
        "health": {"heartbeat_s": 0.1, "silent_s": SILENT_S},
    }
    for section, values in settings.items():
        usual[section] = {**usual.get(section, {}), **msgspec.convert(values, dict[str, Any])}
    return {"workers": [{"role": role, "engine": engine} for role in roles], **usual}


class Chaos:
    """One run; `rows` are filled as it goes."""

    def __init__(self, engine: str, clients: int, console: Console) -> None:
        self.rows: list[Row] = []
        self._engine = engine
        self._clients = clients
        self._console = console
        self._kept = run_base() / "last-chaos.log"

    def strike(self, strikes: list[Strike], rounds: int, seconds: float) -> None:
        """All of them, round by round, on a server for each of the means they need; no round begins after `seconds`."""
        kinds = {strike.means: [other for other in strikes if other.means is strike.means] for strike in strikes}
        for means, some in kinds.items():
            rows = [Row(what=strike.what, where=strike.where, when=strike.when) for strike in some]
            self.rows += rows
            with ExitStack() as stack:
                try:
                    stack.enter_context(means.ready(self._engine))
                except Unavailable as missing:
                    self._skip(rows, str(missing))
                    continue
                self._strike_all(some, rows, rounds, seconds * len(some) / len(strikes))

    def _strike_all(self, strikes: list[Strike], rows: list[Row], rounds: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._serving(strikes[0].means.settings) as (scene, load):
            for number in range(rounds):
                if number and time.monotonic() > until:
                    break
                for strike, row in zip(strikes, rows, strict=True):
                    self._strike(scene, load, strike, row)
                    if scene.server.end:
                        return

    def _skip(self, rows: list[Row], missing: str) -> None:
        for row in rows:
            row.skipped = missing
            self._console.print(f"[yellow]skipped[/yellow]  {row.name}: {missing}", highlight=False, soft_wrap=True)

    def suffer(self, conditions: list[Condition], rounds: int) -> None:
        """A server for each of them."""
        for condition in conditions:
            row = Row(what=condition.what, where=condition.where, when="")
            self.rows.append(row)
            try:
                self._suffer(condition, rounds, row)
            except BatonError as error:  # of one server; the others are still worth their time
                row.problems.append(str(error))
            self._say(row)

    def _suffer(self, condition: Condition, rounds: int, row: Row) -> None:
        with self._serving(condition.settings) as (scene, load):
            before = _count(scene.server, condition.counted)
            for _ in range(rounds):
                began = time.monotonic()
                load.resume()
                time.sleep(_CONDITION_S)
                self._end_row(scene, load, row, began)
                if scene.server.end:
                    return
            row.injected = _count(scene.server, condition.counted) - before

    @contextmanager
    def _serving(self, settings: dict[str, object]) -> Iterator[tuple[Scene, Load]]:
        with tempfile.TemporaryDirectory() as directory:
            config = Path(directory) / "chaos.yaml"
            config.write_text(yaml.safe_dump(deployment(self._engine, settings)))
            server = TritonServer(config)
            try:
                start_with_progress(server, self._console)
                door = RouterDoor(server.run_dir)
                load = Load(server, self._clients, known_requests(2 * self._clients))
                try:
                    load.learn()
                    load.begin()
                    yield Scene(server, door), load
                finally:
                    load.stop()
                    door.close()
            finally:
                if not all(row.ok for row in self.rows) and server.log.path.exists():
                    shutil.copyfile(server.log.path, self._kept)
                    self._console.print(f"the server's log is kept: {self._kept}", highlight=False)
                server.stop()

    def _strike(self, scene: Scene, load: Load, strike: Strike, row: Row) -> None:
        load.pause()
        load.resume(strike.only)
        began = time.monotonic()
        try:
            hit = strike.strike(scene)
        except BatonError as error:
            row.problems.append(str(error))
        else:
            row.injected += 1
            row.back_s.append(hit.back - hit.at)
            hurt = [sample for sample in load.between(hit.at, hit.at) if sample.client in hit.clients]
            row.hit += len(hurt)
            row.pauses_s += [instant - hit.at for instant in _next_tokens(hurt, hit.at)]
            time.sleep(_SETTLE_S)
        self._end_row(scene, load, row, began)
        self._say(row)

    def _end_row(self, scene: Scene, load: Load, row: Row, began: float) -> None:
        """Let what runs end, count, and look for leaks."""
        if not load.pause():
            row.problems.append(f"{len(load.live())} requests have not ended")
        samples = load.between(began, time.monotonic())
        row.requests += len(samples)
        row.failed += sum(bool(sample.error) for sample in samples)
        row.wrong += sum(sample.wrong for sample in samples)
        row.problems += sorted({sample.error for sample in samples if sample.error} - set(row.problems))
        load.forget()
        if scene.server.has_ended():
            row.problems.append(f"tritonserver {scene.server.end}")
        else:
            row.leaked_blocks += _leaked(scene.server)

    def _say(self, row: Row) -> None:
        verdict = "[green]holds[/green]" if row.ok else "[red]BROKEN[/red]"
        back = f", back after {row.back_s[-1]:.2f} s" if row.back_s else ""
        pause = f", longest pause {max(row.pauses_s):.2f} s" if row.pauses_s else ""
        self._console.print(
            f"{verdict}  {row.name}: {row.injected} injected, {row.requests} requests{pause}{back}", highlight=False
        )


def _next_tokens(samples: list[Sample], after: float) -> list[float]:
    """When each of them went on. Waits for it, in vain if need be."""
    end = time.monotonic() + BACK_S
    while any(sample.next_after(after) is None for sample in samples) and time.monotonic() < end:
        time.sleep(0.02)
    return [sample.next_after(after) or time.monotonic() for sample in samples]


def _count(server: TritonServer, names: tuple[str, ...]) -> int:
    """Of a metric, all series whose name and labels begin so."""
    time.sleep(_REFRESHED_S)
    return int(sum(value for key, value in metric_values(metrics_text(server)).items() if key.startswith(names)))


def _leaked(server: TritonServer) -> int:
    """KV blocks and leases that are still held when leases have had time to end."""
    end = time.monotonic() + server.deployment.transfer.lease_s + 1.0 + _REFRESHED_S
    while True:
        values = metric_values(metrics_text(server))
        held = sum(v for key, v in values.items() if 'state="held"' in key or key.startswith("baton_leases"))
        if not held or time.monotonic() > end:
            return int(held)
        time.sleep(0.1)


def render(table: Table) -> Printed:
    """For a terminal; the files say more."""
    printed = Printed("injection", "requests", "failed", "wrong", "pause p99", "back p99", "leaked", "")
    for row in table.rows:
        seconds = [
            "-" if worst is None else f"{worst:.2f} s" for worst in (quantile(row.pauses_s, 0.99), quantile(row.back_s, 0.99))
        ]
        counts = map(str, (row.requests, row.failed, row.wrong))
        printed.add_row(f"{row.injected} x {row.name}", *counts, *seconds, str(row.leaked_blocks), row.verdict)
    return printed


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--engine", choices=("fake", "torch"), default="fake", help="fake: no weights; torch: the demo model")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is injected")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="hit processes for so long, however many rounds; 0: --rounds"
    )
    parser.add_argument("--clients", type=int, default=8, help="requests at once")
    parser.add_argument(
        "--only", metavar="WORDS", action="append", default=[], help="kinds whose row contains these words; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print the kinds of injections and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    return parser.parse_args(arguments)


def _chosen(only: list[str]) -> tuple[list[Strike], list[Condition]]:
    """Raises InvalidRequest when nothing is."""
    strikes = [s for s in STRIKES if _is_named(only, f"{s.what} {s.where} {s.when}")]
    conditions = [c for c in CONDITIONS if _is_named(only, f"{c.what} {c.where}")]
    if not strikes and not conditions:
        raise InvalidRequest(f"--only: nothing is called {' or '.join(only)}; --list shows the kinds")
    return strikes, conditions


def _names(strikes: list[Strike], conditions: list[Condition]) -> list[str]:
    return [f"{s.what} {s.where} {s.when}".strip() for s in strikes] + [f"{c.what} {c.where}" for c in conditions]


def _is_named(only: list[str], name: str) -> bool:
    return not only or any(set(_words(named)) <= set(_words(name)) for named in only)


def _words(name: str) -> list[str]:
    return name.replace(",", "").split()


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    console = Console(stderr=True)
    began, clock = datetime.now().astimezone().isoformat(timespec="seconds"), time.monotonic()
    try:
        strikes, conditions = _chosen(options.only)
        if options.list:
            print("\n".join(_names(strikes, conditions)))
            return 0
        if arguments is None and any(isinstance(strike.means, SmallDisks) for strike in strikes):
            enter_own_mounts("scripts.chaos", sys.argv[1:])
        chaos = Chaos(options.engine, options.clients, console)
        rounds = options.rounds if not options.minutes else sys.maxsize
        chaos.strike(strikes, rounds, options.minutes * 60 or float("inf"))
        chaos.suffer(conditions, options.rounds)
    except BatonError as error:
        print_error(console, error)
        return 1
    command = "scripts/chaos " + " ".join(sys.argv[1:] if arguments is None else arguments)
    table = Table(command=command, began=began, engine=options.engine, seconds=time.monotonic() - clock, rows=chaos.rows)
    Console().print(render(table))
    if options.json:
        options.json.write_bytes(table.json())
    if options.markdown:
        options.markdown.write_text(table.markdown() + "\n")
    return _verdict(table, console)


def _verdict(table: Table, console: Console) -> int:
    for problem in table.problems():
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    for missing, names in table.skipped().items():
        sentence = f"SKIPPED, {len(names)} of {len(table.rows)} rows: {missing}"
        console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)
    requests = sum(row.requests for row in table.rows)
    failed = sum(row.failed + row.wrong for row in table.rows)
    injected = sum(row.injected for row in table.rows)
    verdict = "chaos OK" if table.ok else "chaos FAILED"
    console.print(
        f"{verdict}: {injected} injections, {requests} requests, {failed} failed or wrong "
        f"(at most {wilson(failed, requests)[1]:.3%} with 95% confidence), {table.seconds:.0f} s",
        highlight=False,
    )
    return 0 if table.ok else 1


if __name__ == "__main__":
    sys.exit(main())
