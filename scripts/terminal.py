"""What every script says alike."""

from __future__ import annotations

from rich.console import Console

from python_backends.core.errors import BatonError


def print_error(console: Console, error: BatonError) -> None:
    """One line, whatever its length, so that it can be copied and searched for."""
    console.print("error:", style="red", end=" ")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)
