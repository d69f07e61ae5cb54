"""Pods of the Kubernetes manifests as local processes: the commands, arguments, ports and probes that are written there."""

from __future__ import annotations

import http.client
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from python_backends.core.paths import repository_root
from tests.manifests import KUBERNETES, Document, container
from tests.network.hosts import Host, Network, Process, last_lines, python_environment

ROOT = repository_root()
_DEMO = KUBERNETES / "overlays" / "cpu-demo" / "deployment"
_IMAGE_ROOT, _CONFIG_ROOT, _STORE_ROOT = "/opt/baton", "/etc/baton/deployment", "/etc/baton/redis"


@dataclass
class Pod:
    """One of a Deployment, on a host of its own."""

    machine: Host
    spec: dict[str, Any]  # its container
    grace_s: float  # that Kubernetes gives it to end
    directory: Path
    tmp: Path  # its /tmp
    process: Process | None = None

    def start(self) -> None:
        self.process = self._run([*self.spec["command"], *self.spec["args"]])

    def stop(self) -> None:
        """In a hurry, and for good."""
        if self.process is not None:
            self.process.stop()
        shutil.rmtree(self.tmp, ignore_errors=True)

    def end(self) -> None:
        """As the kubelet does it: the preStop hook, then SIGTERM. Kubernetes would kill what this finds still there."""
        assert self.process is not None
        end = time.monotonic() + self.grace_s
        self.execute(*self.spec["lifecycle"]["preStop"]["exec"]["command"])
        self.process.process.send_signal(signal.SIGTERM)
        assert self.process.process.wait(end - time.monotonic()) == 0

    def execute(self, *command: str) -> None:
        """Beside what runs there, as `kubectl exec` does, until it has ended."""
        done = self._run(command)
        assert done.process.wait(self.grace_s) == 0, last_lines(done.log)

    def worker(self) -> psutil.Process:
        """The process of its worker's model."""
        assert self.process is not None
        children = psutil.Process(self.process.process.pid).children(recursive=True)
        (found,) = [child for child in children if re.search(r"/models/\w+/1/model\.py", " ".join(child.cmdline()))]
        return found

    def _run(self, command: Sequence[str]) -> Process:
        local = list(command)
        for inside, outside in ((_IMAGE_ROOT, ROOT), (_CONFIG_ROOT, self.directory), (_STORE_ROOT, self.directory)):
            local = [word.replace(inside, str(outside)) for word in local]
        environment = {each["name"]: each["value"] for each in self.spec.get("env", [])} | {"TMPDIR": str(self.tmp)}
        return self.machine.start(local, python_environment() | environment, self.directory / f"{self.machine.name}.log")

    def probe(self, kind: str) -> bool:
        """Ask once, as the kubelet does: 200 to 399, or a connection, is a success."""
        probe = self.spec[kind]
        if "tcpSocket" in probe:
            with suppress(OSError), socket.create_connection((self.host, self.port(probe["tcpSocket"]["port"])), timeout=1):
                return True
            return False
        port = self.port(probe["httpGet"]["port"])
        connection = http.client.HTTPConnection(self.machine.address, port, timeout=probe.get("timeoutSeconds", 1))
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request("GET", probe["httpGet"]["path"])
            return 200 <= connection.getresponse().status < 400
        return False

    def await_probe(self, kind: str, within_s: float) -> None:
        """Until it succeeds. Kubernetes asks less often."""
        end = time.monotonic() + within_s
        while not self.probe(kind):
            assert self.process is not None
            assert self.process.process.poll() is None, f"{self.machine.name} ended: {last_lines(self.process.log)}"
            assert time.monotonic() < end, f"{self.machine.name}: no {kind} in {within_s} s: {last_lines(self.process.log)}"
            time.sleep(0.1)

    def port(self, name: str) -> int:
        (found,) = [port["containerPort"] for port in self.spec["ports"] if port["name"] == name]
        assert isinstance(found, int)
        return found

    # What clients of tests/triton/asking.py need to know.

    @property
    def host(self) -> str:
        return self.machine.address

    @property
    def grpc_port(self) -> int:
        return self.port("grpc")

    @property
    def metrics_port(self) -> int:
        return self.port("metrics")


def write_deployment(directory: Path, changes: dict[str, Any]) -> None:
    """The overlay's deployment files, with engine fake, the cache's demo model, secrets in `directory`, and `changes`."""
    (directory / "key").write_bytes(bytes(range(32)))
    (directory / "password").write_text("of the tests alone")
    for file in _DEMO.glob("*.yaml"):
        deployment = yaml.safe_load(file.read_text())
        deployment["model"] = {"path": "smollm2-135m-instruct"}
        deployment["security"] = {"key_file": str(directory / "key")}
        deployment["store"]["remote"]["password_file"] = str(directory / "password")
        for worker in deployment["workers"]:
            worker["engine"] = "fake"
        for section, keys in changes.items():
            deployment[section] = {**deployment.get(section, {}), **keys}
        (directory / file.name).write_text(yaml.safe_dump(deployment))


def make_pods(network: Network, controller: Document, count: int, directory: Path) -> list[Pod]:
    """Of a Deployment or StatefulSet: its pods, not started, under the name of the Service that is called like it.

    Those of a StatefulSet have names of their own, too.
    """
    name = controller["metadata"]["name"]
    grace_s = controller["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    pods = [
        Pod(network.add(f"{name}-{number}"), container(controller), grace_s, directory, Path(tempfile.mkdtemp(prefix="pod-")))
        for number in range(count)
    ]
    network.name(name, [pod.machine for pod in pods])
    for pod in pods if controller["kind"] == "StatefulSet" else []:
        network.name(f"{pod.machine.name}.{name}", [pod.machine])
    return pods


def start_all(pods: Sequence[Pod], within_s: float) -> None:
    for pod in pods:
        pod.start()
    for pod in pods:
        pod.await_probe("startupProbe", within_s)
