"""Verifies a deployment on the machine with GPUs that it is meant for: what no test without a GPU can see.

Of workers with engine torch it checks the engine alone: steps replayed as graphs, the speed of decode and prefill, KV handed
over between GPUs' memories. Of TensorRT-LLM it checks the whole deployment.

Runs the engine conformance suite over the TensorRT-LLM that is installed, then starts the deployment, asks it what clients
ask, compares tokens with those of one worker alone, puts it under load, cancels, kills its workers, and prints what held and
what did not: a report to attach to an issue. The exit status is 0 when everything held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from rich.console import Console

from python_backends.core.config import load_deployment
from python_backends.core.errors import BatonError
from python_backends.core.paths import repository_root
from python_backends.core.trtllm import ENGINE
from scripts.client import Client
from scripts.conformance import run_conformance
from scripts.tritonserver import TritonServer
from scripts.verification import Result, verify


def machine(config: Path) -> list[Result]:
    """What the results depend on, told and not judged."""
    commands = {
        "GPUs": ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
        "GPU links": ["nvidia-smi", "topo", "-p2p", "r"],
        "UCX": ["ucx_info", "-v"],
    }
    shm = shutil.disk_usage("/dev/shm").total / 2**30
    told = {
        "deployment": f"{config.name}: {json.dumps(yaml.safe_load(config.read_text()))}",
        "Baton": _output(["git", "-C", str(repository_root()), "describe", "--always", "--dirty"]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, /dev/shm {shm:.1f} GiB",
        "TensorRT-LLM": _version("tensorrt_llm"),
        **{name: _output(command) for name, command in commands.items()},
    }
    return [Result(name, None, detail) for name, detail in told.items()]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed here"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return f"no {command[0]} on PATH"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " | ".join(line.strip() for line in done.stdout.splitlines() if line.strip())[:500] or f"exit {done.returncode}"


class Report:
    """Results as they come: on the console, and in the end in a file."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        self.results.append(result)
        mark = {True: "[green]ok[/green]    ", False: "[red]FAILED[/red]", None: "      "}[result.ok]
        self._console.print(mark, end=" ", highlight=False)
        self._console.print(f"{result.name:<24} {result.detail}", markup=False, highlight=False, soft_wrap=True)

    @property
    def failed(self) -> list[str]:
        return [result.name.strip() for result in self.results if result.ok is False]

    def write(self, file: Path, deployment: str) -> None:
        told = {"deployment": deployment, "results": [asdict(result) for result in self.results]}
        file.write_text(json.dumps(told, indent=2) + "\n")


def _serve_and_verify(config: Path, report: Report, console: Console) -> None:
    server = TritonServer(config)
    try:
        began = time.monotonic()
        server.start(lambda model: console.print(f"       {model} is loaded", highlight=False))
        report.add(Result("start", True, "all models are ready", time.monotonic() - began))
        with Client(f"{server.host}:{server.grpc_port}") as client:
            verify(server, client, report.add)
    finally:
        server.stop()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/verify-gpu", description=__doc__)
    default = repository_root() / "configs" / "trtllm-1p1d.yaml"
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help="the deployment file")
    parser.add_argument(
        "--small-model",
        type=Path,
        metavar="DIR",
        help="a Hugging Face directory for the conformance suite, which loads it up to four times at once, on the first GPU of "
        "each role; default: the deployment's model",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results, for machines")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    report = Report(console)
    deployment = ""
    try:
        loaded = load_deployment(options.config)
        deployment = options.config.read_text()
        for result in machine(options.config):
            report.add(result)
        if all(worker.engine == "torch" for worker in loaded.workers):
            from scripts.torch_verification import verify_on_gpu  # TensorRT-LLM has its own way to load torch

            verify_on_gpu(loaded, report.add)
            return _finish(report, options.json, deployment, console)
        if not all(worker.engine == ENGINE for worker in loaded.workers):
            console.print("not all workers of this deployment have engine trtllm", style="yellow")
        console.print("       the conformance suite: it loads models some ten times, which takes minutes", highlight=False)
        for result in run_conformance(options.config, options.small_model):
            report.add(result)
        _serve_and_verify(options.config, report, console)
    except BatonError as error:
        report.add(Result("start", False, str(error)))
    return _finish(report, options.json, deployment, console)


def _finish(report: Report, file: Path | None, deployment: str, console: Console) -> int:
    """The exit status."""
    if file:
        report.write(file, deployment)
    failed = report.failed
    console.print(f"verify FAILED: {', '.join(failed)}" if failed else "verify OK: everything held", highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
