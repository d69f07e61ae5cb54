"""Which deployment a model process belongs to: its file, its run directory, its key.

`scripts/serve` says so in the environment (BATON_CONFIG, BATON_RUN_DIR, BATON_TRITON). Under a plain `tritonserver
--model-repository=model_repository` nobody does: then it is configs/default.yaml, and a run directory named after the
server process, which is the parent of every model process.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from python_backends.core.config import Deployment, load_deployment
from python_backends.core.deployment_key import OPERATOR_HEADER, deployment_key, operator_secret
from python_backends.core.errors import ConfigError
from python_backends.core.paths import repository_root, run_base
from python_backends.core.types import Role

DRAINING, DRAINED, STOPPING = "draining", "drained", "stopping"
"""Files in the run directory. scripts/guardian.py makes the first, the router the second when it has nothing more to do;
then, or when the time for that is over, the guardian makes the third and stops the server."""

_CHANNEL = "worker-"


@dataclass(frozen=True, slots=True)
class Home:
    deployment: Deployment
    run_dir: Path  # mode 0700
    key: bytes  # signs work and tickets
    triton_address: str = ""  # HOST:PORT of the server's HTTP service, where it is known

    def channel_address(self, worker: str) -> str:
        """Where a worker of this server listens for routers of this host."""
        return f"ipc://{self.run_dir / _CHANNEL}{worker}"

    @property
    def door_address(self) -> str:
        """Where the router of this server listens for front ends."""
        return f"ipc://{self.run_dir}/door"

    def role_of(self, worker: str) -> Role | None:
        """The role in which the worker was up last, if it was given one; None: that of the deployment file."""
        try:
            return Role(self._role_file(worker).read_text())
        except (OSError, ValueError):
            return None

    def remember_role(self, worker: str, role: Role) -> None:
        """As long as the server lives. Whoever loads the worker's model needs not know of it. Raises OSError."""
        written = self._role_file(worker).with_suffix(".new")
        written.write_text(role.value)
        written.replace(self._role_file(worker))

    def _role_file(self, worker: str) -> Path:
        return self.run_dir / f"role-{worker}"

    def draining(self) -> bool:
        """Whether requests that run are to end and no others are to begin, since the server will be stopped."""
        return (self.run_dir / DRAINING).exists()

    def drained(self) -> None:
        """Say that no request runs any more."""
        with suppress(OSError):  # a full disk: then the guardian waits in vain, as long as it may
            (self.run_dir / DRAINED).touch()

    @property
    def operator_headers(self) -> dict[str, str]:
        """What a call to Triton's HTTP service needs to load and unload models."""
        return {OPERATOR_HEADER: operator_secret(self.key)}

    def stopping(self) -> bool:
        """Whether whoever started the server is stopping it. Triton itself does not tell its models."""
        return (self.run_dir / STOPPING).exists()


def channels(run_dir: Path) -> dict[str, str]:
    """Where the workers of a server listen for this host, by their names."""
    return {path.name.removeprefix(_CHANNEL): f"ipc://{path}" for path in sorted(run_dir.glob(f"{_CHANNEL}*"))}


def find_home() -> Home:
    """Raises ConfigError when the deployment file or the key file is wrong."""
    config = os.environ.get("BATON_CONFIG")
    deployment = load_deployment(Path(config) if config else repository_root() / "configs" / "default.yaml")
    run_dir = _run_dir()
    key = deployment_key(deployment.security.key_file, run_dir)
    return Home(deployment, run_dir, key, os.environ.get("BATON_TRITON", ""))


def _run_dir() -> Path:
    given = os.environ.get("BATON_RUN_DIR")
    if given:
        path = Path(given)
    else:
        base = run_base()
        path = base / _process_name(os.getppid())
        _sweep(base)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid() or path.parent.stat().st_uid not in (os.getuid(), 0):
        raise ConfigError(f"{path} belongs to another user; set BATON_RUN_DIR to a directory of your own")
    return path


def _process_name(pid: int) -> str:
    """`plain-<pid>-<start time>`: unlike that of a later process with the same number."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return f"plain-{pid}-{stat.rpartition(')')[2].split()[19]}"


def _sweep(base: Path) -> None:
    """Remove what plain servers that are gone have left."""
    for path in base.glob("plain-*"):
        pid = path.name.split("-")[1]
        try:
            alive = _process_name(int(pid)) == path.name
        except (OSError, ValueError):
            alive = False
        if not alive:
            shutil.rmtree(path, ignore_errors=True)
