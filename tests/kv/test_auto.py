"""Transport `auto`: which way a pair takes, why it says so, and what it does when that way is closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from python_backends.core.config import ClusterConfig, PoolConfig, TransferConfig
from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff
from python_backends.core.types import Epoch, Role
from python_backends.kv.memory import PoolMemory, PoolView
from python_backends.kv.transfer import create_transport
from python_backends.kv.transfer.auto import AutoTransport, Ways
from python_backends.kv.transfer.base import CheckedTransport, Fetched
from python_backends.kv.transfer.nixl import NixlTransport
from python_backends.kv.transfer.shm import ShmTransport
from python_backends.kv.transfer.tcp import TcpTransport
from tests.kv.test_transports import KEY, LAYOUT, Elsewhere, Rig, changed, kill, nixl, soon, start_owner, tcp


@pytest.fixture
def made() -> Iterator[list[Rig]]:
    rigs: list[Rig] = []
    yield rigs
    for rig in rigs:
        rig.close()


def make(made: list[Rig], transport: CheckedTransport) -> Rig:
    made.append(Rig(transport))
    return made[-1]


def fetched(rig: Rig, handoff: KVHandoff) -> Fetched:
    """How all blocks came."""
    count = len(handoff.blocks)
    how = rig.transport.fetch(handoff, range(count), rig.target, range(count), soon())
    assert np.array_equal(rig.target.blocks[:count], rig.source.blocks[handoff.blocks])
    return how


def with_ways(handoff: KVHandoff, **fields: Any) -> KVHandoff:
    ways = msgspec.msgpack.decode(handoff.opaque, type=Ways)
    return changed(handoff, opaque=msgspec.msgpack.encode(msgspec.structs.replace(ways, **fields)))


def test_within_a_process_and_a_host_it_is_shared_memory(made: list[Rig]) -> None:
    rig = make(made, AutoTransport(ShmTransport(), tcp(), None, ()))
    assert fetched(rig, rig.publish([3, 4])) == Fetched("shm", "same process", wire_bytes=2 * LAYOUT.block_bytes)
    owner, handoff = start_owner("auto")
    try:
        assert fetched(rig, handoff) == Fetched("shm", "same host", wire_bytes=len(handoff.blocks) * LAYOUT.block_bytes)
    finally:
        kill(owner)


def test_to_another_host_it_is_tcp(made: list[Rig]) -> None:
    rig = make(made, Elsewhere(ShmTransport(), tcp(), None, ()))
    assert fetched(rig, rig.publish([3, 4])) == Fetched(
        "tcp", "another host; no other fabric in common", wire_bytes=2 * LAYOUT.block_bytes
    )


def test_with_rdma_on_both_hosts_it_is_nixl(made: list[Rig]) -> None:
    rig = make(made, Elsewhere(ShmTransport(), None, nixl(), ["mlx5_0"]))
    handoff = rig.publish([3, 4])
    assert fetched(rig, handoff) == Fetched(
        "nixl", "another host; RDMA by mlx5_0 and mlx5_0", wire_bytes=2 * LAYOUT.block_bytes
    )


@pytest.mark.parametrize(("ours", "theirs"), [([], ["mlx5_1"]), (["mlx5_0"], [])])
def test_with_rdma_on_one_host_only_it_is_tcp(made: list[Rig], ours: list[str], theirs: list[str]) -> None:
    rig = make(made, Elsewhere(ShmTransport(), tcp(), nixl(), ours))
    transport = rig.transport
    assert isinstance(transport, AutoTransport)
    server = transport._tcp._server if isinstance(transport._tcp, TcpTransport) else None
    handoff = rig.publish([3, 4])
    assert server is not None
    server.publish(rig.source, [3, 4], handoff.lease_id)
    assert fetched(rig, with_ways(handoff, devices=theirs, address=server.address)).transport == "tcp"


def test_a_source_that_does_not_listen_can_not_be_reached_from_afar(made: list[Rig]) -> None:
    rig = make(made, Elsewhere(ShmTransport(), None, None, ()))
    with pytest.raises(HandoffRefused, match=r"transfer\.listen"):
        fetched(rig, rig.publish([3]))
    listening = make(made, AutoTransport(ShmTransport(), tcp(), None, ()))
    with pytest.raises(HandoffRefused, match=r"transfer\.listen"):
        fetched(listening, rig.publish([3]))


def test_shared_memory_that_can_not_be_opened_is_gone_around(made: list[Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(self: PoolView, locator: str) -> None:
        raise PermissionError(13, "Permission denied")

    rig = make(made, AutoTransport(ShmTransport(), tcp(), None, ()))
    handoff = rig.publish([3, 4])
    monkeypatch.setattr(PoolView, "__init__", forbid)
    how = fetched(rig, handoff)
    assert how.transport == "tcp"
    assert how.why.startswith("same host, but not by shared memory")
    assert "Permission denied" in how.why


def test_what_another_way_can_not_cure_is_not_tried_again(made: list[Rig]) -> None:
    rig = make(made, AutoTransport(ShmTransport(), tcp(), None, ()))
    handoff = rig.publish([3, 4])
    rig.source.generations[3] += np.uint64(1)
    assert rig.refusal(handoff) is RefusalReason.STALE_EPOCH
    assert rig.refusal(rig.publish([4]), seconds=-1) is RefusalReason.TRANSFER_TIMEOUT


@pytest.mark.parametrize("opaque", [b"", b"nonsense", msgspec.msgpack.encode([1, 2]), b"\x94\xa1\xff\x01\xa0\x90"])
def test_a_ticket_that_does_not_say_how_is_refused(made: list[Rig], opaque: bytes) -> None:
    rig = make(made, AutoTransport(ShmTransport(), tcp(), None, ()))
    assert rig.refusal(changed(rig.publish([3]), opaque=opaque)) is RefusalReason.TRANSFER_FAILED


@pytest.mark.parametrize(
    ("listen", "devices", "kinds"),
    [
        ("", ["mlx5_0"], (ShmTransport,)),
        ("127.0.0.1", [], (ShmTransport, TcpTransport)),
        ("127.0.0.1", ["mlx5_0"], (ShmTransport, TcpTransport, NixlTransport)),
    ],
)
def test_it_is_made_of_what_the_host_has(
    listen: str, devices: Sequence[str], kinds: tuple[type, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if NixlTransport in kinds:
        nixl().close()  # skips where it isn't installed
    monkeypatch.setattr("python_backends.kv.transfer.rdma_devices", lambda: devices)
    transport = create_transport(TransferConfig(listen=listen), KEY)
    assert isinstance(transport, AutoTransport)
    assert tuple(type(part) for part in transport._parts) == kinds
    transport.close()


@pytest.mark.parametrize(
    ("listen", "cluster", "told"),
    [
        ("", ClusterConfig(listen="127.0.0.1"), "127.0.0.1"),
        ("", ClusterConfig(listen="0.0.0.0", advertise="kv.example"), "kv.example"),
        ("0.0.0.0", ClusterConfig(listen="127.0.0.1", advertise="kv.example"), "kv.example"),
        ("127.0.0.1", ClusterConfig(listen="0.0.0.0", advertise="kv.example"), "127.0.0.1"),
        ("", ClusterConfig(pools=(PoolConfig(hosts=("kv.example",)),)), ""),
        ("", ClusterConfig(registry="redis://kv.example"), ""),
    ],
)
def test_servers_of_a_cluster_reach_each_other(listen: str, cluster: ClusterConfig, told: str) -> None:
    """A server that listens for routers hands KV out there; one that only uses others' workers fetches from them."""
    here = create_transport(TransferConfig(listen=listen), KEY, cluster)
    memory = PoolMemory(4, 4096, Epoch(1))
    here.attach(memory, Role.AGGREGATED)
    address = msgspec.msgpack.decode(here.publish(memory, [1], "lease").opaque, type=Ways).address
    assert address.rpartition(":")[0] == told
    here.release("lease")
    here.close()
    memory.close()


def test_who_does_not_listen_fetches_from_who_does(made: list[Rig]) -> None:
    source = make(made, Elsewhere(ShmTransport(), tcp(), None, ()))
    handoff = source.publish([3, 4])
    reader = AutoTransport(ShmTransport(), TcpTransport(None, KEY, None, 2), None, ())
    how = reader.fetch(handoff, range(2), source.target, range(2), soon())
    assert how == Fetched("tcp", "another host; no other fabric in common", wire_bytes=2 * LAYOUT.block_bytes)
    reader.close()


def test_tickets_stay_small(made: list[Rig]) -> None:
    rig = make(made, AutoTransport(ShmTransport(), tcp(), None, ()))
    assert len(rig.publish([3]).opaque) < 200
