"""Answers on their way to clients: one thread encodes and sends for all requests, one looks who has gone away."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import triton_python_backend_utils as pb_utils

from python_backends.core.errors import BatonError
from python_backends.triton.errors import triton_error
from python_backends.triton.stream import ResponseStream
from router.reply import Gathered
from router.run import Run
from router.triton.codec import TokenText, Wanted, encode_piece
from router.types import Piece

_LOOK_EVERY_S = 0.1  # how often each running request is asked whether its client is still there


class TritonReply:
    """One request's answer; implements router.seams.Reply on the event loop."""

    def __init__(self, stream: ResponseStream, wanted: Wanted, writer: Writer) -> None:
        self._stream = stream
        self._wanted = wanted
        self._writer = writer
        self._gathered = Gathered(stream=wanted.stream, prompt_text=wanted.prompt_text)

    @property
    def stream(self) -> ResponseStream:
        return self._stream

    def send(self, piece: Piece) -> None:
        whole = self._gathered.add(piece)
        if whole is not None:
            self._writer.put(self._stream, whole, self._wanted)

    def fail(self, error: BatonError) -> None:
        self._writer.put(self._stream, error, self._wanted)


class Writer:
    """The one thread that sends. Sending is a call between processes; it must not hold up the event loop."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._queue: queue.SimpleQueue[tuple[ResponseStream, Piece | BatonError, Wanted | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def put(self, stream: ResponseStream, answer: Piece | BatonError, wanted: Wanted | None) -> None:
        self._queue.put((stream, answer, wanted))

    def close(self) -> None:
        """Send what is queued, then stop."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            stream, answer, wanted = item
            if isinstance(answer, BatonError):
                stream.send(pb_utils.InferenceResponse(error=triton_error(answer)), final=True)
            elif wanted is not None:
                stream.send(encode_piece(answer, wanted, self._token_text), final=answer.finish_reason is not None)


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
