"""The section `engine.trtllm` of the deployment file, and what must hold in a deployment with that engine.

Keys that TensorRT-LLM knows have its names and are passed on; a key that is not here is refused. Nothing here imports
TensorRT-LLM or looks at a model: a wrong file is refused within milliseconds and not after minutes of loading.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from python_backends.core.errors import ConfigError
from python_backends.core.section import Fraction, NonNegative, Positive, PositiveSeconds, Section
from python_backends.core.types import Role

if TYPE_CHECKING:
    from python_backends.core.config import Deployment, WorkerConfig

ENGINE = "trtllm"

_BACKENDS = ("UCX", "NIXL", "MOONCAKE")

DEFAULT_MAX_NUM_TOKENS = 8192  # TensorRT-LLM's own

_ENVIRONMENT = frozenset(  # what NVIDIA documents for disaggregated serving; CUDA_VISIBLE_DEVICES is `gpus`
    {
        "NCCL_GRAPH_MIXING_SUPPORT",
        "OMPI_MCA_btl",
        "OMPI_MCA_pml",
        "TLLM_LOG_LEVEL",
        "TLLM_WORKER_USE_SINGLE_PROCESS",
        "TRTLLM_DISABLE_KV_CACHE_TRANSFER_OVERLAP",
        "TRTLLM_DISAGG_ENABLE_INFLIGHT_CANCEL",
        "TRTLLM_ENABLE_KVCACHE_RECEIVE_PARALLEL",
        "TRTLLM_KVCACHE_SEND_MAX_CONCURRENCY_NUM",
        "TRTLLM_KVCACHE_TIME_OUTPUT_PATH",
        "TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE",
        "TRTLLM_KVCACHE_TRANSFER_USE_ASYNC_BUFFER",
        "TRTLLM_NIXL_KVCACHE_BACKEND",
        "TRTLLM_REQUEST_KV_CACHE_CONCURRENT",
        "TRTLLM_TRY_ZCOPY_FOR_KVCACHE_TRANSFER",
        "TRTLLM_UCX_INTERFACE",
        "UCX_CUDA_IPC_ENABLE_MNNVL",
        "UCX_MAX_RNDV_RAILS",
        "UCX_MM_ERROR_HANDLING",
        "UCX_NET_DEVICES",
        "UCX_RNDV_SCHEME",
        "UCX_TLS",
    }
)


class KvCacheConfig(Section, frozen=True):
    free_gpu_memory_fraction: Annotated[
        Fraction, Meta(description="Share of the GPU memory left after weights that the KV cache takes; not with max_tokens.")
    ] = 0.85
    max_tokens: Annotated[
        NonNegative, Meta(description="Tokens in the KV cache. 0: by memory fraction. Needed when workers share a GPU.")
    ] = 0
    dtype: Annotated[
        Literal["auto", "fp8"],
        Meta(description="Type of the KV: auto is the checkpoint's own. The same for prefill and decode."),
    ] = "auto"
    tokens_per_block: Annotated[
        NonNegative, Meta(description="Must equal engine.block_size, by which the router hashes prefixes. 0: that value.")
    ] = 0
    enable_block_reuse: Annotated[bool, Meta(description="Prefix cache of the worker.")] = True
    enable_partial_reuse: Annotated[bool, Meta(description="Reuse of partly matching blocks.")] = False
    event_buffer_max_size: Annotated[
        NonNegative, Meta(description="Events of the prefix cache kept until read. 0: none, and the router routes blindly.")
    ] = 16384


class CacheTransceiverConfig(Section, frozen=True):
    backend: Annotated[
        str, Meta(description="How TensorRT-LLM moves KV: UCX, NIXL or MOONCAKE. No default: what `DEFAULT` means has changed.")
    ] = ""
    max_tokens_in_buffer: Annotated[
        NonNegative, Meta(description="Staging buffer, tokens; at least the longest prompt. 0: model.max_context.")
    ] = 0
    kv_transfer_timeout_ms: Annotated[
        NonNegative,
        Meta(description="Milliseconds after which KV that nobody fetched is dropped. 0: transfer.lease_s. Always set."),
    ] = 0
    kv_transfer_sender_future_timeout_ms: Annotated[
        NonNegative, Meta(description="Milliseconds an idle prefill worker waits for a sender. 0: TensorRT-LLM's default.")
    ] = 0


class CudaGraphConfig(Section, frozen=True):
    enable_padding: Annotated[bool, Meta(description="Pad batches up to the next captured size.")] = True


class LlmConfig(Section, frozen=True):
    """Arguments of `tensorrt_llm.LLM` for the workers of one role."""

    tensor_parallel_size: Annotated[Positive, Meta(description="GPUs that share each layer of one worker.")] = 1
    pipeline_parallel_size: Annotated[
        Positive, Meta(description="Groups of GPUs that share the layers. Times tensor_parallel_size: as many as `gpus`.")
    ] = 1
    max_batch_size: Annotated[NonNegative, Meta(description="Requests computed at once. 0: engine.max_batch.")] = 0
    max_num_tokens: Annotated[NonNegative, Meta(description="Tokens per iteration. 0: TensorRT-LLM's default.")] = 0
    enable_chunked_prefill: Annotated[
        bool, Meta(description="Compute prompts longer than max_num_tokens in pieces; decode workers need it to recompute.")
    ] = True
    disable_overlap_scheduler: Annotated[
        bool | None, Meta(description="null: true for prefill, where TensorRT-LLM 1.x needs it; false elsewhere.")
    ] = None
    stream_interval: Annotated[Positive, Meta(description="Tokens per delivery of a stream; more saves host CPU.")] = 1
    cuda_graph_config: CudaGraphConfig | None = None
    speculative_config: Annotated[
        dict[str, Any] | None,
        Meta(description="Speculative decoding, passed on as it is: `decoding_type` and the keys of that method."),
    ] = None
    kv_cache_config: KvCacheConfig = KvCacheConfig()

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


class TrtllmConfig(Section, frozen=True):
    prefill: LlmConfig = LlmConfig()
    decode: LlmConfig = LlmConfig()
    aggregated: LlmConfig = LlmConfig()
    cache_transceiver_config: CacheTransceiverConfig = CacheTransceiverConfig()
    environment: Annotated[
        dict[str, str], Meta(description="Environment of the workers, by the names NVIDIA documents (UCX_*, TRTLLM_*, ...).")
    ] = msgspec.field(default_factory=dict)
    max_handoffs: Annotated[
        Positive, Meta(description="Prompts whose KV one prefill worker may hold for decode workers; further ones wait.")
    ] = 32
    first_output_s: Annotated[
        PositiveSeconds, Meta(description="Seconds to the first output of KV handed over; then the prompt is recomputed.")
    ] = 5.0
    stall_s: Annotated[
        PositiveSeconds, Meta(description="Seconds without any token while streams run, after which the worker is restarted.")
    ] = 10.0
    prompt_stall_s: Annotated[
        PositiveSeconds, Meta(description="The same while only prompts are computed: longer than the longest prompt takes.")
    ] = 60.0
    load_timeout_s: Annotated[PositiveSeconds, Meta(description="Seconds that loading the model may take.")] = 1800.0

    def of(self, role: Role) -> LlmConfig:
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.AGGREGATED: self.aggregated}[role]


def kv_timeout_ms(deployment: Deployment) -> int:
    """Milliseconds after which TensorRT-LLM drops KV that nobody fetched."""
    given = deployment.engine.trtllm.cache_transceiver_config.kv_transfer_timeout_ms
    return given or round(deployment.transfer.lease_s * 1000)


def check_trtllm(deployment: Deployment) -> None:
    """Raises ConfigError that names the key and the fix when the engine trtllm can't work as configured."""
    workers = [worker for worker in deployment.workers if worker.engine == ENGINE]
    for problem in _gpu_problems(deployment, workers):
        raise ConfigError(problem)
    if not workers:
        return
    for problem in (*_worker_problems(deployment, workers), *_deployment_problems(deployment, workers)):
        raise ConfigError(problem)


Problems = Iterator[str]


def _gpu_problems(deployment: Deployment, workers: Sequence[WorkerConfig]) -> Problems:
    users: dict[str, list[WorkerConfig]] = defaultdict(list)
    for worker in deployment.workers:
        if worker.gpus and worker.engine != ENGINE:
            yield f"workers: {worker.name}: gpus is for engine trtllm; engine {worker.engine} takes device: cuda:N"
    for worker in workers:
        where, gpus = f"workers: {worker.name}", worker.gpus.split(",") if worker.gpus else []
        llm = deployment.engine.trtllm.of(worker.role)
        if not gpus:
            yield f'{where}: gpus is missing; name the GPUs that this worker may use, such as gpus: "0"'
        if len(set(gpus)) < len(gpus):
            yield f"{where}: gpus {worker.gpus!r} names a GPU twice"
        if len(gpus) != llm.num_gpus:
            stages = f" and pipeline_parallel_size {llm.pipeline_parallel_size}" if llm.pipeline_parallel_size > 1 else ""
            yield (
                f"{where}: gpus {worker.gpus!r} are {len(gpus)}, but engine.trtllm.{worker.role.value}.tensor_parallel_size "
                f"is {llm.tensor_parallel_size}{stages}; give {llm.num_gpus}"
            )
        for gpu in gpus:
            users[gpu].append(worker)
    for gpu, sharing in users.items():
        unbounded = [w for w in sharing if not deployment.engine.trtllm.of(w.role).kv_cache_config.max_tokens]
        if len(sharing) > 1 and unbounded:
            names, role = " and ".join(worker.name for worker in sharing), unbounded[0].role.value
            yield (
                f"workers: {names} share GPU {gpu}; set engine.trtllm.{role}.kv_cache_config.max_tokens, "
                "since what a memory fraction means depends on which of them loads first"
            )


def _worker_problems(deployment: Deployment, workers: Sequence[WorkerConfig]) -> Problems:
    for worker in workers:
        unused = {
            "device": worker.device != "cpu",
            "cpus": worker.cpus,
            "threads": worker.threads,
            "weights": worker.weights,
        }
        for key in (*filter(unused.get, unused), *(["kv_pool_mib"] if worker.kv_pool_mib else [])):
            yield f"workers: {worker.name}: {key} has no meaning with engine trtllm; its GPUs are named by gpus"
    for role in sorted({worker.role for worker in workers}):
        yield from _llm_problems(deployment, role, f"engine.trtllm.{role.value}")


def _llm_problems(deployment: Deployment, role: Role, where: str) -> Problems:
    llm, longest, block = deployment.engine.trtllm.of(role), deployment.model.max_context, deployment.engine.block_size
    cache = llm.kv_cache_config
    if role is Role.PREFILL and llm.disable_overlap_scheduler is False:
        yield f"{where}.disable_overlap_scheduler: prefill workers of TensorRT-LLM 1.x need true; leave the key out"
    if cache.tokens_per_block not in (0, block):
        yield (
            f"{where}.kv_cache_config.tokens_per_block is {cache.tokens_per_block}, but engine.block_size is {block}; "
            "they must be equal: the router hashes prefixes by it. Set engine.block_size and leave tokens_per_block out"
        )
    budget = llm.max_num_tokens or DEFAULT_MAX_NUM_TOKENS
    if not llm.enable_chunked_prefill and budget < longest:
        yield (
            f"{where}.max_num_tokens is {budget}, below model.max_context {longest}, and enable_chunked_prefill "
            "is false: longer prompts could not be computed; raise it or enable chunked prefill"
        )
    if llm.speculative_config is not None and not llm.speculative_config.get("decoding_type"):
        yield f"{where}.speculative_config: decoding_type is missing; it names the method, such as MTP or Eagle"
    if cache.max_tokens and cache.max_tokens < longest:
        yield (
            f"{where}.kv_cache_config.max_tokens is {cache.max_tokens}, below model.max_context {longest}: one long request "
            "would not fit; raise it or lower model.max_context"
        )


def _deployment_problems(deployment: Deployment, workers: Sequence[WorkerConfig]) -> Problems:
    if not deployment.model.max_context:
        yield "model.max_context is 0; engine trtllm allocates by it: give the longest prompt and output together, in tokens"
    if deployment.model.weights != "auto":
        yield "model.weights is for the CPU; with engine trtllm a quantised checkpoint says itself what it is: leave it out"
    if deployment.model.kv_dtype != "auto":
        yield "model.kv_dtype is for the CPU; engine trtllm has kv_cache_config.dtype: leave it out"
    if deployment.transfer.faults:
        yield "transfer.faults spoil Baton's own transports; engine trtllm moves KV itself: leave them out"
    yield from _environment_problems(deployment.engine.trtllm.environment)
    handing = [worker for worker in deployment.workers if worker.role is not Role.AGGREGATED]
    engines = {worker.engine for worker in handing}
    if Counter(worker.role for worker in handing)[Role.PREFILL] and len(engines) > 1:
        yield f"workers: prefill and decode workers have engines {', '.join(sorted(engines))}; KV moves within one engine only"
    cluster = deployment.cluster
    elsewhere = bool(cluster.listen or cluster.pools or cluster.registry)  # there may be prefill workers on other servers
    if any(worker.role is Role.PREFILL or (elsewhere and worker.role is Role.DECODE) for worker in workers):
        yield from _transceiver_problems(deployment)
        yield from _unlike_kv(deployment)


def _transceiver_problems(deployment: Deployment) -> Problems:
    where, config = "engine.trtllm.cache_transceiver_config", deployment.engine.trtllm.cache_transceiver_config
    longest, lease_ms, first_ms = (
        deployment.model.max_context,
        deployment.transfer.lease_s * 1000,
        deployment.engine.trtllm.first_output_s * 1000,
    )
    if not config.backend:
        yield f"{where}.backend is missing: without it no KV moves; say UCX, which the container has, or NIXL"
    elif config.backend.upper() != config.backend and config.backend.upper() in _BACKENDS:
        yield f"{where}.backend is {config.backend!r}; write {config.backend.upper()}: TensorRT-LLM refuses lower case"
    elif config.backend == "DEFAULT":
        yield f"{where}.backend is DEFAULT, which means another library in each release; say UCX or NIXL"
    elif config.backend == "MPI":
        yield f"{where}.backend is MPI, which needs one MPI world; Triton's models are separate processes: say UCX or NIXL"
    elif config.backend not in _BACKENDS:
        yield f"{where}.backend is {config.backend!r}; known are {', '.join(_BACKENDS)}"
    if config.max_tokens_in_buffer and config.max_tokens_in_buffer < longest:
        yield (
            f"{where}.max_tokens_in_buffer is {config.max_tokens_in_buffer}, below the longest prompt "
            f"(model.max_context {longest}); raise it or leave it out"
        )
    timeout_ms = kv_timeout_ms(deployment)
    if timeout_ms < lease_ms:
        yield (
            f"{where}.kv_transfer_timeout_ms is {timeout_ms}, below transfer.lease_s ({lease_ms:.0f} ms): KV would be dropped "
            "while its ticket is good; raise it or leave it out"
        )
    if first_ms > timeout_ms:
        yield (
            f"engine.trtllm.first_output_s is {first_ms / 1000:g}: KV is dropped after {timeout_ms / 1000:g} s "
            "(kv_transfer_timeout_ms or transfer.lease_s), so waiting longer is in vain; lower it"
        )


def _unlike_kv(deployment: Deployment) -> Problems:
    theirs, ours = (deployment.engine.trtllm.of(role).kv_cache_config.dtype for role in (Role.PREFILL, Role.DECODE))
    if theirs != ours:
        yield (
            f"engine.trtllm.decode.kv_cache_config.dtype is {ours}, but that of prefill is {theirs}: KV of one type can't be "
            "read as the other; give both the same"
        )


def _environment_problems(environment: Mapping[str, str]) -> Problems:
    for name, value in environment.items():
        if name in ("CUDA_VISIBLE_DEVICES", "TRTLLM_VISIBLE_DEVICES"):
            yield f"engine.trtllm.environment: {name} is set from the worker's gpus; name them there"
        elif name not in _ENVIRONMENT:
            yield f"engine.trtllm.environment: {name} is not known; known are {', '.join(sorted(_ENVIRONMENT))}"
        elif name == "UCX_TLS" and lists_tcp(value):
            yield (
                f"engine.trtllm.environment: UCX_TLS {value!r} lists tcp: UCX then takes GPU memory for host memory; "
                "leave tcp out, or exclude others with ^"
            )


def lists_tcp(ucx_tls: str) -> bool:
    """Whether a UCX_TLS asks for the tcp transport by name."""
    return not ucx_tls.startswith("^") and "tcp" in ucx_tls.split(",")
