"""How KV bytes move between pools: the registry of transports. base.py has the contract."""

from __future__ import annotations

from python_backends.core.config import TransferConfig
from python_backends.core.errors import ConfigError
from python_backends.kv.transfer.base import CheckedTransport, KVTransport
from python_backends.kv.transfer.faulty import FaultyTransport
from python_backends.kv.transfer.inline import InlineTransport
from python_backends.kv.transfer.shm import ShmTransport

_TRANSPORTS: dict[str, type[InlineTransport] | type[ShmTransport]] = {"inline": InlineTransport, "shm": ShmTransport}


def create_transport(config: TransferConfig) -> KVTransport:
    """The transport that the deployment names, with its faults if it asks for any. Raises ConfigError."""
    total = sum(config.faults.values())
    if total > 1:
        raise ConfigError(f"transfer.faults: the shares add up to {total:g}; one transfer has one fault, so at most 1")
    transport: CheckedTransport = _TRANSPORTS[config.transport]()
    return FaultyTransport(transport, config.faults) if config.faults else transport
