"""Runs a deployment on a real tritonserver: the one on PATH (containers), else the one of the nvidia-pytriton package."""

from __future__ import annotations

import http.client
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import TracebackType

from python_backends.core.config import ClusterConfig, load_deployment
from python_backends.core.deployment_key import OPERATOR_HEADER, deployment_key, operator_secret
from python_backends.core.errors import ConfigError, Unavailable
from python_backends.core.paths import repository_root, resolve_model, run_base
from python_backends.core.tls import check_authority, check_certificate
from python_backends.core.types import Role
from python_backends.triton.home import channels
from python_backends.worker.door import WorkersDoor
from scripts import guardian
from scripts.guardian import remove_traces

_EXIT_TIMEOUT_S = 5  # given to requests in flight when the server stops
_GRACE_S = _EXIT_TIMEOUT_S + 1.5  # then everything is killed
_STOP_TIMEOUT_S = _GRACE_S + 8.0  # longer than the guardian can take
_START_TIMEOUT_S = 300.0
_POLL_S = 0.05
_LOG_CHUNK = 1 << 20
# Below the kernel's range for outgoing connections (32768 up), so that none of those takes a port we have chosen.
_FREE_PORTS = range(15_000, 32_000)
_FREE_PORT_TRIES = 200

_NOISE = re.compile(
    "Failed to initialize NVML|DCGM unable to start|CudaDriverHelper has not been initialized"
    "|CUDA memory pool disabled|Unable to allocate pinned system memory"
)
_LOADED = re.compile(r"successfully loaded '([^']+)'")
_LOAD_FAILED = re.compile(r"^E.*\"failed to load '([^']+)' version \d+: \w[\w ]*: (.*)\"$")
_LOG_PREFIX = re.compile(r"^E\d{4} [\d:.]+ +\d+ \S+\] ")


class TritonServer:
    """One tritonserver with the models of one deployment; a context manager.

    `config`: the deployment file. Ports: 0 chooses a free one. `model_repository` holds one directory per role and
    `router`. Known after construction: `deployment`, `address`, the ports, `models` (names), `run_dir` (mode 0700, there
    from `start` to `stop`), `log`; after `start`: `pid` of the server. Start it once.
    """

    def __init__(
        self,
        config: Path,
        *,
        address: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        openai_port: int = 0,
        model_repository: Path | None = None,
        start_timeout_s: float | None = None,
    ) -> None:
        """Raises ConfigError when the deployment file is wrong, a port is taken, or there is no usable tritonserver.

        start_timeout_s: by default as long as the engines of the deployment may take to load.
        """
        self.deployment = load_deployment(config)
        _check_tls(self.deployment.cluster)
        self.address = address
        cluster = self.deployment.cluster
        self.models = [*(["router"] if cluster.router else []), *(worker.name for worker in self.deployment.workers)]
        if cluster.listen and grpc_port not in (0, cluster.grpc_port):
            raise ConfigError(f"--grpc-port {grpc_port}: routers of other hosts are told cluster.grpc_port {cluster.grpc_port}")
        grpc_port = cluster.grpc_port if cluster.listen else grpc_port
        self.http_port, self.grpc_port, self.metrics_port, self.openai_port = _choose_ports(
            address,
            {
                "--http-port": http_port,
                "--grpc-port": grpc_port,
                "--metrics-port": metrics_port,
                "--openai-port": openai_port,
            },
        )
        self.pid = 0
        self.end = ""
        self._config = config.absolute()
        self._binary = find_tritonserver()
        self._model_repository = model_repository or repository_root() / "model_repository"
        self._start_timeout_s = start_timeout_s or self.deployment.load_timeout_s + _START_TIMEOUT_S
        self._guardian: subprocess.Popen[bytes] | None = None
        run_id = secrets.token_hex(4)
        self.run_dir = run_base() / run_id
        self.log = ServerLog(self.run_dir / "server.log")
        self.shm_prefix = f"baton_{run_id}_"

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def host(self) -> str:
        """Where clients on this machine reach the server."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)

    def start(self, on_loaded: Callable[[str], None] | None = None) -> None:
        """Return when every model is ready; `on_loaded` is called with the name of each.

        Raises ConfigError with the server's own reason when it gives up, Unavailable when it takes too long; nothing
        is left running then. Of a failed start the log is kept.
        """
        resolve_model(self.deployment.model.path)  # before anything is loaded for nothing
        self.run_dir.mkdir(mode=0o700)
        try:
            self._assemble()
            self._launch()
            self._await_ready(on_loaded)
        except BaseException:
            self.kill()
            self.stop()
            raise

    def stop(self, grace_s: float = 0.0) -> None:
        """End the server and every process of its models, within about 8 s; remove all it left. Idempotent.

        `grace_s`: before that, requests that run may end within so long; new ones are refused. What the workers of a server
        without a router have not ended by then they hand back, and routers elsewhere go on with other workers.
        """
        if self._guardian is not None:
            if grace_s and not self.deployment.cluster.router:
                with WorkersDoor(channels(self.run_dir)) as door:
                    door.drain(grace_s, self.has_ended)
                grace_s = 0.0
            self._say(f"stop {grace_s}" if grace_s else "stop")
            try:
                self._guardian.wait(grace_s + _STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._guardian.kill()  # the kernel then kills the server
                self._guardian.wait()
            self._channel.close()
            self._guardian = None
        remove_traces(self.run_dir, self.shm_prefix)

    def kill(self) -> None:
        """Make a `stop` that waits end at once, without regard for requests. Safe in a signal handler."""
        if self._guardian is not None:
            self._say("kill")

    def has_ended(self, timeout_s: float = 0.0) -> bool:
        """Whether the server ended by itself; waits for it for up to `timeout_s`. `end` then says how."""
        if not self.end and select.select([self._channel], [], [], timeout_s)[0]:
            code = int(self._hear().removeprefix("exit ") or -signal.SIGKILL)  # the guardian's death is the server's
            self.end = f"ended with code {code}"
            if code < 0:
                self.end = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                self.end += " (out of memory?)"
        return bool(self.end)

    def _assemble(self) -> None:
        """Lay out the run directory: one link per model of the deployment, and the Python backend with its stub."""
        models = self.run_dir / "models"
        models.mkdir()
        roles = {worker.name: worker.role.value for worker in self.deployment.workers}
        for name in self.models:
            directory = self._model_repository / roles.get(name, name)
            if not directory.is_dir():
                raise ConfigError(f"{directory} is missing; the model {name} needs it")
            (models / name).symlink_to(directory.absolute())
        if self._binary.backend_files:
            backend = self.run_dir / "backends" / "python"
            backend.mkdir(parents=True)
            for file in self._binary.backend_files:
                (backend / file.name).symlink_to(file)

    def _launch(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps messages apart
        commands = [*self._command(), *(word for command in self._companions() for word in (guardian.SEPARATOR, *command))]
        arguments = [str(theirs.fileno()), str(_GRACE_S), str(self.run_dir), self.shm_prefix, *commands]
        with theirs, self.log.path.open("wb") as log:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, *arguments],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent alone, which stops us in order
            )
        self._channel.settimeout(_STOP_TIMEOUT_S)
        said = self._hear()
        if not said:
            raise ConfigError(f"{self._binary.executable} can't be run: {self.log.failure()}")
        self.pid = int(said.removeprefix("pid "))

    def _command(self) -> list[str]:
        command = [str(self._binary.executable), f"--model-repository={self.run_dir / 'models'}"]
        if self._binary.backend_files:
            command.append(f"--backend-directory={self.run_dir / 'backends'}")
        for service, port in (("http", self.http_port), ("grpc", self.grpc_port), ("metrics", self.metrics_port)):
            command += [f"--{service}-address={self.address}", f"--{service}-port={port}"]
        return [
            *command,
            "--model-control-mode=explicit",  # lets the router restart a worker: unload, load
            "--load-model=*",
            *self._restrictions(),
            *self._tls(),
            f"--model-load-thread-count={len(self.models)}",  # workers wait for the router: none may be queued behind another
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
            *(f"--{service}-header-forward-pattern=trace(parent|state)" for service in ("http", "grpc")),
        ]

    def _restrictions(self) -> list[str]:
        """Of Triton's APIs that nobody but this deployment's own processes needs."""
        security = self.deployment.security
        if not security.restricted_apis:
            return []
        secret = operator_secret(deployment_key(security.key_file, self.run_dir))
        rule = f"{','.join(security.restricted_apis)}:{OPERATOR_HEADER}={secret}"
        return [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]

    def _tls(self) -> list[str]:
        """Of gRPC, through which routers of other hosts hand over work. HTTP is for this host's own processes, too."""
        cluster = self.deployment.cluster
        if not cluster.grpc_certificate:
            return []
        options = [f"--grpc-server-cert={cluster.grpc_certificate}", f"--grpc-server-key={cluster.grpc_key}"]
        if not cluster.grpc_client_ca:
            return ["--grpc-use-ssl=true", *options]
        return ["--grpc-use-ssl-mutual=true", *options, f"--grpc-root-cert={cluster.grpc_client_ca}"]

    def _companions(self) -> list[list[str]]:
        """The processes of the front end, the first of which keeps the router; or that which tells how the workers are."""
        where = ["--address", self.address, "--port", str(self.openai_port)]
        if not self.deployment.cluster.router:
            return [[sys.executable, "-m", "python_backends.triton.health", *where]]
        if not self.deployment.has_front_end:
            return []
        http = self.deployment.http
        command = [sys.executable, "-m", "router.http", *where]
        command += ["--triton", f"{self.host}:{self.http_port}", "--metrics", f"{self.host}:{self.metrics_port}"]
        first = [*command, "--keep-router"] if self.deployment.health.restart else command
        return [first, *[command] * (http.processes - 1)]

    def _environment(self) -> dict[str, str]:
        environment = {
            **os.environ,
            "BATON_CONFIG": str(self._config),
            "BATON_RUN_DIR": str(self.run_dir),
            "BATON_TRITON": f"[{self.host}]:{self.http_port}" if ":" in self.host else f"{self.host}:{self.http_port}",
        }
        # The stub finds its interpreter, hence the virtual environment, by PATH alone.
        _prepend(environment, "PATH", (Path(sys.executable).parent,))
        _prepend(environment, "LD_LIBRARY_PATH", self._binary.libraries)
        _prepend(environment, "PYTHONPATH", (repository_root(),))
        return environment

    def _await_ready(self, on_loaded: Callable[[str], None] | None) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        ready = False
        while not ready:
            ready = self._is_ready()
            for line in self.log.new_lines():
                loaded = _LOADED.search(line)
                if loaded and on_loaded:
                    on_loaded(loaded[1])
            if self.has_ended(0 if ready else _POLL_S):
                raise ConfigError(f"tritonserver {self.end} at start: {self.log.failure()}; {self._keep_log()}")
            if time.monotonic() > deadline:
                waited = f"tritonserver was not ready after {self._start_timeout_s:.0f} s"
                raise Unavailable(f"{waited}: {self.log.failure()}; {self._keep_log()}")

    def _is_ready(self) -> bool:
        """The metrics service is the last of Triton's."""
        probes = {self.http_port: "/v2/health/ready", self.metrics_port: "/metrics"}
        if self.deployment.has_front_end:
            # Where its own workers can't serve alone it may have to wait for others' far longer than for itself.
            alone = any(worker.role is not Role.PREFILL for worker in self.deployment.workers)
            probes[self.openai_port] = "/health" if alone else "/health/live"
        elif not self.deployment.cluster.router:
            probes[self.openai_port] = "/health/live"
        return all(self._answers(port, path) for port, path in probes.items())

    def _answers(self, port: int, path: str) -> bool:
        connection = http.client.HTTPConnection(self.host, port, timeout=1.0)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _keep_log(self) -> str:
        """One file, whoever failed last: enough to look at, and it never piles up."""
        kept = self.run_dir.with_name("last-failed-start.log")
        shutil.copyfile(self.log.path, kept)
        return f"its log is {kept}"

    def _hear(self) -> str:
        """One message of the guardian; empty when it is gone."""
        try:
            return self._channel.recv(64).decode()
        except ConnectionError:
            return ""

    def _say(self, word: str) -> None:
        try:
            self._channel.sendall(word.encode())
        except OSError:  # the guardian is gone already; waiting for it tells
            return


class ServerLog:
    """The log of a running server, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def new_lines(self) -> list[str]:
        """Whole lines since the last call, without what Triton always says on a machine that has no GPU."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text, _, _ = file.read(_LOG_CHUNK).rpartition(b"\n")
        except FileNotFoundError:
            return []
        if not text:
            return []
        self._offset += len(text) + 1
        return _without_noise(text.decode(errors="replace"))

    def failure(self) -> str:
        """Why the server gave up, in the server's or the model's own words, without the rest of the log."""
        lines = _without_noise(self.path.read_text(errors="replace"))
        reasons = [_reason(*match.groups()) for line in lines if (match := _LOAD_FAILED.match(line))]
        if not reasons:
            reasons = [_LOG_PREFIX.sub("", line).strip('" ') for line in lines if _LOG_PREFIX.match(line)]
        if not reasons:
            reasons = [line for line in lines if line.strip()][-3:] or ["it said nothing"]
        return "; ".join(dict.fromkeys(reasons))

    def last_words(self) -> str:
        """The last lines, whatever they say."""
        return "; ".join(_without_noise(self.path.read_text(errors="replace"))[-5:])


def _without_noise(text: str) -> list[str]:
    return [line for line in text.splitlines() if not _NOISE.search(line)]


def _reason(model: str, escaped: str) -> str:
    r"""`TritonModelException: <sentence>\n\nAt:\n  <file>(<line>): ...` -> the sentence; others keep their place."""
    message, _, place = escaped.partition(r"\n\nAt:\n")
    kind, _, sentence = message.partition("TritonModelException: ")
    if not kind and sentence:
        return sentence
    where = place.replace(r"\n", " ").split()
    return f"model {model}: {message}" + (f" (at {where[0].rstrip(':')})" if where else "")


@dataclass(frozen=True, slots=True)
class TritonBinary:
    """A tritonserver and what it needs: a backend directory made of `backend_files` (empty: it has its own)."""

    executable: Path
    backend_files: tuple[Path, ...]
    libraries: tuple[Path, ...]


def find_tritonserver() -> TritonBinary:
    """The tritonserver on PATH, else that of the nvidia-pytriton package. Raises ConfigError with the fix."""
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        executable = Path(on_path).resolve()
        _check_stub_version(executable)
        return TritonBinary(executable, (), ())
    try:
        package = distribution("nvidia-pytriton")
    except PackageNotFoundError:
        raise ConfigError("no tritonserver on PATH and no nvidia-pytriton package; run scripts/install") from None
    home = Path(str(package.locate_file("pytriton/tritonserver")))
    stub = home / "python_backend_stubs" / _python_version() / "triton_python_backend_stub"
    if not stub.is_file():
        raise ConfigError(f"nvidia-pytriton has no Python backend for Python {_python_version()}; {_reinstall('3.10 to 3.12')}")
    executable = home / "bin" / "tritonserver"
    for program in (executable, stub):
        if not os.access(program, os.X_OK):  # some installers lose the bit
            program.chmod(0o755)
    backend = home / "backends" / "python"
    files = (stub, backend / "libtriton_python.so", backend / "triton_python_backend_utils.py")
    # Our libpython first: another build's would be mixed with this interpreter's standard library.
    return TritonBinary(executable, files, (_libpython_dir(), Path(str(package.locate_file("nvidia_pytriton.libs")))))


def _check_stub_version(executable: Path) -> None:
    """A server of its own brings a Python backend for one Python only; ours must be that one."""
    stub = executable.parents[1] / "backends" / "python" / "triton_python_backend_stub"
    if not stub.is_file():
        raise ConfigError(f"{executable} is on PATH without a Python backend ({stub}); install that or take it off PATH")
    linked = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    if linked and linked[1].decode() != _python_version():
        needed = linked[1].decode()
        raise ConfigError(f"{executable} runs models in Python {needed}, this is {_python_version()}; {_reinstall(needed)}")


def _reinstall(version: str) -> str:
    return f"remove .venv and run scripts/install with PYTHON set to a Python {version}"


def _libpython_dir() -> Path:
    """The directory of this interpreter's shared library, which the stub links. Raises ConfigError."""
    name = f"libpython{_python_version()}.so.1.0"
    places = [Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"), Path(sys.base_prefix) / "lib"]
    for place in places:
        if (place / name).exists():
            return place
    raise ConfigError(
        f"Triton's Python backend needs {name}, which is not in {places[0]}; "
        f"install it (Debian, Ubuntu: apt install libpython{_python_version()})"
    )


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _check_tls(cluster: ClusterConfig) -> None:
    """Raises ConfigError: of a file that is wrong tritonserver says only that it can't listen."""
    if cluster.grpc_certificate:
        check_certificate(cluster.grpc_certificate, cluster.grpc_key, "cluster.grpc_certificate, grpc_key")
    if cluster.grpc_client_ca:
        check_authority(cluster.grpc_client_ca, "cluster.grpc_client_ca")


def _choose_ports(address: str, wanted: dict[str, int]) -> list[int]:
    """One usable port per flag, in order. Raises ConfigError that names the port and its flag."""
    chosen: list[int] = []
    for flag, port in wanted.items():
        if port in chosen:
            raise ConfigError(f"port {port} is given twice; give another with {flag}, or 0 for a free one")
        if port == 0:
            port = free_port(address, {*chosen, *wanted.values()})
        else:
            problem = bind_problem(address, port)
            if problem:
                raise ConfigError(f"port {port} on {address}: {problem}; give another with {flag}, or 0 for a free one")
        chosen.append(port)
    return chosen


def free_port(address: str, taken: Set[int] = frozenset()) -> int:
    """A port that nobody listens at and none of `taken`. Raises ConfigError when there is none."""
    for port in random.sample(_FREE_PORTS, _FREE_PORT_TRIES):
        if port not in taken and not bind_problem(address, port):
            return port
    raise ConfigError(f"no free port on {address}: {bind_problem(address, _FREE_PORTS[0])}; check --address")


def bind_problem(address: str, port: int) -> str:
    """Why one can't listen there now, or an empty string."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton does: old connections don't count
        try:
            probe.bind((address, port))
            probe.listen(1)
        except (OSError, OverflowError) as error:
            return getattr(error, "strerror", None) or str(error)
    return ""


def _prepend(environment: dict[str, str], name: str, paths: Sequence[Path]) -> None:
    if paths:
        environment[name] = os.pathsep.join([*map(str, paths), *filter(None, [environment.get(name)])])
