"""Gives a worker of the server on this machine another role, under load: it is drained, loaded anew in that role, and used
again once it has passed a canary. It keeps the role when it is restarted, until the server itself is.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from python_backends.core.types import Role
from scripts.router_door import LOAD_S, RouterDoor, add_door_options, at_door


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/role", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("worker", metavar="WORKER", help="a name as in the deployment file, such as decode_1")
    parser.add_argument("role", choices=[role.value for role in Role], help="what it is to be")
    add_door_options(parser, grace_help="for what it has begun")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def change(door: RouterDoor, console: Console) -> None:
        began = time.monotonic()
        door.manage("restart", options.worker, options.grace, options.grace + LOAD_S, Role(options.role))
        seconds = time.monotonic() - began
        console.print(f"{options.worker} is {options.role}, after {seconds:.1f} s", highlight=False)

    return at_door(options.run_dir, change)


if __name__ == "__main__":
    sys.exit(main())
