"""Heartbeats and fleets as workers would cause them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from python_backends.core.layout import KVLayout
from python_backends.core.messages import Heartbeat
from python_backends.core.types import Epoch, Role, StoreCounts, WorkerId, WorkerLoad
from router.fleet import Fleet, WorkerView

LAYOUT = KVLayout(1, 1, 1, 16, "float32")
SIMPLE = (2.0, 0.1, 0.0, 1.0, 0.0)  # ms: a step takes 2, a prompt token 0.1, a stream 1


def heartbeat(
    name: str = "decode",
    role: Role = Role.DECODE,
    epoch: int = 1,
    max_context: int = 1000,
    fingerprint: str = "f",
    sequence: int = 0,
    total_blocks: int = 1000,
    load: WorkerLoad | None = None,
    step_tokens: int = 256,
    max_batch: int = 8,
    stores: Collection[str] = (),
    lends: bool = False,
    follows: bool = False,
    step_ms: float = 0.0,
    family: str = "",
    cores: str = "",
) -> Heartbeat:
    return Heartbeat(
        worker=WorkerId(name),
        model=name,
        server="",
        role=role,
        epoch=Epoch(epoch),
        pid=1,
        host="here",
        load=load or WorkerLoad(total_blocks=total_blocks, step_ms=step_ms),
        layout=LAYOUT,
        fingerprint=fingerprint,
        max_context=max_context,
        step_tokens=step_tokens,
        max_batch=max_batch,
        events_sequence=sequence,
        stores={tier: StoreCounts() for tier in stores},
        lends=lends,
        follows=follows,
        family=family,
        cores=cores,
    )


def put(
    fleet: Fleet,
    name: str,
    role: Role,
    *,
    streams: int = 0,
    prompts: Sequence[int] = (),
    context: int = 0,
    up: bool = True,
    max_context: int = 1000,
    fingerprint: str = "f",
    total_blocks: int = 1000,
    coefficients: Sequence[float] = SIMPLE,
    lends: bool = False,
    follows: bool = False,
    step_ms: float = 0.0,
    family: str = "",
    cores: str = "",
) -> WorkerView:
    """A worker that has so many streams, of `context` tokens in all, and prompts with these tokens to compute."""
    beat = heartbeat(
        name,
        role,
        max_context=max_context,
        fingerprint=fingerprint,
        total_blocks=total_blocks,
        lends=lends,
        follows=follows,
        step_ms=step_ms,
        family=family,
        cores=cores,
    )
    fleet.hear(beat, 0.0)
    view = fleet.get(WorkerId(name))
    assert view is not None
    view.model.coefficients = list(coefficients)
    view.hop_ms = 1.0
    for _ in range(streams):
        fleet.charge(view.id, 0, context // streams, 1)
    for tokens in prompts:
        fleet.charge(view.id, tokens, tokens, tokens)
    fleet.reorder(view)
    if not up:
        fleet.lose(view.id)
    return view
