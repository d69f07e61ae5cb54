"""Says what is wrong with this machine for a deployment, how to mend it, and what the machine can serve.

Needs no running server; with --server it also looks at one, by a request that has to come back with a proof. The exit
status is 1 when something that is needed is broken.
"""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from loadtest.machine import cpu_name
from python_backends.core.config import Deployment, load_deployment
from python_backends.core.errors import BatonError, ConfigError
from python_backends.core.paths import repository_root
from scripts import doctor_facts as facts
from scripts import doctor_measures as measures
from scripts.client import Client
from scripts.doctor_checks import (
    GIB,
    Finding,
    Gpu,
    Level,
    check_arithmetic,
    check_cores,
    check_gpus,
    check_libraries,
    check_memory,
    check_model,
    check_nics,
    check_numa,
    check_open_files,
    check_ports,
    check_processor,
    check_python,
    check_redis,
    check_shared_memory,
    check_tritonserver,
    check_versions,
    memory_needed,
)
from scripts.doctor_link import listen, measure_link
from scripts.doctor_sizing import Fit, Limits, Split, fits, split_cores
from scripts.proof_text import handoff_verdict, read_proof
from scripts.serve import parse_options
from scripts.terminal import print_error

_READY_TIMEOUT_S = 5.0
_CANARY_TIMEOUT_S = 30.0
_CANARY_TOKENS = 8
_CANARY = "The doctor asks whether everything works, from the first word to the last one. " * 12 + "Does it?"
_LISTEN_S = 600.0
_STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.BROKEN: "bold red"}


Gpus = tuple[list[Gpu], set[tuple[int, int]]]
"""What torch sees, and the pairs that reach each other's memory."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's limits. Bytes and operations per second; `transfers`: of each transport that exists."""

    bandwidth_one_thread: float
    bandwidth_all_threads: float
    matrix_one_thread: float
    matrix_all_threads: float
    matrix_bfloat16: float
    transfers: dict[str, float]
    gpu_bandwidth: list[float] = []
    gpu_matrix_float16: list[float] = []
    gpu_copies: dict[str, float] = {}
    link_round_trip_ms: float | None = None
    link_bytes_s: float | None = None


class Diagnosis(msgspec.Struct, frozen=True):
    """All that --json prints. `ok`: nothing that is needed is broken."""

    ok: bool
    findings: list[Finding]
    measured: Measured | None
    split: Split | None
    models: list[Fit]
    took_s: float


def look(deployment: Deployment, parsed: argparse.Namespace, gpus: Gpus) -> Iterator[Finding]:
    """What can be seen without asking a server. Where one runs already, ports and memory are its own matter."""
    yield check_python(sys.version_info[:2])
    wanted = facts.wanted_libraries(repository_root() / "requirements.txt")
    path, problem = facts.tritonserver()
    # A tritonserver on PATH, as in a container, makes the one of that package needless.
    unneeded = {"nvidia-pytriton"} if path and "pytriton" not in path else set()
    yield from check_libraries(wanted, facts.found_libraries(wanted), unneeded)
    yield check_tritonserver(path, problem)
    directory, weights, problem = facts.model(deployment)
    yield check_model(directory, problem)
    if not parsed.server:
        yield from check_ports(facts.ports(parsed.address, _ports(parsed)))
        needed = memory_needed(weights, facts.pool_bytes(deployment))
        yield check_memory(psutil.virtual_memory().available, facts.cgroup_memory_left(), needed)
        yield check_shared_memory(facts.shared_memory_free(), 1 + len(deployment.workers))
    yield from check_arithmetic(deployment.model.dtype, {worker.engine for worker in deployment.workers})
    yield check_processor(facts.cpu_flags(), cpu_name(), platform.machine())
    yield check_cores(facts.cores(), facts.cpu_quota(), facts.compute_threads(deployment, facts.cores()))
    yield from check_numa(facts.numa_nodes(), all(worker.cpus for worker in deployment.workers))
    yield from check_open_files(facts.open_files_limit())
    devices = {worker.name: worker.device for worker in deployment.workers if worker.engine != "fake"}
    yield from check_gpus(*gpus, devices, facts.has_nvidia_driver())
    yield from check_nics(facts.nics(), facts.rdma_devices())
    for url in [*facts.configured_redis(deployment), *parsed.redis]:
        yield check_redis(facts.without_password(url), *facts.redis_state(url))


def ask_server(address: str) -> Iterator[Finding]:
    """A running server: ready, and a request that comes back with text and a proof. `address`: HOST:PORT of its gRPC."""
    with Client(address) as client:
        try:
            client.wait_ready(_READY_TIMEOUT_S)
            yield Finding("server", Level.OK, f"{address} is ready")
            answer, proof = "", None
            salt = secrets.token_hex(8)  # so that the prompt's KV is in no cache
            # min_tokens: a real model may want to say nothing, and then there would be no KV to hand over.
            fields = {"max_tokens": _CANARY_TOKENS, "min_tokens": _CANARY_TOKENS, "cache_salt": salt, "route": "remote"}
            with client.stream(_CANARY, timeout_s=_CANARY_TIMEOUT_S, **fields) as stream:
                for chunk in stream:
                    answer, proof = answer + chunk.text, chunk.proof
        except BatonError as error:
            yield Finding("server", Level.BROKEN, str(error))
            return
    if proof is None:
        yield Finding("canary", Level.BROKEN, "the answer came without a proof; the server is of another version")
        return
    told = read_proof(proof)
    if told.prefill_worker != told.decode_worker:
        verdict = handoff_verdict(told, answer)
        yield Finding("canary", Level.OK if verdict.ok else Level.BROKEN, f"{verdict.text}; TTFT {told.ttft_ms:.0f} ms")
    else:
        text = f"answered by {told.decode_worker} alone ({told.why}), TTFT {told.ttft_ms:.0f} ms; no KV was handed over"
        yield Finding("canary", Level.OK if answer.strip() else Level.BROKEN, text)


def measure(cores: int, gpus: Gpus) -> tuple[Measured, list[Finding]]:
    """The machine's limits, and what could not be measured."""
    rates, findings = {}, []
    for name in measures.transports():
        rate, problem = measures.transfer_rate(name)
        if problem:
            findings.append(Finding(f"transport {name}", Level.NOTE, f"not measured: {problem}"))
        else:
            rates[name] = rate
    names, peers = gpus
    gpu_rates = [measures.gpu_rates(index) for index in range(len(names))]
    measured = Measured(
        bandwidth_one_thread=measures.memory_bandwidth(1),
        bandwidth_all_threads=measures.memory_bandwidth(cores),
        matrix_one_thread=measures.matrix_rate(1),
        matrix_all_threads=measures.matrix_rate(cores),
        matrix_bfloat16=measures.bfloat16_rate(cores),
        transfers=rates,
        gpu_bandwidth=[bandwidth for bandwidth, _ in gpu_rates],
        gpu_matrix_float16=[matrix for _, matrix in gpu_rates],
        gpu_copies={f"{a}->{b}": measures.gpu_copy_rate(a, b) for a, b in sorted(peers)},
    )
    return measured, findings


def limits_of(measured: Measured, cores: int, gpus: Gpus) -> Limits:
    """The first GPU's where there is one, else the processor's."""
    if measured.gpu_bandwidth:
        bandwidth, matrix = measured.gpu_bandwidth[0], measured.gpu_matrix_float16[0]
        return Limits(cores, bandwidth, bandwidth, matrix, matrix, gpus[0][0].memory_bytes, element_bytes=2)
    memory = psutil.virtual_memory().available
    left = facts.cgroup_memory_left()
    return Limits(
        cores,
        measured.bandwidth_one_thread,
        max(measured.bandwidth_one_thread, measured.bandwidth_all_threads),
        measured.matrix_one_thread,
        max(measured.matrix_one_thread, measured.matrix_all_threads),
        memory if left is None else min(memory, left),
    )


def examine(parsed: argparse.Namespace) -> Diagnosis:
    """Everything. Raises ConfigError when there is no deployment to look at."""
    began = time.monotonic()
    deployment = load_deployment(parsed.config)
    gpus = facts.gpus()
    findings = list(look(deployment, parsed, gpus))
    if parsed.server:
        findings += ask_server(parsed.server)
    measured, split, models = None, None, []
    if not parsed.no_measuring:
        cores = facts.cores()
        measured, unmeasured = measure(cores, gpus)
        findings += unmeasured
        limits = limits_of(measured, cores, gpus)
        split, models = split_cores(limits), fits(limits)
    if parsed.peer:
        try:
            link = measure_link(parsed.peer)
            findings += check_versions(facts.versions(deployment), link.versions, parsed.peer)
            if measured is not None:
                measured = msgspec.structs.replace(measured, link_round_trip_ms=link.round_trip_ms, link_bytes_s=link.bytes_s)
        except ConfigError:
            raise
        except BatonError as error:
            findings.append(Finding("link", Level.BROKEN, str(error)))
    ok = all(finding.level is not Level.BROKEN for finding in findings)
    return Diagnosis(ok, findings, measured, split, models, round(time.monotonic() - began, 1))


def show(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(box=None, padding=(0, 2), pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in diagnosis.findings:
        style = _STYLES[finding.level]
        table.add_row(f"[{style}]{finding.level.value}[/{style}]", finding.subject, _plain(finding.text))
    console.print(table, highlight=False)
    if diagnosis.measured is not None and diagnosis.split is not None:
        console.print()
        _show_measured(diagnosis.measured, console)
        console.print()
        _show_models(diagnosis.models, diagnosis.split, bool(diagnosis.measured.gpu_bandwidth), console)
    console.print()
    broken = sum(finding.level is Level.BROKEN for finding in diagnosis.findings)
    if broken:
        console.print(f"[bold red]{broken} broken[/bold red]: see above for what to do", highlight=False)
    else:
        console.print(f"[green]Nothing needed is broken[/green] ({diagnosis.took_s:.0f} s)", highlight=False)


def _show_measured(measured: Measured, console: Console) -> None:
    table = Table(box=None, padding=(0, 2), pad_edge=False, show_header=False)
    one, every = measured.bandwidth_one_thread / GIB, measured.bandwidth_all_threads / GIB
    table.add_row("memory, read", f"{one:.1f} GiB/s by one thread, {every:.1f} by all")
    rates = [rate / 1e9 for rate in (measured.matrix_one_thread, measured.matrix_all_threads, measured.matrix_bfloat16)]
    table.add_row("matrix products", f"{rates[0]:.0f} Gflop/s by one thread, {rates[1]:.0f} by all; {rates[2]:.0f} in bfloat16")
    for name, rate in measured.transfers.items():
        table.add_row(f"KV by {name}", f"{rate / GIB:.1f} GiB/s, digests checked")
    for index, (bandwidth, matrix) in enumerate(zip(measured.gpu_bandwidth, measured.gpu_matrix_float16, strict=True)):
        table.add_row(f"GPU {index}", f"{bandwidth / GIB:,.0f} GiB/s read, {matrix / 1e12:.0f} Tflop/s in float16")
    for pair, rate in measured.gpu_copies.items():
        table.add_row(f"GPUs {pair}", f"{rate / GIB:.1f} GiB/s")
    if measured.link_bytes_s is not None:
        table.add_row(
            "link", f"{measured.link_bytes_s / GIB:.2f} GiB/s over TCP, {measured.link_round_trip_ms:.2f} ms round trip"
        )
    console.print(table, highlight=False)


def _show_models(models: list[Fit], split: Split, gpu: bool, console: Console) -> None:
    console.print(
        f"What fits here in {'float16 on the first GPU' if gpu else 'float32'}, 8 streams of 2,048 tokens:", highlight=False
    )
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("GiB", "decode tok/s", "prefill tok/s", "TTFT of 2,000"):
        table.add_column(heading, justify="right")
    table.add_column("serves", no_wrap=True)
    for fit in models:
        rates = (_two_digits(fit.decode_tokens_s), _two_digits(fit.prefill_tokens_s), f"{_two_digits(fit.ttft_s)} s")
        table.add_row(fit.model, f"{fit.needed_bytes / GIB:.1f}", *rates, fit.verdict)
    console.print(table, highlight=False)
    console.print("Rates: what a good engine reaches of the measured limits, one stream, no load besides.", highlight=False)
    if not gpu:
        console.print(f"Workers: {split.text}.", highlight=False)


def _two_digits(value: float) -> str:
    """`0.42`, `9.4`, `25`, `1,100`: an order of magnitude and a little more."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def _plain(text: str) -> str:
    """Text that rich does not take for markup."""
    return text.replace("[", r"\[")


def _ports(parsed: argparse.Namespace) -> dict[str, int]:
    """Flag of scripts/serve -> port: those given here, else its defaults."""
    defaults = {name: port for name, port in vars(parse_options([])).items() if name.endswith("_port")}
    given = dict(zip(defaults, parsed.ports or (), strict=False))
    return {f"--{name.replace('_', '-')}": given.get(name, port) for name, port in defaults.items()}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/doctor", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = repository_root() / "configs" / "default.yaml"
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help="the deployment to look at")
    parser.add_argument("--server", metavar="HOST:PORT", help="gRPC address of a running server to look at as well")
    parser.add_argument("--address", default="127.0.0.1", help="where the deployment is to listen")
    parser.add_argument("--ports", type=int, nargs="+", metavar="PORT", help="its ports, in the order of scripts/serve --help")
    parser.add_argument(
        "--redis", action="append", default=[], metavar="URL", help="a Redis to look at, besides configured ones"
    )
    parser.add_argument(
        "--peer", metavar="HOST:PORT", help="another host's doctor --listen: measure the link, compare versions"
    )
    parser.add_argument(
        "--listen", type=int, metavar="PORT", help="answer one doctor --peer of another host, and do nothing else"
    )
    parser.add_argument("--no-measuring", action="store_true", help="only look, take no second of full load")
    parser.add_argument("--json", action="store_true", help="everything as JSON on standard output")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parsed = _parse(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console, aside = Console(), Console(stderr=True)
    try:
        if parsed.listen is not None:
            console.print(f"Listening on port {parsed.listen} for one doctor --peer", highlight=False)
            peer = listen("0.0.0.0", parsed.listen, facts.versions(load_deployment(parsed.config)), _LISTEN_S)
            console.print(f"{peer} has measured the link", highlight=False)
            return 0
        with aside.status("Looking and measuring"):
            diagnosis = examine(parsed)
    except KeyboardInterrupt:
        return 130
    except BatonError as error:
        print_error(aside, error)
        return 1
    if parsed.json:
        print(msgspec.json.format(msgspec.json.encode(diagnosis), indent=1).decode())
    else:
        show(diagnosis, console)
    return 0 if diagnosis.ok else 1
