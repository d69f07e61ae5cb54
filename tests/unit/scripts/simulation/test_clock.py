from __future__ import annotations

import asyncio
import time

import pytest

from scripts.simulation.clock import Stalled, VirtualClock, VirtualLoop


def test_hours_pass_at_once_and_in_order() -> None:
    loop = VirtualLoop()
    seen: list[tuple[float, str]] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await asyncio.sleep(nap)
            seen.append((loop.time(), name))

    async def all_of_them() -> None:
        await asyncio.gather(sleeper("a", 3600, 3600), sleeper("b", 5000), sleeper("c", 0.5))

    began = time.monotonic()
    loop.run_until_complete(all_of_them())
    loop.close()
    assert time.monotonic() - began < 5
    assert [name for _, name in seen] == ["c", "a", "b", "a"]
    assert [at for at, _ in seen] == pytest.approx([0.5, 3600, 5000, 7200])


def test_waiting_for_what_will_never_happen_is_told() -> None:
    loop = VirtualLoop()
    with pytest.raises(Stalled):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_both_clocks_are_the_loops() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    before = clock.now(), clock.wall()
    loop.run_until_complete(asyncio.sleep(7))
    loop.close()
    assert (clock.now() - before[0], clock.wall() - before[1]) == pytest.approx((7, 7))
