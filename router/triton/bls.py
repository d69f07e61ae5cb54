"""Work to workers by short Triton calls: by BLS to those of the same server, by gRPC to others.

BLS calls block, so there is one thread per worker: a call to one that was killed takes Triton a second or two to fail,
and holds up only that worker's. Work that queues up meanwhile goes out together in the next call.
"""

from __future__ import annotations

import json
import queue
import threading
import urllib.request
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from python_backends.core.errors import Unavailable
from python_backends.core.messages import Work
from python_backends.core.orders import OrderBook
from python_backends.core.tensors import ACCEPTED, WORK
from python_backends.core.types import Role, WorkerId
from router.seams import Destination, Failed
from router.triton.model_config import in_role
from router.triton.remote import HOW_TO_RESTART, RemoteServers
from router.triton.restart_marks import RestartMarks

_MOST_PER_CALL = 64
_LOAD_S = 300.0  # as scripts/serve waits at the start
_READ_S = 2.0

_WRECKED = ("is not healthy", "the health mutex")  # Triton's own words for a process that does not answer, or has died

_Item = tuple[Destination, Work, Failed]


class TritonSubmitter:
    """Implements router.service.Submit; may be called from any thread."""

    def __init__(self, key: bytes, own: Collection[WorkerId], remote: RemoteServers) -> None:
        """own: workers of this server."""
        self._orders = OrderBook(key)
        self._own = own
        self._remote = remote
        self._queues: dict[WorkerId, queue.SimpleQueue[_Item]] = {}
        self._lock = threading.Lock()

    def __call__(self, worker: Destination, work: Work, failed: Failed) -> None:
        if worker.worker not in self._own:
            self._remote.submit(worker, self._orders.seal(worker.worker, worker.epoch, [work]), failed)
            return
        with self._lock:
            waiting = self._queues.get(worker.worker)
            if waiting is None:
                waiting = self._queues[worker.worker] = queue.SimpleQueue()
                name = f"submit-{worker.model}"
                threading.Thread(target=self._run, args=(waiting,), name=name, daemon=True).start()
        waiting.put((worker, work, failed))

    def _run(self, waiting: queue.SimpleQueue[_Item]) -> None:
        while True:
            items = [waiting.get()]
            while len(items) < _MOST_PER_CALL and not waiting.empty():
                items.append(waiting.get())
            for worker, same in groupby(items, key=lambda item: item[0]):  # one life of it, but for a moment after a restart
                group = list(same)
                error = self._call(worker, [work for _, work, _ in group])
                if error is not None:
                    for _, _, failed in group:
                        failed(f"worker {worker.model} did not take the request: {error}", wrecked=_is_wrecked(error))

    def _call(self, worker: Destination, work: list[Work]) -> str | None:
        sealed = np.frombuffer(self._orders.seal(worker.worker, worker.epoch, work), np.uint8)
        request = pb_utils.InferenceRequest(
            model_name=worker.model,
            requested_output_names=[ACCEPTED.name],
            inputs=[pb_utils.Tensor(WORK.name, sealed)],
        )
        try:
            response = request.exec()
        except pb_utils.TritonModelException as error:
            return str(error)
        return str(response.error().message()) if response.has_error() else None


def _is_wrecked(error: str) -> bool:
    """See router.seams.Failed."""
    return any(words in error for words in _WRECKED)


class TritonModelControl:
    """Implements router.supervisor.ModelControl."""

    def __init__(
        self, address: str, headers: Mapping[str, str], own: Collection[WorkerId], remote: RemoteServers, marks: RestartMarks
    ) -> None:
        """`address`: HOST:PORT of this server's HTTP service, which opens to `headers`. Without it the Python backend is asked.

        That holds the interpreter until the model is up, seconds in which no stream of this router goes on.
        """
        self._address = address
        self._headers = dict(headers)
        self._own = own
        self._remote = remote
        self._marks = marks

    def reach(self, worker: Destination) -> None:
        """See router.supervisor.ModelControl."""
        if worker.worker not in self._own:
            self._remote.reach(worker)

    def restart(self, worker: Destination, role: Role | None = None) -> None:
        """See router.supervisor.ModelControl. Raises Unavailable.

        Loading a model whose process died does nothing as long as Triton counts it as loaded, hence unload first.
        """
        if worker.worker in self._own:
            self._restart(worker, role)
        else:
            self._remote.restart(worker, role)

    def marked(self, worker: Destination) -> AbstractContextManager[None]:
        """See router.supervisor.ModelControl."""
        return self._marks.mark(worker)

    def interrupted(self) -> list[Destination]:
        """See router.supervisor.ModelControl."""
        return self._marks.left()

    def _restart(self, worker: Destination, role: Role | None) -> None:
        config = None if role is None else in_role(worker, self._read_config(worker), role)
        try:
            if self._address:
                self._post(worker.model, "unload", {})
                self._post(worker.model, "load", {} if config is None else {"parameters": {"config": json.dumps(config)}})
            else:
                pb_utils.unload_model(worker.model)
                pb_utils.load_model(worker.model)
        except (OSError, pb_utils.TritonModelException) as error:
            raise Unavailable(f"{error}; {HOW_TO_RESTART}") from error

    def _read_config(self, worker: Destination) -> dict[str, Any] | None:
        """In the JSON of Triton's API; None where it tells none."""
        if not self._address:
            return None
        url = f"http://{self._address}/v2/models/{worker.model}/config"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=self._headers), timeout=_READ_S) as response:
                config: dict[str, Any] = json.load(response)
        except (OSError, ValueError):
            return None
        return config

    def _post(self, model: str, action: str, body: dict[str, Any]) -> None:
        """Raises OSError, which urllib's errors are."""
        url = f"http://{self._address}/v2/repository/models/{model}/{action}"
        request = urllib.request.Request(url, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=_LOAD_S) as response:
            response.read()
