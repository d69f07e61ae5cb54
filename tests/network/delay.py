"""Run on a host: holds back every packet that netfilter puts into its queue 0, then lets it go on, in order.

What netem does, for kernels that don't have it. The messages are those of linux/netfilter/nfnetlink_queue.h.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from collections import deque

_NETFILTER = 12  # the netlink family
_QUEUE = 3 << 8  # the subsystem, in a message's type
_PACKET, _CONFIG, _VERDICT_BATCH = _QUEUE | 0, _QUEUE | 2, _QUEUE | 3
_REQUEST = 1
_CFG_CMD, _CFG_PARAMS, _CFG_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND, _COPY_META, _WHOLE = 1, 1, 1 << 2  # the last: packets that are not cut into segments yet stay so
_PACKET_HDR, _VERDICT_HDR = 1, 2
_ACCEPT = 1
_MOST_WAITING = 100_000
_BUFFER_BYTES = 64 << 20


def _message(kind: int, attribute: int, body: bytes) -> bytes:
    """With one attribute, about queue 0."""
    payload = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0) + struct.pack("=HH", 4 + len(body), attribute) + body
    payload += b"\0" * (-len(payload) % 4)
    return struct.pack("=IHHII", 16 + len(payload), kind, _REQUEST, 0, 0) + payload


def _open() -> socket.socket:
    """Raises OSError where the kernel has no queues."""
    queue = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
    queue.setsockopt(socket.SOL_SOCKET, 33, _BUFFER_BYTES)  # SO_RCVBUFFORCE
    queue.bind((0, 0))
    for attribute, body in (
        (_CFG_CMD, struct.pack("!BBH", _BIND, 0, socket.AF_INET)),
        (_CFG_PARAMS, struct.pack("!IB", 0, _COPY_META)),
        (_CFG_MAXLEN, struct.pack("!I", _MOST_WAITING)),
    ):
        queue.send(_message(_CONFIG, attribute, body))
    return queue


def _ids(data: bytes) -> list[int]:
    """Of the packets that these messages are about. A packet's header is the first attribute of its message."""
    found, at = [], 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if kind == _PACKET and struct.unpack_from("=H", data, at + 22)[0] == _PACKET_HDR:
            found.append(struct.unpack_from("!I", data, at + 24)[0])
        at += max(length + -length % 4, 16)
    return found


def main(delay_s: float) -> None:
    queue = _open()
    print("ready", flush=True)
    waiting: deque[tuple[float, int]] = deque()
    while True:
        pause_s = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        if select.select([queue], [], [], pause_s)[0]:
            due = time.monotonic() + delay_s
            waiting.extend((due, packet) for packet in _ids(queue.recv(1 << 16)))
        now, last = time.monotonic(), None
        while waiting and waiting[0][0] <= now:
            last = waiting.popleft()[1]
        if last is not None:  # a verdict on all up to this one
            queue.send(_message(_VERDICT_BATCH, _VERDICT_HDR, struct.pack("!II", _ACCEPT, last)))


if __name__ == "__main__":
    main(float(sys.argv[1]))
