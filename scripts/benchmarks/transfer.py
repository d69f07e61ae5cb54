"""Measures every way that KV blocks can take between two processes of this machine, against memcpy and a plain socket.

Another process owns a pool with blocks at random places; this one brings them into its own, verified as in a handoff. The
ways take turns in rounds, so that what else the machine does hits all of them alike. The plain socket is what one would
write by hand - sendmsg from scattered blocks, recv_into - without tickets, leases, digests or encryption; unpaced, it also
has the congestion control that `tcp` takes within a machine, where the kernel's default may pace (bbr). Times are from the
first request to the last verified byte.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from python_backends.core.block_hash import HASH_BYTES
from python_backends.core.config import RemoteStoreConfig
from python_backends.core.handoff import TICKET_VERSION, KVHandoff
from python_backends.core.layout import KVLayout
from python_backends.core.types import BlockHash, Epoch, WorkerId
from python_backends.kv.memory import PoolMemory
from python_backends.kv.store.base import Offer, StoreTier
from python_backends.kv.store.node import NodeStore
from python_backends.kv.store.remote import RemoteStore
from python_backends.kv.transfer.base import CheckedTransport, block_digest
from python_backends.kv.transfer.nixl import NixlTransport, is_installed
from python_backends.kv.transfer.server import TransferServer
from python_backends.kv.transfer.shm import ShmTransport
from python_backends.kv.transfer.tcp import TcpTransport
from scripts.benchmarks.redis import redis_is_installed, redis_server

_LOOPBACK = "127.0.0.1"
_TIMEOUT_S = 60.0
_VECTOR_MOST = 256
_UNPACED = b"reno"
WAYS = (
    "memcpy",
    "shm",
    "node store read",
    "node store write",
    "plain socket",
    "plain socket, unpaced",
    "tcp",
    "tcp, 1 stream",
    "nixl over tcp",
    "nixl",
    "redis read",
    "redis write",
)

Way = Callable[[], None]
"""Brings all blocks once."""


def make_pool(layout: KVLayout, num_blocks: int, seed: int) -> PoolMemory:
    memory = PoolMemory(num_blocks, layout.block_bytes, Epoch(seed + 1))
    memory.blocks[:] = np.random.default_rng(seed).integers(0, 256, (1, layout.block_bytes), np.uint8)
    memory.blocks[:, :8] = np.arange(num_blocks, dtype=np.uint64)[:, None].view(np.uint8)  # no two are alike
    return memory


def make_transport(way: str, key: bytes) -> CheckedTransport:
    if way == "shm":
        return ShmTransport()
    server = TransferServer(_LOOPBACK, (), key, None, _TIMEOUT_S)
    if way.startswith("tcp"):
        return TcpTransport(server, key, None, 1 if way.endswith("1 stream") else 2)
    return NixlTransport(server, key, None, {"UCX_TLS": "tcp"} if way == "nixl over tcp" else {})


# --- the process that has the blocks ----------------------------------------------------------------------------------


def own_blocks(line: Connection, layout: KVLayout, num_blocks: int, key: bytes) -> None:
    """Says where the blocks are when asked for a way, until the line is closed."""
    memory = make_pool(layout, 2 * num_blocks, 0)
    chosen = np.random.default_rng(1).permutation(2 * num_blocks)[:num_blocks].tolist()
    transports: list[CheckedTransport] = []
    with suppress(EOFError):
        while True:
            way = line.recv()
            if way.startswith("plain socket"):
                listener = socket.create_server((_LOOPBACK, 0))
                line.send(listener.getsockname())
                views = [memory.blocks[block].data for block in chosen]
                unpaced = way.endswith("unpaced")
                threading.Thread(target=serve_plainly, args=(listener, views, unpaced), daemon=True).start()
                continue
            transports.append(make_transport(way, key))
            lease_id = secrets.token_hex(8)
            published = transports[-1].publish(memory, chosen, lease_id)
            line.send_bytes(
                msgspec.msgpack.encode(
                    KVHandoff(
                        version=TICKET_VERSION,
                        transport=transports[-1].name,
                        source=WorkerId("source"),
                        epoch=memory.epoch,
                        lease_id=lease_id,
                        expires_at=time.time() + 3600,
                        layout=layout,
                        fingerprint="bench",
                        num_tokens=num_blocks * layout.block_size,
                        blocks=chosen,
                        generations=[0] * num_blocks,
                        digests=[block_digest(memory.blocks[block]) for block in chosen],
                        locator=published.locator,
                        opaque=published.opaque,
                    )
                )
            )
    for transport in transports:
        transport.close()


def serve_plainly(listener: socket.socket, blocks: Sequence[memoryview], unpaced: bool) -> None:
    """To one client: all blocks for every byte it sends."""
    client, _ = listener.accept()
    with listener, client:
        if unpaced:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _UNPACED)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        while client.recv(1):
            left = list(blocks)
            first = 0
            while first < len(left):
                sent = client.sendmsg(left[first : first + _VECTOR_MOST])
                while first < len(left) and sent >= len(left[first]):
                    sent -= len(left[first])
                    first += 1
                if sent:
                    left[first] = left[first][sent:]


# --- the ways, on this side -------------------------------------------------------------------------------------------


@contextmanager
def open_ways(names: Sequence[str], layout: KVLayout, num_blocks: int, rounds: int) -> Iterator[dict[str, Way]]:
    """The ways, ready to be gone."""
    key = secrets.token_bytes(32)
    target = make_pool(layout, num_blocks, 7)
    with ExitStack() as stack:
        stack.callback(target.close)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        owner = multiprocessing.get_context("spawn").Process(
            target=own_blocks, args=(theirs, layout, num_blocks, key), daemon=True
        )
        owner.start()
        theirs.close()
        stack.callback(owner.join, 10)
        stack.callback(ours.close)
        ways: dict[str, Way] = {}
        for name in names:
            if name == "memcpy":
                ways[name] = _memcpy(layout, num_blocks, target)
            elif name.startswith("plain socket"):
                ways[name] = _plain_socket(name, ours, target, stack)
            elif name.startswith(("node", "redis")):
                continue
            else:
                ways[name] = _transport(name, ours, target, key, stack)
        for tier in ("node store", "redis"):
            wanted = [name for name in names if name.startswith(tier)]
            if wanted:
                read, write = _store(tier, layout, num_blocks, target, key, stack, rounds)
                ways |= {name: read if name.endswith("read") else write for name in wanted}
        yield {name: ways[name] for name in names}


def _memcpy(layout: KVLayout, num_blocks: int, target: PoolMemory) -> Way:
    """Within this process, from block to block: what the processor can do at most."""
    source = make_pool(layout, 2 * num_blocks, 3)
    order = np.random.default_rng(1).permutation(2 * num_blocks)[:num_blocks].tolist()

    def copy() -> None:
        for block, place in enumerate(order):
            target.blocks[block] = source.blocks[place]

    return copy


def _plain_socket(name: str, line: Connection, target: PoolMemory, stack: ExitStack) -> Way:
    line.send(name)
    sock = stack.enter_context(socket.create_connection(line.recv()))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)

    def receive() -> None:
        sock.sendall(b"x")
        for block in target.blocks:
            view, have = block.data, 0
            while have < len(view):
                have += sock.recv_into(view[have:], 0, socket.MSG_WAITALL)

    return receive


def _transport(name: str, line: Connection, target: PoolMemory, key: bytes, stack: ExitStack) -> Way:
    line.send(name)
    handoff = msgspec.msgpack.decode(line.recv_bytes(), type=KVHandoff)
    transport = make_transport(name, key)
    stack.callback(transport.close)
    everything = range(len(handoff.blocks))
    return lambda: _discard(transport.fetch(handoff, everything, target, everything, time.monotonic() + _TIMEOUT_S))


def _discard(result: object) -> None:
    """The result was verified, or it would have raised."""


def _store(
    name: str, layout: KVLayout, num_blocks: int, target: PoolMemory, key: bytes, stack: ExitStack, rounds: int
) -> tuple[Way, Way]:
    """Reading and writing all blocks. Each time it writes, it writes what is not there yet, and it all fits."""
    source = make_pool(layout, num_blocks, 5)
    stack.callback(source.close)
    tier: StoreTier
    if name == "node store":
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        tier = NodeStore((rounds + 3) * num_blocks * layout.block_bytes, layout.block_bytes, key, Path(directory))
    else:
        tier = RemoteStore(RemoteStoreConfig(servers=(stack.enter_context(redis_server()),), ttl_s=600), layout, "bench")
    stack.callback(tier.close)
    digests = [block_digest(block) for block in source.blocks]
    written: list[list[BlockHash]] = []

    def write() -> None:
        names = [BlockHash(secrets.token_bytes(HASH_BYTES)) for _ in range(num_blocks)]
        tier.write([Offer(hash_, i, 0, digests[i]) for i, hash_ in enumerate(names)], source)
        written[:] = [names]

    def read() -> None:
        count = tier.read(written[0], target.blocks, range(num_blocks), time.monotonic() + _TIMEOUT_S)
        if count != num_blocks:
            raise RuntimeError(f"{name}: {count} of {num_blocks} blocks were read")

    write()
    return read, write


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def usable_ways(wanted: Sequence[str], console: Console) -> list[str]:
    missing = set()
    if not is_installed():
        missing |= {name for name in wanted if name.startswith("nixl")}
    if not redis_is_installed():
        missing |= {name for name in wanted if name.startswith("redis")}
    if missing:
        console.print(f"[yellow]left out, since not installed: {', '.join(sorted(missing))}[/yellow]")
    return [name for name in wanted if name not in missing]


def run(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    results = []
    for kib in options.block_kib:
        num_blocks = max(1, (options.mib << 10) // kib)
        layout = KVLayout(1, 1, kib * 8, 16, "float32")
        for count, what in ((num_blocks, "bulk"), (1, "one block")):
            names = usable_ways(options.ways, console)
            with open_ways(names, layout, count, options.rounds) as ways, console.status(f"{kib} KiB, {what}"):
                for name, seconds in measure(ways, options.rounds).items():
                    gib = count * layout.block_bytes / 2**30
                    results.append(
                        {
                            "way": name,
                            "block_kib": kib,
                            "blocks": count,
                            "ms_median": statistics.median(seconds) * 1e3,
                            "ms_best": min(seconds) * 1e3,
                            "gib_per_s_median": gib / statistics.median(seconds),
                            "gib_per_s_best": gib / min(seconds),
                        }
                    )
    return results


def show(results: list[dict[str, Any]], console: Console) -> None:
    sizes = sorted({row["block_kib"] for row in results})
    table = Table("way", *(f"{kib} KiB" for kib in sizes), title="GiB/s, median (best); ms for one block alone")
    cells: dict[str, dict[int, list[str]]] = {}
    for row in results:
        cell = cells.setdefault(row["way"], {}).setdefault(row["block_kib"], ["", ""])
        if row["blocks"] > 1:
            cell[0] = f"{row['gib_per_s_median']:.2f} ({row['gib_per_s_best']:.2f})"
        else:
            cell[1] = f"{row['ms_median']:.2f} ms"
    for way, columns in cells.items():
        table.add_row(way, *("; ".join(filter(None, columns[kib])) for kib in sizes))
    console.print(table)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block-kib", type=int, nargs="+", default=[32, 256, 2048], metavar="N", help="block sizes")
    parser.add_argument("--mib", type=int, default=64, metavar="N", help="moved at once, MiB (64)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of every way (7)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help=f"of: {', '.join(WAYS)}")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(stderr=True)
    results = run(options, console)
    if options.json:
        machine = {"cpus": os.cpu_count(), "python": sys.version.split()[0]}
        print(json.dumps({"machine": machine, "results": results}))
    else:
        show(results, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
