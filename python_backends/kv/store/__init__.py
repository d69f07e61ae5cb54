"""Store tiers: full KV blocks kept outside the engines. base.py has the contract, stores.py what an engine uses."""

from __future__ import annotations

from python_backends.core.config import StoreConfig
from python_backends.core.layout import KVLayout
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store.base import StoreTier
from python_backends.kv.store.node import NodeStore
from python_backends.kv.store.pace import Pace
from python_backends.kv.store.remote import RemoteStore
from python_backends.kv.store.stores import Stores


def create_stores(
    config: StoreConfig, layout: KVLayout, fingerprint: str, memory: PoolMemory, key: bytes, compute: Pace
) -> Stores | None:
    """The tiers that the deployment has; None without any. `key` is the deployment's; the rest as in Stores.

    Raises ConfigError.
    """
    tiers: list[StoreTier] = []
    if config.node_mib:
        tiers.append(NodeStore(config.node_mib << 20, layout.block_bytes, key))
    if config.remote.servers:
        tiers.append(RemoteStore(config.remote, layout, fingerprint))
    return Stores(tiers, memory, layout.block_size, config.queue_blocks, compute) if tiers else None
