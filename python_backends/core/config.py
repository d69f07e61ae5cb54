"""The deployment file: every key, its unit, its default and its bounds, in one place.

docs/configuration.md is generated from these classes. Unknown keys, wrong types and values out of bounds raise a
ConfigError that names the path of the key. Nothing below this file reads the environment or a default of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta

from python_backends.core.errors import ConfigError
from python_backends.core.types import Role, WorkerId

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
PositiveSeconds = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, and an unknown key is an error."""


class ModelConfig(Section, frozen=True):
    path: Annotated[
        str, Meta(description="A Hugging Face model directory, or `smollm2-135m-instruct`: the weights that `make` fetches.")
    ] = "smollm2-135m-instruct"
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Meta(description="Of weights, arithmetic and KV cache.")] = (
        "float32"
    )
    max_context: Annotated[
        NonNegative, Meta(description="Tokens of prompt and output together; 0: what model and KV pool allow.")
    ] = 0


class WorkerConfig(Section, frozen=True):
    role: Annotated[Role, Meta(description="prefill, decode, or aggregated (both in one engine).")]
    name: Annotated[
        str, Meta(description="Triton model name. Default: the role, then role_1, role_2 ...", pattern="^([a-z][a-z0-9_]*)?$")
    ] = ""
    engine: Annotated[str, Meta(description="torch, or fake (no weights, for load and failure tests).")] = "torch"
    device: Annotated[str, Meta(description="cpu, cuda, or cuda:N.", pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    cpus: Annotated[
        str, Meta(description="CPU cores the worker is pinned to, such as `0-3,8`. Empty: not pinned.", pattern=r"^[\d,-]*$")
    ] = ""
    threads: Annotated[
        NonNegative, Meta(description="Compute threads. 0: the pinned cores, else an even share of the machine's.")
    ] = 0
    kv_pool_mib: Annotated[NonNegative, Meta(description="KV pool of this worker, MiB. 0: `engine.kv_pool_mib`.")] = 0

    @property
    def id(self) -> WorkerId:
        return WorkerId(self.name)


class FakeConfig(Section, frozen=True):
    prefill_us_per_token: Annotated[NonNegative, Meta(description="engine fake: microseconds slept per prompt token.")] = 200
    step_us: Annotated[NonNegative, Meta(description="engine fake: microseconds slept per step.")] = 5000


class EngineConfig(Section, frozen=True):
    block_size: Annotated[Positive, Meta(description="Tokens per KV block.")] = 16
    kv_pool_mib: Annotated[Positive, Meta(description="KV pool of each worker, MiB.")] = 512
    max_batch: Annotated[Positive, Meta(description="Requests computed in one step.")] = 64
    step_tokens: Annotated[
        Positive, Meta(description="Tokens computed in one step: the chunk of a long prompt, shared with running streams.")
    ] = 256
    max_queue: Annotated[Positive, Meta(description="Requests that may wait in one worker; more are refused.")] = 1024
    fake: FakeConfig = FakeConfig()


class TransferConfig(Section, frozen=True):
    transport: Annotated[
        Literal["auto", "shm", "tcp", "nixl", "inline"],
        Meta(
            description="How KV moves: shm (shared memory, same host), tcp (any host), nixl (RDMA and other fabrics; needs "
            "requirements-nixl.txt), inline (in the ticket; tests and tiny prompts), or auto: the best that a pair of workers "
            "has in common."
        ),
    ] = "auto"
    listen: Annotated[
        str,
        Meta(
            description="tcp, nixl: address of this host that others reach it by; 0.0.0.0 is every interface, told to others "
            "by the host's name. Empty: 127.0.0.1, and with auto none, so that all is shm."
        ),
    ] = ""
    ports: Annotated[
        str,
        Meta(
            description="tcp, nixl: ports to listen on, such as 7100-7131, one per worker. Empty: any.",
            pattern=r"^(\d+(-\d+)?)?$",
        ),
    ] = ""
    streams: Annotated[Positive, Meta(description="tcp: connections that share one handoff.")] = 2
    tls_cert_file: Annotated[
        str,
        Meta(description="tcp, nixl: this side's certificate. With the next two, connections are in TLS on both sides' word."),
    ] = ""
    tls_key_file: Annotated[str, Meta(description="tcp, nixl: the key of tls_cert_file.")] = ""
    tls_ca_file: Annotated[str, Meta(description="tcp, nixl: who signed the other sides' certificates.")] = ""
    lease_s: Annotated[PositiveSeconds, Meta(description="Seconds that published KV is kept for a decode worker.")] = 10.0
    timeout_s: Annotated[PositiveSeconds, Meta(description="Seconds a transfer may take before KV is recomputed.")] = 2.0
    faults: Annotated[
        dict[Literal["delay", "drop", "corrupt", "truncate", "hang"], Fraction],
        Meta(description="Failure tests only: share of transfers to delay, drop, corrupt, truncate or hang."),
    ] = {}


class RemoteStoreConfig(Section, frozen=True):
    servers: Annotated[
        tuple[str, ...],
        Meta(
            description="Redis servers, redis://HOST:PORT/DB or rediss:// with TLS. Several share the blocks by consistent "
            "hashing. None: no remote store."
        ),
    ] = ()
    cluster: Annotated[
        bool, Meta(description="The servers are nodes of one Redis Cluster, which shares the blocks itself.")
    ] = False
    username: Annotated[str, Meta(description="ACL user. Empty: the default user.")] = ""
    password_file: Annotated[str, Meta(description="File with the password. Empty: none.")] = ""
    ca_file: Annotated[str, Meta(description="TLS: who signed the servers' certificates. Empty: those the system trusts.")] = ""
    cert_file: Annotated[str, Meta(description="TLS: this side's certificate, for servers that want one.")] = ""
    key_file: Annotated[str, Meta(description="TLS: the key of cert_file.")] = ""
    ttl_s: Annotated[Positive, Meta(description="Seconds that a block is kept after its last use.")] = 86_400
    budget_mib: Annotated[
        NonNegative,
        Meta(description="MiB a server may use before the oldest blocks give way to new ones. 0: as its own maxmemory says."),
    ] = 0


class StoreConfig(Section, frozen=True):
    node_mib: Annotated[
        NonNegative, Meta(description="Node store: MiB of shared memory per host for all of its workers. 0: none.")
    ] = 0
    remote: RemoteStoreConfig = RemoteStoreConfig()
    fill: Annotated[
        Literal["publish", "evict"],
        Meta(description="Blocks are stored as soon as they are full (publish), or when they come near eviction (evict)."),
    ] = "publish"
    queue_blocks: Annotated[Positive, Meta(description="Blocks that may wait to be stored; older ones are dropped.")] = 4096
    locate_timeout_s: Annotated[
        PositiveSeconds, Meta(description="Seconds that the router waits to hear what the stores have of a prompt.")
    ] = 0.05
    read_timeout_s: Annotated[
        PositiveSeconds, Meta(description="Seconds that reading from the stores may take; what is late is computed.")
    ] = 0.25


class RouterConfig(Section, frozen=True):
    mode: Annotated[
        Literal["auto", "remote", "local", "aggregated"],
        Meta(description="Route of requests that ask for none: auto decides per request; the others force one way."),
    ] = "auto"
    local_prefill_tokens: Annotated[
        NonNegative, Meta(description="auto: a decode worker prefills up to so many uncached tokens itself.")
    ] = 32
    max_requests: Annotated[Positive, Meta(description="Requests in the house at once; more are refused at once.")] = 256
    max_queued_tokens: Annotated[
        Positive, Meta(description="Prompt tokens waiting for their first token; more are refused at once.")
    ] = 262_144
    default_max_tokens: Annotated[Positive, Meta(description="max_tokens of a request that gives none.")] = 128
    default_deadline_s: Annotated[PositiveSeconds, Meta(description="Seconds that a request without a timeout may take.")] = (
        600.0
    )
    max_prompt_bytes: Annotated[Positive, Meta(description="Longest prompt text accepted, bytes of UTF-8.")] = 1_000_000
    worker_wait_s: Annotated[
        PositiveSeconds, Meta(description="Seconds a request waits for a worker when none is up, say during a restart.")
    ] = 20.0
    max_attempts: Annotated[Positive, Meta(description="Tries of one request when workers die under it.")] = 4


class HealthConfig(Section, frozen=True):
    heartbeat_s: Annotated[PositiveSeconds, Meta(description="Seconds between heartbeats of workers and routers.")] = 0.2
    silent_s: Annotated[
        PositiveSeconds, Meta(description="Seconds of silence after which a living worker process is taken out.")
    ] = 5.0
    restart: Annotated[bool, Meta(description="Restart dead or wedged workers through Triton's model control.")] = True


class SecurityConfig(Section, frozen=True):
    key_file: Annotated[
        str, Meta(description="File with the key that signs work and tickets. Empty: one is made for this server, mode 0600.")
    ] = ""


class Deployment(Section, frozen=True, kw_only=True):
    """One deployment file."""

    model: ModelConfig = ModelConfig()
    workers: Annotated[tuple[WorkerConfig, ...], Meta(min_length=1)]
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    store: StoreConfig = StoreConfig()
    router: RouterConfig = RouterConfig()
    health: HealthConfig = HealthConfig()
    security: SecurityConfig = SecurityConfig()

    def worker(self, name: str) -> WorkerConfig:
        for worker in self.workers:
            if worker.name == name:
                return worker
        known = ", ".join(worker.name for worker in self.workers)
        raise ConfigError(f"workers: the deployment has no worker {name!r} (it has {known}); load only these models")


def load_deployment(path: Path) -> Deployment:
    """Read and validate a deployment file. Raises ConfigError that names file, key and fix."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give an existing file, such as configs/default.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        deployment = msgspec.convert(raw, Deployment)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}; docs/configuration.md lists the keys") from error
    return _checked(_named(deployment), path)


def _named(deployment: Deployment) -> Deployment:
    """Fill in the workers' default names: role, role_1, role_2 ..."""
    seen: Counter[Role] = Counter()
    workers = []
    for worker in deployment.workers:
        count = seen[worker.role]
        seen[worker.role] += 1
        default = worker.role.value if count == 0 else f"{worker.role.value}_{count}"
        workers.append(msgspec.structs.replace(worker, name=worker.name or default))
    return msgspec.structs.replace(deployment, workers=tuple(workers))


def _checked(deployment: Deployment, path: Path) -> Deployment:
    names = Counter(worker.name for worker in deployment.workers)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: workers: the name {twice[0]!r} is given twice; names are Triton model names")
    if "router" in names:
        raise ConfigError(f"{path}: workers: the name 'router' belongs to the router; choose another")
    roles = {worker.role for worker in deployment.workers}
    if not roles & {Role.DECODE, Role.AGGREGATED}:
        raise ConfigError(f"{path}: workers: nobody can decode; add a worker with role decode or aggregated")
    if Role.DECODE not in roles and Role.PREFILL in roles:
        raise ConfigError(f"{path}: workers: prefill workers need a decode worker to hand over to; add one with role decode")
    for worker in deployment.workers:
        parse_cpus(worker.cpus, f"{path}: workers: {worker.name}: cpus")
    return deployment


def parse_cpus(text: str, where: str = "cpus") -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8]; empty -> []. Raises ConfigError."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if first > last:
            raise ConfigError(f"{where}: {text!r} is not a list of cores such as 0-3,8")
        cpus.update(range(first, last + 1))
    return sorted(cpus)
