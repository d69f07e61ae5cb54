"""One request's way back through Triton: any number of responses, and exactly one FINAL flag on every path."""

from __future__ import annotations

import threading
from typing import Any

import triton_python_backend_utils as pb_utils


class ResponseStream:
    """Wraps a decoupled request's response sender. Thread-safe; what comes after the final response is dropped."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._ended = False

    @property
    def ended(self) -> bool:
        return self._ended

    def send(self, response: Any, *, final: bool) -> None:
        """response: pb_utils.InferenceResponse."""
        with self._lock:
            if self._ended:
                return
            self._ended = final
            if final:
                self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            else:
                self._sender.send(response)

    def is_cancelled(self) -> bool:
        """Whether the client has gone away. Asks the server: a call between processes."""
        with self._lock:
            return not self._ended and bool(self._sender.is_cancelled())
