from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from python_backends.core.errors import ConfigError
from python_backends.core.types import Epoch
from python_backends.kv.memory import PoolMemory, PoolView

EPOCH = Epoch(2**63 + 5)


def test_view_sees_what_the_owner_writes() -> None:
    memory = PoolMemory(1000, 96, EPOCH)
    view = PoolView(memory.locator)
    assert (view.num_blocks, view.block_bytes, view.epoch, view.owned) == (1000, 96, EPOCH, True)
    assert (view.blocks.shape, view.generations.shape) == ((1000, 96), (1000,))
    assert not view.blocks.any()
    memory.blocks[999] = 7
    memory.generations[999] = 3
    assert view.blocks[999].tolist() == [7] * 96
    assert view.generations[999] == 3
    memory.close()


def test_blocks_and_generations_do_not_overlap() -> None:
    memory = PoolMemory(513, 8, EPOCH)  # one generation more than a page holds
    memory.generations[:] = np.arange(513)
    memory.blocks[:] = 255
    assert memory.generations.tolist() == list(range(513))
    memory.generations[:] = 0
    assert (memory.blocks == 255).all()
    assert PoolView(memory.locator).epoch == EPOCH
    memory.close()


def test_view_can_not_be_written() -> None:
    memory = PoolMemory(1, 8, EPOCH)
    with pytest.raises(ValueError, match="read-only"):
        PoolView(memory.locator).blocks[0] = 1
    memory.close()


def test_pool_can_not_shrink_under_a_reader() -> None:
    memory = PoolMemory(4, 4096, EPOCH)
    path = "/proc/" + memory.locator.replace("/", "/fd/")
    with pytest.raises(PermissionError):
        os.truncate(path, 0)
    memory.close()


def test_closed_pool_has_no_epoch_and_no_owner_but_its_bytes_stay_readable() -> None:
    memory = PoolMemory(2, 4096, EPOCH)
    memory.blocks[1] = 9
    view = PoolView(memory.locator)
    memory.close()
    memory.close()
    assert view.epoch != EPOCH
    assert not view.owned
    del memory
    assert view.blocks[1].tolist() == [9] * 4096


def test_nothing_is_left_when_owner_and_readers_are_gone() -> None:
    memory = PoolMemory(2, 4096, EPOCH)
    view = PoolView(memory.locator)
    inode = os.stat("/proc/" + memory.locator.replace("/", "/fd/")).st_ino
    assert is_mapped(inode)
    memory.close()
    del memory, view
    assert not is_mapped(inode)


def is_mapped(inode: int) -> bool:
    return any(line.split()[4] == str(inode) for line in Path("/proc/self/maps").read_text().splitlines())


def test_too_large_a_pool_is_refused_before_any_memory_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"MiB available\); lower engine\.kv_pool_mib"):
        PoolMemory(2**40, 4096, EPOCH)


@pytest.mark.parametrize("locator", ["", "/", "abc", "1/", "/3", "-1/2", "../../etc/passwd", "1/2/3"])
def test_malformed_locator_is_refused(locator: str) -> None:
    with pytest.raises(ValueError, match="locator"):
        PoolView(locator)


def test_gone_owner_is_an_os_error() -> None:
    with pytest.raises(OSError, match="No such file"):
        PoolView("4194305/3")  # above the largest pid


def test_other_memory_is_refused() -> None:
    descriptor = os.memfd_create("something-else")
    try:
        with pytest.raises(ValueError, match="not a Baton KV pool"):
            PoolView(f"{os.getpid()}/{descriptor}")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("damage", [{"magic": b"BATONKV0"}, {"num_blocks": b"\xff" * 8}, {"block_bytes": b"\1" + b"\0" * 7}])
def test_header_that_does_not_fit_is_refused(damage: dict[str, bytes]) -> None:
    memory = PoolMemory(2, 4096, EPOCH)
    [(field, value)] = damage.items()
    offset = {"magic": 0, "num_blocks": 16, "block_bytes": 24}[field]
    with open("/proc/" + memory.locator.replace("/", "/fd/"), "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(value)
    with pytest.raises(ValueError, match="not a Baton KV pool"):
        PoolView(memory.locator)
    memory.close()
