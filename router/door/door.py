"""The router's side of the door: how front ends in other processes have requests served, without Triton in between.

One ZeroMQ socket on the router's event loop. What a turn of the loop has for one front end leaves as one message. A front
end that dies takes its requests with it: its process is watched, as the workers' are.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from python_backends.core.errors import UNREADABLE, BatonError
from router.door.messages import (
    Answered,
    Answers,
    Ask,
    AskId,
    Drop,
    Failed,
    Find,
    Found,
    FromRouter,
    Manage,
    Managed,
    ToRouter,
    Watch,
    Welcome,
    encode,
    to_router_decoder,
)
from router.door.news import news_of
from router.reply import Gathered
from router.run import Run
from router.service import RouterService
from router.types import Piece

log = logging.getLogger(__name__)

_HIGH_WATER_MARK = 100_000
_LAST_WORDS_MS = 300  # how long closing waits for front ends to take what was said last


@dataclass(slots=True)
class _FrontEnd:
    identity: bytes
    pidfd: int | None = None
    runs: dict[AskId, Run] = field(default_factory=dict)
    answered: list[Answered] = field(default_factory=list)  # to be sent when this turn of the loop ends
    failed: list[Failed] = field(default_factory=list)
    flushing: bool = False


class Door:
    """Create it on the event loop; `attend` until cancelled."""

    def __init__(self, service: RouterService, address: str) -> None:
        """Raises zmq.ZMQError when the address can't be bound."""
        self._service = service
        self._front_ends: dict[bytes, _FrontEnd] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # what managers asked for
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
        self._socket.bind(address)

    async def attend(self) -> None:
        try:
            while True:
                identity, *frames = await self._socket.recv_multipart()
                try:
                    message = to_router_decoder.decode(b"".join(frames))
                except UNREADABLE as error:
                    log.warning("a front end of another version knocks: %s", error)
                    continue
                front_end = self._front_ends.get(identity)
                if front_end is None:
                    front_end = self._front_ends[identity] = _FrontEnd(identity)
                self._hear(front_end, message)
        finally:
            self._close()

    def answer(self, front_end: _FrontEnd, answered: Answered) -> None:
        front_end.answered.append(answered)
        self._settle(front_end, answered.ask_id if answered.piece.finish_reason else None)

    def fail(self, front_end: _FrontEnd, failed: Failed) -> None:
        front_end.failed.append(failed)
        self._settle(front_end, failed.ask_id)

    def _settle(self, front_end: _FrontEnd, ended: AskId | None) -> None:
        if ended is not None:
            front_end.runs.pop(ended, None)
        if not front_end.flushing:
            front_end.flushing = True
            asyncio.get_running_loop().call_soon(self._flush, front_end)

    def _flush(self, front_end: _FrontEnd) -> None:
        answers = Answers(front_end.answered, front_end.failed)
        front_end.answered, front_end.failed, front_end.flushing = [], [], False
        self._send(front_end, answers)

    def _send(self, front_end: _FrontEnd, message: FromRouter) -> None:
        """Never blocks. What is sent to a front end that is gone is lost, and so is who waited for it."""
        if not self._socket.closed:
            self._socket.send_multipart([front_end.identity, encode(message)], zmq.NOBLOCK)

    def _hear(self, front_end: _FrontEnd, message: ToRouter) -> None:
        if isinstance(message, Ask):
            reply = _DoorReply(self, front_end, message)
            front_end.runs[message.ask_id] = self._service.accept(message.request, reply)
        elif isinstance(message, Drop):
            for ask_id in message.ask_ids:
                self._drop(front_end, ask_id)
        elif isinstance(message, Watch):
            self._send(front_end, news_of(self._service.house, message.after))
        elif isinstance(message, Find):
            self._send(front_end, Found(message.what, self._service.house.journal.find(message.what)))
        elif isinstance(message, Manage):
            task = asyncio.get_running_loop().create_task(self._manage(front_end, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            if front_end.pidfd is None:
                self._watch(front_end, message.pid)
            house = self._service.house
            self._send(front_end, Welcome(house.name, os.getpid(), house.trouble))

    async def _manage(self, front_end: _FrontEnd, message: Manage) -> None:
        drains, error = self._service.drains, ""
        try:
            if message.action == "drain":
                await drains.drain(message.worker, message.grace_s)
            elif message.role is not None:
                await drains.change_role(message.worker, message.role, message.grace_s)
            elif message.action == "restart":
                await drains.restart(message.worker, message.grace_s)
            else:
                drains.resume(message.worker)
        except BatonError as failed:
            error = str(failed)
        self._send(front_end, Managed(message.number, error))

    def _drop(self, front_end: _FrontEnd, ask_id: AskId) -> None:
        run = front_end.runs.pop(ask_id, None)
        if run is not None:
            self._service.cancel(run)

    def _watch(self, front_end: _FrontEnd, pid: int) -> None:
        try:
            front_end.pidfd = os.pidfd_open(pid)
        except OSError:
            self._gone(front_end)
            return
        asyncio.get_running_loop().add_reader(front_end.pidfd, self._gone, front_end)

    def _gone(self, front_end: _FrontEnd) -> None:
        """Its process has ended: nobody waits for its requests."""
        self._front_ends.pop(front_end.identity, None)
        self._unwatch(front_end)
        for ask_id in list(front_end.runs):
            self._drop(front_end, ask_id)

    def _unwatch(self, front_end: _FrontEnd) -> None:
        if front_end.pidfd is not None:
            asyncio.get_running_loop().remove_reader(front_end.pidfd)
            os.close(front_end.pidfd)
            front_end.pidfd = None

    def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for front_end in self._front_ends.values():
            self._unwatch(front_end)
            if front_end.flushing:
                self._flush(front_end)
        self._socket.close()
        self._context.term()


class _DoorReply:
    """One ask's answer; implements router.seams.Reply on the event loop."""

    def __init__(self, door: Door, front_end: _FrontEnd, ask: Ask) -> None:
        self._door = door
        self._front_end = front_end
        self._ask_id = ask.ask_id
        self._gathered = Gathered(ask.sending)

    def send(self, piece: Piece) -> None:
        whole = self._gathered.add(piece)
        if whole is not None:
            self._door.answer(self._front_end, Answered(self._ask_id, whole))

    def fail(self, error: BatonError) -> None:
        self._door.fail(
            self._front_end, Failed(self._ask_id, type(error).__name__, str(error), getattr(error, "retry_after_s", None))
        )
