"""A front end's side of the door: `DoorClient` has requests served by the router of this server.

A router that dies costs no request: what it had answered is known here, so its successor goes on after the tokens that
have been received, exactly (sampling depends only on seed and position). Belongs to one asyncio event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from python_backends.core.errors import BatonError, EngineFailure, Unavailable
from router.door.messages import (
    Answers,
    Ask,
    AskId,
    Drop,
    Failed,
    Find,
    Found,
    Hello,
    News,
    ToRouter,
    Watch,
    Welcome,
    encode,
    from_router_decoder,
)
from router.journal import Record
from router.types import ClientRequest, Piece, Sending

log = logging.getLogger(__name__)

_Value = TypeVar("_Value")

_HIGH_WATER_MARK = 100_000
_GREET_S = 0.5
_ANSWER_S = 2.0  # for news and what is looked for
_MOST_ROUTERS = 3
_SILENT_S = 5.0  # a living router that says nothing for so long is given up


class Answer:
    """One request's answer as it comes. `close` it, or use it as a context manager: what is not ended is cancelled."""

    def __init__(self, client: DoorClient, ask: Ask) -> None:
        self._client = client
        self._pieces: list[Piece] = []
        self._error: BatonError | None = None
        self._news = asyncio.Event()
        self._ended = False
        self.ask = ask
        self.lost = 0  # routers, in a row, that died before they had another token for it
        self.token_ids: list[int] = [*ask.request.output_ids]  # received so far

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def pieces(self) -> list[Piece]:
        """All that has come since the last call, at least one; the last one of all has finish_reason.

        Raises the router's error, after the pieces that came before it.
        """
        while not self._pieces:
            if self._error is not None:
                raise self._error
            await self._news.wait()
            self._news.clear()
        taken, self._pieces = self._pieces, []
        return taken

    async def whole(self) -> Piece:
        """The last piece; of an answer that is not streamed it is all of it. Raises as `pieces`."""
        while True:
            piece = (await self.pieces())[-1]
            if piece.finish_reason is not None:
                return piece

    def close(self) -> None:
        """Idempotent."""
        if not self._ended:
            self._client.drop(self.ask.ask_id)

    # --- for the client ---

    def add(self, piece: Piece) -> None:
        self.lost = 0
        self.token_ids += piece.token_ids
        self._pieces.append(piece)
        self._end(piece.finish_reason is not None)

    def fail(self, error: BatonError) -> None:
        self._error = error
        self._end(True)

    def _end(self, ended: bool) -> None:
        self._ended = ended
        self._news.set()


class DoorClient:
    """An asynchronous context manager. Inside it the router is found, and found again when it is restarted."""

    def __init__(self, address: str, router_wait_s: float, on_silence: Callable[[int], None] | None = None) -> None:
        """`router_wait_s`: how long requests wait when there is no router.

        `on_silence` is told the pidfd of a router that lives and is given up, since it says nothing.
        """
        self._address = address
        self._router_wait_s = router_wait_s
        self._on_silence = on_silence
        self._ids = itertools.count(1)
        self._asks: dict[AskId, Answer] = {}
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._router: Welcome | None = None
        self._wait_for_news: asyncio.Future[News] | None = None
        self._wait_for_found: dict[str, asyncio.Future[list[Record]]] = {}
        self._alone_since = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> DoorClient:
        self._task = asyncio.create_task(self._live())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._fail_all(Unavailable("the front end is shutting down; send the request again elsewhere or later"))
        self._context.destroy(linger=0)

    @property
    def router(self) -> Welcome | None:
        """The router as it is known now; None while there is none."""
        return self._router

    @property
    def alone_s(self) -> float:
        """Seconds without a router; 0 with one."""
        return 0.0 if self._router is not None else time.monotonic() - self._alone_since

    def ask(self, request: ClientRequest, sending: Sending) -> Answer:
        """The request must have a seed, so that another router can go on with it."""
        answer = Answer(self, Ask(next(self._ids), request, sending))
        self._asks[answer.ask.ask_id] = answer
        if self._router is not None:
            self._send(answer.ask)
        return answer

    def drop(self, ask_id: AskId) -> None:
        if self._asks.pop(ask_id, None) is not None and self._router is not None:
            self._send(Drop([ask_id]))

    async def news(self, after: int) -> News | None:
        """What is new at the router; None when there is none or it does not answer. One at a time. `after`: see Watch."""
        if self._router is None:
            return None
        self._wait_for_news = asyncio.get_running_loop().create_future()
        self._send(Watch(after))
        await asyncio.wait({self._wait_for_news}, timeout=_ANSWER_S)
        return self._wait_for_news.result() if self._wait_for_news.done() else None

    async def find(self, what: str) -> list[Record]:
        """Requests in the router's journal, see Journal.find. Raises Unavailable when the router does not answer."""
        if self._router is None:
            raise Unavailable("the router is not up; try again in a moment")
        waiting = self._wait_for_found.setdefault(what, asyncio.get_running_loop().create_future())
        self._send(Find(what))
        await asyncio.wait({waiting}, timeout=_ANSWER_S)
        if not waiting.done():
            self._wait_for_found.pop(what, None)
            raise Unavailable("the router does not answer; try again in a moment")
        return waiting.result()

    # --- the lives of routers ---

    async def _live(self) -> None:
        while True:
            socket = self._socket = self._context.socket(zmq.DEALER)
            socket.set_hwm(_HIGH_WATER_MARK)
            socket.setsockopt(zmq.IDENTITY, secrets.token_bytes(8))  # another one for each router: nothing is mixed up
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 20)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
            socket.connect(self._address)
            try:
                await self._one_life(socket)
            finally:
                self._lose_router()
                socket.close()

    async def _one_life(self, socket: zmq.asyncio.Socket) -> None:
        """Until the router dies, falls silent or is replaced."""
        listening = asyncio.create_task(self._listen(socket))
        died = asyncio.get_running_loop().create_future()
        pidfd: int | None = None
        heard = time.monotonic()
        try:
            while not listening.done() and not died.done():
                self._send(Hello(os.getpid()))
                self._give_up_waiting()
                await asyncio.wait({listening, died}, timeout=_GREET_S, return_when=asyncio.FIRST_COMPLETED)
                if self._heard:
                    self._heard, heard = False, time.monotonic()
                if self._router is not None and pidfd is None:
                    pidfd = _watch(self._router.pid, died)
                if time.monotonic() - heard > _SILENT_S:
                    if pidfd is not None and self._on_silence is not None:
                        self._on_silence(pidfd)
                    return
        finally:
            if pidfd is not None:
                asyncio.get_running_loop().remove_reader(pidfd)
                os.close(pidfd)
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening

    _heard = False  # something, since it was last looked at

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        """Ends when another router answers than before."""
        while True:
            message = from_router_decoder.decode(await socket.recv())
            self._heard = True
            if isinstance(message, Answers):
                self._take(message)
            elif isinstance(message, News):
                _resolve(self._wait_for_news, message)
            elif isinstance(message, Found):
                _resolve(self._wait_for_found.pop(message.what, None), message.records)
            elif self._router is None:
                self._find_router(message)
            elif self._router.router != message.router:
                return
            else:
                self._router = message

    def _find_router(self, welcome: Welcome) -> None:
        self._router = welcome
        for answer in list(self._asks.values()):
            if answer.lost >= _MOST_ROUTERS:
                del self._asks[answer.ask.ask_id]
                answer.fail(EngineFailure(f"{answer.lost} routers died in a row while this request ran; it is not tried again"))
                continue
            request = msgspec.structs.replace(answer.ask.request, output_ids=list(answer.token_ids))
            self._send(msgspec.structs.replace(answer.ask, request=request))

    def _lose_router(self) -> None:
        if self._router is not None:
            log.warning("the router is gone; %d requests wait for another", len(self._asks))
            self._router = None
            for answer in self._asks.values():
                answer.lost += 1
            self._alone_since = time.monotonic()

    def _give_up_waiting(self) -> None:
        if self._asks and self.alone_s > self._router_wait_s:
            self._fail_all(Unavailable("the router is not up; try again in a moment"))

    def _take(self, answers: Answers) -> None:
        for answered in answers.answered:
            answer = self._asks.get(answered.ask_id)
            if answer is not None:
                answer.add(answered.piece)
                if answered.piece.finish_reason is not None:
                    del self._asks[answered.ask_id]
        for failed in answers.failed:
            answer = self._asks.pop(failed.ask_id, None)
            if answer is not None:
                answer.fail(_error(failed))

    def _fail_all(self, error: BatonError) -> None:
        asks, self._asks = self._asks, {}
        for answer in asks.values():
            answer.fail(error)

    def _send(self, message: ToRouter) -> None:
        assert self._socket is not None
        self._socket.send(encode(message), zmq.NOBLOCK)  # queued at once; what no router takes is said again to the next


def _watch(pid: int, died: asyncio.Future[None]) -> int | None:
    """A pidfd whose process's end resolves `died`; None when it can't be watched, then silence tells."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        died.set_result(None)
        return None
    except OSError:
        return None
    asyncio.get_running_loop().add_reader(pidfd, _resolve, died, None)
    return pidfd


def _resolve(future: asyncio.Future[_Value] | None, value: _Value) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _with_subclasses(kind: type[BatonError]) -> dict[str, type[BatonError]]:
    found = {kind.__name__: kind}
    for inner in kind.__subclasses__():
        found |= _with_subclasses(inner)
    return found


_ERRORS = _with_subclasses(BatonError)


def _error(failed: Failed) -> BatonError:
    kind = _ERRORS.get(failed.error, EngineFailure)
    if issubclass(kind, Unavailable):
        return kind(failed.message, failed.retry_after_s)
    return kind(failed.message)
