from __future__ import annotations

import importlib
from pathlib import Path

import msgspec
import pytest

from python_backends.core.config import (
    Deployment,
    EngineConfig,
    ModelConfig,
    TransferConfig,
    WorkerConfig,
    load_deployment,
)
from python_backends.core.paths import repository_root
from python_backends.core.trtllm import CacheTransceiverConfig, CudaGraphConfig, KvCacheConfig, LlmConfig, TrtllmConfig
from python_backends.core.types import Role
from python_backends.engines.trtllm.arguments import llm_arguments
from python_backends.engines.trtllm.library import load_library
from tests.engines.trtllm.playing import RELEASES, playing

EXAMPLES = sorted((repository_root() / "configs").glob("trtllm-*.yaml"))

WORKERS = {role: WorkerConfig(role, role.value, "trtllm", gpus="0") for role in Role}
DEPLOYMENT = Deployment(
    model=ModelConfig("/models/llama", "bfloat16", max_context=8192),
    workers=tuple(WORKERS.values()),
    engine=EngineConfig(
        block_size=32, max_batch=48, trtllm=TrtllmConfig(cache_transceiver_config=CacheTransceiverConfig(backend="UCX"))
    ),
    transfer=TransferConfig(lease_s=7),
)


def with_decode(config: LlmConfig) -> Deployment:
    trtllm = msgspec.structs.replace(DEPLOYMENT.engine.trtllm, decode=config)
    return msgspec.structs.replace(DEPLOYMENT, engine=msgspec.structs.replace(DEPLOYMENT.engine, trtllm=trtllm))


def test_everything_that_a_short_file_means() -> None:
    assert llm_arguments(DEPLOYMENT, WORKERS[Role.PREFILL], Path("/models/llama")) == {
        "model": "/models/llama",
        "backend": "pytorch",
        "dtype": "bfloat16",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "max_batch_size": 48,
        "max_seq_len": 8192,
        "enable_chunked_prefill": True,
        "disable_overlap_scheduler": True,
        "stream_interval": 1,
        "enable_iter_perf_stats": True,
        "kv_cache_config": {
            "free_gpu_memory_fraction": 0.85,
            "tokens_per_block": 32,
            "enable_block_reuse": True,
            "enable_partial_reuse": False,
            "event_buffer_max_size": 16384,
        },
        "cache_transceiver_config": {"backend": "UCX", "max_tokens_in_buffer": 8192, "kv_transfer_timeout_ms": 7000},
    }


def test_overlap_is_off_for_prefill_only() -> None:
    off = {role: llm_arguments(DEPLOYMENT, WORKERS[role], Path("m"))["disable_overlap_scheduler"] for role in Role}
    assert off == {Role.PREFILL: True, Role.DECODE: False, Role.AGGREGATED: False}


def test_an_aggregated_worker_hands_nothing_over() -> None:
    assert "cache_transceiver_config" not in llm_arguments(DEPLOYMENT, WORKERS[Role.AGGREGATED], Path("m"))


def test_what_the_file_gives_is_passed_on() -> None:
    cache = KvCacheConfig(max_tokens=65536, dtype="fp8", enable_partial_reuse=True, event_buffer_max_size=0)
    speculative = {"decoding_type": "Eagle", "max_draft_len": 3, "speculative_model_dir": "/models/draft"}
    config = LlmConfig(
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        max_batch_size=256,
        max_num_tokens=1024,
        stream_interval=2,
        cuda_graph_config=CudaGraphConfig(),
        speculative_config=speculative,
        kv_cache_config=cache,
    )
    arguments = llm_arguments(with_decode(config), WORKERS[Role.DECODE], Path("m"))
    assert (arguments["tensor_parallel_size"], arguments["max_batch_size"], arguments["max_num_tokens"]) == (4, 256, 1024)
    assert arguments["pipeline_parallel_size"] == 2
    assert arguments["speculative_config"] == speculative
    assert arguments["kv_cache_config"]["dtype"] == "fp8"
    assert arguments["cuda_graph_config"] == {"enable_padding": True}
    assert arguments["kv_cache_config"]["max_tokens"] == 65536
    assert "free_gpu_memory_fraction" not in arguments["kv_cache_config"], "the smaller of both would count"
    assert arguments["kv_cache_config"]["event_buffer_max_size"] == 0


def test_there_is_an_example_for_every_usual_shape() -> None:
    names = {path.stem.removeprefix("trtllm-") for path in EXAMPLES}
    assert names == {"1gpu", "1p1d", "2p2d", "unequal-tp", "70b"}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_release_takes_what_the_examples_ask_for(example: Path, release: str, tmp_path: Path) -> None:
    """The fake is as strict as the real LLM: an unknown key or a wrong value raises."""
    deployment = load_deployment(example)
    with playing(RELEASES[release], tmp_path):
        library = load_library()
        parse = importlib.import_module("tensorrt_llm._arguments").parse
        for worker in deployment.workers:
            args = parse(library.typed(llm_arguments(deployment, worker, Path("m"))))
            assert args.tensor_parallel_size * args.pipeline_parallel_size == len(worker.gpus.split(","))
            assert args.cache_transceiver_config.kv_transfer_timeout_ms == deployment.transfer.lease_s * 1000
            assert args.cache_transceiver_config.max_tokens_in_buffer >= deployment.model.max_context
            assert args.disable_overlap_scheduler == (worker.role is Role.PREFILL)
