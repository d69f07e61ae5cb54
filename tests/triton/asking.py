"""A plain Triton client for tests: inputs by name in, all responses of one request out."""

from __future__ import annotations

import queue
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import psutil
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from python_backends.core.tensors import ROUTER_INPUTS
from scripts.tritonserver import TritonServer

TIMEOUT_S = 120.0
_DTYPES = {spec.name: spec.dtype for spec in ROUTER_INPUTS}
_NUMPY = {"STRING": np.object_, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_, "UINT64": np.uint64}
_WIRE = {"STRING": "BYTES"}


class Server(Protocol):
    """A running server, wherever it is."""

    @property
    def host(self) -> str: ...

    @property
    def grpc_port(self) -> int: ...

    @property
    def metrics_port(self) -> int: ...


@dataclass
class Answer:
    """Responses in order, each {output name: flat list}; `error` if the request failed."""

    responses: list[dict[str, list[Any]]] = field(default_factory=list)
    finals: int = 0
    error: InferenceServerException | None = None

    @property
    def text(self) -> str:
        assert self.error is None, self.error
        return "".join(response["text_output"][0].decode() for response in self.responses)

    @property
    def ids(self) -> list[int]:
        assert self.error is None, self.error
        return [token for response in self.responses for token in response.get("output_ids", [])]

    def last(self, name: str) -> Any:
        return self.responses[-1][name][0]


def tensors(fields: Mapping[str, Any]) -> list[triton.InferInput]:
    """Inputs of shape [1, n]."""
    inputs = []
    for name, value in fields.items():
        dtype = _DTYPES[name]
        values = value if isinstance(value, list) else [value]
        if dtype == "STRING":
            values = [v.encode() if isinstance(v, str) else v for v in values]
        array = np.array(values, dtype=_NUMPY[dtype]).reshape(1, -1)
        tensor = triton.InferInput(name, list(array.shape), _WIRE.get(dtype, dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


class Asking:
    """One gRPC stream, so any number of requests at once from one thread."""

    def __init__(self, server: Server, *, with_codes: bool = False) -> None:
        """`with_codes`: errors begin with their code."""
        self._client = triton.InferenceServerClient(f"{server.host}:{server.grpc_port}")
        self._events: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._parameters = {"error_codes": True} if with_codes else None
        self._client.start_stream(lambda result, error: self._events.put((result, error)))
        self._answers: dict[str, Answer] = {}

    def close(self, cancel: bool = False) -> None:
        """Closing with `cancel` drops all that runs, as a client that goes away does."""
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()

    def send(self, request_id: str, **fields: Any) -> None:
        self._answers[request_id] = Answer()
        self._client.async_stream_infer(
            "router",
            tensors(fields),
            request_id=request_id,
            enable_empty_final_response=True,
            parameters=self._parameters,
        )

    def next_response(self) -> str:
        """Wait for one response of any request; returns whose."""
        result, error = self._events.get(timeout=TIMEOUT_S)
        if error is not None:
            # An error of a stream names its request only in the message's prefix; one request at a time then.
            request_id = _request_of(error, self._answers)
            self._answers[request_id].error = error
            self._answers[request_id].finals += 1
            return request_id
        response = result.get_response()
        answer = self._answers[response.id]
        if response.outputs:
            outputs = {output.name: list(result.as_numpy(output.name).reshape(-1)) for output in response.outputs}
            answer.responses.append(outputs)
        if response.parameters["triton_final_response"].bool_param:
            answer.finals += 1
        return str(response.id)

    def collect(self, *request_ids: str) -> list[Answer]:
        while any(self._answers[request_id].finals == 0 for request_id in request_ids):
            self.next_response()
        return [self._answers[request_id] for request_id in request_ids]

    def ask(self, **fields: Any) -> Answer:
        request_id = f"q{len(self._answers)}"
        self.send(request_id, **fields)
        return self.collect(request_id)[0]


def _request_of(error: Any, answers: Mapping[str, Answer]) -> str:
    open_requests = [request_id for request_id, answer in answers.items() if answer.finals == 0]
    named = [request_id for request_id in open_requests if f"[request id: {request_id}]" in str(error)]
    return (named or open_requests)[0]


def metrics(server: Server) -> dict[str, float]:
    """`name{labels}` -> value, of Baton's own metrics."""
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {match[1]: float(match[2]) for match in re.finditer(r"^(baton\S+) (\S+)$", text, re.MULTILINE)}


def total(values: Mapping[str, float], name: str, **labels: str) -> float:
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(v for key, v in values.items() if key.startswith(name + "{") and all(w in key for w in wanted))


def wait_until_nothing_is_held(server: Server, within_s: float) -> None:
    """Pool counters of every worker: no block held, no lease, free + cached the whole pool."""
    end = time.monotonic() + within_s
    while True:
        values = metrics(server)
        held = total(values, "baton_kv_blocks", state="held")
        leases = total(values, "baton_leases")
        in_house = values["baton_router_requests"]
        if not held and not leases and not in_house:
            return
        assert time.monotonic() < end, f"{held} blocks held, {leases} leases, {in_house} requests after {within_s} s"
        time.sleep(0.05)


def worker_process(server: TritonServer, name: str) -> psutil.Process:
    """The process of a worker's model."""
    for process in psutil.Process(server.pid).children(recursive=True):
        if process.status() != psutil.STATUS_ZOMBIE and re.search(rf"/{name}/1/model\.py", " ".join(process.cmdline())):
            return process
    raise AssertionError(f"no process of {name}")
