"""The process of the front end: it ends at once when it is told to, however seldom it looks at the clock."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
import uvicorn

from router.http import __main__ as main


async def _app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("nobody asks")


def test_a_signal_wakes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_TICK_S", 1000.0)
    server = main._Server(uvicorn.Config(_app, port=0, log_level="warning", ws="none", lifespan="off"))

    async def told_when_it_sleeps() -> None:
        serving = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not serving.done()
        server.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(serving, 30)

    asyncio.run(asyncio.wait_for(told_when_it_sleeps(), 60))
