"""Finds out what the doctor's checks ask for: of this process, this machine, and the services that a deployment names."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import redis
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from python_backends.core.config import Deployment, parse_cpus
from python_backends.core.errors import ConfigError
from python_backends.core.handoff import TICKET_VERSION
from python_backends.core.layout import LAYOUT_VERSION
from python_backends.core.paths import repository_root, resolve_model
from python_backends.core.types import Role
from scripts.doctor_checks import Gpu, Nic
from scripts.tritonserver import bind_problem, find_tritonserver

_REDIS_TIMEOUT_S = 2.0
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 when there is none


def wanted_libraries(requirements: Path) -> dict[str, SpecifierSet]:
    """The pins of a requirements file that apply to this Python."""
    found = {}
    for line in requirements.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                found[requirement.name] = requirement.specifier
    return found


def found_libraries(names: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def tritonserver() -> tuple[str, str]:
    """(path, why it can't be used)."""
    try:
        return str(find_tritonserver().executable), ""
    except ConfigError as error:
        return "", str(error)


def ports(address: str, wanted: Mapping[str, int]) -> dict[str, tuple[int, str]]:
    """Flag -> (port, why one can't listen there); 0, which chooses a free one, is left out."""
    return {flag: (port, _port_problem(address, port)) for flag, port in wanted.items() if port}


def _port_problem(address: str, port: int) -> str:
    problem = bind_problem(address, port)
    if not problem:
        return ""
    try:
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        users = {c.pid for c in listening if getattr(c.laddr, "port", 0) == port}
        names = [f"{psutil.Process(pid).name()} (process {pid})" for pid in users if pid]
    except psutil.Error:
        names = []  # of another user
    return f"{problem} by {', '.join(names)}" if names else problem


def shared_memory_free() -> int:
    return shutil.disk_usage("/dev/shm").free


def cgroup_memory_left(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process's control groups still allow it, page cache counted as free; None: no limit."""
    left = [
        limit - _number(directory / usage) + _page_cache(directory)
        for directory, limit_name, usage in _memory_groups(root, own)
        if (limit := _number(directory / limit_name, _NO_LIMIT)) < _NO_LIMIT
    ]
    return max(0, min(left)) if left else None


def _memory_groups(root: Path, own: Path) -> Iterable[tuple[Path, str, str]]:
    """(directory, file of the limit, file of the use) of each group that this process is in, up to the root; v2 and v1."""
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inside = Path(path.lstrip("/"))
        for part in (inside, *inside.parents):
            yield base / part, *names


def _number(path: Path, otherwise: int = 0) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return otherwise
    return int(text) if text.isdecimal() else otherwise  # "max": no limit


def _page_cache(group: Path) -> int:
    """File pages that the kernel gives up when memory is needed."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the container may use; None: no limit."""
    v2, v1 = root / "cpu.max", root / "cpu" / "cpu.cfs_quota_us"
    try:
        if v2.exists():
            quota, period = v2.read_text().split()
        else:
            quota, period = v1.read_text().strip(), (v1.parent / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdecimal() and int(quota) > 0 else None


def cpu_flags() -> set[str]:
    found = re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def numa_nodes() -> int:
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1


def open_files_limit() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # Triton raises its own as far as it may
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def compute_threads(deployment: Deployment, cores: int) -> dict[str, int]:
    """Worker -> threads that compute at the same time as others'. An aggregated worker beside a pair rests while it lives."""
    pair = [worker for worker in deployment.workers if worker.role is not Role.AGGREGATED]
    busy = pair or list(deployment.workers)
    share = max(1, cores // len(busy))
    return {worker.name: worker.threads or len(parse_cpus(worker.cpus)) or share for worker in busy}


def pool_bytes(deployment: Deployment) -> list[int]:
    return [(worker.kv_pool_mib or deployment.engine.kv_pool_mib) << 20 for worker in deployment.workers]


def model(deployment: Deployment) -> tuple[str, int, str]:
    """(directory, bytes of its weights, why it can't be served). Engines without weights need none of them."""
    try:
        directory = resolve_model(deployment.model.path)
    except ConfigError as error:
        return deployment.model.path, 0, str(error)
    if all(worker.engine == "fake" for worker in deployment.workers):
        return str(directory), 0, ""
    return str(directory), sum(file.stat().st_size for file in directory.glob("*.safetensors")), ""


def gpus() -> tuple[list[Gpu], set[tuple[int, int]]]:
    """What torch sees, and which pairs reach each other's memory."""
    import torch  # slow to load, and asked for last

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory) for i in range(count)]
    pairs = {(a, b) for a in range(count) for b in range(count) if a != b and torch.cuda.can_device_access_peer(a, b)}
    return found, pairs


def nics() -> list[Nic]:
    """Interfaces that are up, loopback left out."""
    stats = psutil.net_if_stats()
    return [Nic(name, s.speed, s.mtu) for name, s in stats.items() if s.isup and "loopback" not in s.flags.split(",")]


def rdma_devices(root: Path = Path("/sys/class/infiniband")) -> list[str]:
    """`mlx5_0 port 1: 200 Gb/sec (4X HDR)` for each active port."""
    return [
        f"{port.parents[1].name} port {port.name}: {(port / 'rate').read_text().strip()}"
        for port in sorted(root.glob("*/ports/*"))
        if "ACTIVE" in (port / "state").read_text()
    ]


def configured_redis(deployment: Deployment) -> tuple[str, ...]:
    return deployment.store.remote.servers


def redis_state(url: str) -> tuple[str, float, str]:
    """(why it does not answer, milliseconds of a round trip, maxmemory-policy)."""
    try:
        client = redis.Redis.from_url(url, socket_timeout=_REDIS_TIMEOUT_S, socket_connect_timeout=_REDIS_TIMEOUT_S)
    except ValueError as error:
        return str(error), 0.0, ""
    try:
        client.ping()
        before = time.perf_counter()
        client.ping()
        took_ms = (time.perf_counter() - before) * 1e3
        policy = str(client.info("memory").get("maxmemory_policy", ""))
    except redis.RedisError as error:
        return str(error), 0.0, ""
    finally:
        client.close()
    return "", took_ms, policy


def without_password(url: str) -> str:
    split = urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2]).geturl()


def versions(deployment: Deployment) -> dict[str, str]:
    """What hosts of one deployment compare. `model`: a digest of config and sizes of the weights."""
    import hashlib

    directory, _, problem = model(deployment)
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(directory).glob("*")) if not problem else ():
        if file.suffix in (".json", ".safetensors"):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes() if file.name == "config.json" else b"")
    compared = found_libraries(("torch", "numpy", "msgspec", "pyzmq", "xxhash", "tokenizers"))
    pinned = hashlib.blake2b((repository_root() / "requirements.txt").read_bytes(), digest_size=4).hexdigest()
    return {
        "ticket": str(TICKET_VERSION),
        "layout": str(LAYOUT_VERSION),
        "model": "missing" if problem else digest.hexdigest(),
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "requirements": pinned,
        **compared,
    }


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None


def cores() -> int:
    return len(os.sched_getaffinity(0))
