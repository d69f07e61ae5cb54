"""How KV bytes move between pools: the registry of transports. base.py has the contract."""

from __future__ import annotations

from python_backends.core.config import ClusterConfig, TransferConfig
from python_backends.core.errors import ConfigError
from python_backends.core.layout import ROUNDINGS
from python_backends.core.place import WILDCARDS, own_address
from python_backends.kv.transfer.auto import AutoTransport
from python_backends.kv.transfer.base import CheckedTransport, KVTransport
from python_backends.kv.transfer.cuda_ipc import CudaIpcTransport
from python_backends.kv.transfer.faulty import FaultyTransport
from python_backends.kv.transfer.inline import InlineTransport
from python_backends.kv.transfer.nixl import NixlTransport, is_installed, rdma_devices
from python_backends.kv.transfer.server import TransferServer
from python_backends.kv.transfer.session import TlsContexts, load_tls
from python_backends.kv.transfer.shm import ShmTransport
from python_backends.kv.transfer.tcp import TcpTransport

_LOOPBACK = "127.0.0.1"


_NO_CLUSTER = ClusterConfig()


def create_transport(config: TransferConfig, key: bytes, cluster: ClusterConfig = _NO_CLUSTER) -> KVTransport:
    """The transport that the deployment names, with its faults if it asks for any. `key` is the deployment's.

    `cluster`: where workers are reached from other hosts, unless `config` says otherwise. Raises ConfigError.
    """
    total = sum(config.faults.values())
    if total > 1:
        raise ConfigError(f"transfer.faults: the shares add up to {total:g}; one transfer has one fault, so at most 1")
    transport = _create(config, key, cluster)
    return FaultyTransport(transport, config.faults) if config.faults else transport


def _create(config: TransferConfig, key: bytes, cluster: ClusterConfig) -> CheckedTransport:
    if config.transport == "inline":
        return InlineTransport()
    if config.transport == "shm":
        return ShmTransport()
    if config.transport == "cuda_ipc":
        return CudaIpcTransport()
    listens = bool(config.listen or cluster.listen)
    if config.transport == "auto" and not (listens or cluster.pools or cluster.registry):
        return AutoTransport(ShmTransport(), None, None, ())
    tls = _tls(config)
    if config.transport == "auto" and not listens:  # fetches from other hosts, and hands over to none
        return AutoTransport(
            ShmTransport(), TcpTransport(None, key, tls, config.streams, config.codec, config.rounding), None, ()
        )
    server = _server(config, key, tls, cluster)
    if config.transport == "nixl":
        return NixlTransport(server, key, tls)
    tcp = TcpTransport(server, key, tls, config.streams, config.codec, config.rounding)
    if config.transport == "tcp":
        return tcp
    devices = rdma_devices()
    nixl = NixlTransport(server, key, tls) if devices and is_installed() else None
    return AutoTransport(ShmTransport(), tcp, nixl, devices)


def _server(config: TransferConfig, key: bytes, tls: TlsContexts | None, cluster: ClusterConfig) -> TransferServer:
    listen = config.listen or cluster.listen or _LOOPBACK
    of_cluster = listen in WILDCARDS or (cluster.listen and not config.listen)
    told = own_address(listen, cluster.advertise) if of_cluster else listen
    where = "0.0.0.0" if listen == "*" else listen
    return TransferServer(where, _ports(config.ports), key, tls, config.timeout_s, told, _codecs(config))


def _codecs(config: TransferConfig) -> tuple[str, ...]:
    """Those in which this worker hands out, besides raw."""
    rounding = ROUNDINGS[1 : ROUNDINGS.index(config.rounding) + 1]
    return () if config.codec == "raw" else ("lossless", *rounding)


def _ports(text: str) -> range:
    first, _, last = text.partition("-")
    ports = range(int(first), int(last or first) + 1) if first else range(0)
    if text and (not ports or ports[0] < 1 or ports[-1] > 65_535):
        raise ConfigError(f"transfer.ports: {text!r} is no range of ports such as 7100-7131")
    return ports


def _tls(config: TransferConfig) -> TlsContexts | None:
    files = {key: getattr(config, f"tls_{key}_file") for key in ("cert", "key", "ca")}
    if not any(files.values()):
        return None
    missing = [key for key, path in files.items() if not path]
    if missing:
        raise ConfigError(f"transfer.tls_{missing[0]}_file: TLS needs certificate, key and authority; give this one, too")
    try:
        return load_tls(files["cert"], files["key"], files["ca"])
    except OSError as error:  # also of certificates that are none
        raise ConfigError(f"transfer.tls_*_file: {', '.join(files.values())}: {error.strerror or error}") from error
