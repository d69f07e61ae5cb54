"""What a deployment is like to use, measured through a real tritonserver: serving, prefix cache, handoff, scale, start.

    scripts/bench served                       # all parts on the demo model, some minutes
    scripts/bench served serving handoff --repetitions 7

Every part starts its own servers on free ports. What is compared is measured in turns within one run; the table shows
medians, least and most, and the median of the ratios to the first contender. Results:
bench.json and a picture of each part in --out. scripts/bench all runs these parts, and engine and mixed before them.

serving   32 and 128 streams through Triton and the router: against the same engine called directly, and CPU per token
prefix    time to first token of a long prompt: new, in the worker's pool, in the node store, in Redis (where it is installed)
handoff   the KV of prompts of several lengths from prefill to decode worker, over shared memory and over TCP on loopback:
          its time, its rate, its share of the TTFT
scale     one, two and four workers of each role, and one of both, that sleep instead of computing: tokens per second
start     a deployment from nothing to ready and to its first token, and the memory of its workers
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import psutil

from python_backends.core.errors import BatonError, Unavailable
from scripts.benchmarks.asking import Answer, ask, ask_together, prompt, tokens_per_second
from scripts.benchmarks.bare import BareEngine
from scripts.benchmarks.parts import Bench, Part, Taken, add_options, read_options, run_parts
from scripts.benchmarks.redis import redis_server
from scripts.client import Client
from scripts.tritonserver import TritonServer

_SLEEPING = "engine: {fake: {step_us: 5000, prefill_us_per_token: 100}, kv_pool_mib: 64}\n"
_ONE_OF_EACH = "workers: [{role: prefill}, {role: decode}]\n"
_CALM = "health: {canary_s: 0}\n"  # servers that run side by side do nothing while another is asked
_AGGREGATED = "workers: [{role: aggregated}]\n"
_STREAM_TOKENS = (32, 100)  # in, out
_HANDOFF_LENGTHS = (1_000, 2_000, 4_000, 8_000)
_TRANSPORTS = ("shm", "tcp")
_PREFIX_TOKENS = 2_000
_OTHER_TOKENS = 2_100  # of a prompt that takes another one's place in the pool ...
_SMALL_POOL = "engine: {kv_pool_mib: 96}\n"  # ... which has 2,176 tokens of the demo model
_MOSTLY = 0.9  # of a prompt's tokens: what the store has, since little of it is left in the pool
_SCALE_STREAMS = 16  # per decode worker


def measure_serving(bench: Bench, taken: Taken) -> None:
    """What Triton and the router add to an engine; and their CPU time, with an engine that sleeps."""
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


def measure_prefix(bench: Bench, taken: Taken) -> None:
    """For each repetition another long prompt: new, seen before, and seen before by a worker that has only the store's copy."""
    with ExitStack() as held:
        calls = []
        for name, store in _stores(held, taken):
            _, client = held.enter_context(bench.server(_ONE_OF_EACH + _SMALL_POOL + _CALM + store))
            calls.append(partial(_prefixes, bench, taken, client, name))
        bench.repeated(*calls)


def _stores(held: ExitStack, taken: Taken) -> Iterator[tuple[str, str]]:
    """Names, and what a deployment needs for it."""
    yield "node store", "store: {node_mib: 1024, read_timeout_s: 2}\n"
    try:
        url = held.enter_context(redis_server())
    except Unavailable as error:
        taken.leave_out("Redis", error)
        return
    yield "Redis", f"store: {{remote: {{servers: [{url}]}}, read_timeout_s: 2}}\n"


def _prefixes(bench: Bench, taken: Taken, client: Client, store: str) -> None:
    ids = prompt(bench.rng, _PREFIX_TOKENS)
    for contender in ("new", "seen before, in the worker"):
        taken.add(_prefix_quantity(store), contender, "ms", ask(client, ids, 2).ttft_ms)
    ask(client, prompt(bench.rng, _OTHER_TOKENS), 2, route="remote")  # through both workers
    answer = ask(client, ids, 2)
    proof = answer.proof
    found = proof.kv_tokens_node + proof.kv_tokens_remote + proof.prefill_tokens_node + proof.prefill_tokens_remote
    if found < _PREFIX_TOKENS * _MOSTLY:
        raise Unavailable(f"{found} of {_PREFIX_TOKENS} tokens came from the {store}: {proof.why}")
    taken.add(_prefix_quantity(store), "seen before, in the store", "ms", answer.ttft_ms)


def _prefix_quantity(store: str) -> str:
    return f"TTFT, {_PREFIX_TOKENS} tokens, with {store}"


def measure_handoff(bench: Bench, taken: Taken) -> None:
    """From the proofs: prefill and decode in different processes of this host, by every transport in turn."""
    with ExitStack() as held:
        calls = []
        for transport in _TRANSPORTS:
            deployment = f"{_ONE_OF_EACH}{_CALM}transfer: {{transport: {transport}}}\n"
            _, client = held.enter_context(bench.server(deployment))
            calls.append(partial(_hand_over, bench, taken, client, transport))
        bench.repeated(*calls)


def _hand_over(bench: Bench, taken: Taken, client: Client, transport: str) -> None:
    for length in _HANDOFF_LENGTHS:
        answer = ask(client, prompt(bench.rng, length), 4, route="remote")
        for quantity, unit, value in _handoff(answer):
            taken.add(f"{quantity}, {length} tokens", transport, unit, value)


def _handoff(answer: Answer) -> Iterator[tuple[str, str, float]]:
    proof = answer.proof
    if proof.kv_tokens_received == 0:
        raise BatonError(f"nothing was handed over: {proof.why}")
    yield "moved while the prompt was computed", "%", proof.kv_tokens_ahead / proof.kv_tokens_received * 100
    yield "transfer", "ms", proof.transfer_ms
    yield "handoff, end of prefill to decode", "ms", proof.handoff_ms
    yield "rate", "GiB/s", proof.kv_bytes / proof.transfer_ms * 1e3 / (1 << 30)
    yield "TTFT", "ms", proof.ttft_ms
    yield "handoff, of the TTFT", "%", proof.handoff_ms / proof.ttft_ms * 100


def measure_scale(bench: Bench, taken: Taken) -> None:
    """Workers that sleep scale as far as router and server let them. Each number of them has the machine for itself."""
    pairs = [(f"{count}+{count} workers", count, ["prefill", "decode"] * count) for count in (1, 2, 4)]
    deployments = [*pairs, ("1 worker", 1, ["aggregated"])]
    bench.repeated(*(partial(_scaled, bench, taken, *deployment) for deployment in deployments))


def _scaled(bench: Bench, taken: Taken, name: str, decoding: int, roles: Sequence[str]) -> None:
    """`decoding`: workers that have streams."""
    workers = ", ".join(f"{{role: {role}, engine: fake}}" for role in roles)
    limited = _SLEEPING.replace("engine: {", f"engine: {{max_batch: {_SCALE_STREAMS}, ")
    streams = 2 * decoding * _SCALE_STREAMS
    with bench.server(f"workers: [{workers}]\n{limited}") as (_, client):
        ask_together(client, bench.prompts(streams, 64), 10)  # new processes
        answers = ask_together(client, bench.prompts(streams, 64), 100)
        taken.add("streams on sleeping workers", name, "tokens/s", tokens_per_second(answers))


def measure_start(bench: Bench, taken: Taken) -> None:
    """The default deployment, with machine code and weights in the cache."""

    def start() -> None:
        began = time.monotonic()
        with bench.server(_ONE_OF_EACH) as (server, client):
            taken.add("until ready", "1+1 workers", "s", time.monotonic() - began)
            ask(client, prompt(bench.rng, 32), 1)
            taken.add("until the first token", "1+1 workers", "s", time.monotonic() - began)
            for name, process in _processes(server).items():
                taken.add("memory of its own, pool included", name, "MiB", process.memory_full_info().uss / (1 << 20))

    bench.repeated(start)


PARTS: dict[str, Part] = {
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench served", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, PARTS)
    return run_parts(PARTS, read_options(parser, PARTS, arguments))


if __name__ == "__main__":
    sys.exit(main())
