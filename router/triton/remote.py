"""Triton servers of other hosts, over gRPC: work handed to their workers, and their models loaded anew."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2, service_pb2_grpc

from python_backends.core.config import ClusterConfig
from python_backends.core.deployment_key import OPERATOR_METADATA, operator_secret
from python_backends.core.errors import Unavailable
from python_backends.core.tensors import ACCEPTED, WORK
from python_backends.core.tls import check_authority, check_certificate
from python_backends.core.types import Role
from router.seams import Destination
from router.triton.model_config import in_role

HOW_TO_RESTART = "restarts need tritonserver --model-control-mode=explicit --load-model=* (scripts/serve does that)"

_SUBMIT_TIMEOUT_S = 5.0
_REACH_TIMEOUT_S = 2.0
_RESTART_TIMEOUT_S = 300.0  # for one load: weights may be large
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    # What was lost on the way must not be waited for: TCP itself tries again after ever longer pauses, at last of minutes.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # also how long a connection may take to be made
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

# What gRPC says of connections that could not be made, and what that means here.
_NOT_CONNECTED = "failed to connect to all addresses"
_TLS_MENDS = {
    "WRONG_VERSION_NUMBER": "the server speaks no TLS: give cluster.grpc_certificate there, or no cluster.tls_ca here",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of the server's gRPC is not vouched for by cluster.tls_ca",
    "Hostname Verification": "the certificate of the server's gRPC is for another host than its cluster.advertise",
    "Socket closed": "if the server has a cluster.grpc_client_ca, this one needs a cluster.tls_certificate signed by it",
}
_PLAIN_MENDS = {"Socket closed": "if the server's gRPC speaks TLS, give cluster.tls_ca here"}


class RemoteServers:
    """One connection to each; any number of threads may use it."""

    def __init__(self, cluster: ClusterConfig, key: bytes) -> None:
        """Raises ConfigError when a certificate can't be read."""
        self._credentials = _credentials(cluster)
        self._operator = ((OPERATOR_METADATA, operator_secret(key)),)
        self._stubs: dict[str, Any] = {}
        self._lock = threading.Lock()

    def submit(self, worker: Destination, sealed: bytes, failed: Callable[[str], None]) -> None:
        """Hand over signed work; returns at once."""
        request = service_pb2.ModelInferRequest(model_name=worker.model, raw_input_contents=[sealed])
        request.inputs.add(name=WORK.name, datatype="UINT8", shape=[len(sealed)])
        request.outputs.add(name=ACCEPTED.name)
        call = self._stub(worker.server).ModelInfer.future(request, timeout=_SUBMIT_TIMEOUT_S)

        def done(call: Any) -> None:
            error = call.exception()
            if error is not None:
                failed(f"worker {worker.worker} did not take the request: {self._words(error)}")

        call.add_done_callback(done)

    def reach(self, worker: Destination) -> None:
        """Raises Unavailable when the server does not answer at once."""
        try:
            self._stub(worker.server).ServerLive(service_pb2.ServerLiveRequest(), timeout=_REACH_TIMEOUT_S)
        except grpc.RpcError as error:
            raise Unavailable(f"{worker.server}: {self._words(error)}") from error

    def restart(self, worker: Destination, role: Role | None = None) -> None:
        """See router.supervisor.ModelControl. Raises Unavailable."""
        stub = self._stub(worker.server)
        config = None if role is None else in_role(worker, self._read_config(worker), role)
        try:
            unload = service_pb2.RepositoryModelUnloadRequest(model_name=worker.model)
            stub.RepositoryModelUnload(unload, timeout=_RESTART_TIMEOUT_S, metadata=self._operator)
            load = service_pb2.RepositoryModelLoadRequest(model_name=worker.model)
            if config is not None:
                load.parameters["config"].string_param = json.dumps(config)
            stub.RepositoryModelLoad(load, timeout=_RESTART_TIMEOUT_S, metadata=self._operator)
        except grpc.RpcError as error:
            raise Unavailable(f"{worker.server}: {self._words(error)}; {HOW_TO_RESTART}") from error

    def _read_config(self, worker: Destination) -> dict[str, Any] | None:
        """In the JSON of Triton's API; None where it tells none."""
        request = service_pb2.ModelConfigRequest(name=worker.model)
        try:
            answer = self._stub(worker.server).ModelConfig(request, timeout=_REACH_TIMEOUT_S, metadata=self._operator)
        except grpc.RpcError:
            return None
        config: dict[str, Any] = MessageToDict(answer.config, preserving_proto_field_name=True)
        return config

    def _stub(self, server: str) -> Any:
        with self._lock:
            stub = self._stubs.get(server)
            if stub is None:
                stub = self._stubs[server] = service_pb2_grpc.GRPCInferenceServiceStub(self._connect(server))
        return stub

    def _connect(self, server: str) -> Any:
        if self._credentials is None:
            return grpc.insecure_channel(server, options=_OPTIONS)
        return grpc.secure_channel(server, self._credentials, options=_OPTIONS)

    def _words(self, error: Any) -> str:
        """What went wrong, beginning with the setting that mends it where that is TLS."""
        words = str(error.details()) if isinstance(error, grpc.RpcError) and hasattr(error, "details") else str(error)
        mends = _TLS_MENDS if self._credentials is not None else _PLAIN_MENDS
        mend = next((mend for sign, mend in mends.items() if sign in words and words.startswith(_NOT_CONNECTED)), "")
        return f"{mend} ({words})" if mend else words


def _credentials(cluster: ClusterConfig) -> Any:
    """None without TLS."""
    if not cluster.tls_ca:
        return None
    check_authority(cluster.tls_ca, "cluster.tls_ca")
    if cluster.tls_certificate:
        check_certificate(cluster.tls_certificate, cluster.tls_key, "cluster.tls_certificate, tls_key")
    authority, key, certificate = (
        Path(path).read_bytes() if path else None for path in (cluster.tls_ca, cluster.tls_key, cluster.tls_certificate)
    )
    return grpc.ssl_channel_credentials(authority, key, certificate)
