"""The remote store against real Redis servers: what is stored is found, and whatever fails costs hits and little time."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from python_backends.core.config import RemoteStoreConfig
from python_backends.core.errors import ConfigError
from python_backends.core.layout import KVLayout
from python_backends.core.types import BlockHash
from python_backends.kv.store.remote import RemoteStore
from python_backends.kv.store.value import VERSION
from python_backends.kv.transfer.base import block_digest
from tests.kv.blocks import Pool, content, hashes
from tests.kv.certificates import redis_arguments, write_certificates
from tests.kv.redis_server import RedisServer, free_port

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")  # 8 KiB
FINGERPRINT = "f" * 32
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """An empty server that must not be harmed."""
    shared.client().flushall()
    return shared


@pytest.fixture
def own_server() -> Iterator[Callable[..., RedisServer]]:
    """Makes servers that may be killed."""
    made: list[RedisServer] = []

    def make(*arguments: str, **options: Any) -> RedisServer:
        made.append(RedisServer(*arguments, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., RemoteStore]]:
    stores: list[RemoteStore] = []

    def make(*servers: RedisServer, fingerprint: str = FINGERPRINT, layout: KVLayout = LAYOUT, **options: Any) -> RemoteStore:
        urls = options.pop("urls", None) or tuple(server.url for server in servers)
        stores.append(RemoteStore(RemoteStoreConfig(servers=urls, **options), layout, fingerprint))
        return stores[-1]

    yield make
    for store in stores:
        store.close()
        store.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(512, LAYOUT.block_bytes)
    yield pool
    pool.close()


Connect = Callable[..., RemoteStore]
MakeServer = Callable[..., RedisServer]


def soon() -> float:
    return time.monotonic() + TIMEOUT_S


def put(store: RemoteStore, pool: Pool, names: Sequence[BlockHash]) -> None:
    for start in range(0, len(names), 64):
        store.write(pool.offer(names[start : start + 64]), pool.memory)


def read_all(store: RemoteStore, pool: Pool, names: Sequence[BlockHash], seconds: float = TIMEOUT_S) -> int:
    """How many leading blocks come, each checked."""
    targets = list(range(pool.memory.num_blocks - len(names), pool.memory.num_blocks))
    began = time.monotonic()
    count = store.read(names, pool.memory.blocks, targets, began + seconds)
    assert time.monotonic() - began < seconds + 0.3, "later than the deadline"
    assert pool.holds(names[:count], targets[:count])
    return count


def there(store: RemoteStore, names: Sequence[BlockHash]) -> list[bool]:
    return [store.count([name], soon()) == 1 for name in names]


def key(name: bytes) -> str:
    return f"baton:kv:{FINGERPRINT}:{name.hex()}"


# --- what is stored is found ------------------------------------------------------------------------------------------


def test_another_worker_reads_what_one_has_written(server: RedisServer, connect: Connect, pool: Pool) -> None:
    writer, reader, names = connect(server), connect(server), hashes(150)
    put(writer, pool, names)
    assert reader.count(names, soon()) == 150
    assert read_all(reader, pool, names) == 150
    assert (reader.counts().read, writer.counts().written) == (150, 150)
    assert set(server.client(decode_responses=True).keys()) == {key(name) for name in names}


@pytest.mark.parametrize("block_kib", [1, 64, 1024, 12_288])
def test_blocks_of_every_size(server: RedisServer, connect: Connect, block_kib: int) -> None:
    layout = KVLayout(block_kib, 1, 8, 16, "float32")
    store, pool, names = connect(server, layout=layout), Pool(12, layout.block_bytes), hashes(6)
    assert layout.block_bytes == block_kib << 10
    put(store, pool, names)
    assert read_all(store, pool, names, seconds=10) == 6
    pool.close()


def test_only_the_leading_blocks_count(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names = connect(server), hashes(600)
    put(store, pool, [*names[:530], *names[531:]])
    assert store.count(names, soon()) == 530
    assert read_all(store, pool, names[500:]) == 30
    assert store.count([], soon()) == store.read([], pool.memory.blocks, [], soon()) == 0
    assert read_all(store, pool, names[530:]) == 0
    assert read_all(store, pool, names[:100]) == 100  # the connection is as good as before


def test_what_is_there_is_not_sent_again(server: RedisServer, connect: Connect, pool: Pool) -> None:
    one, two, names = connect(server), connect(server), hashes(20)
    put(one, pool, names)
    before = server.client().info("stats")["total_net_input_bytes"]
    put(two, pool, names)
    put(one, pool, names)
    assert server.client().info("stats")["total_net_input_bytes"] - before < 20 * LAYOUT.block_bytes
    assert (one.counts().written, two.counts().written) == (20, 0)


def test_a_block_reused_before_it_was_copied_is_not_stored(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names = connect(server), hashes(3)
    offers = pool.offer(names)
    pool.memory.generations[offers[1].block] += np.uint64(1)
    store.write(offers, pool.memory)
    assert there(store, names) == [True, False, True]
    assert store.counts().dropped == 1


def test_blocks_of_another_tier_are_taken(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names = connect(server), hashes(5)
    data = [content(name, LAYOUT.block_bytes) for name in names]
    store.put(names, data, [block_digest(block) for block in data])
    assert read_all(store, pool, names) == 5


def test_models_are_apart(server: RedisServer, connect: Connect, pool: Pool) -> None:
    names = hashes(3)
    put(connect(server), pool, names)
    assert there(connect(server, fingerprint="0" * 32), names) == [False] * 3


# --- how long it is kept, and how much --------------------------------------------------------------------------------


def test_values_live_for_their_ttl_and_use_renews_it(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names = connect(server, ttl_s=100), hashes(3)
    put(store, pool, names)
    client = server.client()
    assert all(98 <= client.ttl(key(name)) <= 100 for name in names)
    for name in names:
        client.expire(key(name), 5)
    store.touch(names)
    assert all(client.ttl(key(name)) <= 5 for name in names), "it was heard of just now"
    other = connect(server, ttl_s=100)
    other.touch(names)
    assert all(client.ttl(key(name)) >= 98 for name in names)


def test_expired_values_are_misses(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names = connect(server, ttl_s=1), hashes(3)
    put(store, pool, names)
    assert read_all(store, pool, names) == 3
    time.sleep(1.2)
    assert read_all(store, pool, names) == 0
    put(store, pool, names)
    assert read_all(store, pool, names) == 3


def test_the_budget_is_kept_and_the_oldest_give_way(own_server: MakeServer, connect: Connect, pool: Pool) -> None:
    server = own_server()
    client = server.client()
    store = connect(server, budget_mib=4)
    for seed in range(12):
        put(store, pool, hashes(64, seed))  # 0.5 MiB each
        assert client.info("memory")["used_memory"] < 5 << 20
    assert read_all(store, pool, hashes(64, 11)) == 64
    assert not any(there(store, hashes(64, 0)))
    assert store.counts().used_bytes <= store.counts().budget_bytes == 4 << 20


def test_a_full_server_costs_writes_only(own_server: MakeServer, connect: Connect, pool: Pool) -> None:
    server = own_server("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    store = connect(server)
    put(store, pool, hashes(500))
    assert 50 < store.counts().written < 400
    assert store.counts().dropped >= 100
    assert read_all(store, pool, hashes(50)) == 50
    assert store.counts().up


def test_a_server_that_evicts_by_itself(own_server: MakeServer, connect: Connect, pool: Pool) -> None:
    store = connect(own_server("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru"))
    for seed in range(10):
        put(store, pool, hashes(100, seed))
    assert store.counts().dropped == 0
    assert sum(there(store, hashes(100, 9))) > 50


# --- several servers --------------------------------------------------------------------------------------------------


def test_several_servers_share_and_losing_one_loses_its_share(own_server: MakeServer, connect: Connect, pool: Pool) -> None:
    servers = [own_server() for _ in range(3)]
    store, names = connect(*servers), hashes(300)
    put(store, pool, names)
    shares = [server.client().dbsize() for server in servers]
    assert sum(shares) == 300
    assert min(shares) > 60
    assert read_all(connect(*reversed(servers)), pool, names) == 300
    servers[1].kill()
    left = connect(*servers)
    assert sum(there(left, names)) == 300 - shares[1]
    assert not left.counts().up
    put(left, pool, hashes(30, 1))
    assert 0 < sum(there(left, hashes(30, 1))) < 30


def test_a_redis_cluster_as_it_is(own_server: MakeServer, connect: Connect, pool: Pool) -> None:
    servers = [
        own_server("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", str(free_port()))
        for _ in range(3)
    ]
    make_cluster([server.client() for server in servers])
    store, names = connect(servers[0], cluster=True), hashes(200)
    put(store, pool, names)
    shares = [server.client().dbsize() for server in servers]
    assert sum(shares) == 200
    assert min(shares) > 20
    assert read_all(connect(servers[1], cluster=True), pool, names) == 200
    move_slots(servers[0], servers[1], 2000)  # a worker that does not know it yet is sent on
    assert sum(there(store, names)) < 200
    time.sleep(1.1)
    there(store, names)
    assert sum(there(store, names)) == 200
    servers[2].kill()
    assert read_all(store, pool, names, seconds=0.5) < 200


def make_cluster(clients: Sequence[redis.Redis]) -> None:
    share = 16384 // len(clients) + 1
    for i, client in enumerate(clients):
        command(client, "CLUSTER ADDSLOTSRANGE", i * share, min((i + 1) * share, 16384) - 1)
        command(client, "CLUSTER SET-CONFIG-EPOCH", i + 1)
    for client in clients[1:]:
        bus = clients[0].config_get("cluster-port")["cluster-port"]
        command(client, "CLUSTER MEET", "127.0.0.1", clients[0].connection_pool.connection_kwargs["port"], bus)
    deadline = time.monotonic() + 20
    while not all(client.cluster("INFO")["cluster_state"] == "ok" for client in clients):
        assert time.monotonic() < deadline, "the cluster does not come together"
        time.sleep(0.1)


def move_slots(source: RedisServer, target: RedisServer, count: int) -> None:
    """Slots from 0, with their keys."""
    one, other = source.client(), target.client()
    ids = [command(client, "CLUSTER MYID").decode() for client in (one, other)]
    for slot in range(count):
        names = command(one, "CLUSTER GETKEYSINSLOT", slot, 100)
        if names:
            command(other, "CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
            command(one, "CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
            command(one, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *names)
            for client in (other, one):
                command(client, "CLUSTER SETSLOT", slot, "NODE", ids[1])


def command(client: redis.Redis, *arguments: object) -> Any:
    return client.execute_command(*arguments)  # type: ignore[no-untyped-call]


# --- who may come in --------------------------------------------------------------------------------------------------


def test_password_and_acl_user(own_server: MakeServer, connect: Connect, pool: Pool, tmp_path: Path) -> None:
    server = own_server(password="secret")
    server.client().acl_setuser(
        "baton", enabled=True, passwords=["+word"], keys=["baton:kv:*"],
        commands=["+get", "+set", "+exists", "+expire", "+unlink", "+info", "+select", "+client"],
    )  # fmt: skip
    for user, word in (("", "secret"), ("baton", "word")):
        file = tmp_path / "password"
        file.write_text(f"{word}\n")
        store = connect(server, username=user, password_file=str(file), budget_mib=100)
        names = hashes(3, seed=len(user))
        put(store, pool, names)
        store.touch(names)
        assert read_all(store, pool, names) == 3
        assert store.counts().up


@pytest.mark.parametrize("word", ["", "wrong"])
def test_a_wrong_password_costs_hits_only(
    own_server: MakeServer, connect: Connect, pool: Pool, tmp_path: Path, word: str
) -> None:
    server = own_server(password="secret")
    (tmp_path / "password").write_text(word)
    store = connect(server, password_file=str(tmp_path / "password") if word else "")
    began = time.monotonic()
    for _ in range(20):
        put(store, pool, hashes(3))
        assert read_all(store, pool, hashes(3)) == 0
    assert time.monotonic() - began < 1
    assert store.counts().written == 0


def test_an_acl_that_forbids_writing_leaves_reading(own_server: MakeServer, connect: Connect, pool: Pool) -> None:
    server, names = own_server(), hashes(3)
    put(connect(server), pool, names)
    server.client().acl_setuser("default", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-set"])
    store = connect(server)
    put(store, pool, hashes(3, 1))
    assert store.counts().written == 0
    assert read_all(store, pool, names) == 3


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificates(tmp_path_factory.mktemp("tls"))


def tls_server(own_server: MakeServer, certificates: Path, *arguments: str) -> RedisServer:
    return own_server(*arguments, tls=redis_arguments(certificates))


def test_tls_with_certificates_on_both_sides(own_server: MakeServer, connect: Connect, pool: Pool, certificates: Path) -> None:
    store = connect(
        tls_server(own_server, certificates),
        ca_file=str(certificates / "ca.pem"),
        cert_file=str(certificates / "client.pem"),
        key_file=str(certificates / "client.key"),
    )
    put(store, pool, hashes(100))
    assert read_all(store, pool, hashes(100)) == 100


@pytest.mark.parametrize("ca", ["other-ca.pem", ""])
def test_a_server_that_nobody_trusts_is_not_used(
    own_server: MakeServer, connect: Connect, pool: Pool, certificates: Path, ca: str
) -> None:
    store = connect(tls_server(own_server, certificates), ca_file=str(certificates / ca) if ca else "")
    put(store, pool, hashes(3))
    assert store.counts().written == 0
    assert not store.counts().up


OWN = {"cert_file": "client.pem", "key_file": "client.key"}


@pytest.mark.parametrize(
    ("cluster", "options", "told"),
    [
        (False, OWN, ""),
        (False, {**OWN, "ca_file": "other-ca.pem"}, "CERTIFICATE_VERIFY_FAILED"),
        (False, {}, "SSL|ssl|reset|Broken pipe"),  # the server does not always come to say that it asks for a certificate
        (False, {**OWN, "password_file": "wrong"}, "invalid username-password pair"),
        (False, {**OWN, "username": "nobody"}, "invalid username-password pair"),
        (True, OWN, ""),
        (True, {**OWN, "ca_file": "other-ca.pem"}, "CERTIFICATE_VERIFY_FAILED"),
        (True, {**OWN, "password_file": "wrong"}, "invalid username-password pair"),
    ],
)
def test_tls_and_an_acl_user(
    own_server: MakeServer,
    connect: Connect,
    pool: Pool,
    certificates: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    cluster: bool,
    options: dict[str, str],
    told: str,
) -> None:
    """With the rights that docs/stores.md names. Whatever is wrong costs hits, little time, and one line of the log."""
    rights = "+get +set +exists +unlink +expire +info" + (" +cluster +command" if cluster else "")
    (tmp_path / "users").write_text(f"user default off\nuser baton on >word ~baton:kv:* {rights}\n")
    more = ("--cluster-enabled", "yes", "--tls-cluster", "yes", "--cluster-port", str(free_port())) if cluster else ()
    server = tls_server(own_server, certificates, "--aclfile", str(tmp_path / "users"), *more)
    (certificates / "word").write_text("word\n")
    (certificates / "wrong").write_text("other\n")
    given = {"ca_file": "ca.pem", "username": "baton", "password_file": "word", **options}
    paths = {key: value if key == "username" else str(certificates / value) for key, value in given.items()}
    if cluster:
        own = {"ca_certs": "ca.pem", "certfile": "client.pem", "keyfile": "client.key"}
        files: dict[str, Any] = {f"ssl_{key}": str(certificates / file) for key, file in own.items()}
        url = server.url.replace("//", "//baton:word@")
        make_cluster([redis.Redis.from_url(url, protocol=2, **files)])
    store, names, began = connect(server, cluster=cluster, **paths), hashes(3), time.monotonic()
    for _ in range(20):
        put(store, pool, names)
        assert read_all(store, pool, names) == (0 if told else 3)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    warnings = [warning for warning in warnings if f"127.0.0.1:{server.port}" in warning]
    assert store.counts().up is not bool(told)
    if told:
        assert time.monotonic() - began < 1
        assert len(warnings) == 1
        assert re.search(told, warnings[0])
    else:
        assert warnings == []


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"urls": ("localhost:6379",)}, "servers"),
        ({"urls": ("http://localhost",)}, "servers"),
        ({"urls": ("redis://localhost",), "password_file": "/nowhere"}, "password_file"),
        ({"urls": ("rediss://localhost",), "ca_file": "/nowhere"}, "ca_file"),
        ({"urls": ("rediss://localhost",), "ca_file": __file__}, "ca_file"),
        ({"urls": ("rediss://localhost",), "cert_file": __file__, "key_file": __file__}, "cert_file"),
    ],
)
def test_a_wrong_configuration_names_its_key(connect: Connect, options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=rf"store\.remote\.{names}"):
        connect(**options)


# --- down, slow, flushed, corrupt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [False, True])
def test_nobody_there(connect: Connect, pool: Pool, cluster: bool) -> None:
    store = connect(urls=(f"redis://127.0.0.1:{free_port()}",), cluster=cluster)
    began = time.monotonic()
    for _ in range(100):
        put(store, pool, hashes(3))
        assert read_all(store, pool, hashes(3)) == 0
        assert store.count(hashes(3), soon()) == 0
    assert time.monotonic() - began < 1
    assert not store.counts().up


def test_killed_and_started_again(own_server: MakeServer, connect: Connect, pool: Pool) -> None:
    server, names = own_server(), hashes(50)
    store = connect(server)
    put(store, pool, names)
    assert read_all(store, pool, names) == 50
    server.kill()
    assert read_all(store, pool, names) == 0
    server.start()
    deadline = time.monotonic() + 10
    while read_all(store, pool, names) < 50:  # it is tried again by itself, and what was lost is stored again
        put(store, pool, names)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("deadline_s", [0.05, 0.3])
def test_a_stopped_server_is_a_miss_in_time_and_then_costs_none(
    own_server: MakeServer, connect: Connect, pool: Pool, deadline_s: float
) -> None:
    server, names = own_server(), hashes(50)
    store = connect(server)
    put(store, pool, names)
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    assert read_all(store, pool, names, seconds=deadline_s) == 0
    assert time.monotonic() - began < deadline_s + 0.3
    began = time.monotonic()
    for _ in range(50):
        assert read_all(store, pool, names, seconds=deadline_s) == 0
        put(store, pool, hashes(5, 1))
    assert time.monotonic() - began < 25 * deadline_s, "a server known to hang was waited for"
    server.signal(signal.SIGCONT)
    time.sleep(1.2)
    assert read_all(store, pool, names) == 50


def test_flushed(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names = connect(server), hashes(20)
    put(store, pool, names)
    server.client().flushall()
    assert read_all(store, pool, names) == 0
    put(store, pool, names)
    assert read_all(store, pool, names) == 20


def _flip(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the block": lambda value: _flip(value, len(value) - 5),
    "a bit of the digest": lambda value: _flip(value, value.index(b"digest") + 10),
    "truncated": lambda value: value[:-1],
    "longer": lambda value: value + b"x",
    "empty": lambda value: b"",
    "short": lambda value: b"BTK",
    "no header": lambda value: value[:8],
    "no magic": lambda value: b"XXXX" + value[4:],
    "header of nonsense": lambda value: value[:8] + b"\xc1" * 20 + value[28:],
    "text": lambda value: b"hello" * 2000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_values_are_found_and_replaced(server: RedisServer, connect: Connect, pool: Pool, damage: str) -> None:
    store, names, client = connect(server), hashes(10), server.client()
    put(store, pool, names)
    value = client.get(key(names[4]))
    assert isinstance(value, bytes)
    client.set(key(names[4]), DAMAGE[damage](value))
    assert read_all(store, pool, names) == 4
    assert store.counts().corrupt == 1
    assert not client.exists(key(names[4]))
    put(store, pool, names)
    assert read_all(store, pool, names) == 10


def test_a_value_of_another_type_is_a_miss(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names = connect(server), hashes(3)
    put(store, pool, names)
    server.client().delete(key(names[1]))
    server.client().rpush(key(names[1]), "x")
    assert read_all(store, pool, names) == 1
    assert read_all(store, pool, names[2:]) == 1


def test_swapped_values_are_found(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names, client = connect(server), hashes(2), server.client()
    put(store, pool, names)
    client.rename(key(names[0]), "x")
    client.rename(key(names[1]), key(names[0]))
    client.rename("x", key(names[1]))
    assert read_all(store, pool, names) == 0
    assert store.counts().corrupt == 1


def test_values_of_a_newer_version_are_left_alone(server: RedisServer, connect: Connect, pool: Pool) -> None:
    store, names, client = connect(server), hashes(3), server.client()
    put(store, pool, names)
    value = client.get(key(names[1]))
    assert isinstance(value, bytes)
    newer = value[:4] + (VERSION + 1).to_bytes(2, "little") + value[6:]
    client.set(key(names[1]), newer)
    assert read_all(store, pool, names) == 1
    put(store, pool, names)
    assert client.get(key(names[1])) == newer
    assert store.counts().corrupt == 0


class Liar:
    """A server on a free port that answers whatever comes with `reply`."""

    def __init__(self, reply: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._reply = reply
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    while connection.recv(65536):
                        connection.sendall(self._reply)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.mark.parametrize(
    "reply",
    [b"+OK\r\n", b"$5\r\nhello\r\n", b"$99999999999\r\nx", b"garbage", b"\r\n", b":1\r\n", b"*3\r\n", b"$-7\r\n", b"$x\r\n"],
)
def test_what_is_no_redis_costs_hits_and_little_time(connect: Connect, pool: Pool, reply: bytes) -> None:
    liar = Liar(reply)
    store = connect(urls=(f"redis://127.0.0.1:{liar.port}",))
    for _ in range(3):
        assert read_all(store, pool, hashes(3), seconds=0.3) == 0
        put(store, pool, hashes(3))
    store.close()
    liar.close()


class SlowLink:
    """Passes bytes on to a server, so many per second at most towards the client."""

    def __init__(self, port: int, bytes_per_s: float) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = port
        self._rate = bytes_per_s
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._pass, args=(client, server, 0.0), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, self._rate), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, rate: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16_384):
                target.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


def test_a_slow_link_brings_what_it_can_by_the_deadline(server: RedisServer, connect: Connect, pool: Pool) -> None:
    link = SlowLink(server.port, 2 << 20)
    names = hashes(200)
    put(connect(server), pool, names)
    store = connect(urls=(f"redis://127.0.0.1:{link.port}",))
    count = read_all(store, pool, names, seconds=0.4)
    assert 20 < count < 150
    assert store.counts().up, "slow is not down"
    assert 20 < read_all(store, pool, names, seconds=0.4) < 150
    link.close()


def test_reading_and_writing_while_the_server_dies_again_and_again(
    own_server: MakeServer, connect: Connect, pool: Pool
) -> None:
    """kill -9 and restart under load: what is read is right, and nothing raises or hangs."""
    server = own_server()
    store = connect(server)
    end = time.monotonic() + 4
    read = [0, 0]
    errors: list[BaseException] = []

    def load(index: int) -> None:
        mine = Pool(128, LAYOUT.block_bytes)
        rng = np.random.default_rng(index)
        try:
            while time.monotonic() < end:
                names = hashes(32, int(rng.integers(4)))
                store.write(mine.offer(names[: rng.integers(1, 32)]), mine.memory)
                read[index] += read_all(store, mine, names, seconds=0.5)
        except BaseException as error:
            errors.append(error)
        mine.close()

    threads = [threading.Thread(target=load, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end - 1.5:
        time.sleep(0.3)
        server.kill()
        time.sleep(0.1)
        server.start()
    for thread in threads:
        thread.join(20)
    assert not errors
    assert min(read) > 100
