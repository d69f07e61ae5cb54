"""How a rival's engine is asked: a program in its own environment that reads calls from stdin and answers on stdout.

A call is a line of JSON, `{"prompts": [[1, 2], ...], "steps": 12}`; its answer `{"first": seconds, "steps": [seconds, ...]}`.
The first line of all is `{"ready": true}`. Needs nothing but Python, since the environments have nothing else in common.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Protocol, TextIO


class Engine(Protocol):
    def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[float]]:
        """Compute prompts of one length together, then so many greedy steps.

        Returns seconds to the first tokens, the prompts' computing included, and of each step after them.
        """


def private_stdout() -> TextIO:
    """The stdout that answers go to. Whatever libraries print goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer_calls(engine: Engine, answers: TextIO) -> None:
    """Until stdin ends."""
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        first, steps = engine.generate(call["prompts"], call["steps"])
        print(json.dumps({"first": first, "steps": steps}), file=answers, flush=True)
