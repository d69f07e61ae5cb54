"""gRPC between servers: with TLS, without, and what is said when the two ends don't agree."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from python_backends.core.config import ClusterConfig
from python_backends.core.errors import ConfigError, Unavailable
from python_backends.core.types import Epoch, WorkerId
from router.seams import Destination
from router.triton.remote import RemoteServers
from tests.kv.certificates import write_certificates

KEY = b"k" * 32
Serve = Callable[[Any], Destination]


class _Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """As much of it as routers ask."""

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server with these credentials; without any it speaks no TLS."""
    servers = []

    def start(credentials: Any) -> Destination:
        server = grpc.server(ThreadPoolExecutor(1))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Triton(), server)
        where = "127.0.0.1:0"
        port = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
        server.start()
        servers.append(server)
        return Destination(WorkerId("decode@there"), "decode", f"127.0.0.1:{port}", Epoch(1))

    yield start
    for server in servers:
        server.stop(0)


def credentials(certificates: Path, name: str = "127.0.0.1", asks: bool = False) -> Any:
    """Of a server. `asks`: for the callers' certificates."""
    key, certificate = ((certificates / f"{name}.{kind}").read_bytes() for kind in ("key", "pem"))
    authority = (certificates / "ca.pem").read_bytes() if asks else None
    return grpc.ssl_server_credentials([(key, certificate)], authority, asks)


def router(certificates: Path, **files: str) -> RemoteServers:
    return RemoteServers(ClusterConfig(**{key: str(certificates / file) for key, file in files.items()}), KEY)  # type: ignore[arg-type]


def test_tls_and_a_certificate_for_who_asks(serve: Serve, certificates: Path) -> None:
    router(certificates, tls_ca="ca.pem").reach(serve(credentials(certificates)))
    own = {"tls_certificate": "client.pem", "tls_key": "client.key"}
    router(certificates, tls_ca="ca.pem", **own).reach(serve(credentials(certificates, asks=True)))


@pytest.mark.parametrize(
    ("server", "files", "told"),
    [
        ("tls", {"tls_ca": "other-ca.pem"}, "not vouched for by cluster.tls_ca"),
        ("other name", {"tls_ca": "ca.pem"}, "another host than its cluster.advertise"),
        ("plain", {"tls_ca": "ca.pem"}, "speaks no TLS: give cluster.grpc_certificate there"),
        ("tls", {}, "speaks TLS, give cluster.tls_ca"),
        ("asks", {"tls_ca": "ca.pem"}, "has a cluster.grpc_client_ca, this one needs a cluster.tls_certificate"),
    ],
)
def test_ends_that_do_not_agree_name_the_setting(
    serve: Serve, certificates: Path, server: str, files: dict[str, str], told: str
) -> None:
    made: dict[str, Callable[[], Any]] = {
        "plain": lambda: None,
        "tls": lambda: credentials(certificates),
        "other name": lambda: credentials(certificates, "client"),
        "asks": lambda: credentials(certificates, asks=True),
    }
    worker, servers = serve(made[server]()), router(certificates, **files)
    with pytest.raises(Unavailable, match=told):
        servers.reach(worker)
    said, heard = [], threading.Event()

    def failed(why: str) -> None:
        said.append(why)
        heard.set()

    servers.submit(worker, b"order", failed)
    assert heard.wait(10)
    assert said[0].startswith("worker decode@there did not take the request: ")
    assert told in said[0]


def test_a_server_that_is_not_there_is_no_matter_of_tls(certificates: Path) -> None:
    worker = Destination(WorkerId("decode@there"), "decode", "127.0.0.1:1", Epoch(1))
    with pytest.raises(Unavailable, match="Connection refused") as error:
        router(certificates, tls_ca="ca.pem").reach(worker)
    assert "cluster." not in str(error.value)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"tls_ca": "none.pem"}, r"cluster\.tls_ca: .*none.pem: No such file"),
        ({"tls_ca": "client.key"}, r"cluster\.tls_ca: .*client\.key"),
        ({"tls_ca": "ca.pem", "tls_certificate": "client.pem", "tls_key": "127.0.0.1.key"}, r"cluster\.tls_certificate, tls_k"),
    ],
)
def test_files_that_are_wrong_are_named(certificates: Path, files: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        router(certificates, **files)
