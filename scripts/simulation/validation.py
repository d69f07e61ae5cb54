"""How near simulations are to a real server: the same requests at the same times, on both.

In every mode the first part of the requests lets the server's router learn what steps cost then - workers of one machine
slow each other down, in each mode differently - and with what it has learned the rest is simulated. So no prediction has
seen the requests it is compared on.
"""

from __future__ import annotations

import json
import secrets
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import msgspec
from rich.console import Console
from rich.table import Table

from python_backends.core.config import Deployment
from python_backends.core.errors import BatonError, EngineFailure
from python_backends.core.types import Role
from router.cost_model import prefill_ms
from router.types import Proof
from scripts.client import Client
from scripts.proof_text import read_proof
from scripts.simulation.hardware import Rates
from scripts.simulation.measured import learned_rates, read_metrics, value
from scripts.simulation.simulator import Scenario, simulate
from scripts.simulation.workload import Workload
from scripts.tritonserver import TritonServer

_TIMEOUT_S = 300.0
_LEARNING = 0.35  # share of the requests
_METRICS_SETTLE_S = 8.0  # the router tells what it has learned every few seconds
_ROUTES = {"adaptive": "auto", "always-remote": "remote", "always-local": "local"}
_FIRST_TOKEN_ID, _TOKEN_IDS = 1000, 20_000  # ordinary tokens in common vocabularies
_MEASURES = ("TTFT p50", "TTFT p90", "ITL")


class Comparison(msgspec.Struct, frozen=True):
    """One run. Figures in ms, by the names in _MEASURES."""

    mode: str
    rate: float  # requests per second
    requests: int
    real: dict[str, float]
    simulated: dict[str, float]

    def errors(self) -> dict[str, float]:
        """Signed and relative."""
        return {name: self.simulated[name] / real - 1 for name, real in self.real.items() if real}


@dataclass(slots=True)
class Validation:
    """Runs that were compared, and the rates that the last one has left behind."""

    comparisons: list[Comparison]
    rates: dict[Role, Rates]

    def median_error(self) -> float:
        return statistics.median(abs(error) for each in self.comparisons for error in each.errors().values())


def validate(
    server: TritonServer, workload: Workload, modes: Sequence[str], load: float, warm_up_s: float, console: Console
) -> Validation:
    """Runs the workload once per mode on a server that is up, so fast that its busiest role is busy `load` of the time.

    Raises BatonError when a request fails.
    """
    with Client(f"{server.host}:{server.grpc_port}") as client:
        console.print("Warming up", highlight=False)
        _warm_up(client, workload, warm_up_s)
        rates = _rates(server)
        comparisons = []
        for mode in modes:
            rate = _rate(workload, rates, load, server.deployment, mode)
            paced = workload.scaled(speed=rate * workload.arrivals[-1].at_s / len(workload.arrivals))
            learning, comparing = paced.split(_LEARNING)
            seconds = comparing.arrivals[-1].at_s
            console.print(
                f"{mode}: {len(comparing.arrivals)} requests in {seconds:.0f} s, after some to learn from", highlight=False
            )
            _replay(client, learning, mode)
            rates = _rates(server)
            real = _replay(client, comparing, mode)
            simulated = _simulate(server.deployment, comparing, mode, rates)
            comparisons.append(Comparison(mode, rate, len(comparing.arrivals), real, simulated))
    return Validation(comparisons, rates)


def print_comparison(console: Console, validation: Validation) -> None:
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("mode", no_wrap=True)
    for heading in ("requests/s", *(f"{name} {side}" for name in _MEASURES for side in ("real", "sim", ""))):
        table.add_column(heading.strip(), justify="right")
    for each in validation.comparisons:
        errors = each.errors()
        cells = [
            cell
            for name in _MEASURES
            for cell in (f"{each.real[name]:.0f}", f"{each.simulated[name]:.0f}", f"{errors.get(name, 0):+.0%}")
        ]
        table.add_row(each.mode, f"{each.rate:.2f}", *cells)
    console.print(table)
    console.print(f"median error {validation.median_error():.1%}", highlight=False)


def _warm_up(client: Client, workload: Workload, seconds: float) -> None:
    """Every way, alone and together, until the time is over."""
    end = time.monotonic() + seconds
    index = 0
    while time.monotonic() < end:
        threads = []
        for _ in range(3):
            arrival = workload.arrivals[index % len(workload.arrivals)]
            route = ("remote", "local")[index % 2]
            index += 1
            fields = _fields(arrival.input_length, arrival.output_length, f"warm-up/{index}", route)
            threads.append(
                threading.Thread(target=lambda fields=fields: list(client.stream(None, timeout_s=_TIMEOUT_S, **fields)))
            )
            threads[-1].start()
        for thread in threads:
            thread.join(_TIMEOUT_S)


def _fields(input_length: int, output_length: int, seed: str, route: str) -> dict[str, object]:
    random = Random(seed)
    return {
        "input_ids": [_FIRST_TOKEN_ID + random.randrange(_TOKEN_IDS) for _ in range(input_length)],
        "max_tokens": output_length,
        "sampling_parameters": json.dumps({"ignore_eos": True}),
        "cache_salt": seed,
        "route": route,
    }


def _replay(client: Client, workload: Workload, mode: str) -> dict[str, float]:
    """Each request at its time, from a thread of its own. None has been sent before, or it would be found in a cache."""
    replay = secrets.token_hex(4)
    proofs: list[Proof] = []
    errors: list[BatonError] = []

    def one(index: int) -> None:
        arrival = workload.arrivals[index]
        fields = _fields(arrival.input_length, arrival.output_length, f"{replay}/{index}", _ROUTES[mode])
        time.sleep(max(began + arrival.at_s - time.monotonic(), 0))
        try:
            chunks = list(client.stream(None, timeout_s=_TIMEOUT_S, **fields))
            if chunks[-1].proof is None:
                raise EngineFailure("an answer came without a proof")
            proofs.append(read_proof(chunks[-1].proof))
        except BatonError as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(workload.arrivals))]
    began = time.monotonic() + 1.0
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(workload.arrivals[-1].at_s + _TIMEOUT_S)
    if errors:
        raise errors[0]
    ttft = [proof.ttft_ms for proof in proofs]
    return _figures(ttft, [proof.itl_ms for proof in proofs if proof.itl_ms])


def _figures(ttft: Sequence[float], itl: Sequence[float]) -> dict[str, float]:
    deciles = statistics.quantiles(ttft, n=10, method="inclusive")
    return {"TTFT p50": deciles[4], "TTFT p90": deciles[8], "ITL": statistics.median(itl)}


def _simulate(deployment: Deployment, workload: Workload, mode: str, rates: dict[Role, Rates]) -> dict[str, float]:
    workers = {role: sum(worker.role is role for worker in deployment.workers) for role in (Role.PREFILL, Role.DECODE)}
    router = msgspec.structs.replace(deployment.router, mode=mode, max_requests=10**6, max_queued_tokens=10**9)
    result = simulate(Scenario(mode, workers, rates, router, deployment.engine), workload)
    return {"TTFT p50": result.ttft.quantile(0.5), "TTFT p90": result.ttft.quantile(0.9), "ITL": result.tpot.quantile(0.5)}


def _rates(server: TritonServer) -> dict[Role, Rates]:
    time.sleep(_METRICS_SETTLE_S)
    metrics = read_metrics(f"{server.host}:{server.metrics_port}")
    block_size = server.deployment.engine.block_size
    pools = {
        role: int(sum(value(metrics, "baton_kv_blocks", role=role.value, state=state) for state in ("free", "cached", "held")))
        for role in Role
    }
    counts = {role: max(sum(worker.role is role for worker in server.deployment.workers), 1) for role in Role}
    received = value(metrics, "baton_prompt_tokens_total", source="received")
    token_bytes = int(value(metrics, "baton_kv_received_bytes_total") / received) if received else 1
    return learned_rates(metrics, token_bytes, {role: pools[role] // counts[role] * block_size for role in Role})


def _rate(workload: Workload, rates: dict[Role, Rates], load: float, deployment: Deployment, mode: str) -> float:
    """Requests per second at which the busiest role works `load` of the time."""
    prompt = statistics.mean(arrival.input_length for arrival in workload.arrivals)
    output = statistics.mean(arrival.output_length for arrival in workload.arrivals)
    chunk = deployment.engine.step_tokens
    prefill, decode = rates[Role.PREFILL], rates[Role.DECODE]
    step = decode.step_ms(0, 0, 2, 2 * (prompt + output)) / 2  # ms of the worker per token, two streams at a time
    local = prefill_ms(decode, chunk, int(prompt), 0)
    remote = prefill_ms(prefill, chunk, int(prompt), 0)
    busiest = {
        "always-local": local + output * step,
        "always-remote": max(remote, output * step),
        "adaptive": max(remote, output * step),
    }
    return load / busiest[mode] * 1e3
