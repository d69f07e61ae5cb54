from __future__ import annotations


class Violation(AssertionError):
    """A promise was broken."""


def require(truth: object, promise: str) -> None:
    """Raises Violation, in its words, when a promise does not hold."""
    if not truth:
        raise Violation(promise)
