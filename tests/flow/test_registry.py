"""Workers that say in Redis where they are, and routers that find them there: joins, departures, and Redis in trouble."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from python_backends.core.config import ClusterConfig, SecurityConfig
from python_backends.core.curve import CurveKeys
from python_backends.core.errors import ConfigError
from python_backends.core.registration import seal_address, set_name
from python_backends.worker import registration
from python_backends.worker.registration import Registration
from router import registry
from router.discovery import Discovery, Source, sources_of
from router.registry import Registry
from router.service import Channels, RouterService
from tests.flow.house import GREEDY, FlowHouse, InProcess, deployment, eventually, prompt, reference
from tests.kv.certificates import redis_arguments, write_certificates
from tests.kv.redis_server import RedisServer

KEY = b"k" * 32
ONE, TWO = "tcp://192.0.2.1:7000", "tcp://192.0.2.2:7000"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that forgets within seconds, and a router that does at once."""
    monkeypatch.setattr(registration, "GOOD_FOR_S", 2.0)
    monkeypatch.setattr(registration, "RENEW_EVERY_S", 0.2)
    monkeypatch.setattr(registry, "_KEPT_S", 0.0)


def cluster(server: RedisServer, **fields: str) -> ClusterConfig:
    return ClusterConfig(listen="127.0.0.1", registry=server.url, **fields)  # type: ignore[arg-type]


def known(config: ClusterConfig, key: bytes = KEY) -> set[str]:
    """What a router that starts now finds."""
    return set(asyncio.run(_look(Registry(config, key))))


async def _look(source: Source) -> list[str]:
    return list(await source())


def test_whoever_registers_is_found_until_it_leaves(server: RedisServer, quick: None) -> None:
    config = cluster(server)
    workers = [Registration(config, address, KEY) for address in (ONE, TWO)]
    for worker in workers:
        worker.start()
    assert eventually(lambda: known(config) == {ONE, TWO})
    assert known(config, b"x" * 32) == set(), "another deployment's"
    workers[0].close()
    assert known(config) == {TWO}
    workers[1].close()
    workers[1].close()
    assert known(config) == set()


def test_who_died_is_forgotten(server: RedisServer, quick: None) -> None:
    config = cluster(server)
    worker = Registration(config, ONE, KEY)
    worker._renew()  # and never again
    assert known(config) == {ONE}
    assert eventually(lambda: known(config) == set(), 5)


def test_entries_that_nobody_signed_are_ignored(server: RedisServer) -> None:
    config = cluster(server)
    entries = [b"tcp://203.0.113.9:1", b"", seal_address("tcp://203.0.113.9:1", b"x" * 32), seal_address(ONE, KEY)]
    with server.client() as client:
        client.zadd(set_name(KEY), dict.fromkeys(entries, time.time() + 60))
    assert known(config) == {ONE}


def test_a_flushed_registry_hears_of_all_again_and_routers_keep_what_they_know(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "RENEW_EVERY_S", 0.2)
    config = cluster(server)
    worker = Registration(config, ONE, KEY)
    worker._renew()

    found = Registry(config, KEY)
    assert asyncio.run(_look(found)) == [ONE]
    with server.client() as client:
        client.flushall()
    assert asyncio.run(_look(found)) == [ONE]
    assert known(config) == set()
    worker.start()
    assert eventually(lambda: known(config) == {ONE})
    worker.close()


@pytest.mark.parametrize("trouble", ["killed", "stopped"])
def test_a_registry_in_trouble_takes_nobody_away(server: RedisServer, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.discovery._LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("python_backends.core.registration._TIMEOUT_S", 0.2)
    monkeypatch.setattr(registration, "RENEW_EVERY_S", 0.2)
    config = cluster(server)
    worker = Registration(config, ONE, KEY)
    worker.start()
    assert eventually(lambda: known(config) == {ONE})
    told: list[set[str]] = []

    async def watch() -> None:
        watching = asyncio.ensure_future(Discovery([], sources_of(config, KEY), lambda names: told.append(set(names))).watch())
        await _until(lambda: bool(told) and told[-1] == {ONE})
        server.kill() if trouble == "killed" else server.signal(signal.SIGSTOP)
        looks = len(told)
        await _until(lambda: len(told) >= looks + 3)
        assert all(addresses == {ONE} for addresses in told[looks:])
        watching.cancel()

    asyncio.run(watch())
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 4


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_a_password(tmp_path: Path) -> None:
    server = RedisServer(password="secret")
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "wrong").write_text("no")
    try:
        worker = Registration(cluster(server, registry_password_file=str(tmp_path / "password")), ONE, KEY)
        worker._renew()
        assert known(cluster(server, registry_password_file=str(tmp_path / "password"))) == {ONE}
        for options in ({}, {"registry_password_file": str(tmp_path / "wrong")}):
            with pytest.raises(OSError, match=r"cluster\.registry: .*(uthenticat|password)"):
                known(cluster(server, **options))
        worker.close()
    finally:
        server.close()


OWN = {"tls_certificate": "client.pem", "tls_key": "client.key"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (OWN, ""),
        ({**OWN, "tls_ca": "other-ca.pem"}, "CERTIFICATE_VERIFY_FAILED"),
        ({}, "SSL|ssl|reset|Broken pipe"),  # the server does not always come to say that it asks for a certificate
        ({**OWN, "registry_password_file": "wrong"}, "invalid username-password pair"),
    ],
)
def test_tls_and_an_acl_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, options: dict[str, str], told: str
) -> None:
    """Whatever is wrong costs finding workers; the log says once what that is, on either side."""
    monkeypatch.setattr("router.discovery._LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(registration, "RENEW_EVERY_S", 0.05)
    certificates = write_certificates(tmp_path)
    rights = "+time +zadd +zrem +zrangebyscore +zremrangebyscore +expire"
    (tmp_path / "users").write_text(f"user default off\nuser baton on >word ~baton:workers:* {rights}\n")
    (tmp_path / "word").write_text("word\n")
    (tmp_path / "wrong").write_text("other\n")
    server = RedisServer("--aclfile", str(tmp_path / "users"), tls=redis_arguments(certificates))
    files = {"tls_ca": "ca.pem", "registry_password_file": "word", **options}
    config = ClusterConfig(
        listen="127.0.0.1",
        registry=server.url.replace("//", "//baton@"),
        **{key: str(tmp_path / file) for key, file in files.items()},  # type: ignore[arg-type]
    )
    told_of: list[set[str]] = []

    async def watch() -> None:
        watching = asyncio.ensure_future(
            Discovery([TWO], sources_of(config, KEY), lambda names: told_of.append(set(names))).watch()
        )
        await _until(lambda: len(told_of) > 10 and (bool(told) or told_of[-1] == {ONE, TWO}))
        watching.cancel()

    worker = Registration(config, ONE, KEY)
    worker.start()
    try:
        asyncio.run(watch())
    finally:
        worker.close()
        server.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if not told:
        assert warnings == []
        return
    assert all(addresses == {TWO} for addresses in told_of)
    for said in ("cluster.registry can't be told of this worker", "workers can't be looked up: cluster.registry"):
        lines = [warning for warning in warnings if warning.startswith(said)]
        assert lines
        assert all(re.search(told, line) for line in lines)
    assert len(set(warnings)) == len(warnings)


def test_trouble_is_told_once_and_that_it_is_over(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.discovery._LOOK_EVERY_S", 0)
    caplog.set_level("INFO", "router.discovery")
    answers: list[list[str] | str] = ["refused", "late", "refused", [ONE], [ONE], "refused"]

    async def source() -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, str):
            raise OSError(answer)
        return answer

    async def watch() -> None:
        watching = asyncio.ensure_future(Discovery([], [source], lambda _: None).watch())
        await _until(lambda: not answers)
        watching.cancel()

    asyncio.run(watch())
    said = [re.sub(r".*looked up: (.*); keep.*", r"\1", record.getMessage()) for record in caplog.records]
    assert said[:4] == ["refused", "late", "workers can be looked up again", "refused"]


def test_wrong_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"cluster\.tls_ca: .*no\.pem"):
        Registration(ClusterConfig(registry="rediss://cache", tls_ca=str(tmp_path / "no.pem")), ONE, KEY)
    with pytest.raises(ConfigError, match=r"cluster\.registry: 'cache:6379' is no URL"):
        sources_of(ClusterConfig(registry="cache:6379"), KEY)
    with pytest.raises(ConfigError, match=r"cluster\.registry_password_file: /no/such"):
        Registration(ClusterConfig(registry="redis://cache", registry_password_file="/no/such"), ONE, KEY)


def _free_ports(count: int) -> int:
    """The first of so many in a row, below those that the kernel gives to outgoing connections."""
    for first in range(15_000 + os.getpid() % 900, 16_000, count):
        with ExitStack() as probes:
            sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
            if all(probe.connect_ex(("127.0.0.1", first + i)) for i, probe in enumerate(sockets)):
                return first
    raise AssertionError("no free ports")


class RegisteredHouse(FlowHouse):
    """The router knows only what the registry says."""

    def _router(self) -> RouterService:
        service = super()._router()
        service._channels = Channels(
            str(self._directory), CurveKeys.derive(self.key), [], sources_of(self.config.cluster, self.key)
        )
        return service

    def join(self, *names: str) -> None:
        for name in names:
            self.workers[name] = InProcess(self.config, self.config.worker(name), self.address(name), self.key)
            self.workers[name].ready()

    def up(self) -> set[str]:
        return {view.heartbeat.model for view in self.service.house.fleet.up()}


def test_workers_join_and_leave_a_house_by_the_registry(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.discovery._LOOK_EVERY_S", 0.1)
    config = msgspec.structs.replace(
        deployment(2, 1),
        cluster=ClusterConfig(listen="127.0.0.1", channel_port=_free_ports(3), registry=server.url),
        security=SecurityConfig(key_file="given"),
    )
    house = RegisteredHouse(config, workers_up=False)
    with house:
        house.join("prefill_0", "decode_0")
        assert eventually(lambda: house.up() == {"prefill_0", "decode_0"}, 10)
        answer = house.ask(prompt(100))
        assert answer.ids == reference(prompt(100), GREEDY)
        assert answer.proof.kv_tokens_received == 100
        house.join("prefill_1")
        assert eventually(lambda: "prefill_1" in house.up(), 10)
        house.workers.pop("prefill_0").close()
        assert eventually(lambda: house.up() == {"prefill_1", "decode_0"}, 10)
        answer = house.ask(prompt(100, 7))
        assert answer.ids == reference(prompt(100, 7), GREEDY)
        assert answer.proof.prefill_worker.startswith("prefill_1@")
        house.assert_nothing_held()
