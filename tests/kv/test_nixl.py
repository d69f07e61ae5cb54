"""Transport `nixl`: every way in which NIXL was seen to fail, and what becomes of it here."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from python_backends.core.config import TransferConfig
from python_backends.core.errors import ConfigError, RefusalReason
from python_backends.core.handoff import KVHandoff, seal
from python_backends.core.types import Epoch, Role
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer import create_transport
from python_backends.kv.transfer.nixl import NixlTransport, _Zone
from python_backends.kv.transfer.session import Claim, Landing, Push, Status
from tests.kv.test_tcp import connect, fetch_all
from tests.kv.test_transports import (
    KEY,
    LAYOUT,
    SOURCE_BLOCKS,
    Rig,
    changed,
    kill,
    make_pool,
    nixl,
    outcome,
    require_nixl,
    soon,
    start_owner,
    stop,
)

OVER = {"shared memory": {}, "tcp": {"UCX_TLS": "tcp"}}


@pytest.fixture(params=OVER)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(nixl(**OVER[request.param]))
    yield rig
    rig.close()


@pytest.fixture
def shm_rig() -> Iterator[Rig]:
    rig = Rig(nixl())
    yield rig
    rig.close()


def transport_of(rig: Rig) -> NixlTransport:
    assert isinstance(rig.transport, NixlTransport)
    return rig.transport


def zone_of(rig: Rig) -> _Zone:
    return transport_of(rig)._zones[LAYOUT.block_bytes]


# --- a source that dies or stops --------------------------------------------------------------------------------------


def test_a_source_killed_before_is_a_failure_at_once(rig: Rig) -> None:
    owner, handoff = start_owner("nixl")
    fetch_all(rig, handoff)
    kill(owner)
    began = time.monotonic()
    assert rig.refusal(handoff) is RefusalReason.TRANSFER_FAILED
    assert time.monotonic() - began < 1


def test_a_stopped_source_is_a_timeout_and_what_comes_late_hits_nothing(rig: Rig) -> None:
    owner, handoff = start_owner("nixl")
    try:
        fetch_all(rig, handoff)
        stop(owner)
        zone = zone_of(rig)
        assert rig.refusal(handoff, seconds=0.3) is RefusalReason.TRANSFER_TIMEOUT
        assert not transport_of(rig)._zones, "a zone that may be written to is used again"
        rig.target.blocks[:] = 7
        owner.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        assert (rig.target.blocks == 7).all()
        fetch_all(rig, handoff)
        assert zone_of(rig) is not zone
    finally:
        owner.send_signal(signal.SIGCONT)
        kill(owner)


def test_a_source_killed_while_it_pushes(rig: Rig) -> None:
    """Many times, so that every moment is hit: the reader gets a refusal or the right bytes, and goes on."""
    for delay_ms in (0, 5):
        owner, handoff = start_owner("nixl")
        fetch_all(rig, handoff)
        killer = threading.Timer(delay_ms / 1000, owner.kill)
        killer.start()
        deadline = time.monotonic() + 10
        while outcome(rig, handoff) is None:
            assert np.array_equal(rig.target.blocks, rig.source.blocks)
            assert time.monotonic() < deadline
        killer.join()
        kill(owner)
    fetch_all(rig, rig.publish(list(range(SOURCE_BLOCKS))))


def test_a_source_that_restarts_is_known_by_its_new_name(rig: Rig) -> None:
    for _ in range(2):
        owner, handoff = start_owner("nixl")
        fetch_all(rig, handoff)
        kill(owner)
    fetch_all(rig, rig.publish([3, 4]))


def test_failures_do_not_pile_up_memory(shm_rig: Rig) -> None:
    owner, handoff = start_owner("nixl")
    try:
        fetch_all(shm_rig, handoff)
        stop(owner)
        before = psutil.Process().memory_info().rss
        for _ in range(8):
            assert shm_rig.refusal(handoff, seconds=0.05) is RefusalReason.TRANSFER_TIMEOUT
        zone_bytes = 4096 * LAYOUT.block_bytes
        assert psutil.Process().memory_info().rss - before < 4 * zone_bytes
    finally:
        owner.send_signal(signal.SIGCONT)
        kill(owner)


# --- a reader that dies or stops --------------------------------------------------------------------------------------

READER = """
import os, sys, time
os.dup2(2, 1)
import msgspec
from tests.kv.test_transports import *
handoff = msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=KVHandoff)
transport = nixl()
target = make_pool(Epoch(8), seed=1)
end = time.monotonic() + 20
print("go", file=sys.stderr, flush=True)
while time.monotonic() < end:
    transport.fetch(handoff, range(SOURCE_BLOCKS), target, range(SOURCE_BLOCKS), time.monotonic() + 5)
"""


def start_reader(handoff: KVHandoff) -> subprocess.Popen[bytes]:
    """A process that fetches all blocks again and again."""
    reader = subprocess.Popen([sys.executable, "-c", READER, msgspec.msgpack.encode(handoff).hex()], stderr=subprocess.PIPE)
    assert reader.stderr is not None
    for line in reader.stderr:
        if line == b"go\n":
            break
    time.sleep(0.3)
    return reader


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reader_that_dies_or_stops_does_not_hurt_the_source(rig: Rig, number: int) -> None:
    """Over TCP a pull from unmapped memory crashes the process it is pulled from; a push has to survive its reader."""
    transport_of(rig)._server._timeout_s = 1.0
    handoff = rig.publish(list(range(SOURCE_BLOCKS)))
    for _ in range(2):
        reader = start_reader(handoff)
        reader.send_signal(number)
        time.sleep(1.2)
        fetch_all(rig, handoff)
        reader.send_signal(signal.SIGCONT)
        reader.kill()
        reader.wait(10)
        assert reader.stderr is not None
        reader.stderr.close()
    fetch_all(rig, handoff)


def test_closing_while_blocks_arrive(rig: Rig) -> None:
    other = Rig(nixl())
    handoff = other.publish(list(range(SOURCE_BLOCKS)))
    fetch_all(rig, changed(handoff))
    closer = threading.Timer(0.02, rig.transport.close)
    closer.start()
    reason = None
    while reason is None:
        reason = outcome(rig, handoff)
    assert reason in (RefusalReason.TRANSFER_FAILED, RefusalReason.TRANSFER_TIMEOUT)
    closer.join()
    fetch_all(other, handoff)
    other.close()


# --- requests that must not be believed -------------------------------------------------------------------------------


def ask(rig: Rig, landing: Landing | None, slots: list[int]) -> Status:
    """The source's answer to a push of block 3."""
    host, port = transport_of(rig)._server.address.split(":")
    session = connect((host, int(port)))
    session.send_message(Claim(seal(rig.publish([3]), KEY)), soon())
    if landing is not None:
        session.send_message(landing, soon())
    session.send_message(Push([0], slots), soon())
    status = session.receive_message(soon())
    session.close()
    assert isinstance(status, Status)
    return status


@pytest.mark.parametrize("slots", [[-1], [4096], [2**40], [], [0, 1]])
def test_slots_outside_the_landing_are_refused(shm_rig: Rig, slots: list[int]) -> None:
    fetch_all(shm_rig, shm_rig.publish([3]))
    assert ask(shm_rig, zone_of(shm_rig).landing, slots).reason == RefusalReason.TRANSFER_FAILED.value


def test_a_push_without_a_landing_is_refused(shm_rig: Rig) -> None:
    assert ask(shm_rig, None, [0]).reason == RefusalReason.TRANSFER_FAILED.value


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, ("/tmp/baton-test-bomb", 0o700)


@pytest.mark.parametrize("metadata", [b"", b"nonsense", bytes(5000), pickle.dumps(Bomb()), pickle.dumps([1, 2])])
def test_metadata_that_is_none_is_refused_and_never_unpickled(shm_rig: Rig, metadata: bytes) -> None:
    fetch_all(shm_rig, shm_rig.publish([3]))
    landing = msgspec.structs.replace(zone_of(shm_rig).landing, agent="x", metadata=metadata)
    assert ask(shm_rig, landing, [0]).reason == RefusalReason.TRANSFER_FAILED.value
    assert not Path("/tmp/baton-test-bomb").exists()
    fetch_all(shm_rig, shm_rig.publish([3]))


def test_memory_that_was_not_registered_is_refused_before_anything_moves(shm_rig: Rig) -> None:
    other = Rig(nixl())
    fetch_all(other, other.publish([3]))
    victim = np.full(1 << 20, 7, np.uint8)
    for address, slots in ((victim.ctypes.data, 16), (zone_of(other).landing.address, 100_000)):
        landing = msgspec.structs.replace(zone_of(other).landing, address=address, slots=slots)
        assert ask(shm_rig, landing, [slots - 1]).reason == RefusalReason.TRANSFER_FAILED.value
    assert (victim == 7).all()
    other.close()


def test_another_agents_name_is_refused(shm_rig: Rig) -> None:
    other = Rig(nixl())
    fetch_all(other, other.publish([3]))
    landing = msgspec.structs.replace(zone_of(other).landing, agent="somebody else")
    assert ask(shm_rig, landing, [0]).reason == RefusalReason.TRANSFER_FAILED.value
    other.close()


# --- how the bytes travel ---------------------------------------------------------------------------------------------


def test_a_handoff_larger_than_the_landing_zone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_backends.kv.transfer.nixl._ZONE_SLOTS", 8)
    handoff = rig.publish(np.random.default_rng(1).permutation(SOURCE_BLOCKS).tolist())
    for _ in range(5):
        fetch_all(rig, handoff)
    assert sorted(zone_of(rig)._free) == list(range(8))


def test_of_zones_for_other_sizes_of_blocks_few_are_kept(shm_rig: Rig) -> None:
    """Handoffs that are converted bring blocks as large as the source's; each size has a zone, and memory has an end."""
    transport = transport_of(shm_rig)
    for count in range(2, 8):
        zone = transport._enter_zone(count * LAYOUT.block_bytes)
        transport._leave_zone(zone, clean=True)
    assert list(transport._zones) == [count * LAYOUT.block_bytes for count in range(4, 8)]
    fetch_all(shm_rig, shm_rig.publish([3, 4]))


def test_a_zone_that_is_used_outlives_its_place_among_the_few(shm_rig: Rig) -> None:
    transport = transport_of(shm_rig)
    used = transport._enter_zone(LAYOUT.block_bytes)
    for count in range(2, 8):
        transport._leave_zone(transport._enter_zone(count * LAYOUT.block_bytes), clean=True)
    used.poll()
    assert used.agent._agent is not None
    transport._leave_zone(used, clean=True)
    assert used.agent._agent is None


def test_a_refusal_in_the_middle_leaves_the_zone_as_good_as_before(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_backends.kv.transfer.nixl._PIECE_BYTES", 2 * LAYOUT.block_bytes)
    handoff = rig.publish(list(range(SOURCE_BLOCKS)))
    fetch_all(rig, handoff)
    zone = zone_of(rig)
    rig.source.generations[17] += np.uint64(1)
    assert rig.refusal(handoff) is RefusalReason.STALE_EPOCH
    assert zone_of(rig) is zone
    assert sorted(zone._free) == list(range(len(zone.blocks)))
    fetch_all(rig, rig.publish(list(range(SOURCE_BLOCKS))))


def test_what_can_be_made_ready_is_ready_before_the_first_handoff() -> None:
    source, reader = nixl(), nixl()
    pools = [make_pool(), make_pool(Epoch(8), seed=1)]
    source.attach(pools[0], Role.PREFILL)
    reader.attach(pools[1], Role.DECODE)
    assert not source._zones
    assert source._source._agent is not None
    assert list(reader._zones) == [LAYOUT.block_bytes]
    assert reader._source._agent is None
    for transport in (source, reader):
        transport.close()
        transport.close()
    for pool in pools:
        pool.close()


def test_a_pool_that_was_closed_is_not_pushed_from(rig: Rig) -> None:
    """Its memory is still mapped, and NIXL would send whatever is there."""
    handoff = rig.publish([3, 4])
    fetch_all(rig, handoff)
    rig.source.close()
    assert rig.refusal(handoff) is RefusalReason.STALE_EPOCH


PROCESS = """
from tests.kv.test_transports import *
from tests.kv.test_tcp import fetch_all
rig = Rig(nixl())
fetch_all(rig, rig.publish([3, 4]))
rig.close()
"""


def test_a_process_that_used_it_ends_in_order() -> None:
    """libibverbs, where it is installed without a device, makes processes end with a crash."""
    require_nixl()
    ended = subprocess.run([sys.executable, "-c", PROCESS], timeout=60, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout == b"", "NIXL talks on standard output"


def test_without_nixl_the_configuration_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_backends.kv.transfer.nixl.is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"requirements-nixl\.txt"):
        create_transport(TransferConfig(transport="nixl"), KEY)


def test_environment_settings_of_ucx_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TCP_SNDBUF", "1m")
    transport = nixl()
    assert transport._settings["UCX_TCP_SNDBUF"] == "1m"
    assert transport._settings["UCX_TCP_RCVBUF"] == "4m"
    memory = PoolMemory(2, 4096, Epoch(1))
    transport.attach(memory, Role.DECODE)
    assert os.environ["UCX_TCP_SNDBUF"] == "1m"
    assert "UCX_TCP_RCVBUF" not in os.environ
    transport.close()
    memory.close()
