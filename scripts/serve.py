"""Starts a deployment on this machine and stays in the foreground; Ctrl-C stops it, a second one at once."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from python_backends.core.errors import BatonError, Unavailable
from python_backends.core.paths import DEMO_MODEL, repository_root
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

_LOG_POLL_S = 0.2
_EXAMPLE = {"text_input": "The capital of France is", "max_tokens": 32, "stream": True}


def start_with_progress(server: TritonServer, console: Console) -> None:
    """Start `server`, its weights first if they are the demo model's, and say what is going on. Raises as they do."""
    if server.deployment.model.path == DEMO_MODEL:
        from scripts.weights import prepare_demo_model  # what it needs is not in a container that serves other models

        prepare_demo_model(console)
    waiting = list(server.models)

    def on_loaded(name: str) -> None:
        if name in waiting:
            waiting.remove(name)
        status.update(_loading(waiting))

    with console.status(_loading(waiting)) as status:
        server.start(on_loaded)


def _loading(waiting: list[str]) -> str:
    return f"Loading {', '.join(waiting)}" if waiting else "Opening the ports"


def serve(server: TritonServer, console: Console, grace_s: float = 0.0) -> None:
    """Until KeyboardInterrupt, which a signal raises; then requests that run have `grace_s` to end.

    Raises as start_with_progress, Unavailable if the server dies.
    """
    try:
        start_with_progress(server, console)
        _print_endpoints(server, console)
        ended = False
        while not ended:
            ended = server.has_ended(_LOG_POLL_S)
            for line in server.log.new_lines():
                print(line, flush=True)
        raise Unavailable(f"tritonserver {server.end}; what it said last is above")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda *_: server.kill())
        signal.signal(signal.SIGTERM, lambda *_: server.kill())
        console.print(f"Stopping; requests have {grace_s:g} s to end, Ctrl-C again to hurry", highlight=False)
        server.stop(grace_s)
    finally:
        server.stop()


def _print_endpoints(server: TritonServer, console: Console) -> None:
    host = f"[{server.host}]" if ":" in server.host else server.host
    table = Table.grid(padding=(0, 2))
    if server.deployment.has_front_end:
        table.add_row("page", f"http://{host}:{server.openai_port}/")
        table.add_row("OpenAI", f"{host}:{server.openai_port}/v1")
    if not server.deployment.cluster.router:
        table.add_row("health", f"http://{host}:{server.openai_port}/health")
    table.add_row("HTTP", f"{host}:{server.http_port}")
    table.add_row("gRPC", f"{host}:{server.grpc_port}")
    table.add_row("metrics", f"{host}:{server.metrics_port}/metrics")
    table.add_row("models", ", ".join(server.models))
    table.add_row("run directory", str(server.run_dir))
    console.print("[green]Ready.[/green] Ctrl-C stops it.")
    console.print(table, highlight=False, markup=False)
    if "router" not in server.models:
        return
    url = f"{host}:{server.http_port}/v2/models/router/generate_stream"
    console.print("Try:")
    console.print(f"curl -sN {url} -d '{json.dumps(_EXAMPLE)}'", markup=False, highlight=False, soft_wrap=True)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/serve", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = repository_root() / "configs" / "default.yaml"
    parser.add_argument("--config", type=Path, default=default, metavar="FILE", help="the deployment file")
    parser.add_argument("--address", default="127.0.0.1", help="where to listen; 0.0.0.0 is every interface")
    parser.add_argument(
        "--openai-port",
        type=int,
        default=9000,
        metavar="PORT",
        help="0 chooses a free one; of a server without a router it has /health alone",
    )
    parser.add_argument("--http-port", type=int, default=8000, metavar="PORT", help="0 chooses a free one")
    parser.add_argument(
        "--grpc-port", type=int, default=8001, metavar="PORT", help="0 chooses a free one; with cluster.listen its grpc_port"
    )
    parser.add_argument("--metrics-port", type=int, default=8002, metavar="PORT", help="0 chooses a free one")
    parser.add_argument(
        "--grace",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="when it is stopped, how long requests that run may go on; new ones are refused meanwhile. What a server without "
        "a router has not ended by then goes on elsewhere",
    )
    return parser.parse_args(arguments)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    signal.signal(signal.SIGINT, _interrupt)  # also where a parent shell has it ignored
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(stderr=True)
    try:
        server = TritonServer(
            options.config,
            address=options.address,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            metrics_port=options.metrics_port,
            openai_port=options.openai_port,
        )
        serve(server, console, options.grace)
    except BatonError as error:
        print_error(console, error)
        return 1
    except KeyboardInterrupt:  # before there was a server
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
