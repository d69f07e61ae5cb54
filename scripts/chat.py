"""A conversation in the terminal with a deployment that is running (scripts/serve).

Ctrl-C stops the answer, at the server too; Ctrl-D quits. With its input from a pipe, every line is a turn.
"""

from __future__ import annotations

import argparse
import readline
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from rich.console import Console

from python_backends.core.errors import BatonError, InvalidRequest
from python_backends.core.paths import cache_dir
from python_backends.core.tensors import ROUTER_INPUTS
from scripts.client import Chunk, Client, Message
from scripts.proof_text import read_proof, summary
from scripts.terminal import print_error

HELP = """\
/set NAME VALUE   change a setting, such as: /set temperature 0.7
/set NAME         back to the server's default
/set              show the settings
/proof            show or hide the line of route and KV under answers
/reset            forget the conversation
/help             show this
Ctrl-C stops an answer, Ctrl-D quits."""

_SETTABLE = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop_words",
    "route",
    "cache_salt",
    "priority",
)
_DTYPES = {tensor.name: tensor.dtype for tensor in ROUTER_INPUTS}
_CONVERT = {"STRING": str, "INT32": int, "UINT64": int, "FP32": float}
_KINDS = {"INT32": "a whole number", "UINT64": "a whole number", "FP32": "a number"}
_TIMEOUT_S = 600.0
_READY_TIMEOUT_S = 5.0
_HISTORY_LINES = 1000


class Chat:
    """One conversation and its settings."""

    def __init__(self, client: Client, console: Console) -> None:
        self._client = client
        self._console = console
        self.messages: list[Message] = []
        self.settings: dict[str, object] = {"max_tokens": 256, "temperature": 0.7, "top_p": 0.9}
        self.shows_proof = True

    def handle(self, line: str) -> bool:
        """One line of input: a command or a turn. False when it failed; the reason has been printed."""
        try:
            if line.startswith("/"):
                self._say(self.command(line))
            elif line.strip():
                self.turn(line)
            return True
        except BatonError as error:
            print_error(self._console, error)
            return False

    def command(self, line: str) -> str:
        """Carry out `/name ...`; returns what to tell the user. Raises InvalidRequest with the fix."""
        name, *words = line[1:].split(maxsplit=2) or [""]
        if name == "help":
            return HELP
        if name == "set":
            return self._set(words)
        if name == "proof":
            self.shows_proof = not self.shows_proof
            return f"the proof is {'shown' if self.shows_proof else 'hidden'}"
        if name == "reset":
            self.messages = []
            return "the conversation begins anew"
        raise InvalidRequest(f"there is no command /{name}; /help lists them")

    def turn(self, text: str) -> None:
        """Ask, show the answer as it comes, remember both. Ctrl-C keeps what was answered so far. Raises BatonError."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        answer, num_tokens = "", 0
        last: Chunk | None = None
        try:
            with self._client.stream(asked, timeout_s=_TIMEOUT_S, **self.settings) as stream:
                for last in stream:
                    answer += last.text
                    num_tokens += last.num_tokens
                    self._console.print(last.text, end="", markup=False, highlight=False, soft_wrap=True)
            self._say("")
        except KeyboardInterrupt:
            self._say("\n(stopped)")
        except BatonError:
            if answer:
                self._say("")
            raise
        if answer:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        if self.shows_proof and last is not None and last.proof is not None:
            self._say(summary(read_proof(last.proof), num_tokens), style="dim")

    def _set(self, words: list[str]) -> str:
        if not words:
            return ", ".join(f"{name} {value}" for name, value in self.settings.items()) or "all as the server has them"
        name = words[0]
        if name not in _SETTABLE:
            near = get_close_matches(name, _SETTABLE, n=1)
            fix = f"did you mean {near[0]}?" if near else f"known are {', '.join(_SETTABLE)}"
            raise InvalidRequest(f"there is no setting {name!r}; {fix}")
        if len(words) == 1:
            self.settings.pop(name, None)
            return f"{name} is the server's default"
        self.settings[name] = _convert(name, words[1])
        return f"{name} is {self.settings[name]}"

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _convert(name: str, text: str) -> object:
    dtype = _DTYPES[name]
    try:
        return _CONVERT[dtype](text.strip())
    except ValueError:
        raise InvalidRequest(f"{name} is {text!r}; it must be {_KINDS[dtype]}") from None


def converse(chat: Chat, console: Console) -> int:
    """Until Ctrl-D. A conversation in a terminal has always succeeded."""
    console.print("Ask something; /help lists the commands, Ctrl-D quits.", highlight=False)
    with _history():
        while True:
            try:
                chat.handle(input("> "))
            except KeyboardInterrupt:
                console.print()
            except EOFError:
                console.print()
                return 0


def answer_lines(chat: Chat, lines: Iterator[str]) -> int:
    """Every line of `lines` in turn; 1 when one failed. Those after it are still answered."""
    failed = 0
    for line in lines:
        failed += not chat.handle(line.rstrip("\n"))
    return 1 if failed else 0


@contextmanager
def _history() -> Iterator[None]:
    """Lines typed earlier come back with the arrow keys, also those of earlier runs."""
    path = cache_dir() / "chat_history"
    if path.exists():
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(path)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/chat", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC address")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a parent shell has it ignored
    console = Console()
    try:
        with Client(options.server) as client:
            client.wait_ready(_READY_TIMEOUT_S)
            chat = Chat(client, console)
            return converse(chat, console) if sys.stdin.isatty() else answer_lines(chat, sys.stdin)
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
