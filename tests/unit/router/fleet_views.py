"""Heartbeats and fleet views as workers would cause them."""

from __future__ import annotations

from collections.abc import Collection

from python_backends.core.layout import KVLayout
from python_backends.core.messages import Heartbeat
from python_backends.core.types import Epoch, Role, StoreCounts, WorkerId, WorkerLoad
from router.fleet import WorkerView

LAYOUT = KVLayout(1, 1, 1, 16, "float32")


def heartbeat(
    name: str = "decode",
    role: Role = Role.DECODE,
    epoch: int = 1,
    max_context: int = 1000,
    fingerprint: str = "f",
    sequence: int = 0,
    stores: Collection[str] = (),
    lends: bool = False,
) -> Heartbeat:
    return Heartbeat(
        worker=WorkerId(name),
        model=name,
        server="",
        role=role,
        epoch=Epoch(epoch),
        pid=1,
        host="here",
        load=WorkerLoad(),
        layout=LAYOUT,
        fingerprint=fingerprint,
        max_context=max_context,
        events_sequence=sequence,
        stores={tier: StoreCounts() for tier in stores},
        lends=lends,
    )


def view(
    name: str,
    role: Role,
    *,
    requests: int = 0,
    prefill_tokens: int = 0,
    up: bool = True,
    max_context: int = 1000,
    fingerprint: str = "f",
    stores: Collection[str] = (),
    lends: bool = False,
) -> WorkerView:
    beat = heartbeat(name, role, max_context=max_context, fingerprint=fingerprint, stores=stores, lends=lends)
    return WorkerView(beat, heard=0.0, up=up, requests=requests, prefill_tokens=prefill_tokens)
