"""Front ends at the router's door: served, cancelled, and served on by another router when theirs dies."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest

from python_backends.core.config import RouterConfig
from python_backends.core.errors import InvalidRequest, QueueFull, Unavailable
from python_backends.core.types import FinishReason, SamplingParams
from router.door.client import Answer, DoorClient
from router.door.door import Door
from router.http.keeper import RouterKeeper
from router.types import ClientRequest, Sending, Wish
from tests.flow.house import TIMEOUT_S, FlowHouse, deployment, eventually, fake_engine, prompt, reference

SAMPLING = SamplingParams(seed=4, max_tokens=30)
ENDLESS = SamplingParams(seed=4, max_tokens=4000)


def _open_door(house: FlowHouse, path: Path) -> str:
    address = _address(path)
    house.service.attend(lambda: Door(house.service, address).attend())
    return address


def _request(seed: int, sampling: SamplingParams = SAMPLING) -> ClientRequest:
    return ClientRequest(sampling, input_ids=prompt(60, seed), wish=Wish.REMOTE)


def _run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), TIMEOUT_S * 2))


@asynccontextmanager
async def _client(address: str, router_wait_s: float = 5.0) -> AsyncIterator[DoorClient]:
    async with DoorClient(address, router_wait_s) as client:
        yield client


async def _tokens(answer: Answer) -> list[int]:
    while (await answer.pieces())[-1].finish_reason is None:
        pass
    return answer.token_ids


def test_many_asks_are_answered_streamed_and_whole(tmp_path: Path) -> None:
    with FlowHouse(deployment(2, 2)) as house:
        address = _open_door(house, tmp_path)

        async def test() -> None:
            async with _client(address) as client:
                streamed = [client.ask(_request(i), Sending.TEXT) for i in range(8)]
                whole = [client.ask(_request(i), Sending.WHOLE) for i in range(8)]
                for i, answer in enumerate(streamed):
                    assert await _tokens(answer) == reference(prompt(60, i), SAMPLING)
                for i, answer in enumerate(whole):
                    piece = await answer.whole()
                    assert piece.token_ids == reference(prompt(60, i), SAMPLING)
                    assert piece.text == "".join(f"<{token}>" for token in piece.token_ids)
                    assert piece.finish_reason is FinishReason.LENGTH
                    assert piece.proof is not None
                    assert piece.proof.kv_tokens_recomputed == 0

        _run(test)
        house.assert_nothing_held()


def test_errors_come_as_what_they_are(tmp_path: Path) -> None:
    with FlowHouse(deployment(router=RouterConfig(max_requests=1))) as house:
        address = _open_door(house, tmp_path)

        async def test() -> None:
            async with _client(address) as client:
                with pytest.raises(InvalidRequest, match="input_ids"):
                    await client.ask(ClientRequest(SAMPLING, input_ids=[-1]), Sending.TEXT).pieces()
                with client.ask(_request(0, ENDLESS), Sending.TEXT) as running:
                    await running.pieces()
                    with pytest.raises(QueueFull, match="max_requests"):
                        await client.ask(_request(1), Sending.WHOLE).whole()

        _run(test)
        house.assert_nothing_held()


def test_what_is_closed_is_cancelled(tmp_path: Path) -> None:
    with FlowHouse(deployment(engine=fake_engine(step_us=2000))) as house:
        address = _open_door(house, tmp_path)

        async def test() -> None:
            async with _client(address) as client:
                answers = [client.ask(_request(i, ENDLESS), Sending.TEXT) for i in range(4)]
                for answer in answers:
                    await answer.pieces()
                for answer in answers:
                    answer.close()
                    answer.close()
                await asyncio.to_thread(house.assert_nothing_held)

        _run(test)


def _front_end(address: str, line: Connection) -> None:
    """The life of a front end process: begins requests without end."""

    async def ask() -> None:
        async with _client(address) as client:
            answers = [client.ask(_request(i, ENDLESS), Sending.TEXT) for i in range(4)]
            for answer in answers:
                await answer.pieces()
            line.send_bytes(b"streaming")
            await asyncio.sleep(TIMEOUT_S)

    asyncio.run(ask())


def test_a_front_end_that_is_killed_takes_its_requests_with_it(tmp_path: Path) -> None:
    with FlowHouse(deployment(engine=fake_engine(step_us=2000))) as house:
        address = _open_door(house, tmp_path)
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=_front_end, args=(address, theirs), daemon=True)
        process.start()
        assert ours.poll(TIMEOUT_S)
        assert ours.recv_bytes() == b"streaming"
        process.kill()
        house.assert_nothing_held(within=1.0)
        process.join(TIMEOUT_S)


def _address(path: Path) -> str:
    return f"ipc://{path}/door"


def _router(address: str, line: Connection) -> None:
    """The life of a router process with workers of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with FlowHouse(deployment(engine=fake_engine(step_us=3000))) as house:
        house.service.attend(lambda: Door(house.service, address).attend())
        line.send_bytes(b"up")
        time.sleep(TIMEOUT_S)


def _start_router(path: Path) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_router, args=(_address(path), theirs))
    process.start()
    assert ours.poll(TIMEOUT_S)
    return process


def test_another_router_goes_on_where_one_died(tmp_path: Path) -> None:
    """SIGKILL between two tokens; the text is the same, and no token comes twice."""

    async def test() -> None:
        first = await asyncio.to_thread(_start_router, tmp_path)
        sampling = msgspec.structs.replace(SAMPLING, max_tokens=60)
        async with _client(_address(tmp_path), router_wait_s=TIMEOUT_S) as client:
            answers = [client.ask(_request(i, sampling), Sending.TEXT) for i in range(4)]
            unheard = client.ask(_request(9, sampling), Sending.WHOLE)
            while any(len(answer.token_ids) < 10 for answer in answers):
                await asyncio.wait([asyncio.ensure_future(answer.pieces()) for answer in answers])
            first.kill()
            assert all(10 <= len(answer.token_ids) < 60 for answer in answers)
            second = await asyncio.to_thread(_start_router, tmp_path)
            for i, answer in enumerate(answers):
                assert await _tokens(answer) == reference(prompt(60, i), sampling)
            assert (await unheard.whole()).token_ids == reference(prompt(60, 9), sampling)
            second.kill()

    _run(test)


def test_without_a_router_there_is_one_clear_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with _client(f"ipc://{tmp_path}/door", router_wait_s=0.3) as client:
            began = time.monotonic()
            with pytest.raises(Unavailable, match="the router is not up"):
                await client.ask(_request(0), Sending.TEXT).pieces()
            assert time.monotonic() - began < 2
            assert client.router is None

    _run(test)


def test_a_router_that_shuts_down_says_so(tmp_path: Path) -> None:
    with FlowHouse(deployment(engine=fake_engine(step_us=2000))) as house:
        address = _open_door(house, tmp_path)

        async def test() -> None:
            async with _client(address) as client:
                answer = client.ask(_request(0, ENDLESS), Sending.TEXT)
                await answer.pieces()
                await asyncio.to_thread(house.service.close)
                with pytest.raises(Unavailable, match="shutting down"):
                    await _tokens(answer)

        _run(test)


def test_nonsense_at_the_door_is_not_heeded(tmp_path: Path) -> None:
    with FlowHouse() as house:
        address = _open_door(house, tmp_path)

        async def test() -> None:
            async with _client(address) as client:
                await client.ask(_request(1), Sending.TEXT).pieces()
                assert client._socket is not None
                await client._socket.send(b"nonsense")
                assert await _tokens(client.ask(_request(0), Sending.TEXT)) == reference(prompt(60, 0), SAMPLING)

        _run(test)
        assert eventually(lambda: house.service.house.trouble == "")


def test_a_front_end_that_finds_no_router_where_triton_serves_has_one_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that had kept it has died with it."""
    monkeypatch.setattr("router.http.keeper._FIRST_PATIENCE_S", 0.2)
    asked: list[str] = []

    class Triton(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            asked.append(self.path)
            self.do_GET()

        def log_message(self, format: str, *arguments: object) -> None: ...

    async def test() -> None:
        keeper = RouterKeeper(f"127.0.0.1:{triton.server_port}", {})
        async with DoorClient(_address(tmp_path), 3.0) as client, keeper.watching(client):
            while len(asked) < 2:
                await asyncio.sleep(0.05)

    with ThreadingHTTPServer(("127.0.0.1", 0), Triton) as triton:
        thread = threading.Thread(target=triton.serve_forever)
        thread.start()
        try:
            _run(test)
        finally:
            triton.shutdown()
            thread.join(5)
    assert asked[:2] == [f"/v2/repository/models/router/{action}" for action in ("unload", "load")]


def test_a_router_that_stands_still_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the front end that keeps it: Triton would wait for its requests, and for as long as it stands still."""
    monkeypatch.setattr("router.door.client._SILENT_S", 1.0)
    router = _start_router(tmp_path)
    keeper = RouterKeeper("127.0.0.1:1", {})

    async def test() -> None:
        async with DoorClient(_address(tmp_path), 3.0, keeper.fell_silent) as client, keeper.watching(client):
            answer = client.ask(_request(0, ENDLESS), Sending.TEXT)
            await answer.pieces()
            assert router.pid is not None
            os.kill(router.pid, signal.SIGSTOP)
            with pytest.raises(Unavailable, match="the router is not up"):
                await _tokens(answer)
            await asyncio.to_thread(router.join, 5)
            assert router.exitcode == -signal.SIGKILL

    try:
        _run(test)
    finally:
        router.kill()
