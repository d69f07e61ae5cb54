"""What the doctor says of facts: one finding each, in a sentence that tells what is wrong and how to mend it.

Pure functions: whatever they are told they believe. doctor_facts.py finds out, doctor.py calls both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from packaging.specifiers import SpecifierSet

GIB = 1 << 30
_MIB = 1 << 20
_SHM_PER_MODEL = 4 * _MIB  # Triton's Python backend: 1 MiB per model and direction, growing with large messages
_SHM_COMFORT = 64 * _MIB
_WORKER_BYTES = 400 * _MIB  # of a worker's process beside weights and pool: Python, torch, buffers
_SERVER_BYTES = 500 * _MIB  # tritonserver and the router
_OPEN_FILES = 4096
_SLOW_NIC_MBIT = 10_000


class Level(str, Enum):
    OK = "ok"
    NOTE = "note"  # good to know
    WARNING = "warning"  # it works, and could be better
    BROKEN = "broken"  # it will not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    subject: str
    level: Level
    text: str


def check_python(version: tuple[int, int]) -> Finding:
    name = f"{version[0]}.{version[1]}"
    if (3, 10) <= version <= (3, 12):
        return Finding("Python", Level.OK, name)
    return Finding(
        "Python",
        Level.BROKEN,
        f"{name} is not 3.10 to 3.12; remove .venv and run scripts/install with PYTHON set to one of those",
    )


def check_libraries(
    wanted: Mapping[str, SpecifierSet], found: Mapping[str, str], unneeded: Collection[str] = ()
) -> list[Finding]:
    """`found`: versions of what is installed. `unneeded`: packages whose absence does no harm here."""
    missing = sorted(name for name in wanted if name not in found and name not in unneeded)
    other = sorted(
        f"{name} {found[name]} instead of {str(wanted[name]).removeprefix('==')}"
        for name in wanted
        if name in found and not wanted[name].contains(found[name], prereleases=True)
    )
    findings = []
    if missing:
        findings.append(Finding("libraries", Level.BROKEN, f"{', '.join(missing)} missing; run scripts/install"))
    if other:
        text = f"not the versions that are tested: {'; '.join(other)}; run scripts/install to have those"
        findings.append(Finding("libraries", Level.WARNING, text))
    return findings or [Finding("libraries", Level.OK, f"{len(wanted)} as pinned in requirements.txt")]


def check_tritonserver(path: str, problem: str) -> Finding:
    """`problem`: why there is none that can be used; empty when there is one, at `path`."""
    if not problem:
        return Finding("tritonserver", Level.OK, path)
    return Finding("libpython" if "needs libpython" in problem else "tritonserver", Level.BROKEN, problem)


def check_ports(taken: Mapping[str, tuple[int, str]]) -> list[Finding]:
    """`taken`: flag of scripts/serve -> (port, why one can't listen there; empty if one can)."""
    findings = [
        Finding("ports", Level.BROKEN, f"port {port}: {why}; stop what uses it or give another with {flag}")
        for flag, (port, why) in taken.items()
        if why
    ]
    free = ", ".join(str(port) for port, why in taken.values() if not why)
    return findings or [Finding("ports", Level.OK, f"{free} free")]


def check_shared_memory(free_bytes: int, models: int) -> Finding:
    """/dev/shm, which Triton's Python backend talks through. KV pools are elsewhere (memfd) and not bound by it."""
    needed = _SHM_PER_MODEL * models
    free = f"/dev/shm has {free_bytes / _MIB:.0f} MiB free"
    mend = "remount it larger (mount -o remount,size=1G /dev/shm; docker run --shm-size=1g)"
    if free_bytes < needed:
        text = f"{free}, {models} models need {needed / _MIB:.0f}; {mend}, or remove what others left there"
        return Finding("shared memory", Level.BROKEN, text)
    if free_bytes < _SHM_COMFORT:
        return Finding("shared memory", Level.WARNING, f"{free}, which long prompts can fill; {mend}")
    return Finding("shared memory", Level.OK, free)


def memory_needed(weights: int, pools: Sequence[int]) -> int:
    """Bytes of a deployment on one host. `weights`: mapped once, shared by all workers. `pools`: KV pool of each."""
    return weights + sum(pools) + _WORKER_BYTES * len(pools) + _SERVER_BYTES


def check_memory(available: int, limit: int | None, needed: int) -> Finding:
    """`available`: without swapping. `limit`: what the container may have on top of what it has; None: no limit."""
    usable = available if limit is None else min(available, limit)
    of = " inside the container's limit" if limit is not None and limit < available else ""
    have = f"{usable / GIB:.1f} GiB available{of}, this deployment needs about {needed / GIB:.1f}"
    if needed > usable:
        text = f"{have}; lower engine.kv_pool_mib, take fewer workers or a smaller model"
        return Finding("memory", Level.BROKEN, text + (", or raise the container's limit" if of else ""))
    if needed > 0.8 * usable:
        return Finding("memory", Level.WARNING, f"{have}: little is left for anything else; lower engine.kv_pool_mib")
    return Finding("memory", Level.OK, have)


def check_processor(flags: Collection[str], name: str, machine: str) -> Finding:
    """`flags`: of /proc/cpuinfo. `machine`: architecture."""
    if machine not in ("x86_64", "AMD64"):
        return Finding("processor", Level.NOTE, f"{name} ({machine})")
    if "avx2" not in flags:
        return Finding(
            "processor", Level.WARNING, f"{name} has no AVX2: matrix products are several times slower; use another host"
        )
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = ", ".join(flag for flag in known if flag in flags)
    native = {"avx512_bf16", "amx_bf16"} & set(flags)
    advice = "" if native else "; it has no bfloat16 arithmetic: keep model.dtype at float32 on CPU workers"
    return Finding("processor", Level.OK, f"{name}: {has}{advice}")


def check_cores(cores: int, quota: float | None, threads: Mapping[str, int]) -> Finding:
    """`quota`: cores' worth of time the container may use; None: no limit. `threads`: compute threads of each worker."""
    total = sum(threads.values())
    text = f"{cores} cores, {total} compute threads ({', '.join(f'{name} {count}' for name, count in threads.items())})"
    if quota is not None and quota < total:
        mend = "set workers[].threads so that their sum fits, or raise the limit"
        return Finding(
            "cores", Level.WARNING, f"the container may use {quota:g} cores, the workers have {total} threads; {mend}"
        )
    if total > cores:
        return Finding("cores", Level.WARNING, f"{text}: they take each other's time; lower workers[].threads")
    return Finding("cores", Level.OK, text)


def check_numa(nodes: int, pinned: bool) -> list[Finding]:
    if nodes < 2 or pinned:
        return []
    text = (
        f"{nodes} NUMA nodes and workers that are not pinned; set workers[].cpus to cores of one node each (lscpu shows them)"
    )
    return [Finding("NUMA", Level.WARNING, text)]


def check_open_files(limit: int) -> list[Finding]:
    if limit >= _OPEN_FILES:
        return []
    return [
        Finding(
            "open files", Level.WARNING, f"at most {limit} per process; run ulimit -n {_OPEN_FILES} before serving many clients"
        )
    ]


def check_model(path: str, problem: str) -> Finding:
    return Finding("model", Level.BROKEN, problem) if problem else Finding("model", Level.OK, path)


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int


def check_arithmetic(dtype: str, engines: Collection[str]) -> list[Finding]:
    """`dtype`: model.dtype. `engines`: of the workers."""
    if "trtllm" not in engines or dtype != "float32":
        return []
    text = "model.dtype is float32, the default, which suits CPUs: several times slower on a GPU, and KV twice as large"
    return [Finding("arithmetic", Level.WARNING, f"{text}; set it to bfloat16 or what the checkpoint has")]


def check_gpus(
    gpus: Sequence[Gpu], peers: Collection[tuple[int, int]], wanted: Mapping[str, str], driver: bool
) -> list[Finding]:
    """`peers`: pairs that reach each other's memory. `wanted`: worker -> its device. `driver`: nvidia-smi is there."""
    findings = []
    for worker, device in wanted.items():
        kind, _, index = device.partition(":")
        if kind == "cuda" and int(index or 0) >= len(gpus):
            has = f"only {len(gpus)}" if gpus else "none"
            text = f"worker {worker} wants {device}, torch sees {has}; set workers[].device, or install driver and CUDA build"
            findings.append(Finding("GPUs", Level.BROKEN, text))
    if driver and not gpus:
        text = "there is an NVIDIA driver, but torch sees no GPU: a CPU build, or too new for the driver; install another torch"
        findings.append(Finding("GPUs", Level.WARNING, text))
    if gpus:
        findings.append(Finding("GPUs", Level.OK, ", ".join(f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GiB)" for gpu in gpus)))
        pairs = [(a, b) for a in range(len(gpus)) for b in range(len(gpus)) if a != b]
        blind = [f"{a}->{b}" for a, b in pairs if (a, b) not in peers]
        if blind:
            text = f"none {', '.join(blind)}: KV between them goes through host memory; pair workers of GPUs that have it"
            findings.append(Finding("peer access", Level.WARNING, text))
        elif pairs:
            findings.append(Finding("peer access", Level.OK, "between all GPUs"))
    return findings or [Finding("GPUs", Level.NOTE, "none; workers compute on the CPU")]


@dataclass(frozen=True, slots=True)
class Nic:
    """`speed_mbit`: 0 where the driver does not say."""

    name: str
    speed_mbit: int
    mtu: int


def check_nics(nics: Sequence[Nic], rdma: Sequence[str]) -> list[Finding]:
    """Of interfaces that are up, loopback left out. `rdma`: devices with an active port."""
    if not nics:
        return [Finding("network", Level.NOTE, "no interface besides loopback; workers of other hosts can't be reached")]
    names = [
        f"{nic.name} {f'{nic.speed_mbit / 1000:g} Gbit/s' if nic.speed_mbit else 'of unknown speed'}, MTU {nic.mtu}"
        for nic in nics
    ]
    found = [Finding("network", Level.OK, "; ".join(names))]
    if rdma:
        found.append(Finding("RDMA", Level.OK, ", ".join(rdma)))
    elif 0 < max(nic.speed_mbit for nic in nics) < _SLOW_NIC_MBIT:
        text = "no interface of 10 Gbit/s or more and no RDMA: keep prefill and decode of a model on one host"
        found.append(Finding("network", Level.NOTE, text))
    return found


def check_redis(url: str, problem: str, milliseconds: float, policy: str) -> Finding:
    """`url`: shown without a password. `problem`: why it does not answer. `policy`: its maxmemory-policy."""
    if problem:
        return Finding("Redis", Level.BROKEN, f"{url}: {problem}; start it, or take it out of store.remote.servers")
    if policy == "noeviction":
        mend = "set maxmemory-policy allkeys-lru"
        return Finding("Redis", Level.WARNING, f"{url} refuses writes when it is full (noeviction); {mend}")
    return Finding("Redis", Level.OK, f"{url} answers in {milliseconds:.2f} ms")


EXCHANGED = ("ticket", "layout", "model")
"""Versions that decide whether KV of one host can be used on the other."""


def check_versions(ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> list[Finding]:
    """What must be the same on hosts whose workers exchange KV, and what had better be."""
    differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if not differing:
        return [Finding("versions", Level.OK, f"{where} has the same")]
    said = {name: f"{name} is {ours.get(name, 'missing')} here and {theirs.get(name, 'missing')} there" for name in differing}
    fatal = [said[name] for name in differing if name in EXCHANGED]
    minor = [said[name] for name in differing if name not in EXCHANGED]
    findings = []
    if fatal:
        text = f"{where}: {'; '.join(fatal)}: KV can't be exchanged; install the same Baton and the same model on both"
        findings.append(Finding("versions", Level.BROKEN, text))
    if minor:
        findings.append(
            Finding("versions", Level.WARNING, f"{where}: {'; '.join(minor)}; run scripts/install of the same checkout on both")
        )
    return findings
