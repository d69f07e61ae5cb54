"""Drains workers of the server on this machine, so that they can be taken away: they get no new requests and finish those they
have. What is not finished in the grace period goes on at other workers, at the very next token. --resume uses them again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from python_backends.core.errors import BatonError
from scripts.router_door import RouterDoor, find_server
from scripts.terminal import print_error

_MARGIN_S = 20.0  # over the grace period; the router's own sentence comes first


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/drain", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("workers", nargs="+", metavar="WORKER", help="names as in the deployment file, such as decode_1")
    parser.add_argument("--resume", action="store_true", help="use drained workers again")
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for what they have begun")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="of the server, where several run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    console = Console(stderr=True)
    try:
        with RouterDoor(find_server(options.run_dir)) as door:
            for worker in options.workers:
                began = time.monotonic()
                door.manage("resume" if options.resume else "drain", worker, options.grace, options.grace + _MARGIN_S)
                done = "is used again" if options.resume else f"is drained, after {time.monotonic() - began:.1f} s"
                console.print(f"{worker} {done}", highlight=False)
    except BatonError as error:
        print_error(console, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
