"""Deployment files with engine trtllm: each wrong one is refused with the key and the fix, and without TensorRT-LLM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from python_backends.core.config import Deployment, load_deployment
from python_backends.core.errors import ConfigError
from python_backends.core.trtllm import kv_timeout_ms

GOOD: dict[str, Any] = {
    "model": {"path": "/models/llama", "dtype": "bfloat16", "max_context": 8192},
    "workers": [
        {"role": "prefill", "engine": "trtllm", "gpus": "0"},
        {"role": "decode", "engine": "trtllm", "gpus": "1"},
    ],
    "engine": {"block_size": 32, "trtllm": {"cache_transceiver_config": {"backend": "UCX"}}},
}


def load(tmp_path: Path, changes: dict[str, Any]) -> Deployment:
    """GOOD with `a.b.c: value` set; None removes a key."""
    config = yaml.safe_load(yaml.safe_dump(GOOD))
    for path, value in changes.items():
        *parents, last = path.split(".")
        section: Any = config
        for name in parents:
            section = section[int(name)] if isinstance(section, list) else section.setdefault(name, {})
        if isinstance(section, list):
            section[int(last)] = value
        elif value is None:
            section.pop(last, None)
        else:
            section[last] = value
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(config))
    return load_deployment(file)


def test_the_good_one_is_good_and_needs_no_library(tmp_path: Path) -> None:
    deployment = load(tmp_path, {})
    assert kv_timeout_ms(deployment) == 10_000
    assert "tensorrt_llm" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # GPUs
        ({"workers.0.gpus": None}, r'prefill: gpus is missing; name the GPUs .* gpus: "0"'),
        ({"workers.0.gpus": "0,0", "engine.trtllm.prefill.tensor_parallel_size": 2}, "'0,0' names a GPU twice"),
        ({"workers.0.gpus": "2,3"}, r"'2,3' are 2, but engine.trtllm.prefill.tensor_parallel_size is 1"),
        ({"engine.trtllm.decode.tensor_parallel_size": 4}, "decode.tensor_parallel_size is 4; give 4"),
        (
            {"engine.trtllm.decode.pipeline_parallel_size": 2, "workers.1.gpus": "1,2,3"},
            "'1,2,3' are 3, but .*tensor_parallel_size is 1 and pipeline_parallel_size 2; give 2",
        ),
        ({"workers.1.gpus": "0"}, r"prefill and decode share GPU 0; set engine.trtllm.prefill.kv_cache_config.max_tokens"),
        ({"workers.0.gpus": "zero"}, "gpus"),
        ({"workers.0.engine": "torch", "workers.1.engine": "torch"}, "gpus is for engine trtllm; engine torch takes device"),
        # keys of other engines
        ({"workers.0.device": "cuda:0"}, "prefill: device has no meaning with engine trtllm"),
        ({"workers.0.cpus": "0-3"}, "prefill: cpus has no meaning"),
        ({"workers.0.threads": 4}, "prefill: threads has no meaning"),
        ({"workers.0.kv_pool_mib": 64}, "prefill: kv_pool_mib has no meaning"),
        ({f"workers.{i}.weights": "int8" for i in (0, 1)}, "prefill: weights has no meaning"),
        ({"model.weights": "int8"}, "model.weights is for the CPU; .* leave it out"),
        ({"model.kv_dtype": "int8"}, "model.kv_dtype is for the CPU; engine trtllm has kv_cache_config.dtype"),
        # the model
        ({"model.max_context": None}, "model.max_context is 0; engine trtllm allocates by it"),
        # blocks
        (
            {"engine.trtllm.decode.kv_cache_config.tokens_per_block": 64},
            "decode.kv_cache_config.tokens_per_block is 64, but engine.block_size is 32; they must be equal",
        ),
        # KV that the other side can't read
        (
            {"engine.trtllm.decode.kv_cache_config.dtype": "fp8"},
            "decode.kv_cache_config.dtype is fp8, but that of prefill is auto: .*; give both the same",
        ),
        ({"engine.trtllm.prefill.kv_cache_config.dtype": "int3"}, r"int3.*kv_cache_config.dtype"),
        # speculative decoding
        ({"engine.trtllm.decode.speculative_config": {"max_draft_len": 3}}, "speculative_config: decoding_type is missing"),
        # prompts that could not be computed
        (
            {"engine.trtllm.prefill.enable_chunked_prefill": False, "engine.trtllm.prefill.max_num_tokens": 4096},
            "prefill.max_num_tokens is 4096, below model.max_context 8192, and enable_chunked_prefill is false",
        ),
        (
            {"engine.trtllm.decode.enable_chunked_prefill": False, "engine.trtllm.decode.max_num_tokens": 1024},
            "decode.max_num_tokens is 1024",
        ),
        (  # TensorRT-LLM's own default
            {"engine.trtllm.prefill.enable_chunked_prefill": False, "model.max_context": 16384},
            "prefill.max_num_tokens is 8192, below model.max_context 16384",
        ),
        ({"engine.trtllm.decode.kv_cache_config.max_tokens": 4096}, "max_tokens is 4096, below model.max_context 8192"),
        ({"engine.trtllm.prefill.disable_overlap_scheduler": False}, "prefill.disable_overlap_scheduler: .* need true"),
        # the transceiver
        ({"engine.trtllm.cache_transceiver_config.backend": None}, "backend is missing: without it no KV moves; say UCX"),
        (  # prefill workers may be on other servers
            {
                "workers": [{"role": "decode", "engine": "trtllm", "gpus": "0"}],
                "cluster": {"listen": "10.0.0.1"},
                "security": {"key_file": "/etc/baton/key"},
                "engine.trtllm.cache_transceiver_config.backend": None,
            },
            "backend is missing: without it no KV moves",
        ),
        ({"engine.trtllm.cache_transceiver_config.backend": "ucx"}, "backend is 'ucx'; write UCX"),
        ({"engine.trtllm.cache_transceiver_config.backend": "DEFAULT"}, "backend is DEFAULT, which means another library"),
        ({"engine.trtllm.cache_transceiver_config.backend": "MPI"}, "backend is MPI, which needs one MPI world"),
        ({"engine.trtllm.cache_transceiver_config.backend": "RDMA"}, "backend is 'RDMA'; known are UCX, NIXL, MOONCAKE"),
        (
            {"engine.trtllm.cache_transceiver_config.max_tokens_in_buffer": 8191},
            r"max_tokens_in_buffer is 8191, below the longest prompt \(model.max_context 8192\)",
        ),
        (
            {"engine.trtllm.cache_transceiver_config.kv_transfer_timeout_ms": 9_999},
            r"kv_transfer_timeout_ms is 9999, below transfer.lease_s \(10000 ms\)",
        ),
        ({"engine.trtllm.first_output_s": 11}, "first_output_s is 11: KV is dropped after 10 s .* lower it"),
        ({"transfer.lease_s": 2.0}, "first_output_s is 5: KV is dropped after 2 s"),
        # environment
        ({"engine.trtllm.environment.UCX_TSL": "rc"}, "environment: UCX_TSL is not known; known are"),
        ({"engine.trtllm.environment.CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES is set from the worker's gpus"),
        ({"engine.trtllm.environment.UCX_TLS": "tcp,cuda_copy"}, "UCX_TLS 'tcp,cuda_copy' lists tcp"),
        # what can't work together
        ({"workers.1": {"role": "decode"}}, "prefill and decode workers have engines torch, trtllm"),
        ({"transfer.faults": {"drop": 0.5}}, "transfer.faults spoil Baton's own transports"),
        # unknown keys and wrong types, by their path
        ({"engine.trtllm.prefill.max_batchsize": 8}, r"max_batchsize.*engine.trtllm.prefill"),
        ({"engine.trtllm.prefill.kv_cache_config.secondary_offload": 1}, r"secondary_offload.*kv_cache_config"),
        ({"engine.trtllm.cache_transceiver_config.transceiver_runtime": "PYTHON"}, "transceiver_runtime"),
        ({"engine.trtllm.prefill.kv_cache_config.free_gpu_memory_fraction": 1.5}, "free_gpu_memory_fraction"),
        ({"engine.trtllm.prefill.stream_interval": 0}, "stream_interval"),
    ],
)
def test_a_wrong_one_is_refused_with_the_fix(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load(tmp_path, changes)
    assert str(refused.value).startswith(f"{tmp_path / 'deployment.yaml'}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"engine.trtllm.decode.kv_cache_config.tokens_per_block": 32},
        {"engine.trtllm.cache_transceiver_config.kv_transfer_timeout_ms": 60_000},
        {"engine.trtllm.environment.UCX_TLS": "^ib,gdr_copy"},
        {"engine.trtllm.environment.UCX_TLS": "cuda_copy,cuda_ipc,sm"},
        {"workers.0.gpus": "0,2", "engine.trtllm.prefill.tensor_parallel_size": 2},
        {
            "workers.0.gpus": "0,2,3,4",
            "engine.trtllm.prefill.tensor_parallel_size": 2,
            "engine.trtllm.prefill.pipeline_parallel_size": 2,
        },
        {f"engine.trtllm.{role}.kv_cache_config.dtype": "fp8" for role in ("prefill", "decode")},
        {
            f"engine.trtllm.{role}.speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 1}
            for role in ("prefill", "decode")
        },
        {"engine.trtllm.prefill.max_num_tokens": 1024},
        {
            "workers.1.gpus": "0",
            "engine.trtllm.prefill.kv_cache_config.max_tokens": 8192,
            "engine.trtllm.decode.kv_cache_config.max_tokens": 16384,
        },
        {"workers": [{"role": "aggregated", "engine": "trtllm", "gpus": "0"}], "engine.trtllm": {}},
    ],
)
def test_what_is_allowed(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert load(tmp_path, changes).workers


def test_the_time_out_of_kv_is_the_lease_unless_given(tmp_path: Path) -> None:
    assert kv_timeout_ms(load(tmp_path, {"transfer.lease_s": 30})) == 30_000
    given = {"engine.trtllm.cache_transceiver_config.kv_transfer_timeout_ms": 45_000}
    assert kv_timeout_ms(load(tmp_path, given)) == 45_000
