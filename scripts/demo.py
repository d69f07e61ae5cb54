"""Shows a whole disaggregated deployment at work: a conversation, where its KV came from, and a verdict.

Without --server it starts a deployment on this machine and stops it afterwards. The exit status is 0 only when KV was
handed over from a prefill to a decode worker, passed its digest check and was used without being computed again.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from python_backends.core.errors import BatonError
from python_backends.core.paths import repository_root
from router.types import Proof, Way
from scripts.client import Client, Message
from scripts.proof_text import Verdict, handoff_verdict, milliseconds, read_proof
from scripts.serve import start_with_progress
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

_SYSTEM = (
    "You are a friendly geography teacher. You answer questions about countries, their capitals, their rivers and their "
    "history in one or two short and correct sentences. You never make up facts. When you are not sure, you say so. You "
    "always name the country that you are asked about, and you use plain words that a child of ten years can understand."
)
_QUESTION = "What is the capital of France?"
_FOLLOW_UP = "Which river flows through it?"
_MAX_TOKENS = 80
_TIMEOUT_S = 120.0
_READY_TIMEOUT_S = 10.0
_INTERRUPTED = 130  # what shells report for SIGINT


@dataclass(frozen=True, slots=True)
class Turn:
    """One answered question. `title`: its row in the table."""

    title: str
    answer: str
    proof: Proof


class Conversation:
    """The demo's requests: greedy, and of a tenant of their own, so that no earlier run's KV is found in a cache."""

    def __init__(self, client: Client, console: Console) -> None:
        self._client = client
        self._console = console
        self._salt = secrets.token_hex(8)
        self._messages: list[Message] = [{"role": "system", "content": _SYSTEM}]

    def ask(self, title: str, question: str, way: Way | None = None) -> Turn:
        """The next turn; question and answer are shown as they come. `way`: None lets the router decide. Raises BatonError."""
        self._messages.append({"role": "user", "content": question})
        self._console.print(f"[bold]You[/bold]    {_plain(question)}", highlight=False)
        self._console.print("[bold]Model[/bold]  ", end="")
        turn = self._answer(title, self._messages, way, self._console)
        self._console.print("\n")
        self._messages.append({"role": "assistant", "content": turn.answer})
        return turn

    def ask_aggregated(self, question: str) -> Turn:
        """The first question again, served by one worker alone. Nothing is shown."""
        messages: list[Message] = [self._messages[0], {"role": "user", "content": question}]
        return self._answer("alone", messages, Way.AGGREGATED, None)

    def _answer(self, title: str, messages: list[Message], way: Way | None, console: Console | None) -> Turn:
        answer, proof = "", None
        route = way.value if way else None
        fields = {"max_tokens": _MAX_TOKENS, "cache_salt": self._salt, "route": route}
        with self._client.stream(messages, timeout_s=_TIMEOUT_S, **fields) as stream:
            for chunk in stream:
                answer += chunk.text
                proof = chunk.proof
                if console:
                    console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
        if proof is None:
            raise BatonError("the answer came without a proof; the server is of another version")
        return Turn(title, answer, read_proof(proof))


def run_demo(client: Client, console: Console, question: str) -> Verdict:
    """Raises BatonError when a request fails."""
    conversation = Conversation(client, console)
    first = conversation.ask("first", question, Way.REMOTE)  # alone on the machine, the router would rather spare the handoff
    second = conversation.ask("second", _FOLLOW_UP)
    alone = conversation.ask_aggregated(question)
    console.print(_table([first, second, alone]))
    console.print(reuse_line(second.proof), highlight=False, markup=False)
    console.print(comparison_line(first, alone), highlight=False, markup=False)
    return handoff_verdict(first.proof, first.answer)


def reuse_line(proof: Proof) -> str:
    """What the second turn found in the decode worker's prefix cache."""
    rest = proof.kv_tokens_received + proof.kv_tokens_computed + proof.kv_tokens_recomputed
    return (
        f"follow-up: {proof.kv_tokens_reused} prompt tokens reused on {proof.decode_worker}, {rest} new (route {proof.route})"
    )


def comparison_line(first: Turn, alone: Turn) -> str:
    """Whether one worker alone says the same as prefill and decode worker together."""
    if alone.proof.route != Way.AGGREGATED.value:
        return "aggregated worker: none in this deployment to compare with"
    if alone.answer == first.answer:
        return "aggregated worker: same text"
    return f"aggregated worker: DIFFERENT text: {alone.answer!r}"


def _table(turns: list[Turn]) -> Table:
    """Fits a terminal of 80 columns."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for heading in ("turn", "route"):
        table.add_column(heading, no_wrap=True)
    for heading in ("reused", "received", "computed", "queue", "prefill", "TTFT", "handoff", "decode"):
        table.add_column(heading, justify="right", no_wrap=True)
    for turn in turns:
        proof = turn.proof
        counts = (proof.kv_tokens_reused, proof.kv_tokens_received, proof.prefill_tokens_computed)
        times = (proof.queue_ms, proof.prefill_ms, proof.ttft_ms, proof.handoff_ms, proof.first_decode_ms)
        table.add_row(turn.title, proof.route, *map(str, counts), *map(milliseconds, times))
    table.caption = "KV of the prompt in tokens; ms, queue + prefill = TTFT; decode: its first step"
    return table


def _plain(text: str) -> str:
    """Text that rich does not take for markup."""
    return text.replace("[", r"\[")


def _demo(options: argparse.Namespace, console: Console) -> Verdict:
    if options.server:
        with Client(options.server) as client:
            client.wait_ready(_READY_TIMEOUT_S)
            return run_demo(client, console, options.prompt)
    server = TritonServer(options.config)
    try:
        start_with_progress(server, console)
        with Client(f"{server.host}:{server.grpc_port}") as client:
            return run_demo(client, console, options.prompt)
    finally:
        server.stop()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = repository_root() / "configs" / "default.yaml"
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--server", metavar="HOST:PORT", help="gRPC address of a running server; none is started then")
    where.add_argument("--config", type=Path, default=default, metavar="FILE", help="the deployment to start")
    parser.add_argument("--prompt", default=_QUESTION, metavar="TEXT", help="the first question")
    return parser.parse_args(arguments)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    signal.signal(signal.SIGINT, _interrupt)  # also where a parent shell has it ignored
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    try:
        verdict = _demo(options, console)
    except KeyboardInterrupt:
        console.print("\nInterrupted")
        return _INTERRUPTED
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    console.print(verdict.text, style="green" if verdict.ok else "red", highlight=False, markup=False, soft_wrap=True)
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
