"""Transport `tcp`: who may ask, what is handed out, and what happens when connections break, stall or are of strangers."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_backends.core.config import TransferConfig
from python_backends.core.errors import ConfigError, HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff, seal
from python_backends.core.types import Epoch
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer import create_transport
from python_backends.kv.transfer.server import TransferServer
from python_backends.kv.transfer.session import Claim, Fetch, Session, SessionError, Status, TlsContexts, load_tls
from python_backends.kv.transfer.tcp import TcpTransport
from tests.kv.certificates import write_certificates
from tests.kv.test_transports import KEY, LAYOUT, SOURCE_BLOCKS, Rig, changed, kill, outcome, soon, start_owner, stop, tcp

STRANGER = b"s" * 32


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(tcp())
    yield rig
    rig.close()


def fetch_all(rig: Rig, handoff: KVHandoff, seconds: float = 5.0) -> None:
    count = len(handoff.blocks)
    rig.target.blocks[:] = 0
    rig.fetch(handoff, range(count), range(count), seconds)
    assert np.array_equal(rig.target.blocks[:count], rig.source.blocks[handoff.blocks])


def connect(address: tuple[str, int], key: bytes = KEY, tls: TlsContexts | None = None) -> Session:
    session = Session(socket.create_connection(address, timeout=5))
    try:
        session.greet(address[0], key, tls, soon())
    except BaseException:
        session.close()
        raise
    return session


def server_of(rig: Rig) -> TransferServer:
    assert isinstance(rig.transport, TcpTransport)
    assert rig.transport._server is not None
    return rig.transport._server


def address_of(rig: Rig) -> tuple[str, int]:
    host, port = server_of(rig).address.split(":")
    return host, int(port)


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_a_stranger_is_refused_on_either_side(rig: Rig) -> None:
    handoff = rig.publish([3])
    with pytest.raises(SessionError, match="another deployment's key"):
        connect(address_of(rig), STRANGER)
    foreign = TcpTransport(TransferServer("127.0.0.1", (), STRANGER, None, 5.0), STRANGER, None, 2)
    with pytest.raises(HandoffRefused, match="another deployment's key"):
        foreign.fetch(handoff, [0], rig.target, [0], soon())
    foreign.close()
    fetch_all(rig, handoff)


def test_the_client_has_to_prove_the_key_too(rig: Rig) -> None:
    """Whoever only plays back what it has heard gets nothing."""
    heard = bytearray()
    rig.publish([3])
    with socket.create_connection(address_of(rig), timeout=5) as sock:
        sock.sendall(struct.pack("<8sHH32s", b"BATON-KV", 1, 1, bytes(32)))
        while len(heard) < 42 + 32:
            heard += sock.recv(4096)
        sock.sendall(heard[-32:])  # the server's own proof
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 1000,
        b"BATON-KV",
        b"BATON-KV\xff\xff\xff\xff" + bytes(100),
        b"\x16\x03\x01" * 100,
    ],
)
def test_noise_ends_the_connection_and_nothing_else(rig: Rig, noise: bytes) -> None:
    with socket.create_connection(address_of(rig), timeout=5) as sock:
        sock.sendall(noise)
        with contextlib.suppress(OSError):  # what it did not read makes it a reset
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    fetch_all(rig, rig.publish([3, 4]))


_NO_UTF8 = b"\x82\xa4type\xa5Claim\xa6ticket\xa1\xff"


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",
        b"\3\0\0\0abc",
        b"\0\0\0\0",
        struct.pack("<I", 17 << 20),
        struct.pack("<I", len(_NO_UTF8)) + _NO_UTF8,
        struct.pack("<I", 5000) + b"\x91" * 5000,
    ],
)
def test_nonsense_after_the_handshake_ends_the_connection(rig: Rig, frame: bytes) -> None:
    session = connect(address_of(rig))
    session.send_pieces([memoryview(frame)], soon())
    with pytest.raises((SessionError, OSError)):
        session.receive_message(soon())
    session.close()
    fetch_all(rig, rig.publish([3, 4]))


def test_whoever_says_nothing_is_shown_the_door(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_backends.kv.transfer.server._HANDSHAKE_S", 0.2)
    with socket.create_connection(address_of(rig), timeout=5) as sock:
        assert sock.recv(1) == b""


@pytest.mark.parametrize(("theirs", "chosen"), [((1, 1), 1), ((1, 7), 2), ((0, 1), 1), ((2, 7), 2), ((3, 7), 0), ((0, 0), 0)])
def test_the_source_chooses_a_version_that_both_speak(rig: Rig, theirs: tuple[int, int], chosen: int) -> None:
    with socket.create_connection(address_of(rig), timeout=5) as sock:
        sock.sendall(struct.pack("<8sHH32s", b"BATON-KV", *theirs, bytes(32)))
        answer = sock.recv(42, socket.MSG_WAITALL)
    assert struct.unpack("<8sH32s", answer)[1] == chosen


def test_a_source_that_speaks_no_common_version_is_told_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = threading.Thread(target=_refuse_version, args=(listener,))
        reader.start()
        with pytest.raises(SessionError, match="no version from 1 to 2"):
            connect(listener.getsockname())
        reader.join(5)


def _refuse_version(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        sock.recv(44, socket.MSG_WAITALL)
        sock.sendall(struct.pack("<8sH32s", b"BATON-KV", 0, bytes(32)))


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificates(tmp_path_factory.mktemp("tls"))


def contexts(certificates: Path, ca: str = "ca.pem") -> TlsContexts:
    return load_tls(str(certificates / "127.0.0.1.pem"), str(certificates / "127.0.0.1.key"), str(certificates / ca))


def test_tls_keeps_bytes_secret_and_right(certificates: Path) -> None:
    rig = Rig(tcp(tls=contexts(certificates)))
    handoff = rig.publish(list(range(SOURCE_BLOCKS)))
    for _ in range(3):
        fetch_all(rig, handoff)
    with pytest.raises((SessionError, OSError)):
        connect(address_of(rig))
    rig.close()


def test_certificates_of_another_authority_are_refused(certificates: Path) -> None:
    rig = Rig(tcp(tls=contexts(certificates)))
    with pytest.raises(OSError, match="certificate"):
        connect(address_of(rig), tls=contexts(certificates, "other-ca.pem"))
    rig.close()


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"tls_cert_file": "127.0.0.1.pem"}, "tls_key_file"),
        ({"tls_cert_file": "127.0.0.1.pem", "tls_key_file": "127.0.0.1.key"}, "tls_ca_file"),
        ({"tls_cert_file": "ca.pem", "tls_key_file": "127.0.0.1.key", "tls_ca_file": "ca.pem"}, "tls_"),
        ({"tls_cert_file": "no", "tls_key_file": "no", "tls_ca_file": "no"}, "tls_"),
    ],
)
def test_wrong_certificates_are_a_config_error(certificates: Path, files: dict[str, str], names: str) -> None:
    paths: dict[str, Any] = {key: str(certificates / name) for key, name in files.items()}
    with pytest.raises(ConfigError, match=rf"transfer\.{names}"):
        create_transport(TransferConfig(transport="tcp", **paths), KEY)


# --- what is handed out -----------------------------------------------------------------------------------------------


def test_only_live_leases_are_served(rig: Rig) -> None:
    handoff = rig.publish([3, 4])
    fetch_all(rig, handoff)
    rig.transport.release(handoff.lease_id)
    assert rig.refusal(handoff) is RefusalReason.EXPIRED
    assert rig.refusal(changed(handoff, lease_id="0" * 16)) is RefusalReason.EXPIRED


def test_only_blocks_of_the_lease_are_served(rig: Rig) -> None:
    rig.publish([7])
    handoff = changed(rig.publish([3, 4]), blocks=[3, 7])  # well signed, and yet
    assert rig.refusal(handoff) is RefusalReason.TRANSFER_FAILED


def test_an_expired_ticket_is_refused_by_the_source(rig: Rig) -> None:
    handoff = changed(rig.publish([3]), expires_at=time.time() - 1)
    assert rig.refusal(handoff) is RefusalReason.EXPIRED


@pytest.mark.parametrize("positions", [[-1], [2], [2**62], [0, 1, 2]])
def test_positions_that_the_ticket_does_not_have_are_refused(rig: Rig, positions: list[int]) -> None:
    session = connect(address_of(rig))
    session.send_message(Claim(seal(rig.publish([3, 4]), KEY)), soon())
    session.send_message(Fetch(positions), soon())
    status = session.receive_message(soon())
    assert isinstance(status, Status)
    assert status.reason == RefusalReason.TRANSFER_FAILED.value
    session.close()


@pytest.mark.parametrize("ticket", [b"", b"nonsense" * 20])
def test_a_ticket_that_nobody_signed_gets_nothing(rig: Rig, ticket: bytes) -> None:
    session = connect(address_of(rig))
    session.send_message(Claim(ticket), soon())
    session.send_message(Fetch([0]), soon())
    status = session.receive_message(soon())
    assert isinstance(status, Status)
    assert status.reason == RefusalReason.BAD_SIGNATURE.value
    session.close()


def test_without_a_ticket_there_is_nothing(rig: Rig) -> None:
    rig.publish([3, 4])
    session = connect(address_of(rig))
    session.send_message(Fetch([0]), soon())
    assert session.receive_message(soon()) == Status(RefusalReason.TRANSFER_FAILED.value, "no ticket was shown")
    session.close()


def test_chunks_published_one_after_the_other_are_one_handoff(rig: Rig) -> None:
    handoff = rig.publish([3, 4, 5, 6])
    assert isinstance(rig.transport, TcpTransport)
    rig.transport.release(handoff.lease_id)
    rig.transport.publish(rig.source, [3, 4], handoff.lease_id)
    assert rig.refusal(handoff) is RefusalReason.TRANSFER_FAILED
    rig.fetch(handoff, [0, 1], [0, 1])
    rig.transport.publish(rig.source, [5, 6], handoff.lease_id)
    fetch_all(rig, handoff)


def test_a_block_reused_while_it_is_sent_is_noticed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    handoff = rig.publish([3, 4])
    send = Session.send_pieces

    def reuse_then_send(self: Session, pieces: Any, deadline: float) -> None:
        if len(pieces) == 2:
            rig.source.generations[4] += np.uint64(1)
        send(self, pieces, deadline)

    monkeypatch.setattr(Session, "send_pieces", reuse_then_send)
    assert rig.refusal(handoff) is RefusalReason.STALE_EPOCH


@pytest.mark.parametrize(
    "locator", ["", "x", "127.0.0.1", "127.0.0.1:", ":80", "127.0.0.1:99999", "127.0.0.1:１２", "nowhere.invalid:1"]
)
def test_addresses_that_lead_nowhere_are_refused(rig: Rig, locator: str) -> None:
    assert rig.refusal(changed(rig.publish([3]), locator=locator)) is RefusalReason.TRANSFER_FAILED


# --- how the bytes travel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_several_connections_share_a_handoff(streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_backends.kv.transfer.tcp._STREAM_BYTES", LAYOUT.block_bytes * 2)
    monkeypatch.setattr("os.cpu_count", lambda: 16)  # within a machine each takes two
    rig = Rig(tcp(streams))
    handoff = rig.publish(np.random.default_rng(1).permutation(SOURCE_BLOCKS).tolist())
    for _ in range(5):
        fetch_all(rig, handoff)
    connections = len(server_of(rig)._sessions)
    rig.close()
    assert min(streams, 2) <= connections <= streams, "connections are kept and used again"


@pytest.mark.parametrize("pieces", [1, 300])
def test_without_a_copy_by_sendfile(rig: Rig, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """As to another host; on this one the kernel copies all the same."""
    monkeypatch.setattr(Session, "is_local", False)
    handoff = rig.publish((np.arange(pieces) % SOURCE_BLOCKS)[:SOURCE_BLOCKS].tolist())
    fetch_all(rig, handoff)


def test_more_blocks_than_one_system_call_takes() -> None:
    rig = Rig(tcp())
    rig.source, rig.target = (PoolMemory(3000, LAYOUT.block_bytes, Epoch(epoch)) for epoch in (7, 8))
    rig.source.blocks[:] = np.random.default_rng(1).integers(0, 256, rig.source.blocks.shape, np.uint8)
    fetch_all(rig, rig.publish(np.random.default_rng(2).permutation(3000).tolist()))
    rig.close()


class Proxy:
    """Between reader and source: passes bytes on, and can cut, stall or slow down what comes from the source."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None  # bytes of each connection
        self.stalled = threading.Event()
        self.connections = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                server = socket.create_connection(self._target)
                self._sockets.append(server)
                self.connections += 1
                threading.Thread(target=self._pass, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, self.cut_after), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, most: int | None) -> None:
        with contextlib.suppress(OSError):
            passed = 0
            while data := source.recv(16_384):
                while self.stalled.is_set() and target.fileno() >= 0:
                    time.sleep(0.01)
                if most is not None and passed + len(data) > most:
                    target.sendall(data[: most - passed])
                    break
                passed += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.stalled.clear()
        for end in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def proxied(rig: Rig) -> Iterator[Callable[..., tuple[Proxy, KVHandoff]]]:
    proxies: list[Proxy] = []

    def make(cut_after: int | None = None) -> tuple[Proxy, KVHandoff]:
        proxy = Proxy(address_of(rig))
        proxy.cut_after = cut_after
        proxies.append(proxy)
        return proxy, changed(rig.publish(list(range(SOURCE_BLOCKS))), locator=proxy.address)

    yield make
    for proxy in proxies:
        proxy.close()


Proxied = Callable[..., tuple[Proxy, KVHandoff]]


def test_a_broken_connection_is_resumed_where_it_broke(rig: Rig, proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection brings about seven blocks before it is cut, so five are needed, and no block comes twice."""
    monkeypatch.setattr("python_backends.kv.transfer.tcp._PIECE_BYTES", LAYOUT.block_bytes)
    proxy, handoff = proxied(cut_after=200 + 7 * LAYOUT.block_bytes)
    fetch_all(rig, handoff)
    assert 4 <= proxy.connections <= 6


def test_a_connection_that_always_breaks_is_given_up(rig: Rig, proxied: Proxied) -> None:
    proxy, handoff = proxied(cut_after=90)
    began = time.monotonic()
    assert rig.refusal(handoff, seconds=10) is RefusalReason.TRANSFER_FAILED
    assert time.monotonic() - began < 2
    assert proxy.connections <= 4


@pytest.mark.parametrize("when", ["at once", "midway"])
def test_a_stalled_connection_is_a_timeout(rig: Rig, proxied: Proxied, when: str) -> None:
    proxy, handoff = proxied()
    if when == "at once":
        proxy.stalled.set()
    else:
        threading.Timer(0.002, proxy.stalled.set).start()
        time.sleep(0.001)
    reason, took = None, 0.0
    while reason is None:
        began = time.monotonic()
        reason = outcome(rig, handoff, 0.3)
        took = time.monotonic() - began
    assert reason is RefusalReason.TRANSFER_TIMEOUT
    assert took < 0.8
    before = rig.target.blocks.copy()
    proxy.stalled.clear()
    time.sleep(0.2)
    assert np.array_equal(rig.target.blocks, before), "somebody still writes after the fetch has returned"


def test_a_stopped_owner_is_a_timeout_and_then_as_good_as_before(rig: Rig) -> None:
    owner, handoff = start_owner("tcp")
    try:
        fetch_all(rig, handoff)
        stop(owner)
        assert rig.refusal(handoff, seconds=0.3) is RefusalReason.TRANSFER_TIMEOUT
        owner.send_signal(signal.SIGCONT)
        fetch_all(rig, handoff)
    finally:
        owner.send_signal(signal.SIGCONT)
        kill(owner)


def test_a_reader_that_stops_reading_does_not_keep_the_source(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    server_of(rig)._timeout_s = 0.3
    monkeypatch.setattr("python_backends.kv.transfer.session._BUFFER_BYTES", 4096)
    session = connect(address_of(rig))
    ticket = seal(rig.publish(list(range(SOURCE_BLOCKS))), KEY)
    session.send_message(Claim(ticket), soon())
    session.send_message(Fetch(list(range(SOURCE_BLOCKS)) * 500), soon())
    deadline = time.monotonic() + 5
    while server_of(rig)._sessions:
        assert time.monotonic() < deadline, "the source still waits for its reader"
        time.sleep(0.02)
    session.close()


def test_closing_wakes_who_waits(rig: Rig, proxied: Proxied) -> None:
    proxy, handoff = proxied()
    proxy.stalled.set()
    closer = threading.Timer(0.1, rig.transport.close)
    closer.start()
    began = time.monotonic()
    assert rig.refusal(handoff, seconds=20) is RefusalReason.TRANSFER_FAILED
    assert time.monotonic() - began < 5
    closer.join()


# --- configuration ----------------------------------------------------------------------------------------------------


def test_ports_of_a_range_are_taken_in_order_until_there_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=r"transfer\.listen.*ports"):
            create_transport(TransferConfig(transport="tcp", ports=str(port)), KEY)
        transport = create_transport(TransferConfig(transport="tcp", ports=f"{port}-{port + 20}"), KEY)
        assert isinstance(transport, TcpTransport)
        assert transport._server is not None
        assert port < int(transport._server.address.rpartition(":")[2]) <= port + 20
        transport.close()


@pytest.mark.parametrize("ports", ["0", "9-5", "70000", "7100-70000"])
def test_ports_that_are_none_are_a_config_error(ports: str) -> None:
    with pytest.raises(ConfigError, match=r"transfer\.ports"):
        create_transport(TransferConfig(transport="tcp", ports=ports), KEY)


@pytest.mark.parametrize("listen", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_of_another_host_is_a_config_error(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"transfer\.listen"):
        create_transport(TransferConfig(transport="tcp", listen=listen), KEY)


def test_ipv6() -> None:
    try:
        server = TransferServer("::1", (), KEY, None, 5.0)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    rig = Rig(TcpTransport(server, KEY, None, 1))
    fetch_all(rig, rig.publish([3, 4]))
    rig.close()


def test_the_socket_is_closed_with_the_transport(rig: Rig) -> None:
    address = address_of(rig)
    rig.transport.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(address, timeout=5)
