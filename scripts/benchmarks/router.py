"""What the router itself costs: microseconds of processor time per decision and per token, without any worker.

A decision is everything from a tokenised prompt to a chosen route: finding cached prefixes, predicting, choosing, saying
why. Hashing the prompt's blocks and tokenising it are measured apart. A token is everything from a worker's message to the
text that is sent: routing to its request, lifecycle, detokenising.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.config import Deployment, EngineConfig, RouterConfig, WorkerConfig
from python_backends.core.errors import BatonError
from python_backends.core.layout import KVLayout
from python_backends.core.messages import BlockEvents, Heartbeat, Outputs, TokenChunk, Work
from python_backends.core.paths import DEMO_MODEL, resolve_model
from python_backends.core.step_model import longest_step_ms
from python_backends.core.types import BlockHash, Epoch, LeaseEnd, RequestId, Role, SamplingParams, WorkerId, WorkerLoad
from router.fleet import WorkerView
from router.house import House
from router.journal import Record
from router.run import Run
from router.seams import Snapshot
from router.serve import serve
from router.tokenizer import Tokenizer
from router.types import ClientRequest, Piece, Slo, Way, Wish
from scripts.terminal import print_error

_BLOCK = 16
_FINGERPRINT = "bench"
_SLO = Slo(ttft_ms=2000, itl_ms=50)
_WORD = "the river runs between old mountains and green cities because seven kings "


@dataclass(frozen=True, slots=True)
class Measured:
    """Microseconds."""

    what: str
    p50: float
    p99: float
    mean: float
    count: int


class _Nowhere:
    """Implements router.seams.Calls and Observer: nobody is there."""

    def submit(self, worker: WorkerId, work: Work) -> None:
        self.last = work.request.request_id

    def abort(self, worker: WorkerId, request_id: RequestId) -> None: ...
    def release(self, worker: WorkerId, lease_id: str, end: LeaseEnd) -> None: ...
    def lend(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None: ...
    def locate(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[BlockHash]) -> None: ...
    def refresh(self, snapshot: Snapshot) -> None: ...
    def decided(self, way: Way) -> None: ...
    def retried(self) -> None: ...
    def warmed(self, verdict: str) -> None: ...
    def probed(self, worker: WorkerView, verdict: str) -> None: ...
    def paired(self, prefill: WorkerId, decode: WorkerId, verdict: str) -> None: ...
    def tokens(self, count: int, gap_s: float) -> None: ...
    def ended(self, record: Record) -> None: ...


class _Reply:
    """Implements router.seams.Reply."""

    def __init__(self) -> None:
        self.tokens = 0

    def send(self, piece: Piece) -> None:
        self.tokens += len(piece.token_ids)

    def fail(self, error: BatonError) -> None:
        raise error


class Bench:
    """A house with workers that have prefixes cached and requests running, as the router believes."""

    def __init__(self, workers: int, prefixes: int, prompt_tokens: int, tokenizer: Tokenizer, random: Random) -> None:
        """Half of the workers prefill. Each prefix is with one worker of each role; `prompt_tokens` long."""
        self.calls = _Nowhere()
        roles = [Role.PREFILL if i % 2 else Role.DECODE for i in range(workers)]
        deployment = Deployment(
            workers=tuple(WorkerConfig(role=role, name=f"{role.value}_{i}") for i, role in enumerate(roles)),
            engine=EngineConfig(step_tokens=2048),
            router=RouterConfig(max_requests=10**6, max_queued_tokens=10**9),
        )
        self.house = House(deployment, tokenizer, self.calls, self.calls, random=random)
        self._random = random
        self._vocabulary = tokenizer.vocab_size
        self._prompt_tokens = prompt_tokens
        self._epoch = Epoch(1)
        for worker in deployment.workers:
            self.house.hear_heartbeat(self._heartbeat(worker), time.monotonic())
            self.house.hear_events(BlockEvents(worker.id, self._epoch, 0, [], [], reset=True))
        self._busy(deployment.workers)
        self._cache(deployment.workers, prefixes)

    def _heartbeat(self, worker: WorkerConfig) -> Heartbeat:
        layout = KVLayout(32, 8, 128, _BLOCK, "bfloat16")
        load = WorkerLoad(total_blocks=10**6, step_ms=longest_step_ms(_SLO.itl_ms))
        return Heartbeat(
            worker=worker.id,
            model=worker.name,
            server="",
            role=worker.role,
            epoch=self._epoch,
            pid=0,
            host="nowhere",
            load=load,
            layout=layout,
            fingerprint=_FINGERPRINT,
            max_context=10**6,
            step_tokens=2048,
            max_batch=256,
            events_sequence=0,
        )

    def _busy(self, workers: Sequence[WorkerConfig]) -> None:
        for worker in workers:
            for _ in range(self._random.randrange(1, 30)):
                self.house.fleet.charge(worker.id, self._random.choice([0, 0, 0, 300]), 1000, 1000)

    def _cache(self, workers: Sequence[WorkerConfig], prefixes: int) -> None:
        sequences = {worker.id: 0 for worker in workers}
        by_role = {role: [w.id for w in workers if w.role is role] for role in (Role.PREFILL, Role.DECODE)}
        root = chain_root(_FINGERPRINT, "")
        self.prompts: list[list[int]] = []
        for index in range(prefixes):
            tokens = self.tokens()
            if index % max(prefixes // 1000, 1) == 0:
                self.prompts.append(tokens)
            hashes = list(block_hashes(tokens, _BLOCK, root))
            for holders in by_role.values():
                worker = self._random.choice(holders)
                sequences[worker] += 1
                self.house.hear_events(BlockEvents(worker, self._epoch, sequences[worker], list(hashes), []))

    def tokens(self) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(self._prompt_tokens)]

    def decisions(self, count: int) -> tuple[list[float], list[float]]:
        """Seconds of each decision, and of hashing its prompt. Half of the prompts go on after a cached prefix."""
        decided, hashed = [], []
        for index in range(count):
            prefix = self._random.choice(self.prompts) if index % 2 else []
            tokens = [*prefix, *self.tokens()][: self._prompt_tokens + 64]
            prompt = self.house.prompt(tokens, "")
            began = time.thread_time()
            prompt.hashes(_FINGERPRINT, _BLOCK)
            between = time.thread_time()
            choice = self.house.choose(prompt, Wish.AUTO, _SLO, 256, ())
            decided.append(time.thread_time() - between)
            hashed.append(between - began)
            if choice is not None and index % 4 == 0:  # the next one finds the fleet a little changed
                self.house.fleet.charge(choice.decision.decode, 0, 1000, 1000).undo()
        return decided, hashed

    async def per_token(self, streams: int, steps: int, token_ids: Sequence[int]) -> list[float]:
        """Seconds per token of each step: so many streams get one token each."""
        running = [await self._begin() for _ in range(streams)]
        taken = []
        for step in range(steps):
            token = token_ids[step % len(token_ids)]
            chunks = [(worker, TokenChunk(request_id, [token], step)) for worker, request_id, _, _ in running]
            by_worker: dict[WorkerId, list[TokenChunk]] = {}
            for worker, chunk in chunks:
                by_worker.setdefault(worker, []).append(chunk)
            before = sum(reply.tokens for *_, reply in running)
            began = time.thread_time()
            for worker, outputs in by_worker.items():
                self.house.hear_outputs(Outputs(worker, self._epoch, list(outputs)))
            while sum(reply.tokens for *_, reply in running) < before + streams:
                await asyncio.sleep(0)
            taken.append((time.thread_time() - began) / streams)
        for _, _, task, _ in running:
            task.cancel()
        await asyncio.gather(*(task for _, _, task, _ in running), return_exceptions=True)
        return taken

    async def _begin(self) -> tuple[WorkerId, RequestId, asyncio.Task[None], _Reply]:
        reply = _Reply()
        request = ClientRequest(SamplingParams(max_tokens=10**6, temperature=0), input_ids=self.tokens(), wish=Wish.LOCAL)
        run = Run(request, reply, self.house, time.monotonic())
        task = asyncio.get_running_loop().create_task(serve(run))
        while not (leg := run._decode_leg):
            await asyncio.sleep(0)
        return leg[0], leg[1], task, reply


def _measured(what: str, seconds: Sequence[float]) -> Measured:
    ordered = sorted(seconds)
    return Measured(
        what,
        ordered[len(ordered) // 2] * 1e6,
        ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)] * 1e6,
        sum(ordered) / len(ordered) * 1e6,
        len(ordered),
    )


def measure(workers: int, prefixes: int, prompt_tokens: int, count: int, rounds: int, model: str) -> list[Measured]:
    """Of the quietest round: whatever else runs on the machine only adds. Raises ConfigError when there is no tokenizer."""
    tokenizer = Tokenizer(resolve_model(model))
    bench = Bench(workers, prefixes, prompt_tokens, tokenizer, Random(0))
    bench.decisions(max(count // 10, 50))  # warms up
    decided, hashed = min((bench.decisions(count) for _ in range(rounds)), key=lambda times: sum(times[0]))
    text = _WORD * (prompt_tokens // 12 + 1)
    tokenised = []
    for _ in range(max(count // 20, 20)):
        began = time.thread_time()
        ids = tokenizer.encode(text)
        tokenised.append((time.thread_time() - began) * prompt_tokens / len(ids))
    per_token = asyncio.run(bench.per_token(streams=64, steps=max(count // 20, 20), token_ids=tokenizer.encode(_WORD)))
    with_hashing = [a + b for a, b in zip(decided, hashed, strict=True)]
    typical = sorted(tokenised)[len(tokenised) // 2]
    return [
        _measured("decision", decided),
        _measured(f"hashing {prompt_tokens} tokens", hashed),
        _measured("decision with hashing", with_hashing),
        _measured(f"tokenising {prompt_tokens} tokens", tokenised),
        _measured("decision with hashing and tokenising", [each + typical for each in with_hashing]),
        _measured("token", per_token),
    ]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench router", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=64, help="half prefill, half decode")
    parser.add_argument("--prefixes", type=int, default=10_000, help="cached prefixes, each with two of the workers")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of a prompt, and of a cached prefix")
    parser.add_argument("--count", type=int, default=2000, help="decisions of a round")
    parser.add_argument("--rounds", type=int, default=5, help="the quietest is shown")
    parser.add_argument("--model", default=DEMO_MODEL, metavar="DIR", help="whose tokenizer is used")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    try:
        figures = measure(
            options.workers, options.prefixes, options.prompt_tokens, options.count, options.rounds, options.model
        )
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    table = Table("microseconds", box=None)
    for heading in ("p50", "p99", "mean", "n"):
        table.add_column(heading, justify="right")
    for figure in figures:
        table.add_row(figure.what, f"{figure.p50:.1f}", f"{figure.p99:.1f}", f"{figure.mean:.1f}", str(figure.count))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
