"""Random requests and random cancels against a deployment for minutes; then nothing may be held, leaked or grown.

Starts the deployment itself, on free ports of 127.0.0.1, since it looks into the server's processes and its /dev/shm.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from python_backends.core.errors import BatonError, Cancelled, InvalidRequest
from python_backends.core.paths import repository_root
from scripts.client import Client
from scripts.serve import start_with_progress
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

_LINE_EVERY_S = 10.0
_SETTLE_S = 3.0
_WARM_UP_SHARE = 0.3  # of the time; growth is counted from there
_RSS_NOISE = 1.05
_RSS_NOISE_MIB = 30
_WORDS = ("the", "river", "city", "king", "of", "and", "old", "green", "runs", "between", "mountains", "because", "seven")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of the server and its model processes."""

    threads: int
    rss_mib: float
    shm_mib: float


def pool_problem(metrics: str) -> str:
    """What is held in a server that serves nobody, or an empty string. `metrics`: text of the metrics port."""
    held = {
        key: v
        for key, v in metric_values(metrics).items()
        if v and ('state="held"' in key or key.startswith(("baton_leases", "baton_router_")))
    }
    return ", ".join(f"{key} is {value:.0f}" for key, value in held.items())


def growth_problem(before: Usage, after: Usage) -> str:
    """What grew beyond noise, or an empty string."""
    problems = []
    if after.threads > before.threads:
        problems.append(f"threads {before.threads} -> {after.threads}")
    if after.rss_mib > max(before.rss_mib * _RSS_NOISE, before.rss_mib + _RSS_NOISE_MIB):
        problems.append(f"memory {before.rss_mib:.0f} -> {after.rss_mib:.0f} MiB")
    if after.shm_mib > before.shm_mib + 1:
        problems.append(f"/dev/shm {before.shm_mib:.1f} -> {after.shm_mib:.1f} MiB")
    return ", ".join(problems)


class Load:
    """Client threads that send, read and cancel at random until told to stop."""

    def __init__(self, client: Client, clients: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._client = client
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=120)

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            try:
                outcome = self._request(rng)
            except InvalidRequest:
                outcome = "refused"
            except Cancelled:
                outcome = "cancelled"
            except BatonError as error:
                outcome = f"failed: {error}"
            self.outcomes[outcome] += 1

    def _request(self, rng: random.Random) -> str:
        prompt = " ".join(rng.choices(_WORDS, k=rng.choice([3, 20, 80, 300])))
        temperature = 99999.0 if rng.random() < 0.03 else rng.choice([0.0, 0.8])
        cancel_after = rng.choice([0, 1, 5]) if rng.random() < 0.4 else None
        stop = ["."] if rng.random() < 0.2 else None
        with self._client.stream(
            prompt, max_tokens=rng.randrange(1, 40), temperature=temperature, stop_words=stop, timeout_s=120
        ) as stream:
            if cancel_after == 0:
                time.sleep(rng.random() * 0.3)
                return "cancelled"
            for count, _ in enumerate(stream, start=1):
                if count == cancel_after:
                    return "cancelled"
        return "ok"


def _usage(server: TritonServer) -> Usage:
    root = psutil.Process(server.pid)
    processes = [p for p in (root, *root.children(recursive=True)) if p.status() != psutil.STATUS_ZOMBIE]
    shm = sum(path.stat().st_size for path in Path("/dev/shm").glob(f"{server.shm_prefix}*"))
    # Pages of the mapped weights come and go with the page cache; only private memory can leak.
    private = sum(p.memory_info().rss - p.memory_info().shared for p in processes)
    return Usage(sum(p.num_threads() for p in processes), private / 2**20, shm / 2**20)


def metrics_text(server: TritonServer) -> str:
    """What the metrics port says."""
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics", timeout=10) as response:
        text: str = response.read().decode()
    return text


def metric_values(text: str) -> dict[str, float]:
    """`name{labels}` -> value, of Baton's own metrics."""
    return {key: float(value) for key, value in re.findall(r"^(baton\S+) (\S+)$", text, re.MULTILINE)}


def soak(server: TritonServer, minutes: float, clients: int, console: Console) -> str:
    """Returns what is wrong, or an empty string."""
    with Client(f"{server.host}:{server.grpc_port}") as client:
        load = Load(client, clients)
        began, before = time.monotonic(), None
        while (passed := time.monotonic() - began) < minutes * 60:
            if server.has_ended(min(_LINE_EVERY_S, minutes * 60 - passed)):
                return f"tritonserver {server.end} after {passed:.0f} s; its last words: {server.log.last_words()}"
            usage = _usage(server)
            if before is None and time.monotonic() - began >= minutes * 60 * _WARM_UP_SHARE:
                before = usage
            counts = ", ".join(f"{count} {outcome}" for outcome, count in load.outcomes.most_common(4))
            console.print(
                f"{passed:5.0f} s  {counts}; {usage.threads} threads, {usage.rss_mib:.0f} MiB, /dev/shm {usage.shm_mib:.1f} MiB"
            )
        load.stop()
        time.sleep(_SETTLE_S)
        failed = [outcome for outcome in load.outcomes if outcome.startswith("failed")]
        problems = [*failed, pool_problem(metrics_text(server)), growth_problem(before or usage, _usage(server))]
    return "; ".join(filter(None, problems))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--config", type=Path, default=repository_root() / "configs" / "default.yaml", metavar="FILE")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    console = Console()
    try:
        server = TritonServer(options.config)
        try:
            start_with_progress(server, console)
            problem = soak(server, options.minutes, options.clients, console)
        finally:
            server.stop()
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    console.print(f"soak FAILED: {problem}" if problem else "soak OK: nothing held, nothing grown", highlight=False)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
