"""What front ends and the router say to each other through the door. msgspec tagged unions, like core/messages.py."""

from __future__ import annotations

import msgspec

from router.types import ClientRequest, Piece

AskId = int
"""Numbered by the front end, per life of it."""

# --- front end -> router ----------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """I am here. Said first, then again and again; the answer is Welcome."""

    pid: int


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Serve this. stream: a piece as soon as there is text; otherwise one piece with everything."""

    ask_id: AskId
    request: ClientRequest
    stream: bool


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for these any more."""

    ask_ids: list[AskId]


ToRouter = Hello | Ask | Drop

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


class Answers(msgspec.Struct, frozen=True, tag=True):
    """Everything that one turn of the router's loop has for this front end, in order per ask."""

    answered: list[Answered]
    failed: list[Failed]


FromRouter = Welcome | Answers

to_router_decoder = msgspec.msgpack.Decoder(ToRouter)
from_router_decoder = msgspec.msgpack.Decoder(FromRouter)
encode = msgspec.msgpack.Encoder().encode
