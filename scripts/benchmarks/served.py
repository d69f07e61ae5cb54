"""What a deployment is like to use, measured through a real tritonserver: serving, prefix cache, handoff, scale, start.

    scripts/bench served                       # all parts on the demo model, some minutes
    scripts/bench served serving handoff --repetitions 7

Every part starts its own servers on free ports. What is compared is measured in turns within one run; the table shows
medians, least and most, and the median of the ratios to the first contender. Results: bench.json and bench.png in --out.

serving   32 and 128 streams through Triton and the router: against the same engine called directly, and CPU per token
prefix    time to first token of a long prompt: new, and seen before
handoff   the KV of prompts of several lengths from prefill to decode worker: its time, its rate, its share of the TTFT
scale     one, two and four workers of each role that sleep instead of computing: tokens per second
start     a deployment from nothing to ready and to its first token, and the memory of its workers
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import psutil
from rich.console import Console

from loadtest.machine import this_machine
from python_backends.core.errors import BatonError
from scripts.benchmarks.asking import Answer, ask, ask_together, prompt, tokens_per_second
from scripts.benchmarks.bare import BareEngine
from scripts.benchmarks.figures import Figure, Report, draw, table
from scripts.client import Client
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

_SLEEPING = "engine: {fake: {step_us: 5000, prefill_us_per_token: 100}, kv_pool_mib: 64}\n"
_ONE_OF_EACH = "workers: [{role: prefill}, {role: decode}]\n"
_AGGREGATED = "workers: [{role: aggregated}]\n"
_STREAM_TOKENS = (32, 100)  # in, out
_HANDOFF_LENGTHS = (1_000, 2_000, 4_000, 8_000)
_PREFIX_TOKENS = 2_000
_SCALE_STREAMS = 16  # per decode worker


@dataclass
class Bench:
    """What parts need: where to put files, how often to repeat, whom to tell, and a source of new prompts."""

    directory: Path
    repetitions: int
    console: Console
    rng: random.Random

    @contextmanager
    def server(self, deployment: str) -> Iterator[tuple[TritonServer, Client]]:
        """A server with the deployment of this YAML."""
        path = self.directory / "deployment.yaml"
        path.write_text(deployment)
        with TritonServer(path) as server, Client(f"{server.host}:{server.grpc_port}") as client:
            client.wait_ready()
            yield server, client

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        return [prompt(self.rng, tokens) for _ in range(count)]

    def repeated(self, *calls: Callable[[], None]) -> None:
        """Call them in turn, from either end alternately, so often as is asked for; once before that, to warm up."""
        for call in calls:
            call()
        for number in range(self.repetitions):
            for call in calls if number % 2 == 0 else calls[::-1]:
                call()


class _Taken:
    """Values of several figures while they are being measured. The first of each is the warm-up, and is left out."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._values: dict[tuple[str, str, str], list[float]] = {}

    def add(self, quantity: str, contender: str, unit: str, value: float) -> None:
        self._values.setdefault((quantity, contender, unit), []).append(value)

    def figures(self) -> list[Figure]:
        return [
            Figure(self._part, quantity, contender, unit, tuple(values[1:]))
            for (quantity, contender, unit), values in self._values.items()
        ]


def measure_serving(bench: Bench) -> list[Figure]:
    """What Triton and the router add to an engine; and their CPU time, with an engine that sleeps."""
    taken = _Taken("serving")
    inputs, outputs = _STREAM_TOKENS
    with bench.server(_AGGREGATED) as (server, client), BareEngine(server.deployment) as bare:

        def alone() -> None:
            run = bare.run(bench.prompts(32, inputs), outputs)
            taken.add("32 streams", "engine alone", "tokens/s", run.tokens_per_second)
            taken.add("TTFT, one request", "engine alone", "ms", bare.run(bench.prompts(1, inputs), 4).ttft_ms)

        def served() -> None:
            answers = ask_together(client, bench.prompts(32, inputs), outputs)
            taken.add("32 streams", "served", "tokens/s", tokens_per_second(answers))
            taken.add("TTFT, one request", "served", "ms", ask(client, prompt(bench.rng, inputs), 4).ttft_ms)

        bench.repeated(alone, served)
    for streams in (32, 128):
        with bench.server("workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]\n" + _SLEEPING) as (
            server,
            client,
        ):
            processes = _processes(server)

            def sleeping(
                streams: int = streams, client: Client = client, processes: dict[str, psutil.Process] = processes
            ) -> None:
                before = {name: _cpu_s(process) for name, process in processes.items()}
                answers = ask_together(client, bench.prompts(streams, inputs), outputs)
                tokens = sum(answer.tokens for answer in answers)
                for name, process in processes.items():
                    cost_us = (_cpu_s(process) - before[name]) / tokens * 1e6
                    taken.add(f"CPU per token, {streams} streams", name, "us", cost_us)

            bench.repeated(sleeping)
    return taken.figures()


def measure_prefix(bench: Bench) -> list[Figure]:
    """The same long prompt twice, for each repetition another one."""
    taken = _Taken("prefix")
    with bench.server(_ONE_OF_EACH) as (_, client):

        def cold_then_warm() -> None:
            ids = prompt(bench.rng, _PREFIX_TOKENS)
            for contender in ("new", "seen before"):
                taken.add(f"TTFT, {_PREFIX_TOKENS} tokens", contender, "ms", ask(client, ids, 2).ttft_ms)

        bench.repeated(cold_then_warm)
    return taken.figures()


def measure_handoff(bench: Bench) -> list[Figure]:
    """From the proofs: prefill and decode in different processes of this host."""
    taken = _Taken("handoff")
    with bench.server(_ONE_OF_EACH) as (_, client):

        def hand_over() -> None:
            for length in _HANDOFF_LENGTHS:
                answer = ask(client, prompt(bench.rng, length), 4, route="remote")
                for quantity, unit, value in _handoff(answer):
                    taken.add(quantity, f"{length} tokens", unit, value)

        bench.repeated(hand_over)
    return taken.figures()


def _handoff(answer: Answer) -> Iterator[tuple[str, str, float]]:
    proof = answer.proof
    if proof.kv_tokens_received == 0:
        raise BatonError(f"nothing was handed over: {proof.why}")
    yield "moved while the prompt was computed", "%", proof.kv_tokens_ahead / proof.kv_tokens_received * 100
    yield "transfer", "ms", proof.transfer_ms
    yield "handoff, end of prefill to decode", "ms", proof.handoff_ms
    yield "rate", "GiB/s", proof.kv_bytes / proof.transfer_ms * 1e3 / (1 << 30)
    yield "handoff, of the TTFT", "%", proof.handoff_ms / proof.ttft_ms * 100


def measure_scale(bench: Bench) -> list[Figure]:
    """Workers that sleep scale as far as router and server let them."""
    taken = _Taken("scale")
    for pairs in (1, 2, 4):
        workers = ", ".join(f"{{role: {role}, engine: fake}}" for role in ("prefill", "decode") for _ in range(pairs))
        limited = _SLEEPING.replace("engine: {", f"engine: {{max_batch: {_SCALE_STREAMS}, ")
        with bench.server(f"workers: [{workers}]\n{limited}") as (_, client):

            def load(pairs: int = pairs, client: Client = client) -> None:
                answers = ask_together(client, bench.prompts(2 * pairs * _SCALE_STREAMS, 64), 100)
                taken.add("streams on sleeping workers", f"{pairs}+{pairs} workers", "tokens/s", tokens_per_second(answers))

            bench.repeated(load)
    return taken.figures()


def measure_start(bench: Bench) -> list[Figure]:
    """The default deployment, with machine code and weights in the cache."""
    taken = _Taken("start")

    def start() -> None:
        began = time.monotonic()
        with bench.server(_ONE_OF_EACH) as (server, client):
            taken.add("until ready", "1+1 workers", "s", time.monotonic() - began)
            ask(client, prompt(bench.rng, 32), 1)
            taken.add("until the first token", "1+1 workers", "s", time.monotonic() - began)
            for name, process in _processes(server).items():
                taken.add("memory of its own, pool included", name, "MiB", process.memory_full_info().uss / (1 << 20))

    bench.repeated(start)
    return taken.figures()


PARTS: dict[str, Callable[[Bench], list[Figure]]] = {
    "serving": measure_serving,
    "prefix": measure_prefix,
    "handoff": measure_handoff,
    "scale": measure_scale,
    "start": measure_start,
}


def _processes(server: TritonServer) -> dict[str, psutil.Process]:
    """The server's own process and those of its models, by name."""
    triton = psutil.Process(server.pid)
    models = {
        name: process
        for process in triton.children(recursive=True)
        for name in server.models
        if any(word.endswith(f"/{name}/1/model.py") for word in process.cmdline())
    }
    return {"tritonserver": triton, **models}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench served", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all when none is given")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="of everything (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="DIR", help="for bench.json and bench.png")
    parsed = parser.parse_args(arguments)
    unknown = [part for part in parsed.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART {unknown[0]!r} is unknown; known are {', '.join(PARTS)}")
    if parsed.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parse(arguments)
    console = Console()
    busy = psutil.cpu_percent(interval=2.0) / 100
    if busy > 0.1:
        console.print(f"warning: others use {busy:.0%} of this machine's cores; figures will be unlike a quiet one's")
    figures: list[Figure] = []
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        with ExitStack() as held:
            directory = Path(held.enter_context(tempfile.TemporaryDirectory()))
            bench = Bench(directory, parsed.repetitions, console, random.Random(parsed.seed))
            for part in parsed.parts or PARTS:
                console.print(f"{part} ...", highlight=False)
                figures += PARTS[part](bench)
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; nothing was written")
        return 130
    console.print(table(figures))
    parsed.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["scripts/bench served", *(arguments if arguments is not None else sys.argv[1:])])
    report = Report(command, began, this_machine(), busy, figures)
    (parsed.out / "bench.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    draw(figures, parsed.out / "bench.png")
    console.print(f"{report.machine}\nWritten: {parsed.out}/bench.json, {parsed.out}/bench.png", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
