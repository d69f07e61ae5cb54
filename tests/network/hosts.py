"""Hosts made of network and host-name namespaces, on a network of their own whose links can be cut, slowed or made lossy.

Every host has its own address, ports, host name and /etc/hosts, so processes on it find, listen and connect as they would on a
machine or in a pod. Links are veth pairs to a bridge. Packets are dropped by netfilter, held back by tc's token bucket, and
delayed by a process that netfilter hands them to (delay.py); kernels without netem have all that, too. What a network makes is
gone after `close`. What one left behind that was killed is removed by the next, its processes first: they would take cores and
answer in the place of others.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.network import delay
from tests.tools import require_program

_LOCKS = Path("/run/baton-test-networks")  # a file for each network, locked by the process whose it is as long as that lives
_NAMESPACE = re.compile(r"(baton\d+)-")
_TIMEOUT_S = 30.0
_STOP_S = 25.0


def require_namespaces() -> None:
    """Skip where they can't be made; in CI that is a failure."""
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("iptables-legacy", "iptables")):
        require_program(program, package)
    name = f"baton-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if made.returncode:
        message = f"no network namespaces here: {made.stderr.strip()}; run as root on Linux"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    _run("ip", "netns", "del", name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def remove_abandoned() -> None:
    """End the processes of networks whose owner is gone, and remove their namespaces."""
    listed = [line.split()[0] for line in _run("ip", "netns", "list").splitlines()]
    found = [(namespace, match[1]) for namespace in listed if (match := _NAMESPACE.match(namespace))]
    owned = {network for network in {network for _, network in found} if _is_owned(network)}
    for namespace in [namespace for namespace, network in found if network not in owned]:
        listed_pids = subprocess.run(
            ["ip", "netns", "pids", namespace], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        for pid in listed_pids.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _remove(namespace)
    for network in {network for _, network in found} - owned:
        (_LOCKS / network).unlink(missing_ok=True)


def _remove(namespace: str) -> None:
    subprocess.run(["ip", "netns", "del", namespace], timeout=_TIMEOUT_S, check=False)
    shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def _own(network: str) -> int:
    """A descriptor whose closing, or this process's end, tells others that nobody has the network any more."""
    _LOCKS.mkdir(exist_ok=True)
    lock = os.open(_LOCKS / network, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    return lock


def _is_owned(network: str) -> bool:
    """Also of one without a lock: nobody knows whose it is."""
    if not (_LOCKS / network).exists():
        return True
    try:
        os.close(_own(network))
    except BlockingIOError:
        return True
    return False


@dataclass(frozen=True)
class Host:
    """One machine, as the others see it."""

    name: str
    address: str
    namespace: str

    def inside(self, *command: str) -> list[str]:
        """The command that runs `command` there, with this host's name and names of others."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name)
        return ["ip", "netns", "exec", self.namespace, *named, *command]

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.inside(*command), env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        return Process(process, log)


@dataclass
class Process:
    """One that runs on a host: `ip`, `unshare` and `sh` have become it."""

    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        """As Kubernetes does it: SIGTERM, and SIGKILL for what is still there after the grace period. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.wait()

    def wait(self) -> None:
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Network:
    """A bridge in a namespace of its own, hosts around it, and this process with them at the first address."""

    def __init__(self) -> None:
        self._id = f"baton{os.getpid() % 100_000}"
        self._prefix = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self._switch = f"{self._id}-sw"
        self._hosts: dict[str, Host] = {}
        self._names: dict[str, list[Host]] = {}
        self._delays: dict[str, subprocess.Popen[str]] = {}  # by host
        remove_abandoned()
        self._lock = _own(self._id)
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        self._attach(self._id, None, f"{self._prefix}.1")

    def add(self, name: str) -> Host:
        host = Host(name, f"{self._prefix}.{len(self._hosts) + 2}", f"{self._id}-{name}")
        self._hosts[name] = host
        _run("ip", "netns", "add", host.namespace)
        (Path("/etc/netns") / host.namespace).mkdir(parents=True)
        self._attach("eth0", host, host.address)
        _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        self._tell_names()
        return host

    def name(self, name: str, hosts: Sequence[Host]) -> None:
        """Let a DNS name mean these hosts, from now on and everywhere."""
        self._names[name] = list(hosts)
        self._tell_names()

    def close(self) -> None:
        self._end_delays()
        _run("ip", "link", "del", self._id)  # the kernel takes its time to end a namespace, and this process may want another
        for host in self._hosts.values():
            _remove(host.namespace)
        _remove(self._switch)
        (_LOCKS / self._id).unlink(missing_ok=True)
        os.close(self._lock)

    # --- trouble ---

    def cut(self, one: Host, other: Host) -> None:
        """Nothing gets through between them any more, and nobody is told."""
        self.cut_one_way(one, other)
        self.cut_one_way(other, one)

    def cut_one_way(self, sender: Host, receiver: Host) -> None:
        """What `sender` sends does not arrive; what it is sent does."""
        self._filter(receiver, "-A", "INPUT", "-s", sender.address, "-j", "DROP")

    def lose(self, host: Host, share: float) -> None:
        """This share of the packets that are for the host."""
        self._filter(host, "-A", "INPUT", "-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")

    def slow(self, host: Host, rate: str) -> None:
        """Both ways of its link, such as 40mbit."""
        if self._is_slow(host):
            return
        for namespace, device in self._ends(host):
            bucket = ("rate", rate, "burst", "64kb", "latency", "200ms")
            _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *bucket)

    def delay(self, host: Host, seconds: float) -> None:
        """What is for the host arrives so much later, in order. Of both ends of a link it is a delay of both ways."""
        if host.name in self._delays:
            return
        command = host.inside(sys.executable, "-I", delay.__file__, str(seconds))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self._delays[host.name] = process
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "no packet queues in this kernel (CONFIG_NETFILTER_NETLINK_QUEUE)"
        self._filter(host, "-A", "INPUT", "-i", "eth0", "-j", "NFQUEUE", "--queue-num", "0")

    def heal(self) -> None:
        """All links are as new."""
        for host in self._hosts.values():
            self._filter(host, "-F")
        self._end_delays()
        for host in self._hosts.values():
            if self._is_slow(host):
                for namespace, device in self._ends(host):
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")

    # --- inside ---

    def _end_delays(self) -> None:
        """What they still hold is lost, and sent again by those who miss it."""
        for process in self._delays.values():
            process.kill()
            process.communicate()
        self._delays.clear()

    def _filter(self, host: Host, *rule: str) -> None:
        _run("ip", "netns", "exec", host.namespace, "iptables-legacy", "-w", *rule)

    def _ends(self, host: Host) -> list[tuple[str, str]]:
        """Namespace and device of both ends of its link."""
        return [(host.namespace, "eth0"), (self._switch, self._port(host.address))]

    def _is_slow(self, host: Host) -> bool:
        return "tbf" in _run("tc", "-n", host.namespace, "qdisc", "show", "dev", "eth0")

    def _port(self, address: str) -> str:
        """The bridge's end of the link to an address."""
        return f"p{address.rpartition('.')[2]}"

    def _attach(self, device: str, host: Host | None, address: str) -> None:
        """A link from the bridge to a host, or to this process's own namespace."""
        port = self._port(address)
        _run("ip", "-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "peer")
        target = str(os.getpid()) if host is None else host.namespace
        _run("ip", "-n", self._switch, "link", "set", "peer", "name", device, "netns", target)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        where = ("-n", host.namespace) if host else ()
        _run("ip", *where, "address", "add", f"{address}/24", "dev", device)
        _run("ip", *where, "link", "set", device, "up")

    def _tell_names(self) -> None:
        """Written in place: each host has its file mounted at /etc/hosts."""
        lines = [f"{host.address} {name}" for name, hosts in self._names.items() for host in hosts]
        for host in self._hosts.values():
            own = f"127.0.0.1 localhost\n{host.address} {host.name}\n"
            (Path("/etc/netns") / host.namespace / "hosts").write_text(own + "\n".join(lines) + "\n")


def python_environment() -> dict[str, str]:
    """What scripts/launch needs to run in this Python."""
    return {"BATON_PYTHON": sys.executable, "TERM": "dumb"}


def last_lines(log: Path) -> str:
    return re.sub(r"\s+\n", "\n", log.read_text(errors="replace"))[-3000:]
