"""Transport `auto`: of what a pair of workers has in common, the best. Which one and why is shown in the proof.

    same process, same host   shm
    another host              nixl where both have RDMA devices and NIXL, else tcp - if the source listens for others

A ticket says all ways to its blocks. Where shared memory of the same host can't be opened (another user's, say), the next
way is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import msgspec

from python_backends.core.errors import UNREADABLE, HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff
from python_backends.core.host import host_id
from python_backends.core.types import Role
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import Arrived, CheckedTransport, Fetched, Published, check_time, failed


class Ways(msgspec.Struct, frozen=True, array_like=True):
    """What a ticket says besides the shared memory's locator."""

    host: str  # core.host.host_id: processes of equal ones find each other's memory
    process: int
    address: str  # of the source's TransferServer; empty: it has none
    devices: list[str]  # RDMA devices that its NIXL can use


class AutoTransport(CheckedTransport):
    def __init__(
        self, shm: CheckedTransport, tcp: CheckedTransport | None, nixl: CheckedTransport | None, devices: Sequence[str]
    ) -> None:
        """The transports that this worker has; they are closed with this one. `devices`: of RDMA, on this host."""
        self.name = "auto"
        self._shm = shm
        self._tcp = tcp
        self._nixl = nixl
        self._devices = list(devices) if nixl is not None else []
        self._host = host_id()

    @property
    def _parts(self) -> list[CheckedTransport]:
        return [part for part in (self._shm, self._tcp, self._nixl) if part is not None]

    def attach(self, memory: PoolMemory, role: Role) -> None:
        for part in self._parts:
            part.attach(memory, role)

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        """See KVTransport.publish."""
        shm = self._shm.publish(memory, blocks, lease_id)
        address = ""
        for part in (self._tcp, self._nixl):
            if part is not None:
                address = part.publish(memory, blocks, lease_id).locator
        ways = Ways(self._host, os.getpid(), address, self._devices)
        return Published(locator=shm.locator, opaque=msgspec.msgpack.encode(ways))

    def release(self, lease_id: str) -> None:
        """See KVTransport.release."""
        for part in self._parts:
            part.release(lease_id)

    def copy(
        self,
        handoff: KVHandoff,
        wanted: Sequence[int],
        into: PoolMemory,
        blocks: Sequence[int],
        deadline: float,
        arrived: Arrived,
        *,
        exact: bool,
    ) -> Fetched:
        """See CheckedTransport.copy."""
        try:
            ways = _decoder.decode(handoff.opaque)
        except UNREADABLE as error:
            raise failed(f"the ticket does not say how to fetch: {error}") from error
        refused: HandoffRefused | None = None
        for part, locator, why in self._choices(handoff, ways):
            if refused is not None:
                check_time(deadline)
                why = f"{why} ({refused.detail})"
            ticket = msgspec.structs.replace(handoff, transport=part.name, locator=locator, opaque=b"")
            try:
                how = part.copy(ticket, wanted, into, blocks, deadline, arrived, exact=exact)
            except HandoffRefused as error:
                if error.reason is not RefusalReason.TRANSFER_FAILED:
                    raise
                refused = error
            else:
                plain = Fetched(part.name, wire_bytes=len(wanted) * into.block_bytes)
                return msgspec.structs.replace(how or plain, why=why)
        raise refused or failed(f"{handoff.source} is on another host, and one of the two does not listen (transfer.listen)")

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _choices(self, handoff: KVHandoff, ways: Ways) -> Iterator[tuple[CheckedTransport, str, str]]:
        """Transport, its locator and why, the best first."""
        near = ways.host == self._host
        if near:
            yield self._shm, handoff.locator, "same process" if ways.process == os.getpid() else "same host"
        where = "same host, but not by shared memory" if near else "another host"
        if ways.address and self._nixl is not None and self._devices and ways.devices:
            yield self._nixl, ways.address, f"{where}; RDMA by {self._devices[0]} and {ways.devices[0]}"
        if ways.address and self._tcp is not None:
            yield self._tcp, ways.address, f"{where}; no other fabric in common"


_decoder = msgspec.msgpack.Decoder(Ways)
