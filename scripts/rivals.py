"""Other engines and servers that benchmarks can run beside Baton. Each is installed into an environment of its own.

    scripts/rivals                     which there are, and which are installed
    scripts/rivals install vllm ...    install them, with pip, into $BATON_CACHE/rivals

Nothing of Baton needs any of them. scripts/bench and scripts/compare name them: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from python_backends.core.errors import BatonError
from scripts.rivalry.environments import ENVIRONMENTS, rivals_dir
from scripts.rivalry.servers import RIVALS
from scripts.terminal import print_error


def _show(console: Console) -> None:
    table = Table("rival", "what", "packages", "installed", box=None, padding=(0, 2), pad_edge=False)
    for environment in ENVIRONMENTS.values():
        installed = "yes" if environment.is_installed else "no"
        table.add_row(environment.name, environment.about, ", ".join(environment.packages), installed)
    console.print(table)
    console.print(f"\nEach is or would be in {rivals_dir()}/NAME.", highlight=False, soft_wrap=True)
    console.print("\nServers, as scripts/compare and scripts/bench mixed name them:", highlight=False)
    for rival in RIVALS.values():
        console.print(f"  {rival.name:<20}{rival.about}", highlight=False)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/rivals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    install = commands.add_parser("install", help="install rivals")
    install.add_argument("names", nargs="+", choices=ENVIRONMENTS, metavar="NAME", help=", ".join(ENVIRONMENTS))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parsed = _parse(arguments)
    console = Console()
    try:
        for name in parsed.names if parsed.command == "install" else ():
            ENVIRONMENTS[name].install()
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    _show(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
