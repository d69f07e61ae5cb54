"""Answers on their way to clients: one thread encodes and sends for all requests, one looks who has gone away."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import triton_python_backend_utils as pb_utils

from python_backends.core.errors import BatonError
from python_backends.triton.errors import triton_error
from python_backends.triton.stream import ResponseStream
from router.reply import Gathered, merged
from router.run import Run
from router.triton.codec import TokenText, Wanted, encode_piece
from router.types import Piece

_LOOK_EVERY_S = 0.1  # how often each running request is asked whether its client is still there


class TritonReply:
    """One request's answer; implements router.seams.Reply on the event loop. The writer takes what has come meanwhile.

    So when steps outrun the server's response path, responses carry several tokens, instead of queueing up.
    """

    def __init__(self, stream: ResponseStream, wanted: Wanted, writer: Writer) -> None:
        self.stream = stream
        self.wanted = wanted
        self.sent = 0.0  # the last response, monotonic s; 0 before the first. Belongs to the writer
        self._writer = writer
        self._gathered = Gathered(wanted.sending, wanted.prompt_text)
        self._lock = threading.Lock()
        self._pieces: list[Piece] = []
        self._error: BatonError | None = None
        self._waiting = False  # for the writer

    def send(self, piece: Piece) -> None:
        whole = self._gathered.add(piece)
        if whole is not None:
            with self._lock:
                self._pieces.append(whole)
            self._wait()

    def fail(self, error: BatonError) -> None:
        with self._lock:
            self._error = error
        self._wait()

    def take(self) -> tuple[Piece | None, BatonError | None]:
        """What is to be sent now: a response, an error, or one after the other."""
        with self._lock:
            pieces, self._pieces, self._waiting = self._pieces, [], False
            return merged(pieces), self._error

    def _wait(self) -> None:
        with self._lock:
            if self._waiting:
                return
            self._waiting = True
        self._writer.put(self)


class Writer:
    """The one thread that sends. Sending is a call between processes; it must not hold up the event loop."""

    def __init__(self, token_text: TokenText, interval_s: float) -> None:
        """interval_s: responses of one stream are at least so far apart; the first is never held back."""
        self._token_text = token_text
        self._interval_s = interval_s
        self._queue: queue.SimpleQueue[TritonReply | None] = queue.SimpleQueue()
        self._later: deque[TritonReply] = deque()  # sent too lately; in the order in which they are due
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def put(self, reply: TritonReply) -> None:
        self._queue.put(reply)

    def refuse(self, stream: ResponseStream, error: BatonError, with_code: bool) -> None:
        """Answer a request that is not served at all. with_code: see codec.wants_error_codes."""
        stream.send(pb_utils.InferenceResponse(error=triton_error(error, with_code)), final=True)

    def close(self) -> None:
        """Send what is queued, then stop."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (reply := self._next()) is not None:
            self._send(reply)
        for reply in self._later:
            self._send(reply)

    def _next(self) -> TritonReply | None:
        """The next one that is due; None to stop."""
        while True:
            wait_s = max(0.0, self._later[0].sent + self._interval_s - time.monotonic()) if self._later else None
            try:
                reply = self._queue.get(timeout=wait_s)
            except queue.Empty:
                return self._later.popleft()
            if reply is None or reply.sent + self._interval_s <= time.monotonic():
                return reply
            self._later.append(reply)

    def _send(self, reply: TritonReply) -> None:
        piece, error = reply.take()
        if piece is not None:
            final = piece.finish_reason is not None
            reply.stream.send(encode_piece(piece, reply.wanted, self._token_text), final=final)
            reply.sent = time.monotonic()
        if error is not None:
            self.refuse(reply.stream, error, reply.wanted.error_codes)


class CancelWatch:
    """The one thread that notices clients that went away. Triton can only be asked, it doesn't tell."""

    def __init__(self, cancel: Callable[[Run], None]) -> None:
        self._cancel = cancel
        self._running: dict[Run, ResponseStream] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._look, name="cancel-watch", daemon=True)
        self._thread.start()

    def add(self, run: Run, stream: ResponseStream) -> None:
        with self._lock:
            self._running[run] = stream
        self._wake.set()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout=10)

    def _look(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                running = list(self._running.items())
            if not running:
                self._wake.wait()  # idle: no looking at all
                self._wake.clear()
                continue
            for run, stream in running:
                if stream.is_cancelled():
                    self._cancel(run)
                elif not stream.ended:
                    continue
                with self._lock:
                    self._running.pop(run, None)
            self._closing.wait(_LOOK_EVERY_S)
