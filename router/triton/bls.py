"""Work to workers of the same server by BLS: short, non-decoupled calls on one thread per worker.

A call to a worker that was killed takes Triton a second or two to fail; it holds up only the thread of that worker. Work
that queues up meanwhile goes out together in the next call.
"""

from __future__ import annotations

import queue
import threading
import urllib.request
from collections.abc import Callable

import numpy as np
import triton_python_backend_utils as pb_utils

from python_backends.core.errors import Unavailable
from python_backends.core.messages import Work, seal_work
from python_backends.core.tensors import ACCEPTED, WORK
from python_backends.core.types import WorkerId

_MOST_PER_CALL = 64
_LOAD_S = 300.0  # as scripts/serve waits at the start

_Item = tuple[Work, Callable[[str], None]]


class BlsSubmitter:
    """Implements router.service.Submit; may be called from any thread."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._queues: dict[WorkerId, queue.SimpleQueue[_Item]] = {}
        self._lock = threading.Lock()

    def __call__(self, worker: WorkerId, work: Work, failed: Callable[[str], None]) -> None:
        with self._lock:
            waiting = self._queues.get(worker)
            if waiting is None:
                waiting = self._queues[worker] = queue.SimpleQueue()
                threading.Thread(target=self._run, args=(worker, waiting), name=f"submit-{worker}", daemon=True).start()
        waiting.put((work, failed))

    def _run(self, worker: WorkerId, waiting: queue.SimpleQueue[_Item]) -> None:
        while True:
            items = [waiting.get()]
            while len(items) < _MOST_PER_CALL and not waiting.empty():
                items.append(waiting.get())
            error = self._call(worker, [work for work, _ in items])
            if error is not None:
                for _, failed in items:
                    failed(f"worker {worker} did not take the request: {error}")

    def _call(self, worker: WorkerId, work: list[Work]) -> str | None:
        sealed = np.frombuffer(seal_work(work, self._key), np.uint8)
        request = pb_utils.InferenceRequest(
            model_name=worker,
            requested_output_names=[ACCEPTED.name],
            inputs=[pb_utils.Tensor(WORK.name, sealed)],
        )
        try:
            response = request.exec()
        except pb_utils.TritonModelException as error:
            return str(error)
        return str(response.error().message()) if response.has_error() else None


class TritonModelControl:
    """Implements router.supervisor.ModelControl."""

    def __init__(self, address: str) -> None:
        """`address`: HOST:PORT of the server's HTTP service. Without it the Python backend is asked.

        That holds the interpreter until the model is up, seconds in which no stream of this router goes on.
        """
        self._address = address

    def restart(self, worker: WorkerId) -> None:
        """Blocks until the model is up. Raises Unavailable.

        Loading a model whose process died does nothing as long as Triton counts it as loaded, hence unload first.
        """
        try:
            if self._address:
                for action in ("unload", "load"):
                    self._post(worker, action)
            else:
                pb_utils.unload_model(worker)
                pb_utils.load_model(worker)
        except (OSError, pb_utils.TritonModelException) as error:
            raise Unavailable(
                f"{error}; restarts need tritonserver --model-control-mode=explicit --load-model=* (scripts/serve does that)"
            ) from error

    def _post(self, worker: WorkerId, action: str) -> None:
        """Raises OSError, which urllib's errors are."""
        url = f"http://{self._address}/v2/repository/models/{worker}/{action}"
        with urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=_LOAD_S) as response:
            response.read()
