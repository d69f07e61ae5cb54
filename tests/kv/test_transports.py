"""One conformance suite for every transport: what arrives is what was published, or a HandoffRefused, in time.

Each transport is used through a Rig, which owns a source pool, publishes from it, and fetches into a second pool.
"""

from __future__ import annotations

import gc
import importlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from python_backends.core.config import TransferConfig
from python_backends.core.errors import ConfigError, HandoffRefused, RefusalReason
from python_backends.core.handoff import TICKET_VERSION, KVHandoff
from python_backends.core.layout import KVLayout
from python_backends.core.types import Epoch, WorkerId
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer import create_transport
from python_backends.kv.transfer.auto import AutoTransport, Ways
from python_backends.kv.transfer.base import CheckedTransport, Fetched, KVTransport, Published, block_digest
from python_backends.kv.transfer.cuda_ipc import CudaIpcTransport
from python_backends.kv.transfer.faulty import FaultyTransport
from python_backends.kv.transfer.inline import InlineTransport
from python_backends.kv.transfer.nixl import NixlTransport, is_installed
from python_backends.kv.transfer.server import TransferServer
from python_backends.kv.transfer.session import TlsContexts
from python_backends.kv.transfer.shm import ShmTransport
from python_backends.kv.transfer.tcp import TcpTransport
from tests.kv.played_device import PlayedDevice

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
SOURCE_BLOCKS = 32
EPOCH = Epoch(7)
KEY = b"k" * 32


def make_pool(epoch: Epoch = EPOCH, *, num_blocks: int = SOURCE_BLOCKS, seed: int = 0) -> PoolMemory:
    """Of whole numbers, each vector's largest 127, so that rounding leaves them as they are."""
    memory = PoolMemory(num_blocks, LAYOUT.block_bytes, epoch)
    numbers = np.random.default_rng(seed).integers(-127, 128, (num_blocks, *LAYOUT.block_shape)).astype(np.float32)
    numbers[..., 0] = 127
    memory.blocks[:] = numbers.reshape(num_blocks, -1).view(np.uint8)
    memory.device = PlayedDevice(memory)
    return memory


def publish(transport: KVTransport, memory: PoolMemory, blocks: Sequence[int]) -> KVHandoff:
    lease_id = secrets.token_hex(8)
    published = transport.publish(memory, blocks, lease_id)
    return KVHandoff(
        version=TICKET_VERSION,
        transport=transport.name,
        source=WorkerId("prefill"),
        epoch=memory.epoch,
        lease_id=lease_id,
        expires_at=time.time() + 60,
        layout=LAYOUT,
        fingerprint="f" * 32,
        num_tokens=len(blocks) * LAYOUT.block_size,
        blocks=list(blocks),
        generations=[int(memory.generations[block]) for block in blocks],
        digests=transport.digests(memory, blocks),
        locator=published.locator,
        opaque=published.opaque,
    )


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Rig:
    """A source pool, a destination pool and one transport, as the two ends of a handoff see them."""

    def __init__(self, transport: CheckedTransport, *, exact: bool = True) -> None:
        """`exact`: as in KVTransport.fetch."""
        self.transport = transport
        self.exact = exact
        self.source = make_pool()
        self.target = make_pool(Epoch(8), seed=1)

    @property
    def carries_copy(self) -> bool:
        """Whether the ticket holds the bytes, so that nothing can make it stale."""
        return self.transport.name == "inline"

    def publish(self, blocks: Sequence[int]) -> KVHandoff:
        return publish(self.transport, self.source, blocks)

    def fetch(self, handoff: KVHandoff, wanted: Sequence[int], blocks: Sequence[int], seconds: float = 5.0) -> Fetched:
        return self.transport.fetch(handoff, wanted, self.target, blocks, soon(seconds), exact=self.exact)

    def refusal(self, handoff: KVHandoff, *, seconds: float = 5.0) -> RefusalReason:
        """The reason why the whole handoff is refused."""
        count = len(handoff.blocks)
        with pytest.raises(HandoffRefused) as refused:
            self.fetch(handoff, range(count), range(count), seconds)
        return refused.value.reason

    def close(self) -> None:
        self.transport.close()
        self.source.close()
        self.target.close()


def outcome(rig: Rig, handoff: KVHandoff, seconds: float = 5.0) -> RefusalReason | None:
    """Fetch all of a handoff to the first blocks. None: it was accepted."""
    count = len(handoff.blocks)
    try:
        rig.fetch(handoff, range(count), range(count), seconds)
    except HandoffRefused as refused:
        return refused.reason
    return None


def tcp(streams: int = 2, tls: TlsContexts | None = None, codec: str = "auto", rounding: str = "none") -> TcpTransport:
    codecs = ("lossless", "float16", "int8")
    server = TransferServer("127.0.0.1", (), KEY, tls, timeout_s=5.0, codecs=codecs)
    return TcpTransport(server, KEY, tls, streams, codec, rounding)


def require_nixl() -> None:
    if not is_installed():
        reason = "nixl is not installed; run .venv/bin/pip install --no-deps -r requirements-nixl.txt"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def nixl(**settings: str) -> NixlTransport:
    """`settings`: of UCX."""
    require_nixl()
    importlib.import_module("nixl._api")  # loads torch: seconds that are no part of a transfer
    return NixlTransport(TransferServer("127.0.0.1", (), KEY, None, timeout_s=5.0), KEY, None, settings)


class Elsewhere(AutoTransport):
    """Publishes as if from another host."""

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        published = super().publish(memory, blocks, lease_id)
        ways = msgspec.msgpack.decode(published.opaque, type=Ways)
        return Published(published.locator, msgspec.msgpack.encode(msgspec.structs.replace(ways, host="another")))


TRANSPORTS: dict[str, Callable[[], CheckedTransport]] = {
    "shm": ShmTransport,
    "inline": InlineTransport,
    "tcp": tcp,
    "tcp lossless": lambda: tcp(codec="lossless"),
    "tcp float16": lambda: tcp(codec="float16", rounding="int8"),
    "tcp int8": lambda: tcp(codec="int8", rounding="int8"),
    "auto": lambda: AutoTransport(ShmTransport(), tcp(), None, ()),
    "auto elsewhere": lambda: Elsewhere(ShmTransport(), tcp(), None, ()),
    "cuda_ipc": CudaIpcTransport,
    "nixl": nixl,
    "nixl over tcp": lambda: nixl(UCX_TLS="tcp"),
    "faulty": lambda: FaultyTransport(ShmTransport(), {}),
    "faulty cuda_ipc": lambda: FaultyTransport(CudaIpcTransport(), {}),
}


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(TRANSPORTS[request.param](), exact=request.param not in ("tcp float16", "tcp int8"))
    yield rig
    rig.close()


@pytest.fixture
def shm() -> Iterator[Rig]:
    rig = Rig(ShmTransport())
    yield rig
    rig.close()


def changed(handoff: KVHandoff, **fields: Any) -> KVHandoff:
    return msgspec.structs.replace(handoff, **fields)


# --- bytes that arrive ------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact_in_shuffled_blocks(rig: Rig) -> None:
    rng = np.random.default_rng(2)
    blocks, targets = rng.permutation(SOURCE_BLOCKS).tolist(), rng.permutation(SOURCE_BLOCKS).tolist()
    rig.fetch(rig.publish(blocks), range(SOURCE_BLOCKS), targets)
    assert np.array_equal(rig.target.blocks[targets], rig.source.blocks[blocks])


def test_consecutive_blocks_arrive_in_order(rig: Rig) -> None:
    blocks, targets = [4, 5, 6, 7, 9, 10, 3], [8, 9, 10, 20, 21, 22, 23]
    rig.fetch(rig.publish(blocks), range(len(blocks)), targets)
    assert np.array_equal(rig.target.blocks[targets], rig.source.blocks[blocks])


def test_only_wanted_blocks_are_touched(rig: Rig) -> None:
    before = rig.target.blocks.copy()
    rig.fetch(rig.publish([5, 9, 2, 11]), wanted=[1, 3], blocks=[30, 0])
    assert np.array_equal(rig.target.blocks[[30, 0]], rig.source.blocks[[9, 11]])
    rest = [block for block in range(SOURCE_BLOCKS) if block not in (30, 0)]
    assert np.array_equal(rig.target.blocks[rest], before[rest])


def test_wanting_nothing_moves_nothing(rig: Rig) -> None:
    before = rig.target.blocks.copy()
    rig.fetch(rig.publish([1]), [], [])
    assert np.array_equal(rig.target.blocks, before)


def test_damage_outside_the_wanted_blocks_does_not_matter(rig: Rig) -> None:
    handoff = rig.publish([5, 9])
    rig.fetch(changed(handoff, digests=[b"\0" * 16, handoff.digests[1]]), [1], [0])
    assert np.array_equal(rig.target.blocks[0], rig.source.blocks[9])


def test_concurrent_fetches_do_not_mix(rig: Rig) -> None:
    handoffs = [rig.publish(list(range(start, start + 4))) for start in range(0, SOURCE_BLOCKS, 4)]

    def fetch(index: int) -> None:
        rig.fetch(handoffs[index], range(4), range(index * 4, index * 4 + 4))

    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            rig.target.blocks[:] = 0
            list(threads.map(fetch, range(len(handoffs))))
            assert np.array_equal(rig.target.blocks, rig.source.blocks)


# --- bytes that must not be believed ----------------------------------------------------------------------------------


def flip(memory: PoolMemory, handoff: KVHandoff, position: int, bit: int) -> KVHandoff:
    """Damage the published bytes at the source and, where they travel in it, in the ticket."""
    memory.blocks[handoff.blocks[position], bit // 8] ^= 1 << bit % 8
    opaque = bytearray(handoff.opaque)
    if len(opaque) == len(handoff.blocks) * LAYOUT.block_bytes:
        opaque[position * LAYOUT.block_bytes + bit // 8] ^= 1 << bit % 8
    return changed(handoff, opaque=bytes(opaque))


@pytest.mark.parametrize("bit", [0, 7, LAYOUT.block_bytes * 4, LAYOUT.block_bytes * 8 - 1])
@pytest.mark.parametrize("position", [0, 2])
def test_one_flipped_bit_is_found(rig: Rig, position: int, bit: int) -> None:
    handoff = flip(rig.source, rig.publish([3, 8, 1]), position, bit)
    assert rig.refusal(handoff) is RefusalReason.DIGEST_MISMATCH


def test_swapped_blocks_are_found(rig: Rig) -> None:
    handoff = rig.publish([3, 8])
    assert rig.refusal(changed(handoff, digests=handoff.digests[::-1])) is RefusalReason.DIGEST_MISMATCH


def test_ticket_of_another_transport_is_refused(rig: Rig) -> None:
    assert rig.refusal(changed(rig.publish([1]), transport="carrier-pigeon")) is RefusalReason.TRANSFER_FAILED


def test_other_block_size_is_refused(rig: Rig) -> None:
    layout = msgspec.structs.replace(LAYOUT, block_size=8)
    assert rig.refusal(changed(rig.publish([1]), layout=layout)) is RefusalReason.TRANSFER_FAILED


def test_passed_deadline_is_a_timeout(rig: Rig) -> None:
    assert rig.refusal(rig.publish([1, 2]), seconds=-0.001) is RefusalReason.TRANSFER_TIMEOUT


def test_reused_block_is_stale_or_still_the_published_one(rig: Rig) -> None:
    handoff = rig.publish([3, 8])
    published = rig.source.blocks[[3, 8]].copy()
    rig.source.generations[8] += np.uint64(1)
    rig.source.blocks[8] = 0
    if rig.carries_copy:
        rig.fetch(handoff, [0, 1], [0, 1])
        assert np.array_equal(rig.target.blocks[[0, 1]], published)
    else:
        assert rig.refusal(handoff) is RefusalReason.STALE_EPOCH
        rig.fetch(handoff, [0], [0])  # the other block is as good as before


def test_reuse_for_the_same_content_is_still_stale(shm: Rig) -> None:
    handoff = shm.publish([3])
    shm.source.generations[3] += np.uint64(1)
    assert shm.refusal(handoff) is RefusalReason.STALE_EPOCH


@pytest.mark.parametrize("mapped_before", [False, True])
def test_recreated_pool_is_never_read_for_the_old_one(rig: Rig, mapped_before: bool) -> None:
    handoff = rig.publish([3, 8])
    published = rig.source.blocks[[3, 8]].copy()
    if mapped_before:
        rig.fetch(handoff, [0], [0])
    rig.source.close()
    rig.source = make_pool(Epoch(EPOCH + 1), seed=3)
    if rig.transport.name == "shm":
        assert rig.source.locator == handoff.locator  # the descriptor's number is used again
    if rig.carries_copy:
        rig.fetch(handoff, [0, 1], [0, 1])
        assert np.array_equal(rig.target.blocks[[0, 1]], published)
    else:
        assert rig.refusal(handoff) is RefusalReason.STALE_EPOCH


def test_restart_with_a_smaller_pool_is_told_from_a_wrong_ticket(shm: Rig) -> None:
    handoff = shm.publish([SOURCE_BLOCKS - 1])
    shm.source.close()
    shm.source = make_pool(Epoch(EPOCH + 1), num_blocks=2)
    assert shm.refusal(handoff) is RefusalReason.STALE_EPOCH


def test_closed_pool_is_refused(shm: Rig) -> None:
    handoff = shm.publish([3])
    shm.fetch(handoff, [0], [0])
    shm.source.close()
    assert shm.refusal(handoff) in (RefusalReason.TRANSFER_FAILED, RefusalReason.STALE_EPOCH)


@pytest.mark.parametrize("number", [-1, SOURCE_BLOCKS, 2**62, -(2**62)])
def test_block_numbers_outside_the_pool_are_refused(shm: Rig, number: int) -> None:
    handoff = shm.publish([3, 4])
    assert shm.refusal(changed(handoff, blocks=[3, number])) is RefusalReason.TRANSFER_FAILED


@pytest.mark.parametrize("opaque", [b"", b"x", bytes(LAYOUT.block_bytes * 2 - 1), bytes(LAYOUT.block_bytes * 2 + 1)])
def test_inline_bytes_of_the_wrong_length_are_refused(opaque: bytes) -> None:
    rig = Rig(InlineTransport())
    assert rig.refusal(changed(rig.publish([3, 4]), opaque=opaque)) is RefusalReason.TRANSFER_FAILED
    rig.close()


@pytest.mark.parametrize("locator", ["", "/", "1", "x/y", "../3", "999999999/3", "1/0", "-1/3", "3/" + "9" * 5000, "１/２"])
def test_foreign_locator_is_refused(shm: Rig, locator: str) -> None:
    assert shm.refusal(changed(shm.publish([3]), locator=locator)) is RefusalReason.TRANSFER_FAILED


def test_locator_of_something_that_is_no_pool_is_refused_without_opening_it(shm: Rig) -> None:
    reader, writer = os.pipe()  # opening a pipe's other end could wait for ever
    unsealed = os.memfd_create("baton-kv", os.MFD_CLOEXEC)
    os.truncate(unsealed, 1 << 20)
    for descriptor in (reader, unsealed):
        handoff = changed(shm.publish([3]), locator=f"{os.getpid()}/{descriptor}")
        assert shm.refusal(handoff, seconds=1.0) is RefusalReason.TRANSFER_FAILED
    for descriptor in (reader, writer, unsealed):
        os.close(descriptor)


def test_block_overwritten_while_copied_is_never_accepted(shm: Rig) -> None:
    """The owner reuses blocks as fast as it can: each fetch is either refused or exactly what was published."""
    stop = threading.Event()

    def overwrite() -> None:
        rng = np.random.default_rng(5)
        while not stop.is_set():
            shm.source.generations[5] += np.uint64(1)
            shm.source.blocks[5] = rng.integers(0, 256, LAYOUT.block_bytes, np.uint8)

    writer = threading.Thread(target=overwrite)
    writer.start()
    try:
        for _ in range(300):
            handoff = shm.publish([5])
            reason = outcome(shm, handoff)
            assert reason in (None, RefusalReason.STALE_EPOCH, RefusalReason.DIGEST_MISMATCH)
            assert reason or block_digest(shm.target.blocks[0]) == handoff.digests[0]
    finally:
        stop.set()
        writer.join(5)


# --- owners that die --------------------------------------------------------------------------------------------------

OWNER = """
import os, sys
out = os.dup(1)
os.dup2(2, 1)  # libraries that chat go elsewhere
import msgspec
from tests.kv.test_transports import TRANSPORTS, make_pool, publish
transport = TRANSPORTS[sys.argv[1]]()
memory = make_pool()
os.write(out, msgspec.msgpack.encode(publish(transport, memory, range(memory.num_blocks))))
os.close(out)
sys.stdin.read()  # until killed, or the test's process is gone
"""


def start_owner(transport: str) -> tuple[subprocess.Popen[bytes], KVHandoff]:
    """Another process with a pool like make_pool(), and its handoff of all blocks."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, transport], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    with owner.stdout:
        return owner, msgspec.msgpack.decode(owner.stdout.read(), type=KVHandoff)


def stop(owner: subprocess.Popen[bytes]) -> None:
    """SIGSTOP; returns when it has taken effect."""
    owner.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill(owner: subprocess.Popen[bytes]) -> None:
    owner.kill()
    owner.wait(10)
    assert owner.stdin is not None
    owner.stdin.close()


def test_blocks_of_another_process_arrive(rig: Rig) -> None:
    owner, handoff = start_owner(rig.transport.name)
    try:
        rig.fetch(handoff, range(SOURCE_BLOCKS), range(SOURCE_BLOCKS))
        assert np.array_equal(rig.target.blocks, rig.source.blocks)
    finally:
        kill(owner)


@pytest.mark.parametrize("mapped_before", [False, True])
def test_owner_killed_before_the_fetch(rig: Rig, mapped_before: bool) -> None:
    owner, handoff = start_owner(rig.transport.name)
    try:
        if mapped_before:
            rig.fetch(handoff, [0], [0])
    finally:
        kill(owner)
    if rig.carries_copy:
        rig.fetch(handoff, range(SOURCE_BLOCKS), range(SOURCE_BLOCKS))
        assert np.array_equal(rig.target.blocks, rig.source.blocks)
    else:
        assert rig.refusal(handoff) is RefusalReason.TRANSFER_FAILED


def test_owner_killed_during_fetches_does_not_hurt_the_reader(rig: Rig) -> None:
    owner, handoff = start_owner(rig.transport.name)
    killer = threading.Timer(0.02, owner.kill)
    outcomes = [attempt(rig, handoff)]
    killer.start()
    try:
        outcomes += [attempt(rig, handoff) for _ in range(400)]
        owner.wait(10)
        outcomes.append(attempt(rig, handoff))
    finally:
        kill(owner)
        killer.join()
    assert outcomes[0] is None
    assert outcomes[-1] is (None if rig.carries_copy else RefusalReason.TRANSFER_FAILED)


def attempt(rig: Rig, handoff: KVHandoff) -> RefusalReason | None:
    """Fetch a handoff of all blocks. None: it was accepted, and the right bytes came."""
    rig.target.blocks[:] = 0
    reason = outcome(rig, handoff)
    assert reason or np.array_equal(rig.target.blocks, rig.source.blocks)
    return reason


def test_memory_of_dead_owners_is_given_back() -> None:
    rig = Rig(ShmTransport())
    before = mapped_pools()
    for _ in range(2):
        owner, handoff = start_owner("shm")
        try:
            rig.fetch(handoff, [0], [0])
        finally:
            kill(owner)
    rig.fetch(rig.publish([1]), [0], [0])  # any later fetch lets go of the dead
    assert len(mapped_pools() - before) == 1
    rig.close()


def mapped_pools() -> set[str]:
    """Inodes of the pools that this process has mapped for reading."""
    gc.collect()  # what earlier tests' tracebacks still refer to
    with open("/proc/self/maps") as maps:
        return {line.split()[4] for line in maps if "memfd:baton-kv" in line and " r--s " in line}


def test_many_sources_keep_few_mappings(shm: Rig) -> None:
    pools = [make_pool(Epoch(100 + i), num_blocks=2) for i in range(40)]
    for pool in pools:
        shm.fetch(publish(shm.transport, pool, [1]), [0], [0])
        assert np.array_equal(shm.target.blocks[0], pool.blocks[1])
    for pool in pools:
        pool.close()


# --- faults on purpose ------------------------------------------------------------------------------------------------


def faulty(**shares: float) -> Rig:
    rig = Rig(ShmTransport())
    rig.transport = FaultyTransport(rig.transport, shares)  # type: ignore[arg-type]
    return rig


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("drop", RefusalReason.TRANSFER_FAILED),
        ("corrupt", RefusalReason.DIGEST_MISMATCH),
        ("truncate", RefusalReason.DIGEST_MISMATCH),
    ],
)
def test_every_fault_is_found(fault: str, reason: RefusalReason) -> None:
    rig = faulty(**{fault: 1.0})
    handoff = rig.publish([3, 8, 9])
    for _ in range(100):
        rig.target.blocks[:3] = 0
        assert rig.refusal(handoff) is reason
    rig.close()


def test_hang_ends_at_the_deadline() -> None:
    rig = faulty(hang=1.0)
    before = rig.target.blocks.copy()
    began = time.monotonic()
    assert rig.refusal(rig.publish([3]), seconds=0.15) is RefusalReason.TRANSFER_TIMEOUT
    assert 0.15 <= time.monotonic() - began < 0.6  # promised: 50 ms late at most; the rest is for a busy machine
    assert np.array_equal(rig.target.blocks, before)
    rig.close()


def test_closing_wakes_a_hanging_fetch() -> None:
    rig = faulty(hang=1.0)
    handoff = rig.publish([3])
    closer = threading.Timer(0.05, rig.transport.close)
    closer.start()
    began = time.monotonic()
    assert rig.refusal(handoff, seconds=20) is RefusalReason.TRANSFER_FAILED
    assert time.monotonic() - began < 5
    closer.join()
    rig.close()


def test_delay_is_late_yet_right_or_a_timeout() -> None:
    rig = faulty(delay=1.0)
    handoff = rig.publish([3])
    rig.fetch(handoff, [0], [0])
    assert np.array_equal(rig.target.blocks[0], rig.source.blocks[3])
    assert rig.refusal(handoff, seconds=0.0001) is RefusalReason.TRANSFER_TIMEOUT
    rig.close()


def test_faults_come_in_the_given_shares_and_the_same_order() -> None:
    def outcomes() -> list[RefusalReason | None]:
        rig = faulty(drop=0.25, corrupt=0.25)
        handoff = rig.publish(list(range(SOURCE_BLOCKS)))
        result = [attempt(rig, handoff) for _ in range(400)]
        rig.close()
        return result

    first = outcomes()
    assert first == outcomes()
    assert 60 < first.count(RefusalReason.TRANSFER_FAILED) < 140
    assert 60 < first.count(RefusalReason.DIGEST_MISMATCH) < 140
    assert 150 < first.count(None) < 250


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", AutoTransport),
        ("shm", ShmTransport),
        ("inline", InlineTransport),
        ("cuda_ipc", CudaIpcTransport),
        ("tcp", TcpTransport),
        ("nixl", NixlTransport),
    ],
)
def test_configured_transport_is_created(name: Any, kind: type) -> None:
    if name == "nixl":
        nixl().close()  # skips where it isn't installed
    transport = create_transport(TransferConfig(transport=name), KEY)
    assert isinstance(transport, kind)
    assert transport.name == name
    transport.close()
    transport = create_transport(TransferConfig(transport=name, faults={"drop": 1.0}), KEY)
    assert isinstance(transport, FaultyTransport)
    assert transport.name == name
    transport.close()


def test_faults_that_add_up_to_more_than_all_transfers_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"transfer\.faults"):
        create_transport(TransferConfig(faults={"drop": 0.7, "hang": 0.7}), KEY)
