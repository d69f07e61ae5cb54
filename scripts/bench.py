"""Benchmarks. Each part has a --help of its own; results and how to read them: docs/benchmarks.md

    scripts/bench all        engine, mixed and served in one run: one table, pictures, one JSON file
    scripts/bench mixed      steady streams beside long prompts: against our aggregated mode, and against rivals' servers
    scripts/bench served     what a deployment is like to use: serving, prefix cache, handoff, scale, start, memory
    scripts/bench engine     how fast the CPU engine computes, against the machine's limits, PyTorch and transformers
    scripts/bench transfer   how fast KV moves between processes, by every way, against memcpy, a socket and Redis
    scripts/bench codec      what the lossless codec makes of real KV, and on which links it pays
    scripts/bench router     what a decision of the router costs
    scripts/bench overload   three times what can be served: who is accepted, who refused and how fast, and the memory

Rivals are installed by scripts/rivals. Any load on any deployments and servers in turn: scripts/compare
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_PARTS = ("all", "mixed", "served", "engine", "transfer", "codec", "router", "overload")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if given else 2
    if given[0] not in _PARTS:
        print(f"error: {given[0]!r} is no benchmark; there are {', '.join(_PARTS)}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"scripts.benchmarks.{given[0]}").main(given[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
