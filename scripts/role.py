"""Gives a worker of the server on this machine another role, under load: it is drained, loaded anew in that role, and used
again once it has passed a canary. It keeps the role when it is restarted, until the server itself is.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from python_backends.core.errors import BatonError
from python_backends.core.types import Role
from scripts.router_door import RouterDoor, find_server
from scripts.terminal import print_error

_LOAD_S = 400.0  # to load its weights


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/role", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("worker", metavar="WORKER", help="a name as in the deployment file, such as decode_1")
    parser.add_argument("role", choices=[role.value for role in Role], help="what it is to be")
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for what it has begun")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="of the server, where several run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    console = Console(stderr=True)
    try:
        with RouterDoor(find_server(options.run_dir)) as door:
            began = time.monotonic()
            door.manage("restart", options.worker, options.grace, options.grace + _LOAD_S, Role(options.role))
            seconds = time.monotonic() - began
            console.print(f"{options.worker} is {options.role}, after {seconds:.1f} s", highlight=False)
    except BatonError as error:
        print_error(console, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
