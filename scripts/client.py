"""A client of the router over gRPC: what demo, chat, soak and the tests talk through.

Every request is a stream of its own, so that cancelling it ends this request alone and its errors carry a code; all
streams of a `Client` share one HTTP/2 connection. tritonclient gives the messages and the stub. Its
`InferenceServerClient` is not used: it holds one stream per connection and cancels all requests of it together.

Triton's stream is bidirectional; a request here sends its one message and nothing after it, which on the wire is a
call with one message up and a stream down. gRPC can read such a call in the thread that iterates. A bidirectional one
needs two more threads and a hand-over per message: a third more CPU per token, which a load test would take from the
server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc  # type: ignore[import-untyped]
import grpc.experimental  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from python_backends.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    TritonCode,
    Unavailable,
)
from python_backends.core.tensors import ROUTER_INPUTS

Message = Mapping[str, str]
"""One message of a chat: {"role": "user", "content": "..."}."""

_MODEL = "router"
_TENSORS = {tensor.name: tensor for tensor in ROUTER_INPUTS}
_CONTENTS = {  # Triton's dtype -> (the wire's name, field of InferTensorContents)
    "STRING": ("BYTES", "bytes_contents"),
    "INT32": ("INT32", "int_contents"),
    "UINT64": ("UINT64", "uint64_contents"),
    "FP32": ("FP32", "fp32_contents"),
    "BOOL": ("BOOL", "bool_contents"),
}
_ALWAYS = {"stream": True, "return_finish_reason": True, "return_num_output_tokens": True, "return_proof": True}
_ERRORS: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: EngineFailure,
}
_BY_CODE: dict[str, type[BatonError]] = {
    TritonCode.INVALID_ARG.value: InvalidRequest,
    TritonCode.UNAVAILABLE.value: Unavailable,
    TritonCode.CANCELLED.value: Cancelled,
    TritonCode.INTERNAL.value: EngineFailure,
}
_MODEL_IS_AWAY = ("unknown model", "is not ready", "no available versions", "is unloading")  # Triton's own words
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
)
_STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
_PROBE_TIMEOUT_S = 2.0
_PROBE_EVERY_S = 0.1
_GRACE_S = 5.0  # the server's own time-out, which comes with a sentence, is to be first


@dataclass(frozen=True, slots=True)
class Chunk:
    """One response. The last one has a finish_reason (stop or length) and the proof (docs/api.md)."""

    text: str
    num_tokens: int  # new tokens in it
    time: float  # of arrival here, monotonic seconds
    finish_reason: str = ""
    proof: dict[str, Any] | None = None
    token_ids: tuple[int, ...] = ()  # with return_output_ids


class Client:
    """One connection to one server; `address` is HOST:PORT of its gRPC service. Any number of threads may use it.

    Nothing is sent before the first call. A context manager; closing it cancels what is still running.
    """

    def __init__(self, address: str, request_id: str = "") -> None:
        """`request_id`: what the router's journal calls the requests of this client."""
        self.address = address
        self._request_id = request_id
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stream_infer = self._channel.unary_stream(
            _STREAM_INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when server and router are ready. Raises Unavailable, whose message says what is missing."""
        deadline = time.monotonic() + timeout_s
        while problem := self._problem():
            if time.monotonic() >= deadline:
                raise Unavailable(problem)
            time.sleep(_PROBE_EVERY_S)

    def stream(self, prompt: str | Sequence[Message] | None, *, timeout_s: float = 600.0, **fields: object) -> Stream:
        """Send a request now; iterate over the result for its chunks.

        `prompt`: text, the messages of a chat, or None when `input_ids` is among the fields. `fields`: any other input
        of the router by its name in core/tensors.py (max_tokens, temperature, stop_words, route, ...); None is left
        out. `timeout_s`: from now to the last chunk. Raises InvalidRequest when a field is unknown or of a wrong type.
        """
        given: dict[str, object] = {"text_input": prompt}
        if prompt is not None and not isinstance(prompt, str):
            given = {"messages": json.dumps([dict(message) for message in prompt])}
        request = encode_request({**given, **fields, **_ALWAYS}, timeout_s)
        request.id = self._request_id
        return Stream(self, self._stream_infer(request, timeout=timeout_s + _GRACE_S))

    def explain(self, error: grpc.RpcError) -> BatonError:
        """The error as ours. A refused request and a missing server have the same code: only asking tells them apart."""
        if error.code() is grpc.StatusCode.UNAVAILABLE and not self._answers():
            return Unavailable(unreachable(self.address))
        return _ERRORS.get(error.code(), BatonError)(error.details())

    def _problem(self) -> str:
        """Why requests can't be sent now, or an empty string."""
        if not self._answers():
            return unreachable(self.address)
        try:
            ready = self._stub.ModelReady(service_pb2.ModelReadyRequest(name=_MODEL), timeout=_PROBE_TIMEOUT_S).ready
        except grpc.RpcError as error:
            return f"the server at {self.address} says: {error.details()}"
        return "" if ready else f"the server at {self.address} has no model {_MODEL} that is ready; its log says why"

    def _answers(self) -> bool:
        try:
            self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return False
        return True


class Stream(Iterator[Chunk]):
    """The answer to one request, chunk by chunk. A context manager: what is not finished when it closes is cancelled.

    Iterating raises the server's error with its message: InvalidRequest, Unavailable, DeadlineExceeded, EngineFailure,
    and Cancelled after `close`. One thread iterates, and leaves the `with` block.
    """

    def __init__(self, client: Client, call: Any) -> None:
        """`call`: the gRPC call, an iterator of ModelStreamInferResponse."""
        self._client = client
        self._call = call
        self._finished = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
        self._drain()

    def __next__(self) -> Chunk:
        try:
            response = next(self._call)
        except StopIteration:
            if self._finished:
                raise
            raise EngineFailure("the answer ended before its last response; the server's log says why") from None
        except grpc.RpcError as error:
            raise self._client.explain(error) from None
        if response.error_message:
            raise stated_error(response.error_message)
        chunk = decode_response(response.infer_response)
        self._finished = bool(chunk.finish_reason)
        return chunk

    def close(self) -> None:
        """Cancel the request at the server if it is still running. Idempotent; any thread may call it."""
        self._call.cancel()

    def _drain(self) -> None:
        """Take what has arrived; it ends at once with the call's status, and gRPC frees the call."""
        try:
            while True:
                next(self._call)
        except (StopIteration, grpc.RpcError):
            return


def stated_error(message: str) -> BatonError:
    """An error that came as a message of the stream: the router's begins with its code, Triton's own has none.

    Triton would end the stream with the code as the call's status, if the call's metadata said `triton_grpc_error`. Before
    26.04 that may crash the server: it frees the stream's state and goes on using it.
    """
    code, colon, rest = message.partition(": ")
    if colon and code in _BY_CODE:
        return _BY_CODE[code](rest)
    return (Unavailable if any(words in message for words in _MODEL_IS_AWAY) else EngineFailure)(message)


def unreachable(address: str) -> str:
    return f"no server answers at {address}; start one with `make serve`"


def encode_request(fields: Mapping[str, object], timeout_s: float) -> Any:
    """ModelInferRequest with one tensor [1, n] per field. Raises InvalidRequest that names the field."""
    request = service_pb2.ModelInferRequest(model_name=_MODEL)
    request.parameters["timeout"].int64_param = int(timeout_s * 1e6)
    request.parameters["error_codes"].bool_param = True
    for name, value in fields.items():
        if value is not None:
            _add_tensor(request, name, value)
    return request


def _add_tensor(request: Any, name: str, value: object) -> None:
    spec = _TENSORS.get(name)
    if spec is None:
        raise InvalidRequest(f"the router has no input {name!r}; core/tensors.py lists them")
    values = list(value) if isinstance(value, list | tuple) else [value]
    datatype, field = _CONTENTS[spec.dtype]
    tensor = request.inputs.add(name=name, datatype=datatype, shape=[1, len(values)])
    try:
        getattr(tensor.contents, field).extend(item.encode() if isinstance(item, str) else item for item in values)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{name} is {value!r}; it must be {spec.dtype}: {error}") from error


def decode_response(response: Any) -> Chunk:
    """`response`: a ModelInferResponse of the router. Read byte by byte: numpy would be half of a client's CPU."""
    outputs = dict(zip((output.name for output in response.outputs), response.raw_output_contents, strict=True))
    proof = _text(outputs, "proof")
    ids = outputs.get("output_ids")
    return Chunk(
        text=_text(outputs, "text_output"),
        num_tokens=int.from_bytes(outputs["num_output_tokens"], "little"),
        time=time.monotonic(),
        finish_reason=_text(outputs, "finish_reason"),
        proof=json.loads(proof) if proof else None,
        token_ids=tuple(memoryview(ids).cast("i")) if ids else (),
    )


def _text(outputs: Mapping[str, bytes], name: str) -> str:
    """A text output (one string: its length in 4 bytes, then itself); empty when the response is without it."""
    return outputs.get(name, b"")[4:].decode()
