"""What front ends and the router say to each other through the door. msgspec tagged unions, like core/messages.py."""

from __future__ import annotations

from typing import Literal

import msgspec

from python_backends.core.types import Role, WorkerId, WorkerLoad
from router.journal import Record
from router.types import ClientRequest, Piece, Sending

AskId = int
"""Numbered by the front end, per life of it."""

# --- front end -> router ----------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """I am here. Said first, then again and again; the answer is Welcome."""

    pid: int


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Serve this."""

    ask_id: AskId
    request: ClientRequest
    sending: Sending


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for these any more."""

    ask_ids: list[AskId]


class Watch(msgspec.Struct, frozen=True, tag=True):
    """Somebody looks at the page: what is new? Said again and again; the answer is News.

    after: the last `News.sequence` of this router; 0 at first.
    """

    after: int


class Find(msgspec.Struct, frozen=True, tag=True):
    """Tell me of these requests. The answer is Found. `what`: as in Journal.find."""

    what: str


class Manage(msgspec.Struct, frozen=True, tag=True):
    """Drain a worker, use it again, or restart it once it is drained. The answer is Managed, when that is done.

    role: that it is to have when it is restarted; None: as before.
    """

    number: int  # of the sender's choice
    action: Literal["drain", "resume", "restart"]
    worker: WorkerId
    grace_s: float = 0.0
    role: Role | None = None


ToRouter = Hello | Ask | Drop | Watch | Find | Manage

# --- router -> front end ----------------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """`router` is another name in every life of the router: asks of an earlier one are lost."""

    router: str
    pid: int
    trouble: str  # why requests can't be served now; empty when they can


class Answered(msgspec.Struct, frozen=True, array_like=True):
    ask_id: AskId
    piece: Piece


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """error: name of a class in core/errors.py."""

    ask_id: AskId
    error: str
    message: str
    retry_after_s: float | None = None  # of Unavailable


class Answers(msgspec.Struct, frozen=True, tag=True):
    """Everything that one turn of the router's loop has for this front end, in order per ask."""

    answered: list[Answered]
    failed: list[Failed]


class WorkerNews(msgspec.Struct, frozen=True):
    id: WorkerId
    role: Role
    up: bool
    resting: str  # why it is given no new work, though it is up
    pid: int
    epoch: str  # a number that JavaScript could not hold
    silent_s: float  # since its last heartbeat
    requests: int  # given to it by this router and not ended
    load: WorkerLoad  # as it said itself
    block_size: int  # tokens
    block_bytes: int


class News(msgspec.Struct, frozen=True, tag=True):
    """How things stand at the router `router`, and the requests that ended since. There may be more: ask at once then."""

    router: str
    trouble: str
    sequence: int  # of the last one of `ended`
    more: bool
    ended: list[Record]
    live: list[Record]  # the oldest ones, when there are very many
    requests: int  # in the house
    queued_tokens: int
    index_blocks: int
    workers: list[WorkerNews]


class Found(msgspec.Struct, frozen=True, tag=True):
    what: str
    records: list[Record]


class Managed(msgspec.Struct, frozen=True, tag=True):
    number: int
    error: str  # empty: it is done


FromRouter = Welcome | Answers | News | Found | Managed

to_router_decoder = msgspec.msgpack.Decoder(ToRouter)
from_router_decoder = msgspec.msgpack.Decoder(FromRouter)
encode = msgspec.msgpack.Encoder().encode
