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
from python_backends.core.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveSeconds, Section
from python_backends.core.trtllm import ENGINE as TRTLLM
from python_backends.core.trtllm import TrtllmConfig, check_trtllm
from python_backends.core.types import Role, WorkerId

Port = Annotated[int, Meta(ge=1, le=65535)]


class ModelConfig(Section, frozen=True):
    path: Annotated[
        str, Meta(description="A Hugging Face model directory, or `smollm2-135m-instruct`: the weights that `make` fetches.")
    ] = "smollm2-135m-instruct"
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Meta(description="Of weights, arithmetic and KV cache.")] = (
        "float32"
    )
    weights: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"],
        Meta(
            description="CPU: how weights are kept; arithmetic stays float32. auto: as in the checkpoint, which changes no "
            "result. int8 and int4 are made from it, with a scale per 32 weights."
        ),
    ] = "auto"
    kv_dtype: Annotated[
        Literal["auto", "float32", "float16", "int8"],
        Meta(description="CPU: how the KV cache is kept. auto: as `model.dtype`. int8 has a scale per token and head."),
    ] = "auto"
    mixed_weights: Annotated[
        bool,
        Meta(description="Let workers whose `weights` differ exchange KV. Text then depends on where the prompt was computed."),
    ] = False
    max_context: Annotated[
        NonNegative, Meta(description="Tokens of prompt and output together; 0: what model and KV pool allow.")
    ] = 0


class WorkerConfig(Section, frozen=True):
    role: Annotated[Role, Meta(description="prefill, decode, or aggregated (both in one engine).")]
    name: Annotated[
        str, Meta(description="Triton model name. Default: the role, then role_1, role_2 ...", pattern="^([a-z][a-z0-9_]*)?$")
    ] = ""
    engine: Annotated[
        str, Meta(description="torch, trtllm (TensorRT-LLM), or fake (no weights, for load and failure tests).")
    ] = "torch"
    device: Annotated[str, Meta(description="engine torch: cpu, cuda, or cuda:N.", pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    gpus: Annotated[
        str, Meta(description="engine trtllm: the GPUs this worker sees, such as `0` or `0,1`.", pattern=r"^(\d+(,\d+)*)?$")
    ] = ""
    cpus: Annotated[
        str, Meta(description="CPU cores the worker is pinned to, such as `0-3,8`. Empty: not pinned.", pattern=r"^[\d,-]*$")
    ] = ""
    threads: Annotated[
        NonNegative, Meta(description="Compute threads. 0: the pinned cores, else an even share of the machine's.")
    ] = 0
    weights: Annotated[
        Literal["", "auto", "float32", "bfloat16", "float16", "int8", "int4"],
        Meta(description="As `model.weights`, for this worker. Empty: that."),
    ] = ""
    kv_pool_mib: Annotated[NonNegative, Meta(description="KV pool of this worker, MiB. 0: `engine.kv_pool_mib`.")] = 0

    @property
    def id(self) -> WorkerId:
        return WorkerId(self.name)


class FakeConfig(Section, frozen=True):
    prefill_us_per_token: Annotated[NonNegative, Meta(description="engine fake: microseconds slept per prompt token.")] = 200
    step_us: Annotated[NonNegative, Meta(description="engine fake: microseconds slept per step.")] = 5000
    hang_dir: Annotated[
        str,
        Meta(
            description="engine fake, failure tests only: directory; a worker computes nothing while the number of its process "
            "is the name of a file there. Empty: none."
        ),
    ] = ""


class EngineConfig(Section, frozen=True):
    block_size: Annotated[Positive, Meta(description="Tokens per KV block.")] = 16
    kv_pool_mib: Annotated[Positive, Meta(description="KV pool of each worker, MiB.")] = 512
    max_batch: Annotated[Positive, Meta(description="Requests computed in one step.")] = 64
    step_tokens: Annotated[
        Positive, Meta(description="Tokens computed in one step: the chunk of a long prompt, shared with running streams.")
    ] = 256
    draft_tokens: Annotated[
        NonNegative,
        Meta(
            description="Tokens that a stream may guess ahead from its own text (prompt lookup), where that pays. Changes no "
            "text. 0: none."
        ),
    ] = 4
    kernels: Annotated[
        Literal["auto", "compiled", "torch"],
        Meta(
            description="CPU: who computes the model. auto: compiled kernels where processor and model allow, else PyTorch's "
            "own operators; compiled: an error where they can't."
        ),
    ] = "auto"
    elastic_cores: Annotated[
        bool,
        Meta(
            description="CPU, compiled kernels: a worker with nothing to compute lends its cores to others of this host, and "
            "has them back within one layer of their model. Workers with `cpus` or `threads` keep to those."
        ),
    ] = True
    max_queue: Annotated[Positive, Meta(description="Requests that may wait in one worker; more are refused.")] = 1024
    fake: FakeConfig = FakeConfig()
    trtllm: TrtllmConfig = TrtllmConfig()


class TransferConfig(Section, frozen=True):
    transport: Annotated[
        Literal["auto", "shm", "tcp", "nixl", "cuda_ipc", "inline"],
        Meta(
            description="How KV moves: shm (shared memory, same host), tcp (any host), nixl (RDMA and other fabrics; needs "
            "requirements-nixl.txt), cuda_ipc (between GPUs of one host), inline (in the ticket; tests and tiny prompts), or "
            "auto: the best that a pair of workers has in common."
        ),
    ] = "auto"
    listen: Annotated[
        str,
        Meta(
            description="tcp, nixl: address to listen at for other hosts; 0.0.0.0 is every interface, which others are told "
            "of as `cluster.advertise` or the address of this host's name. Empty: `cluster.listen`; where that is empty, too, "
            "127.0.0.1, and with auto none."
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
    codec: Annotated[
        Literal["auto", "raw", "lossless"],
        Meta(
            description="tcp: how KV travels: raw (as it lies in the pool), lossless (the numbers' highest bytes compressed: "
            "fewer bytes, more work), or auto: whichever is fastest over the measured link, what `transfer.rounding` allows "
            "included."
        ),
    ] = "auto"
    rounding: Annotated[
        Literal["none", "float16", "int8"],
        Meta(
            description="How far KV may be rounded on its way: none (it arrives bit for bit), float16 or int8. It lets codec "
            "auto round by tcp where that saves a fifth of the time, and workers of different `model.kv_dtype` hand over to "
            "each other. Texts then may differ from those without a handoff: measure it first (docs/transports.md)."
        ),
    ] = "none"
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
    ] = msgspec.field(default_factory=dict)


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


class SloConfig(Section, frozen=True):
    ttft_ms: Annotated[
        NonNegativeFloat,
        Meta(
            description="Time to first token aimed at, ms. Requests that would wait too long for it are refused. 0: no target."
        ),
    ] = 0.0
    itl_ms: Annotated[
        NonNegativeFloat,
        Meta(
            description="Time between two tokens of a running stream aimed at, ms. Paged engines compute as much of prompts "
            "beside streams as leaves that time, and streams that are faster give way to long prompts of other workers on the "
            "same cores. 0: no target."
        ),
    ] = 0.0


class RouterConfig(Section, frozen=True):
    mode: Annotated[
        Literal["adaptive", "always-remote", "always-local", "always-aggregated"],
        Meta(description="Route of requests that ask for none: adaptive predicts and decides for each; the others force one."),
    ] = "adaptive"
    slo: SloConfig = SloConfig()
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
    stream_interval_ms: Annotated[
        NonNegative,
        Meta(
            description="Responses of one gRPC or generate_stream request are at least so far apart and carry what has come "
            "meanwhile; the first is never held back. 0: as fast as the server takes them."
        ),
    ] = 0
    max_attempts: Annotated[
        Positive, Meta(description="Tries of one request that fail in a row; tokens that come in between begin a new row.")
    ] = 4
    max_worker_deaths: Annotated[
        Positive,
        Meta(
            description="Workers that may die in a row under one request before it is failed, and its prompt refused for five "
            "minutes. The last of them computes no other suspect besides."
        ),
    ] = 3


class HealthConfig(Section, frozen=True):
    heartbeat_s: Annotated[
        PositiveSeconds,
        Meta(description="Seconds between heartbeats of workers and routers; while nothing happens five times as long."),
    ] = 0.2
    silent_s: Annotated[
        PositiveSeconds, Meta(description="Seconds of silence after which a living worker process is taken out.")
    ] = 5.0
    canary_s: Annotated[
        NonNegativeFloat,
        Meta(
            description="Seconds between canaries: requests of the router's own to each worker. A worker that fails two in a "
            "row is given no work until it passes one. Half as far apart again while it has no requests. 0: none."
        ),
    ] = 2.0
    canary_timeout_s: Annotated[
        PositiveSeconds, Meta(description="Seconds in which a canary must pass, unless the worker works for others meanwhile.")
    ] = 3.0
    restart: Annotated[bool, Meta(description="Restart dead or wedged workers through Triton's model control.")] = True


TritonApi = Literal[
    "health", "metadata", "inference", "shared-memory", "model-config", "model-repository", "statistics", "trace", "logging"
]
"""As tritonserver's --http-restricted-api and --grpc-restricted-protocol name them."""


class SecurityConfig(Section, frozen=True):
    key_file: Annotated[
        str, Meta(description="File with the key that signs work and tickets. Empty: one is made for this server, mode 0600.")
    ] = ""
    restricted_apis: Annotated[
        tuple[TritonApi, ...],
        Meta(description="APIs of Triton that only this deployment itself may call, over HTTP and gRPC (docs/security.md)."),
    ] = ("model-repository", "shared-memory", "trace", "logging")


class HttpConfig(Section, frozen=True):
    """The OpenAI-compatible front end, a process (or several) beside the server."""

    enabled: Annotated[bool, Meta(description="Start the OpenAI-compatible front end with the server.")] = True
    processes: Annotated[Positive, Meta(description="Processes that share its port.")] = 1
    model_name: Annotated[str, Meta(description="Name of the model in the API. Empty: the last part of `model.path`.")] = ""
    api_keys_file: Annotated[
        str, Meta(description="File with one accepted API key per line; others are refused. Empty: none is asked for.")
    ] = ""
    cors_origins: Annotated[
        tuple[str, ...], Meta(description="Origins whose pages may call the API from a browser; `*` is all.")
    ] = ()
    tenant: Annotated[
        Literal["none", "user", "api_key"],
        Meta(description="What keeps prefix caches apart: nothing, the request's `user`, or its API key."),
    ] = "none"
    max_body_bytes: Annotated[Positive, Meta(description="Largest request body accepted, bytes.")] = 4_000_000


class PoolConfig(Section, frozen=True):
    """Workers on other servers."""

    hosts: Annotated[
        tuple[str, ...], Meta(description="Names or addresses of servers with workers for this one's router.")
    ] = ()
    dns: Annotated[
        str, Meta(description="A name whose addresses are such servers, such as a headless service; looked up again and again.")
    ] = ""
    channel_ports: Annotated[
        tuple[Port, ...], Meta(description="Ports of the workers' channels on each of them.", min_length=1)
    ] = (7000,)


class ClusterConfig(Section, frozen=True):
    """Several servers as one deployment. They need one `security.key_file`; nothing of this is needed on one host."""

    router: Annotated[bool, Meta(description="Whether this server has a router (and front end), or only workers.")] = True
    listen: Annotated[
        str, Meta(description="Interface where this server's workers listen for routers of other hosts. Empty: this host only.")
    ] = ""
    channel_port: Annotated[Port, Meta(description="Channel of the first worker; the others follow.")] = 7000
    advertise: Annotated[
        str, Meta(description="How other hosts reach this server. Empty: the address of this host's name.")
    ] = ""
    grpc_port: Annotated[Port, Meta(description="Port of Triton's gRPC service, as other hosts reach it.")] = 8001
    pools: Annotated[tuple[PoolConfig, ...], Meta(description="Where the router finds workers of other servers.")] = ()
    registry: Annotated[
        str, Meta(description="URL of a Redis where workers register and routers find them, such as redis://cache:6379.")
    ] = ""
    registry_password_file: Annotated[
        str, Meta(description="File with its password; the user is named in the URL, as redis://USER@cache:6379. Empty: none.")
    ] = ""
    tls_ca: Annotated[
        str,
        Meta(description="Certificate authority of the servers' gRPC and a rediss:// registry (PEM). Empty: no TLS for gRPC."),
    ] = ""
    tls_certificate: Annotated[
        str, Meta(description="What this server shows to servers and a registry that ask for a certificate (PEM).")
    ] = ""
    tls_key: Annotated[str, Meta(description="Its key (PEM).")] = ""
    grpc_certificate: Annotated[
        str,
        Meta(
            description="Certificate of this server's gRPC, for the host in `advertise` (PEM). `scripts/serve` then has it "
            "speak TLS, to routers and to clients. Empty: in the clear."
        ),
    ] = ""
    grpc_key: Annotated[str, Meta(description="Its key (PEM).")] = ""
    grpc_client_ca: Annotated[
        str, Meta(description="Who signed the certificates that callers of gRPC must show (PEM). Empty: none is asked for.")
    ] = ""


class TracingConfig(Section, frozen=True):
    """One OpenTelemetry trace per request. `scripts/trace` needs none of this: it reads the router's own memory."""

    otlp_endpoint: Annotated[
        str,
        Meta(
            description="Where traces are sent by OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`. Empty: nowhere.",
            pattern="^(https?://.+)?$",
        ),
    ] = ""
    sample: Annotated[
        Fraction, Meta(description="Share of requests that is exported; where the client sent a traceparent, it decides.")
    ] = 1.0
    service_name: Annotated[str, Meta(description="`service.name` of the traces.", min_length=1)] = "baton"


class Deployment(Section, frozen=True, kw_only=True):
    """One deployment file."""

    model: ModelConfig = ModelConfig()
    workers: tuple[WorkerConfig, ...]
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    store: StoreConfig = StoreConfig()
    router: RouterConfig = RouterConfig()
    health: HealthConfig = HealthConfig()
    security: SecurityConfig = SecurityConfig()
    http: HttpConfig = HttpConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracing: TracingConfig = TracingConfig()

    @property
    def has_front_end(self) -> bool:
        return self.http.enabled and self.cluster.router

    @property
    def model_name(self) -> str:
        """How clients of the API call the model."""
        return self.http.model_name or Path(self.model.path).name

    @property
    def load_timeout_s(self) -> float:
        """How long the workers' engines may say that they are still loading; 0 when none has such a limit."""
        uses_trtllm = any(worker.engine == TRTLLM for worker in self.workers)
        return self.engine.trtllm.load_timeout_s if uses_trtllm else 0.0

    def worker(self, name: str) -> WorkerConfig:
        for worker in self.workers:
            if worker.name == name:
                return worker
        known = ", ".join(worker.name for worker in self.workers)
        raise ConfigError(f"workers: the deployment has no worker {name!r} (it has {known}); load only these models")

    def with_worker(self, changed: WorkerConfig) -> Deployment:
        """The same, but for the worker of this name."""
        workers = tuple(changed if worker.name == changed.name else worker for worker in self.workers)
        return msgspec.structs.replace(self, workers=workers)


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
    _check_cluster(deployment, path)
    _check_transfer(deployment.transfer, path)
    roles = {worker.role for worker in deployment.workers}
    if deployment.cluster.pools or deployment.cluster.registry or not deployment.cluster.router:
        roles = set(Role)  # there are others elsewhere
    if not roles & {Role.DECODE, Role.AGGREGATED}:
        raise ConfigError(f"{path}: workers: nobody can decode; add a worker with role decode or aggregated")
    if Role.DECODE not in roles and Role.PREFILL in roles:
        raise ConfigError(f"{path}: workers: prefill workers need a decode worker to hand over to; add one with role decode")
    if deployment.http.tenant == "api_key" and not deployment.http.api_keys_file:
        raise ConfigError(f"{path}: http.tenant: api_key needs http.api_keys_file; without keys use user or none")
    kept = {worker.weights or deployment.model.weights for worker in deployment.workers}
    if len(kept) > 1 and not deployment.model.mixed_weights:
        raise ConfigError(
            f"{path}: workers: weights differ ({', '.join(sorted(kept))}); make them equal, or let these workers exchange KV "
            "with model.mixed_weights: true"
        )
    for worker in deployment.workers:
        parse_cpus(worker.cpus, f"{path}: workers: {worker.name}: cpus")
    try:
        check_trtllm(deployment)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return deployment


def _check_cluster(deployment: Deployment, path: Path) -> None:
    cluster = deployment.cluster
    away = bool(cluster.listen or cluster.pools or cluster.registry)
    if away and not deployment.security.key_file:
        raise ConfigError(f"{path}: security.key_file is needed by several servers: give all of them the same file")
    if not cluster.router and not cluster.listen:
        raise ConfigError(
            f"{path}: cluster.listen: a server without a router must listen for routers of others, say on 0.0.0.0"
        )
    if not deployment.workers and not (cluster.router and (cluster.pools or cluster.registry)):
        raise ConfigError(f"{path}: workers: there is none; only a server whose router has cluster.pools can do without")
    for index, pool in enumerate(cluster.pools):
        if bool(pool.hosts) == bool(pool.dns):
            raise ConfigError(f"{path}: cluster.pools[{index}]: give either hosts or dns")
    if bool(cluster.tls_certificate) != bool(cluster.tls_key) or (cluster.tls_key and not cluster.tls_ca):
        raise ConfigError(f"{path}: cluster.tls_certificate: give it together with tls_key and tls_ca")
    if bool(cluster.grpc_certificate) != bool(cluster.grpc_key) or (cluster.grpc_client_ca and not cluster.grpc_key):
        raise ConfigError(f"{path}: cluster.grpc_certificate: give it together with grpc_key; grpc_client_ca needs both")


def _check_transfer(transfer: TransferConfig, path: Path) -> None:
    """What a transport would not do is refused, lest somebody believes that it is done."""
    if transfer.codec == "lossless" and transfer.transport not in ("auto", "tcp"):
        raise ConfigError(
            f"{path}: transfer.codec: lossless is for transport tcp; {transfer.transport} moves KV as it lies in the pool: "
            "leave codec out, or set transfer.transport: tcp"
        )
    if transfer.rounding != "none" and transfer.transport == "cuda_ipc":
        raise ConfigError(
            f"{path}: transfer.rounding: {transfer.rounding} can't be done by transport cuda_ipc, which neither rounds nor "
            "converts KV: leave rounding out, or set transfer.transport: tcp"
        )


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
