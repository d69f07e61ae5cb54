"""Handoffs between engines whose KV differs, or is rounded on its way: the same tokens where nothing is lost, nothing lossy
where it isn't allowed, and never a rounded block for anybody else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.config import (
    Deployment,
    EngineConfig,
    FakeConfig,
    ModelConfig,
    StoreConfig,
    TransferConfig,
    WorkerConfig,
)
from python_backends.core.types import Epoch, KVReport, Role
from python_backends.engines.base import create_engine
from python_backends.kv.transfer.codec_choice import CodecChoice
from tests.engines.bench import KEY, EngineBench, make_request
from tests.engines.test_loans import lend, prefill_with
from tests.engines.test_stores import tokens_of
from tests.engines.tiny_model import write_tiny_llama

PROMPT = tokens_of(1, 75)

Make = Callable[..., EngineBench]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(tiny: Path) -> Iterator[Make]:
    benches: list[EngineBench] = []

    def make_bench(
        role: Role,
        engine: str,
        block_size: int = 16,
        model: dict[str, Any] | None = None,
        kernels: Any = "torch",
        **transfer: Any,
    ) -> EngineBench:
        deployment = Deployment(
            model=ModelConfig(path=str(tiny), **(model or {})),
            workers=(WorkerConfig(role=role, name=role.value, engine=engine, threads=1),),
            engine=EngineConfig(block_size=block_size, kv_pool_mib=8, kernels=kernels, fake=FakeConfig(0, 200)),
            transfer=TransferConfig(**({"timeout_s": 5.0} | transfer)),
            store=StoreConfig(node_mib=1),
        )
        bench = EngineBench(create_engine(deployment, deployment.workers[0], Epoch(len(benches) + 1), KEY))
        benches.append(bench)
        return bench

    yield make_bench
    for bench in benches:
        bench.engine.close()


def hand_over(prefill: EngineBench, decode: EngineBench, name: str) -> tuple[list[int], KVReport]:
    """All tokens of the answer, and what became of the KV."""
    done = prefill.prefill(make_request(f"{name}-p", PROMPT, max_tokens=12))
    tokens, report = decode.decode(make_request(f"{name}-d", PROMPT, [done.token_id], max_tokens=12), done.ticket)
    return [done.token_id, *tokens], report


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 16), (24, 16)])
def test_other_block_sizes_say_the_same_and_are_found_again(make: Make, transport: str, theirs: int, ours: int) -> None:
    prefill = make(Role.PREFILL, "fake", theirs, transport=transport)
    decode = make(Role.DECODE, "fake", ours, transport=transport)
    expected, _ = make(Role.AGGREGATED, "fake", ours).decode(make_request("ref", PROMPT, max_tokens=12))
    tokens, report = hand_over(prefill, decode, "a")
    assert tokens == expected
    assert (report.received_tokens, report.recomputed_tokens, report.digest, report.rounded) == (75, 0, "verified", "")
    again, report = hand_over(prefill, decode, "b")
    assert again == expected
    assert (report.reused_tokens, report.received_tokens) == (75 // ours * ours, 75 % ours)


def test_another_dtype_is_refused_by_name_unless_rounding_is_allowed(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    prefill = make(Role.PREFILL, "torch")
    decode = make(Role.DECODE, "torch", model={"dtype": "float16"})
    with caplog.at_level(logging.WARNING):
        _, report = hand_over(prefill, decode, "a")
    assert (report.digest, report.received_tokens, report.recomputed_tokens) == ("foreign_fingerprint", 0, 75)
    assert "dtype float32 and float16, which is converted with transfer.rounding: float16" in caplog.text


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32")])
def test_another_dtype_is_converted_where_that_is_allowed(make: Make, dtypes: tuple[str, str]) -> None:
    prefill, decode = (
        make(role, "torch", size, {"dtype": dtype}, rounding="float16")
        for role, size, dtype in zip((Role.PREFILL, Role.DECODE), (16, 32), dtypes, strict=True)
    )
    assert prefill.engine.info.family == decode.engine.info.family
    tokens, report = hand_over(prefill, decode, "a")
    assert len(tokens) == 12
    assert (report.received_tokens, report.digest, report.rounded) == (75, "verified", "float16")
    assert_kept_to_itself(prefill, decode)


def test_what_was_rounded_on_the_wire_is_nobody_elses(make: Make) -> None:
    prefill = make(Role.PREFILL, "torch", transport="tcp", rounding="float16")
    decode = make(Role.DECODE, "torch", transport="tcp", rounding="float16")
    round_always(decode)
    tokens, report = hand_over(prefill, decode, "a")
    assert len(tokens) == 12
    assert (report.received_tokens, report.digest, report.codec, report.rounded) == (75, "verified", "float16", "float16")
    assert report.wire_bytes < 0.55 * report.received_bytes
    assert_kept_to_itself(prefill, decode)


def test_loans_are_never_rounded(make: Make) -> None:
    """The borrower hands on what it borrows, and is asked for it by hash."""
    lender, borrower = (make(Role.PREFILL, "torch", transport="tcp", rounding="float16") for _ in range(2))
    round_always(borrower)
    expected = lender.prefill(make_request("a", PROMPT))
    loan = lend(lender, block_hashes(PROMPT, 16, chain_root(lender.engine.info.fingerprint, ""))).ticket
    assert loan is not None
    done = prefill_with(borrower, "b", PROMPT, loan)
    assert (done.prefix.peer_tokens, done.token_id) == (64, expected.token_id)
    ours, theirs = (blocks_of(bench) for bench in (borrower, lender))
    assert len(ours & theirs) >= 4, "blocks are not bit for bit the lender's"


def blocks_of(bench: EngineBench) -> set[bytes]:
    """Those that are not all zeros."""
    engine: Any = bench.engine
    return {block.tobytes() for block in engine._memory.blocks if block.any()}


def round_always(bench: EngineBench) -> None:
    engine: Any = bench.engine
    engine._transport._choice = CodecChoice("float16")


def assert_kept_to_itself(prefill: EngineBench, decode: EngineBench) -> None:
    """Nothing of the first handoff is found by the next one, here or in the stores."""
    assert decode.engine.load().cached_blocks == 0
    assert not any(change.stored for change in decode.changes)
    _, report = hand_over(prefill, decode, "again")
    assert (report.reused_tokens, report.received_tokens, report.prefix.tokens) == (0, 75, 0)
    engine: Any = decode.engine
    assert engine._stores.counts()["node"].written == 0
    decode.assert_nothing_held()
