"""What breaks first as a deployment grows: unit costs of the router, measured here, and the arithmetic up to many sessions.

    python -m scripts.capacity
    python -m scripts.capacity --sessions 100000 --json

Measured without workers: hashing and tokenising prompts, reading workers' messages, taking cache events into the prefix index
and the memory that it takes. Measured on a server with engine `fake`, whose time is slept: processor time of the router's
process and of the front end, per request and per token of streams over the OpenAI API. docs/scaling.md shows a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from loadtest.machine import this_machine
from python_backends.core.block_hash import HASH_BYTES, block_hashes, chain_root
from python_backends.core.errors import BatonError, Unavailable
from python_backends.core.messages import BlockEvents, Outputs, TokenChunk, encode, from_worker_decoder
from python_backends.core.paths import DEMO_MODEL, resolve_model
from python_backends.core.types import Epoch, RequestId, WorkerId
from router.prefix_index import PrefixIndex
from router.tokenizer import Tokenizer
from scripts.terminal import print_error
from scripts.tritonserver import TritonServer

_BLOCK = 16  # tokens
_PER_MESSAGE = 64  # tokens of as many streams, one step of a full batch
_ROUNDS = 5
_CLIENTS = 48
_TIMEOUT_S = 120.0
_WORDS = ("the", "river", "city", "king", "of", "and", "old", "green", "runs", "between", "mountains", "because", "seven")
_CONFIG = """
workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]
engine: {kv_pool_mib: 64, fake: {prefill_us_per_token: 10, step_us: 20000}}
"""


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """Processor seconds of one core, and bytes."""

    hash_token_s: float  # block hashes of a prompt, per token
    tokenize_token_s: float
    message_token_s: float  # reading a worker's message, per token
    event_s: float  # one block stored, taken into the index
    index_block_bytes: float  # of a block that one worker holds
    index_holder_bytes: float  # of each further worker that holds it
    router_request_s: float  # the router's process: a whole request of one token
    router_token_s: float  # each further token
    front_end_request_s: float
    front_end_token_s: float


@dataclass(frozen=True, slots=True)
class Sessions:
    """So many conversations at once, all of them streaming."""

    count: int
    tokens_s: float  # of each stream
    prompt: int  # tokens of a prompt, most of them seen before
    new: int  # of these not seen before
    output: int  # tokens of an answer
    pause_s: float  # between an answer and the next prompt
    token_bytes: int  # of KV
    worker_streams: int  # that one decode worker runs at once
    prefill_rate: float  # tokens/s that one prefill worker computes
    index_lifetime_s: float = 600.0  # that a block stays in some worker's cache

    @property
    def turns_s(self) -> float:
        """Requests per second of all sessions."""
        return self.count / (self.output / self.tokens_s + self.pause_s)

    @property
    def streams(self) -> float:
        """Streams that run at the same time."""
        return self.turns_s * self.output / self.tokens_s


@dataclass(frozen=True, slots=True)
class Needs:
    """What the sessions ask of each part."""

    sessions: int
    streams: float
    requests_s: float
    tokens_s: float
    router_cores: float
    front_end_cores: float
    events_s: float  # blocks stored and removed; every router hears all of them
    events_share: float  # of one core, in every router
    index_blocks: float
    index_bytes: float  # in every router
    decode_workers: float
    prefill_workers: float
    messages_s: float  # of all workers to one router
    link_bytes_s: float  # KV handed over, all links together


def needs(sessions: Sessions, costs: UnitCosts) -> Needs:
    """A new block of a prompt is cached by the prefill worker that computed it and by the decode worker that was given it, one
    of an answer by the latter alone. Each is stored once and removed once.
    """
    requests = sessions.turns_s
    tokens = requests * sessions.output
    shared_s, own_s = requests * sessions.new / _BLOCK, requests * sessions.output / _BLOCK
    index_blocks = (shared_s + own_s) * sessions.index_lifetime_s
    index_bytes = index_blocks * costs.index_block_bytes + shared_s * sessions.index_lifetime_s * costs.index_holder_bytes
    events = 2 * (2 * shared_s + own_s)
    workers = sessions.streams / sessions.worker_streams
    per_request = costs.router_request_s + sessions.prompt * costs.hash_token_s
    return Needs(
        sessions=sessions.count,
        streams=sessions.streams,
        requests_s=requests,
        tokens_s=tokens,
        router_cores=requests * per_request + tokens * costs.router_token_s,
        front_end_cores=requests * (costs.front_end_request_s + sessions.prompt * costs.tokenize_token_s)
        + tokens * costs.front_end_token_s,
        events_s=events,
        events_share=events * costs.event_s,
        index_blocks=index_blocks,
        index_bytes=index_bytes,
        decode_workers=workers,
        prefill_workers=requests * sessions.new / sessions.prefill_rate,
        messages_s=workers * sessions.tokens_s,
        link_bytes_s=requests * sessions.new * sessions.token_bytes,
    )


# --- measuring ---


def _best(action: Callable[[], object], count: int) -> float:
    """Processor seconds for one of `count`, in the quietest of some rounds."""
    took = []
    for _ in range(_ROUNDS):
        before = time.process_time()
        action()
        took.append(time.process_time() - before)
    return min(took) / count


def _text(words: int) -> str:
    dice = random.Random(1)
    return " ".join(dice.choice(_WORDS) for _ in range(words))


def _hash_token_s(tokens: int = 8192) -> float:
    ids, root = list(range(tokens)), chain_root("f", "")
    return _best(lambda: block_hashes(ids, _BLOCK, root), tokens)


def _tokenize_token_s(words: int = 2000) -> float:
    tokenizer, text = Tokenizer(resolve_model(DEMO_MODEL)), _text(words)
    return _best(lambda: tokenizer.encode(text), len(tokenizer.encode(text)))


def _message_token_s(messages: int = 500) -> float:
    chunks = [TokenChunk(RequestId(f"0123456789abcdef.{i}"), [i], 100) for i in range(_PER_MESSAGE)]
    payload = encode(Outputs(WorkerId("decode@10.0.0.1:8001"), Epoch(1), [*chunks]))

    def read() -> None:
        for _ in range(messages):
            from_worker_decoder.decode(payload)

    return _best(read, messages * _PER_MESSAGE)


def _events(worker: str, blocks: int, seed: int) -> list[BlockEvents]:
    """Of blocks that are stored a few at a time, as an engine's steps do."""
    dice = random.Random(seed)
    names = [dice.randbytes(HASH_BYTES) for _ in range(blocks)]
    found = [BlockEvents(WorkerId(worker), Epoch(1), 0, [], [], reset=True)]
    for start in range(0, blocks, _BLOCK):
        found.append(BlockEvents(WorkerId(worker), Epoch(1), len(found), names[start : start + _BLOCK], []))
    return found


def _event_s(blocks: int) -> float:
    events = _events("decode", blocks, 1)

    def take_in() -> None:
        index = PrefixIndex()
        for each in events:
            index.apply(each)

    return _best(take_in, blocks)


def _index_bytes(blocks: int, holders: int) -> float:
    """Per block, the hashes included; as if each had come in a message of its own."""
    payloads = [[encode(each) for each in _events(f"decode_{number}", blocks, 1)] for number in range(holders)]
    tracemalloc.start()
    try:
        index = PrefixIndex()
        before = tracemalloc.get_traced_memory()[0]
        for worker in payloads:
            for payload in worker:
                events = from_worker_decoder.decode(payload)
                assert isinstance(events, BlockEvents)
                assert index.apply(events)
        del events
        return (tracemalloc.get_traced_memory()[0] - before) / blocks
    finally:
        tracemalloc.stop()


def _process(server: TritonServer, pattern: str) -> psutil.Process:
    guardian = psutil.Process(psutil.Process(server.pid).ppid())
    for process in guardian.children(recursive=True):
        if process.status() != psutil.STATUS_ZOMBIE and re.search(pattern, " ".join(process.cmdline())):
            return process
    raise Unavailable(f"the server has no process like {pattern}")


def _stream(server: TritonServer, number: int, tokens: int) -> None:
    """One streamed completion to its end. Raises Unavailable when it is not what was asked for."""
    with closing(http.client.HTTPConnection(server.host, server.openai_port, timeout=_TIMEOUT_S)) as connection:
        body = {
            "model": DEMO_MODEL,
            "prompt": f"{number} {_text(100)}",
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        got = answer.read()
    if answer.status != HTTPStatus.OK or not got.rstrip().endswith(b"[DONE]"):
        raise Unavailable(f"the front end answered {answer.status}: {got[-200:].decode(errors='replace')}")


def _served(server: TritonServer, requests: int, tokens: int) -> tuple[float, float]:
    """Processor seconds per request of the router's process and of the front end's."""
    processes = [_process(server, r"/router/1/model\.py"), _process(server, r"-m router\.http")]

    def spent() -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in processes]

    before = spent()
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for done in [clients.submit(_stream, server, number, tokens) for number in range(requests)]:
            done.result()
    router, front_end = (after - start for after, start in zip(spent(), before, strict=True))
    return router / requests, front_end / requests


def measure(blocks: int, requests: int, tokens: int) -> UnitCosts:
    """`blocks` in the index; `requests` of 1 and of `tokens` tokens through a server. Raises BatonError."""
    one, four = _index_bytes(blocks, 1), _index_bytes(blocks, 4)
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "capacity.yaml"
        config.write_text(_CONFIG)
        with TritonServer(config) as server:
            _served(server, _CLIENTS, 2)
            router_one, front_one = _served(server, requests, 1)
            router_many, front_many = _served(server, requests, tokens)
    return UnitCosts(
        hash_token_s=_hash_token_s(),
        tokenize_token_s=_tokenize_token_s(),
        message_token_s=_message_token_s(),
        event_s=_event_s(blocks),
        index_block_bytes=one,
        index_holder_bytes=(four - one) / 3,
        router_request_s=router_one,
        router_token_s=(router_many - router_one) / (tokens - 1),
        front_end_request_s=front_one,
        front_end_token_s=(front_many - front_one) / (tokens - 1),
    )


def median(runs: Sequence[UnitCosts]) -> UnitCosts:
    """Of each cost by itself."""
    names = [field.name for field in dataclasses.fields(UnitCosts)]
    return UnitCosts(**{name: statistics.median(getattr(run, name) for run in runs) for name in names})


# --- telling ---


def _print(console: Console, runs: Sequence[UnitCosts], found: list[Needs]) -> None:
    table = Table("unit cost", box=None, pad_edge=False)
    for heading in ("one core's time, or bytes", "least", "most"):
        table.add_column(heading, justify="right")
    for name, value in dataclasses.asdict(median(runs)).items():
        values = [getattr(run, name) for run in runs]
        shown = (f"{each:,.0f} B" if "bytes" in name else f"{each * 1e6:,.2f} us" for each in (value, min(values), max(values)))
        table.add_row(name.rpartition("_")[0].replace("_", " "), *shown)
    console.print(table)
    console.print(f"Medians of {len(runs)} runs. {this_machine()}", highlight=False)
    console.print()
    table = Table("sessions", box=None, pad_edge=False)
    for each in found:
        table.add_column(f"{each.sessions:,}", justify="right")
    rows: dict[str, Callable[[Needs], str]] = {
        "streams at once": lambda each: f"{each.streams:,.0f}",
        "requests/s": lambda each: f"{each.requests_s:,.0f}",
        "tokens/s": lambda each: f"{each.tokens_s:,.0f}",
        "decode workers": lambda each: f"{math.ceil(each.decode_workers):,}",
        "prefill workers": lambda each: f"{math.ceil(each.prefill_workers):,}",
        "router cores": lambda each: f"{each.router_cores:,.1f}",
        "front end cores": lambda each: f"{each.front_end_cores:,.1f}",
        "cache events/s": lambda each: f"{each.events_s:,.0f}",
        "of a core, in every router": lambda each: f"{each.events_share:.1%}",
        "index, blocks": lambda each: f"{each.index_blocks:,.0f}",
        "index, GiB in every router": lambda each: f"{each.index_bytes / 2**30:,.2f}",
        "worker messages/s": lambda each: f"{each.messages_s:,.0f}",
        "KV handed over, Gbit/s": lambda each: f"{each.link_bytes_s * 8 / 1e9:,.1f}",
    }
    for name, text in rows.items():
        table.add_row(name, *map(text, found))
    console.print(table)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.capacity", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sessions", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="conversations at once")
    parser.add_argument("--tokens-s", type=float, default=30.0, help="of each stream")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of a turn's prompt, the conversation so far")
    parser.add_argument("--new", type=int, default=800, help="of these not in any cache")
    parser.add_argument("--output", type=int, default=300, help="tokens of an answer")
    parser.add_argument("--pause", type=float, default=20.0, help="seconds from an answer to the next prompt")
    parser.add_argument("--token-kib", type=float, default=128.0, help="KV of a token; scripts/size tells")
    parser.add_argument("--worker-streams", type=int, default=192, help="streams of one decode worker at once")
    parser.add_argument("--prefill-rate", type=float, default=10_000.0, help="tokens per second of one prefill worker")
    parser.add_argument("--blocks", type=int, default=200_000, help="in the index that is measured")
    parser.add_argument("--requests", type=int, default=300, help="through the server that is measured, twice")
    parser.add_argument("--repetitions", type=int, default=5, help="of everything; a minute each")
    parser.add_argument("--json", action="store_true", help="for programs")
    parsed = parser.parse_args(arguments)
    if parsed.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        runs = [measure(options.blocks, options.requests, 65) for _ in range(options.repetitions)]
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    found = [
        needs(
            Sessions(
                count,
                options.tokens_s,
                options.prompt,
                options.new,
                options.output,
                options.pause,
                int(options.token_kib * 1024),
                options.worker_streams,
                options.prefill_rate,
            ),
            median(runs),
        )
        for count in options.sessions
    ]
    if options.json:
        told = {
            "costs": dataclasses.asdict(median(runs)),
            "runs": [dataclasses.asdict(run) for run in runs],
            "needs": [dataclasses.asdict(each) for each in found],
        }
        print(json.dumps(told, indent=2))
    else:
        _print(Console(), runs, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
