"""Two PyTorch engines whose KV is in devices' memory, handing over by `cuda_ipc`: no byte of it comes by the host."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.config import Deployment, EngineConfig, ModelConfig, TransferConfig, WorkerConfig
from python_backends.core.messages import Lent
from python_backends.core.types import Epoch, RequestId, Role
from python_backends.engines.paged.engine import PagedEngine
from python_backends.engines.torch.runner import TorchRunner
from tests.engines.bench import KEY, EngineBench, make_request
from tests.engines.host_device import HostDevice
from tests.engines.paged_sequences import memory_of
from tests.engines.tiny_model import VOCAB, write_tiny_llama

BLOCK = 16
PROMPT = [random.Random(1).randrange(3, VOCAB) for _ in range(75)]  # 4 full blocks and a partial one

Make = Callable[..., EngineBench]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    benches: list[EngineBench] = []
    directory = write_tiny_llama(tmp_path / "model")

    def make_bench(role: Role, device: HostDevice | None = None, **transfer: Any) -> EngineBench:
        deployment = Deployment(
            model=ModelConfig(path=str(directory), max_context=512),
            workers=(WorkerConfig(role, role.value),),
            engine=EngineConfig(block_size=BLOCK, kv_pool_mib=2, step_tokens=64, max_batch=4),
            transfer=TransferConfig(transport="cuda_ipc" if device is not None else "shm", **transfer),
        )
        worker = deployment.workers[0]
        runner = TorchRunner(deployment.model, worker, BLOCK, directory, "torch", max_batch=4, device=device)
        benches.append(EngineBench(PagedEngine(deployment, worker, runner, Epoch(len(benches) + 1), KEY)))
        return benches[-1]

    yield make_bench
    for bench in benches:
        bench.engine.close()


def handed_over(prefill: EngineBench, decode: EngineBench, request_id: str, prompt: list[int]) -> tuple[list[int], Any]:
    done = prefill.prefill(make_request(request_id, prompt, max_tokens=20))
    assert done.ticket is not None
    tokens, report = decode.decode(make_request(request_id, prompt, [done.token_id], max_tokens=20), done.ticket)
    return [done.token_id, *tokens], report


def test_the_text_is_that_of_one_engine_and_the_host_saw_no_kv(make: Make) -> None:
    alone, _ = make(Role.AGGREGATED).decode(make_request("a", PROMPT, max_tokens=20))
    prefill, decode = make(Role.PREFILL, HostDevice()), make(Role.DECODE, device := HostDevice())
    text, report = handed_over(prefill, decode, "a", PROMPT)
    assert text == alone
    assert (report.transport, report.digest, report.recomputed_tokens) == ("cuda_ipc", "verified", 0)
    assert report.received_tokens == len(PROMPT)
    for bench in (prefill, decode):
        assert not memory_of(bench.engine).blocks.any(), "KV was copied to the host"
    text, report = handed_over(prefill, decode, "b", PROMPT[::-1])
    assert report.digest == "verified"
    assert device.num_open == 1
    prefill.engine.release(next(iter(prefill.outputs["a"])).lease_id)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("fault", ["corrupt", "truncate"])
def test_damage_on_the_way_is_found_and_computed_anew(make: Make, fault: str) -> None:
    alone, _ = make(Role.AGGREGATED).decode(make_request("a", PROMPT, max_tokens=20))
    prefill, decode = make(Role.PREFILL, HostDevice()), make(Role.DECODE, HostDevice(), faults={fault: 1.0})
    text, report = handed_over(prefill, decode, "a", PROMPT)
    assert text == alone
    assert (report.digest, report.recomputed_tokens) == ("digest_mismatch", len(PROMPT))


def test_a_device_that_can_not_be_opened_costs_a_computation(make: Make) -> None:
    device = HostDevice()  # one process: CUDA opens no memory in the process that shares it
    text, report = handed_over(make(Role.PREFILL, device), make(Role.DECODE, device), "a", PROMPT)
    assert (report.digest, report.recomputed_tokens) == ("transfer_failed", len(PROMPT))
    assert len(text) == 20


def test_a_lent_prefix_comes_from_the_devices_memory(make: Make) -> None:
    lender, borrower = make(Role.DECODE, HostDevice()), make(Role.PREFILL, HostDevice())
    lender.decode(make_request("a", PROMPT))
    assert isinstance(lender.engine, PagedEngine)
    assert isinstance(borrower.engine, PagedEngine)
    root = chain_root(lender.engine.info.fingerprint, "")
    lender.engine.lend(RequestId("q"), block_hashes(PROMPT, BLOCK, root))
    lender.wait(lambda: "q" in lender.outputs)
    (lent,) = lender.outputs["q"]
    assert isinstance(lent, Lent)
    assert lent.ticket is not None
    borrower.engine.prefill_with(make_request("b", PROMPT), lent.ticket)
    borrower.wait(lambda: borrower.last("b") is not None)
    assert borrower.last("b").prefix.peer_tokens == 64  # type: ignore[union-attr]
