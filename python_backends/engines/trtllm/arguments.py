"""The deployment file as arguments of `tensorrt_llm.LLM`. core/trtllm.py has checked it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from python_backends.core.config import Deployment, WorkerConfig
from python_backends.core.trtllm import KvCacheConfig, kv_timeout_ms
from python_backends.core.types import Role


def llm_arguments(deployment: Deployment, worker: WorkerConfig, model_dir: Path) -> dict[str, Any]:
    """Only keys that every supported release knows, unless the file asks for more. What is left out is NVIDIA's default."""
    config = deployment.engine.trtllm.of(worker.role)
    overlap_off = config.disable_overlap_scheduler
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "backend": "pytorch",
        "dtype": deployment.model.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "max_batch_size": max_batch(deployment, worker),
        "max_seq_len": deployment.model.max_context,
        "enable_chunked_prefill": config.enable_chunked_prefill,
        "disable_overlap_scheduler": worker.role is Role.PREFILL if overlap_off is None else overlap_off,
        "stream_interval": config.stream_interval,
        "enable_iter_perf_stats": True,  # they tell the size of the KV cache
        "kv_cache_config": _kv_cache(config.kv_cache_config, deployment.engine.block_size),
    }
    if config.max_num_tokens:
        arguments["max_num_tokens"] = config.max_num_tokens
    if config.cuda_graph_config is not None:
        arguments["cuda_graph_config"] = msgspec.to_builtins(config.cuda_graph_config)
    if config.speculative_config is not None:
        arguments["speculative_config"] = dict(config.speculative_config)
    if worker.role is not Role.AGGREGATED and deployment.engine.trtllm.cache_transceiver_config.backend:
        arguments["cache_transceiver_config"] = _transceiver(deployment)
    return arguments


def max_batch(deployment: Deployment, worker: WorkerConfig) -> int:
    return deployment.engine.trtllm.of(worker.role).max_batch_size or deployment.engine.max_batch


def _kv_cache(config: KvCacheConfig, block_size: int) -> dict[str, Any]:
    size = (
        {"max_tokens": config.max_tokens}
        if config.max_tokens
        else {"free_gpu_memory_fraction": config.free_gpu_memory_fraction}
    )
    return {
        **size,
        **({"dtype": config.dtype} if config.dtype != "auto" else {}),
        "tokens_per_block": block_size,
        "enable_block_reuse": config.enable_block_reuse,
        "enable_partial_reuse": config.enable_partial_reuse,
        "event_buffer_max_size": config.event_buffer_max_size,
    }


def _transceiver(deployment: Deployment) -> dict[str, Any]:
    config = deployment.engine.trtllm.cache_transceiver_config
    arguments: dict[str, Any] = {
        "backend": config.backend,
        "max_tokens_in_buffer": config.max_tokens_in_buffer or deployment.model.max_context,
        "kv_transfer_timeout_ms": kv_timeout_ms(deployment),
    }
    if config.kv_transfer_sender_future_timeout_ms:
        arguments["kv_transfer_sender_future_timeout_ms"] = config.kv_transfer_sender_future_timeout_ms
    return arguments
