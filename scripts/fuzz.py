"""Feeds damaged, invented and foreign bytes to everything that reads what comes from another process.

tickets    of handoffs, at a decode worker
orders     signed work, at a worker
events     what workers say on the channel: outputs, events, heartbeats, at a router
requests   what clients send: bodies of the OpenAI API and sampling parameters

Nothing may be raised but the reader's own refusal, and nothing may be accepted that its maker did not sign (tickets,
orders) or that is not of its form (events, requests: what is accepted must come back the same when it is written again).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random

import msgspec
from rich.console import Console
from rich.table import Table

from python_backends.core.errors import UNREADABLE, HandoffRefused, InvalidRequest, TritonCode
from python_backends.core.handoff import ENGINE_TRANSPORT, TICKET_VERSION, KVHandoff, seal, unseal
from python_backends.core.layout import KVLayout
from python_backends.core.messages import (
    Abort,
    BlockEvents,
    DecodeWork,
    FollowWork,
    Outputs,
    PrefillDone,
    PrefillWork,
    ReleaseLease,
    RequestFailed,
    Resync,
    RouterHeartbeat,
    TokenChunk,
    Work,
    encode,
    from_worker_decoder,
    to_worker_decoder,
)
from python_backends.core.orders import OrderBook, OrderReader
from python_backends.core.signing import Domain, sign
from python_backends.core.types import (
    Epoch,
    FinishReason,
    GenerateRequest,
    RequestId,
    SamplingParams,
    TokenLogprob,
    WorkerId,
)
from router.http.errors import ApiError
from router.http.requests import ChatCompletion, Completion, parse, sampling_of

_KEY = b"the deployment's key of 32 bytes"
_OTHER_KEY = b"another deployment's key, 32 bytes"
_WORKER, _EPOCH = WorkerId("decode"), Epoch(2**62 + 1)
_NOW = 1_000.0
_AT_ONCE = 5_000  # inputs of one task of a process
_MOST_SHOWN = 10


@dataclass
class Result:
    """`faults`: inputs that broke a reader, or were let in, as hex, with what happened."""

    reader: str
    inputs: int = 0
    refused: int = 0
    accepted: int = 0  # unsigned forms only, where accepting is right
    broken: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        self.inputs += other.inputs
        self.refused += other.refused
        self.accepted += other.accepted
        self.broken += other.broken
        self.faults = (self.faults + other.faults)[:_MOST_SHOWN]


class Fault(AssertionError):
    """An input did what no input may do."""


Read = Callable[[bytes], bool]
"""Whether the input was accepted. Raises whatever the reader raises but its own refusal, or Fault."""
Invent = Callable[[Random], bytes]


# --- damage --------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: Random) -> bytes:
    """A few small changes, as bit errors, cut messages and clever strangers make them."""
    spoilt = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        lot = rng.randrange(7)
        at = rng.randrange(len(spoilt) + 1)
        if lot == 0 and at < len(spoilt):
            spoilt[at] ^= 1 << rng.randrange(8)
        elif lot == 1 and at < len(spoilt):
            spoilt[at] = rng.choice([0, 0x7F, 0x80, 0xC0, 0xC1, 0xD9, 0xDF, 0xFF, rng.randrange(256)])
        elif lot == 2:
            del spoilt[at:]
        elif lot == 3:
            del spoilt[at : at + rng.randrange(1, 9)]
        elif lot == 4:
            spoilt[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif lot == 5:
            end = at + rng.randrange(1, 33)
            spoilt[at:at] = spoilt[at:end]
        else:
            spoilt += rng.randbytes(rng.randrange(1, 40))
    return bytes(spoilt)


def _invented(valid: Sequence[bytes]) -> Invent:
    """Damaged valid inputs, mostly; also noise, and halves of two that do not belong together."""

    def invent(rng: Random) -> bytes:
        lot = rng.random()
        if lot < 0.8:
            return damaged(rng.choice(valid), rng)
        if lot < 0.9:
            return rng.randbytes(rng.randrange(400))
        one, other = rng.choice(valid), rng.choice(valid)
        return one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other) + 1) :]

    return invent


# --- tickets and orders: signed ------------------------------------------------------------------------------------------

_HANDOFF = KVHandoff(
    version=TICKET_VERSION,
    transport="shm",
    source=WorkerId("prefill"),
    epoch=_EPOCH,
    lease_id="0123456789abcdef",
    expires_at=_NOW + 10,
    layout=KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype="float32"),
    fingerprint="f" * 32,
    num_tokens=9,
    blocks=[5, 0, 7],
    generations=[1, 2, 2**64 - 1],
    digests=[b"\1" * 16, b"\2" * 16, b"\3" * 16],
    locator="12/3",
    opaque=b"opaque",
    content=b"c" * 16,
)
_MOVED_BY_ENGINE = msgspec.structs.replace(_HANDOFF, transport=ENGINE_TRANSPORT, blocks=[], generations=[], digests=[])
_BODIES = [msgspec.msgpack.encode(handoff) for handoff in (_HANDOFF, _MOVED_BY_ENGINE)]
_TICKETS = [seal(_HANDOFF, _KEY), seal(_MOVED_BY_ENGINE, _KEY)]
_REQUEST = GenerateRequest(RequestId("r.1.1d"), [1, 2, 3], SamplingParams(seed=1, stop=("x",)), 9.0, [4], "tenant", 1)


def _invent_ticket(rng: Random) -> bytes:
    """Also whole tickets of other deployments, and damaged ones that are signed: what a faulty worker might make."""
    lot = rng.random()
    if lot < 0.1:
        return seal(_HANDOFF, _OTHER_KEY)
    if lot < 0.4:
        return sign(Domain.HANDOFF, damaged(rng.choice(_BODIES), rng), _KEY)
    if lot < 0.45:
        return sign(Domain.WORK, rng.choice(_BODIES), _KEY)
    return _invented(_TICKETS)(rng)


def _read_ticket(ticket: bytes) -> bool:
    try:
        handoff = unseal(ticket, _KEY, _NOW)
    except HandoffRefused:
        return False
    if ticket in _TICKETS:
        return True  # the damage undid itself
    if seal(handoff, _KEY) != ticket and not _signed(Domain.HANDOFF, ticket):
        raise Fault("a ticket is accepted that nobody signed")
    covered = handoff.layout.blocks_for(handoff.num_tokens) if handoff.transport != ENGINE_TRANSPORT else 0
    if not len(handoff.blocks) == len(handoff.generations) == len(handoff.digests) == covered or handoff.num_tokens < 1:
        raise Fault("a ticket is accepted whose blocks are not those of its tokens")
    return True


def _signed(domain: Domain, data: bytes) -> bool:
    return sign(domain, data[:-32], _KEY) == data


def _valid_orders() -> list[bytes]:
    book = OrderBook(_KEY)
    works: list[list[Work]] = [
        [PrefillWork(_REQUEST)],
        [DecodeWork(_REQUEST, _TICKETS[0])],
        [DecodeWork(_REQUEST), PrefillWork(_REQUEST)],
        [FollowWork(_REQUEST, _TICKETS[0])],
    ]
    return [book.seal(_WORKER, _EPOCH, work) for work in works]


_ORDERS = _valid_orders()
_FOREIGN_ORDERS = [
    OrderBook(_OTHER_KEY).seal(_WORKER, _EPOCH, [DecodeWork(_REQUEST)]),
    OrderBook(_KEY).seal(WorkerId("another"), _EPOCH, [DecodeWork(_REQUEST)]),
    OrderBook(_KEY).seal(_WORKER, Epoch(_EPOCH - 1), [DecodeWork(_REQUEST)]),
]


def _invent_order(rng: Random) -> bytes:
    lot = rng.random()
    if lot < 0.1:
        return rng.choice(_FOREIGN_ORDERS)
    if lot < 0.3:  # signed nonsense can only be of a router with a bug; it must not take the worker with it
        return sign(Domain.WORK, damaged(rng.choice(_ORDERS)[:-32], rng), _KEY)
    if lot < 0.4:
        return rng.choice(_ORDERS)  # taken before
    return _invented(_ORDERS)(rng)


def _order_reader() -> Read:
    reader = OrderReader(_KEY, _WORKER, _EPOCH)
    for order in _ORDERS:
        reader.take(order)

    def read(order: bytes) -> bool:
        try:
            reader.take(order)
        except InvalidRequest:
            return False
        if not _signed(Domain.WORK, order):
            raise Fault("an order is taken that nobody signed")
        if order in _ORDERS or order in _FOREIGN_ORDERS:
            raise Fault("an order is taken that is another's, or was taken before")
        return True

    return read


# --- events and requests: not signed, but of one form --------------------------------------------------------------------

_CHUNK = TokenChunk(RequestId("r.1.1d"), [1, 2], 5, [TokenLogprob(1, -0.5, [(1, -0.5)])], FinishReason.STOP)
_DONE = PrefillDone(RequestId("r.1.1p"), 7, None, None, b"ticket", "0123456789abcdef", 4, 5, 1.5)
_FAILED = RequestFailed(RequestId("r.2.1d"), TritonCode.UNAVAILABLE, "busy", True)
_FROM_WORKER = [
    encode(Outputs(_WORKER, _EPOCH, [_CHUNK, _DONE, _FAILED])),
    encode(BlockEvents(_WORKER, _EPOCH, 3, [b"\0" * 16, b"\1" * 16], [b"\2" * 16], reset=True)),
]
_TO_WORKER = [
    encode(RouterHeartbeat("r", 1, "host", "place")),
    encode(Abort([RequestId("a"), RequestId("b")])),
    encode(ReleaseLease(["0123456789abcdef"])),
    encode(Resync()),
]


def _read_event(data: bytes) -> bool:
    accepted = False
    for decoder in (from_worker_decoder, to_worker_decoder):
        try:
            message = decoder.decode(data)
        except UNREADABLE:
            continue
        if repr(decoder.decode(encode(message))) != repr(message):  # NaN is not equal to itself
            raise Fault("an event is read otherwise than it would be written")
        accepted = True
    return accepted


_BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}],
    "temperature": 0.5,
    "max_tokens": 5,
    "stop": ["a", "b"],
    "logit_bias": {"5": 1.0},
    "seed": 2**63,
    "stream": True,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "baton": {"cache_salt": "s", "route": "remote", "timeout_s": 1.5},
}
_PROMPT = {"model": "m", "prompt": [[1, 2], [3]], "logprobs": 2, "top_p": 0.5, "n": 2, "echo": False, "user": "u"}
_REQUESTS = [msgspec.json.encode(_BODY), msgspec.json.encode(_PROMPT), msgspec.json.encode({"model": "m", "prompt": "p"})]
_JSON_PIECES = [b"null", b"-1", b"1e999", b"1e308", b"{}", b"[]", b'""', b"true", b'"\\ud800"', b"9" * 20, b"[" * 2_000]


def _invent_request(rng: Random) -> bytes:
    """Also values that are JSON and not what the field wants."""
    data = rng.choice(_REQUESTS)
    if rng.random() < 0.5:
        colons = [at for at, byte in enumerate(data) if byte == ord(":")]
        start = rng.choice(colons) + 1
        ends = [at for at, byte in enumerate(data) if at > start and byte in b",}]"]
        return data[:start] + rng.choice(_JSON_PIECES) + data[rng.choice(ends[:3]) :]
    return _invented(_REQUESTS)(rng)


def _read_request(data: bytes) -> bool:
    accepted = False
    for form in (ChatCompletion, Completion):
        try:
            body = parse(data, form)
            sampling = sampling_of(body, body.max_tokens or 1, None, None)
        except (ApiError, InvalidRequest):
            continue
        if sampling.validated() is not sampling:
            raise Fault("a request is accepted whose sampling is out of bounds")
        accepted = True
    return accepted


READERS: dict[str, tuple[Invent, Callable[[], Read]]] = {
    "tickets": (_invent_ticket, lambda: _read_ticket),
    "orders": (_invent_order, _order_reader),
    "events": (_invented([*_FROM_WORKER, *_TO_WORKER]), lambda: _read_event),
    "requests": (_invent_request, lambda: _read_request),
}


# --- the run -------------------------------------------------------------------------------------------------------------


def feed(reader: str, seed: int, inputs: int) -> Result:
    """So many inputs, which the seed decides."""
    invent, reading = READERS[reader]
    read, rng, result = reading(), Random(f"{reader} {seed}"), Result(reader)
    for _ in range(inputs):
        data = invent(rng)
        result.inputs += 1
        try:
            accepted = read(data)
        except Exception as error:  # any of them is what is looked for
            result.broken += 1
            if len(result.faults) < _MOST_SHOWN:
                result.faults.append(f"{type(error).__name__}: {error}; input {data.hex()}")
        else:
            result.accepted += accepted
            result.refused += not accepted
    return result


def fuzz(reader: str, first: int, inputs: int, processes: int) -> Result:
    began = time.monotonic()
    total = Result(reader)
    portions = list(_portions(first, inputs))
    if processes == 1:
        for seed, count in portions:
            total.add(feed(reader, seed, count))
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for part in pool.map(feed, [reader] * len(portions), *zip(*portions, strict=True)):
                total.add(part)
    total.seconds = time.monotonic() - began
    return total


def _portions(first: int, inputs: int) -> Iterator[tuple[int, int]]:
    """(seed, how many inputs)."""
    for number, start in enumerate(range(0, inputs, _AT_ONCE)):
        yield first + number, min(_AT_ONCE, inputs - start)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"{', '.join(READERS)}; all of them if none is named")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each reader (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when an input broke a reader or was let in."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [reader for reader in options.readers if reader not in READERS]
    if unknown:
        parser.error(f"there is no reader {unknown[0]}; there are {', '.join(READERS)}")
    if min(options.inputs, options.processes) < 1:
        parser.error("--inputs and --processes must be at least 1")
    results = [fuzz(name, options.first, options.inputs, options.processes) for name in options.readers or list(READERS)]
    console = Console()
    table = Table("reader", "inputs", "refused", "accepted", "faults", "seconds", title="Fuzzing")
    for result in results:
        counts = (result.inputs, result.refused, result.accepted, result.broken)
        table.add_row(result.reader, *(f"{count:,}" for count in counts), f"{result.seconds:.0f}")
    console.print(table)
    for result in results:
        for fault in result.faults:
            console.print(f"{result.reader}: {fault}", markup=False, highlight=False, soft_wrap=True)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    return 1 if any(result.broken for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
