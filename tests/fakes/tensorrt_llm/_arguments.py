"""Arguments of LLM: strict, as the real pydantic models are. An unknown key or a wrong backend raises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ._knobs import release

T = TypeVar("T")


@dataclass(kw_only=True)
class KvCacheConfig:
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = 0.9
    event_buffer_max_size: int = 0
    tokens_per_block: int = 32
    dtype: str = "auto"


@dataclass(kw_only=True)
class CacheTransceiverConfig:
    backend: str | None = None
    max_tokens_in_buffer: int | None = None
    kv_transfer_timeout_ms: int | None = None if release() < (1, 3) else 60_000
    kv_transfer_sender_future_timeout_ms: int = 1000
    transceiver_runtime: str = "CPP"


@dataclass(kw_only=True)
class CudaGraphConfig:
    enable_padding: bool = False


@dataclass(kw_only=True)
class DecodingConfig:
    """Of speculative decoding. Each method has a class of its own in the real one; here the keys that they have in common."""

    decoding_type: str
    max_draft_len: int | None = None
    num_nextn_predict_layers: int | None = None  # of MTP
    max_matching_ngram_size: int | None = None  # of NGram
    speculative_model_dir: str | None = None

    @property
    def drafts(self) -> int:
        """Tokens that may be accepted at once beside the one that is computed."""
        return self.max_draft_len or self.num_nextn_predict_layers or 1

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> DecodingConfig:
        if given.get("decoding_type") not in ("MTP", "Eagle", "NGram", "DraftTarget"):
            raise ValueError(f"Invalid decoding type: {given.get('decoding_type')}")
        return _build(cls, given, "speculative_config", set())


@dataclass(kw_only=True)
class LlmArgs:
    model: str
    backend: str = "pytorch"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    disable_overlap_scheduler: bool = False
    enable_chunked_prefill: bool = False
    max_batch_size: int = 2048
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    stream_interval: int = 1
    enable_iter_perf_stats: bool = False
    cuda_graph_config: CudaGraphConfig | None = field(default_factory=CudaGraphConfig)
    kv_cache_config: KvCacheConfig = field(default_factory=KvCacheConfig)
    cache_transceiver_config: CacheTransceiverConfig | None = None
    speculative_config: DecodingConfig | None = None


def parse(arguments: Mapping[str, Any]) -> LlmArgs:
    """Raises ValueError for what the release would not take."""
    given = dict(arguments)
    for name, kind in (
        ("kv_cache_config", KvCacheConfig),
        ("cache_transceiver_config", CacheTransceiverConfig),
        ("cuda_graph_config", CudaGraphConfig),
    ):
        if isinstance(given.get(name), Mapping):
            given[name] = _build(kind, given[name], name, _absent(name))
    given["speculative_config"] = _speculative(given.get("speculative_config"))
    args = _build(LlmArgs, given, "LLM", set())
    if args.backend != "pytorch":
        raise ValueError(f"backend {args.backend!r} is not played here")
    transceiver = args.cache_transceiver_config
    if transceiver is not None and transceiver.backend not in (None, *_backends()):
        raise ValueError(f"cache_transceiver_config.backend: Input should be {_backends()}, got {transceiver.backend!r}")
    if transceiver is not None and transceiver.kv_transfer_timeout_ms is not None and transceiver.kv_transfer_timeout_ms <= 0:
        raise ValueError("cache_transceiver_config.kv_transfer_timeout_ms: Input should be greater than 0")
    return args


def _speculative(given: Any) -> DecodingConfig | None:
    """Up to 1.2 the method is the object's class, and no key."""
    if isinstance(given, Mapping):
        if release() < (1, 3):
            raise ValueError("speculative_config.decoding_type: Extra inputs are not permitted")
        return DecodingConfig.from_dict(given)
    assert given is None or isinstance(given, DecodingConfig)
    return given


def _build(kind: type[T], given: Mapping[str, Any], where: str, absent: set[str]) -> T:
    known = {entry.name for entry in fields(kind)} - absent  # type: ignore[arg-type]
    extra = given.keys() - known
    if extra:
        raise ValueError(f"{where}.{min(extra)}: Extra inputs are not permitted")
    return kind(**given)


def _absent(section: str) -> set[str]:
    """Keys that the release played doesn't have yet."""
    if section != "cache_transceiver_config":
        return set()
    absent = {"transceiver_runtime"} if release() < (1, 3) else set()
    return absent | ({"kv_transfer_sender_future_timeout_ms"} if release() < (1, 2) else set())


def _backends() -> tuple[str, ...]:
    return ("DEFAULT", "UCX", "NIXL", "MPI") if release() < (1, 2) else ("DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI")
