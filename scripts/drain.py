"""Drains workers of the server on this machine, so that they can be taken away: they get no new requests and finish those they
have. What is not finished in the grace period goes on at other workers, at the very next token. --resume uses them again.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from scripts.router_door import RouterDoor, add_door_options, at_door

_MARGIN_S = 20.0  # over the grace period; the router's own sentence comes first


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/drain", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("workers", nargs="+", metavar="WORKER", help="names as in the deployment file, such as decode_1")
    parser.add_argument("--resume", action="store_true", help="use drained workers again")
    add_door_options(parser, grace_help="for what they have begun")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def drain(door: RouterDoor, console: Console) -> None:
        for worker in options.workers:
            began = time.monotonic()
            door.manage("resume" if options.resume else "drain", worker, options.grace, options.grace + _MARGIN_S)
            done = "is used again" if options.resume else f"is drained, after {time.monotonic() - began:.1f} s"
            console.print(f"{worker} {done}", highlight=False)

    return at_door(options.run_dir, drain)


if __name__ == "__main__":
    sys.exit(main())
