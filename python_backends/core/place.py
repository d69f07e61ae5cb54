"""Where a worker is: its name in the whole deployment, and how routers of other hosts reach it."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.errors import ConfigError
from python_backends.core.types import WorkerId

WILDCARDS = ("0.0.0.0", "::", "*")


@dataclass(frozen=True, slots=True)
class Place:
    worker: WorkerId  # unique among all servers
    server: str  # HOST:PORT of its Triton's gRPC; empty when nobody but this host's router uses it
    listen: str  # ZeroMQ address that its channel binds for other hosts; empty: none
    channel: str  # ZeroMQ address where they connect


def place_of(deployment: Deployment, worker: WorkerConfig) -> Place:
    """Raises ConfigError when this host's own address can't be found."""
    cluster = deployment.cluster
    if not cluster.listen:
        return Place(WorkerId(worker.name), "", "", "")
    host = own_address(cluster.listen, cluster.advertise)
    port = cluster.channel_port + [other.name for other in deployment.workers].index(worker.name)
    return Place(
        worker=WorkerId(f"{worker.name}@{host}:{cluster.grpc_port}"),
        server=f"{host}:{cluster.grpc_port}",
        listen=f"tcp://{cluster.listen}:{port}",
        channel=f"tcp://{host}:{port}",
    )


def own_address(listen: str, advertise: str) -> str:
    """What other hosts are told of an interface listened at. Raises ConfigError when nobody says and it can't be found."""
    if advertise:
        return advertise
    if listen not in WILDCARDS:
        return listen
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise ConfigError(f"cluster.advertise: the address of this host is not known ({error}); give it") from error
