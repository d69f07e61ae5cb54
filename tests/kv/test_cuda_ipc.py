"""Transport `cuda_ipc` beyond what all transports promise: when it opens and closes others' memory, and who may use it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from python_backends.core.errors import ConfigError, HandoffRefused, RefusalReason
from python_backends.core.types import Epoch, Role
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.conversion import fetch_converted
from python_backends.kv.transfer.cuda_ipc import CudaIpcTransport
from python_backends.kv.transfer.faulty import FaultyTransport
from tests.kv.played_device import PlayedDevice
from tests.kv.test_transports import LAYOUT, Rig, changed, kill, make_pool, publish, soon, start_owner


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(CudaIpcTransport())
    yield rig
    rig.close()


def opened(rig: Rig) -> int:
    assert isinstance(rig.target.device, PlayedDevice)
    return len(rig.target.device.opened)


def test_a_source_is_opened_once_in_its_life(rig: Rig) -> None:
    for _ in range(3):
        rig.fetch(rig.publish([3, 8]), [0, 1], [0, 1])
    assert opened(rig) == 1
    rig.source.close()
    rig.source = make_pool(Epoch(9), seed=5)
    rig.fetch(rig.publish([3]), [0], [0])
    assert np.array_equal(rig.target.blocks[0], rig.source.blocks[3])
    assert opened(rig) == 1, "the memory of a closed pool is still open"


def test_all_is_closed_with_the_transport(rig: Rig) -> None:
    rig.fetch(rig.publish([3]), [0], [0])
    rig.transport.close()
    rig.transport.close()
    assert opened(rig) == 0


def test_memory_of_a_dead_owner_is_closed(rig: Rig) -> None:
    owner, handoff = start_owner("cuda_ipc")
    try:
        rig.fetch(handoff, [0], [0])
    finally:
        kill(owner)
    rig.fetch(rig.publish([1]), [0], [0])
    assert opened(rig) == 1


def test_of_many_sources_few_stay_open(rig: Rig) -> None:
    pools = [make_pool(Epoch(100 + i), num_blocks=2) for i in range(40)]
    for pool in pools:
        rig.fetch(publish(rig.transport, pool, [1]), [0], [0])
        assert np.array_equal(rig.target.blocks[0], pool.blocks[1])
    assert opened(rig) <= 17
    for pool in pools:
        pool.close()


def test_own_blocks_are_copied_without_opening_anything(rig: Rig) -> None:
    handoff = publish(rig.transport, rig.target, [3, 4])
    rig.fetch(handoff, [0, 1], [7, 8])
    assert np.array_equal(rig.target.blocks[[7, 8]], rig.target.blocks[[3, 4]])
    assert opened(rig) == 0


@pytest.mark.parametrize("opaque", [b"", b"x", b"\xc4\x00"])
def test_a_ticket_without_a_handle_is_refused(rig: Rig, opaque: bytes) -> None:
    assert rig.refusal(changed(rig.publish([3]), opaque=opaque)) is RefusalReason.TRANSFER_FAILED


def test_workers_without_a_gpu_can_not_have_it() -> None:
    memory = PoolMemory(4, LAYOUT.block_bytes, Epoch(1))
    transport = CudaIpcTransport()
    with pytest.raises(ConfigError, match=r"cuda_ipc needs workers on GPUs.*use auto"):
        transport.attach(memory, Role.DECODE)
    memory.close()


def test_kv_of_another_layout_is_refused_by_name(rig: Rig) -> None:
    ours = msgspec.structs.replace(LAYOUT, block_size=2 * LAYOUT.block_size)
    with pytest.raises(HandoffRefused, match=r"cuda_ipc converts no layouts.*transfer\.transport: tcp") as refused:
        fetch_converted(rig.transport, rig.publish([3, 8]), 0, ours, rig.target, [0], soon())
    assert refused.value.reason is RefusalReason.TRANSFER_FAILED


@pytest.mark.parametrize("fault", ["corrupt", "truncate"])
def test_damage_on_the_device_is_found(rig: Rig, fault: str) -> None:
    broken = FaultyTransport(rig.transport, {fault: 1.0})  # type: ignore[dict-item]
    handoff = publish(broken, rig.source, [3, 8, 9])
    for _ in range(20):
        rig.target.blocks[:3] = 0
        with pytest.raises(HandoffRefused) as refused:
            broken.fetch(handoff, range(3), rig.target, range(3), soon())
        assert refused.value.reason is RefusalReason.DIGEST_MISMATCH
