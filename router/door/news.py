"""What the router tells those who watch: made when it is asked for, so that nobody watching costs nothing."""

from __future__ import annotations

import time

from router.door.messages import News, WorkerNews
from router.fleet import WorkerView
from router.house import House

_MOST_ENDED = 200  # per message: a whole journal at once would hold up the streams
_MOST_LIVE = 300


def news_of(house: House, after: int) -> News:
    """`after`: see Watch. Belongs to the event loop."""
    journal = house.journal
    ended = journal.after(after, _MOST_ENDED)
    sequence = max(after, journal.first) + len(ended)
    return News(
        router=house.name,
        trouble=house.trouble,
        sequence=sequence,
        more=sequence < journal.sequence,
        ended=ended,
        live=journal.live(_MOST_LIVE),
        requests=house.admission.requests,
        queued_tokens=house.admission.queued_tokens,
        index_blocks=len(house.index),
        workers=[_worker(view, time.monotonic()) for view in house.fleet],
    )


def _worker(view: WorkerView, now: float) -> WorkerNews:
    heartbeat = view.heartbeat
    return WorkerNews(
        id=view.id,
        role=view.role,
        up=view.up,
        resting=view.resting or ("drained" if view.heartbeat.draining else ""),
        pid=heartbeat.pid,
        epoch=str(view.epoch),
        silent_s=now - view.heard,
        requests=view.requests,
        load=heartbeat.load,
        block_size=heartbeat.layout.block_size,
        block_bytes=heartbeat.layout.block_bytes,
    )
