"""`scripts/doctor`: nothing but the standard library is imported here, so that a missing package is a sentence."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    try:
        from scripts.doctor_visit import main as visit
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is missing; run scripts/install", file=sys.stderr)
        return 1
    return visit(arguments)


if __name__ == "__main__":
    sys.exit(main())
