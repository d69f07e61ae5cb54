"""What engines/base.py promises, held against every engine. An engine that passes can be put behind a worker."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher

from python_backends.core.config import (
    Deployment,
    EngineConfig,
    FakeConfig,
    ModelConfig,
    TransferConfig,
    WorkerConfig,
)
from python_backends.core.errors import ConfigError, RefusalReason, TritonCode
from python_backends.core.handoff import KVHandoff, seal, unseal
from python_backends.core.messages import PrefillDone, RequestFailed, TokenChunk
from python_backends.core.trtllm import TrtllmConfig
from python_backends.core.types import Epoch, FinishReason, GenerateRequest, RequestId, Role
from python_backends.engines.base import StepReporter, create_engine
from tests.engines.bench import KEY, EngineBench, make_request
from tests.engines.installed import Lender, gpu_of, installed_deployment
from tests.engines.tiny_model import VOCAB, byte_tokenizer, write_tiny_llama
from tests.engines.trtllm.playing import RELEASES, playing, trtllm_config

BLOCK = 16
PROMPT = [random.Random(1).randrange(3, VOCAB) for _ in range(75)]  # 4 full blocks and a partial one
LONG = [random.Random(2).randrange(3, VOCAB) for _ in range(600)]

Make = Callable[..., EngineBench]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


INSTALLED = installed_deployment()
OURS = [] if INSTALLED else ["fake", "torch"]
TRTLLM = ["installed"] if INSTALLED else [f"trtllm-{release}" for release in RELEASES]
_tests = itertools.count(1)


@pytest.fixture(scope="session")
def lender() -> Iterator[Lender]:
    made = Lender()
    yield made
    made.close()


@pytest.fixture(params=[*OURS, *TRTLLM])
def make(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path, lender: Lender) -> Iterator[Make]:
    """Makes engines of one kind: make(Role.PREFILL, kv_pool_mib=..., transfer=..., ...)."""
    yield from _lend(lender) if request.param == "installed" else _make(request.param, tiny, tmp_path)


@pytest.fixture(params=OURS)
def make_ours(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Iterator[Make]:
    """For what only engines with our own pool, scheduler, sampler and transports promise.

    TensorRT-LLM has its own of each: it moves KV itself (so there are no blocks, digests or injected faults of ours),
    keeps published KV until its time-out, schedules prompts as it likes, and counts random draws per engine.
    tests/engines/trtllm holds it to what it does promise there.
    """
    yield from _make(request.param, tiny, tmp_path)


def _make(kind: str, tiny: Path, tmp_path: Path) -> Iterator[Make]:
    engine, _, release = kind.partition("-")
    with playing(RELEASES[release], tmp_path) if release else nullcontext() as knobs:
        benches: list[EngineBench] = []
        epochs = iter(range(1, 1000))

        def make_bench(
            role: Role,
            kv_pool_mib: int = 8,
            transfer: TransferConfig | None = None,
            model: Path = tiny,
            step_us: int = 200,
            max_queue: int = 1024,
        ) -> EngineBench:
            transfer = transfer or TransferConfig()
            if knobs is not None:
                knobs.set(step_ms=step_us / 1000)
            deployment = Deployment(
                model=ModelConfig(path=str(model), max_context=min(2048, kv_pool_mib * 1024) if knobs else 0),
                workers=(WorkerConfig(role, role.value, engine, gpus="0" if knobs else "", threads=0 if knobs else 1),),
                engine=EngineConfig(
                    block_size=BLOCK,
                    kv_pool_mib=kv_pool_mib,
                    step_tokens=64,
                    max_batch=64,
                    max_queue=max_queue,
                    fake=FakeConfig(prefill_us_per_token=5, step_us=step_us),
                    trtllm=_as_large_as_the_fake(kv_pool_mib, transfer),
                ),
                transfer=transfer,
            )
            bench = EngineBench(create_engine(deployment, deployment.workers[0], Epoch(next(epochs)), KEY))
            benches.append(bench)
            return bench

        yield make_bench
        for bench in benches:
            bench.engine.close()
            bench.engine.close()


def _as_large_as_the_fake(kv_pool_mib: int, transfer: TransferConfig, **changes: Any) -> TrtllmConfig:
    return trtllm_config(kv_pool_mib * 1024, first_output_s=min(5.0, transfer.lease_s), **changes)


def _lend(lender: Lender) -> Iterator[Make]:
    """`step_us` has no meaning: a real engine is as fast as it is."""
    assert INSTALLED is not None
    base, test = INSTALLED, next(_tests)

    def make_bench(
        role: Role,
        kv_pool_mib: int = 8,
        transfer: TransferConfig | None = None,
        model: Path | None = None,
        step_us: int = 0,
        max_queue: int = 1024,
    ) -> EngineBench:
        if model is not None:
            pytest.skip("needs a second model")
        transfer = transfer or TransferConfig()
        kept = {
            name: getattr(base.engine.trtllm, name) for name in ("cache_transceiver_config", "environment", "load_timeout_s")
        }
        deployment = msgspec.structs.replace(
            base,
            model=msgspec.structs.replace(base.model, max_context=min(2048, kv_pool_mib * 1024)),
            engine=EngineConfig(
                block_size=BLOCK,
                max_batch=64,
                max_queue=max_queue,
                trtllm=_as_large_as_the_fake(kv_pool_mib, transfer, **kept),
            ),
            transfer=transfer,
        )
        worker = WorkerConfig(role, role.value, "trtllm", gpus=gpu_of(base, role))
        return EngineBench(lender.lend(deployment, worker, test))

    yield make_bench
    lender.take_back()


def _has_ended(bench: EngineBench, request_id: str) -> bool:
    return bench.last(request_id) is not None


def _handed(done: PrefillDone, request_id: str, prompt: list[int], **sampling: Any) -> GenerateRequest:
    return make_request(request_id, prompt, [done.token_id], **sampling)


def _resealed(ticket: bytes, **changes: object) -> bytes:
    handoff = unseal(ticket, KEY, time.time())
    return seal(msgspec.structs.replace(handoff, **changes), KEY)


# --- the same text by every way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 11}, {"temperature": 1.2, "top_p": 0.8, "seed": 5}])
@pytest.mark.parametrize("transport", ["auto", "shm", "tcp", "inline"])
def test_handed_over_equals_computed_in_one_place(make_ours: Make, transport: str, sampling: dict[str, Any]) -> None:
    transfer = TransferConfig(transport=transport)  # type: ignore[arg-type]
    prefill, decode = make_ours(Role.PREFILL, transfer=transfer), make_ours(Role.DECODE, transfer=transfer)
    expected, _ = make_ours(Role.AGGREGATED).decode(make_request("ref", PROMPT, max_tokens=24, **sampling))
    done = prefill.prefill(make_request("p", PROMPT, max_tokens=24, **sampling))
    tokens, report = decode.decode(_handed(done, "d", PROMPT, max_tokens=24, **sampling), done.ticket)
    assert [done.token_id, *tokens] == expected
    assert (report.received_tokens, report.reused_tokens, report.recomputed_tokens) == (len(PROMPT), 0, 0)
    assert report.digest == "verified"
    assert report.received_bytes == 5 * decode.engine.info.layout.block_bytes


def test_handed_over_greedy_equals_computed_in_one_place(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    expected, _ = make(Role.AGGREGATED).decode(make_request("ref", PROMPT, max_tokens=24))
    done = prefill.prefill(make_request("p", PROMPT, max_tokens=24))
    tokens, report = decode.decode(_handed(done, "d", PROMPT, max_tokens=24), done.ticket)
    assert [done.token_id, *tokens] == expected
    assert (report.received_tokens, report.recomputed_tokens) == (len(PROMPT), 0)


def test_decode_computes_only_what_it_was_not_handed(make: Make) -> None:
    """Fails if the decode worker recomputes: with the ticket's blocks empty the text must change."""
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    _, report = decode.decode(_handed(done, "d", PROMPT), done.ticket)
    assert report.recomputed_tokens == report.computed_tokens == 0
    assert report.received_tokens == len(PROMPT)


def test_a_prefix_is_reused_on_both_sides(make_ours: Make) -> None:
    prefill, decode = make_ours(Role.PREFILL), make_ours(Role.DECODE)
    first = prefill.prefill(make_request("p1", PROMPT))
    expected, _ = decode.decode(_handed(first, "d1", PROMPT), first.ticket)
    again = prefill.prefill(make_request("p2", PROMPT))
    assert (again.reused_tokens, again.computed_tokens) == (64, 11)
    tokens, report = decode.decode(_handed(again, "d2", PROMPT), again.ticket)
    assert tokens == expected
    assert (report.reused_tokens, report.received_tokens, report.recomputed_tokens) == (64, 11, 0)
    local, report = decode.decode(make_request("l", PROMPT))
    assert local == [again.token_id, *expected]
    assert (report.reused_tokens, report.computed_tokens) == (64, 10)  # the last token is computed for its logits


def test_salt_keeps_tenants_apart(make: Make) -> None:
    engine = make(Role.AGGREGATED)
    one, _ = engine.decode(make_request("a", PROMPT, salt="tenant a"))
    two, report = engine.decode(make_request("b", PROMPT, salt="tenant b"))
    assert one == two
    assert report.reused_tokens == 0


def test_continues_after_tokens_already_sent(make_ours: Make) -> None:
    """What recovery relies on: another worker goes on in the middle, and the rest is the same."""
    first, second = make_ours(Role.AGGREGATED), make_ours(Role.AGGREGATED)
    sampling: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 3}
    whole, _ = first.decode(make_request("whole", PROMPT, **sampling))
    rest, _ = second.decode(make_request("rest", PROMPT, whole[:9], **sampling))
    assert whole[:9] + rest == whole


def test_continues_greedily_after_tokens_already_sent(make: Make) -> None:
    first, second = make(Role.AGGREGATED), make(Role.AGGREGATED)
    whole, _ = first.decode(make_request("whole", PROMPT, max_tokens=20))
    rest, _ = second.decode(make_request("rest", PROMPT, whole[:9], max_tokens=20))
    assert whole[:9] + rest == whole


def test_a_prefix_is_reused(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.AGGREGATED)
    prefill.prefill(make_request("p1", PROMPT))
    again = prefill.prefill(make_request("p2", PROMPT))
    assert (again.reused_tokens, again.computed_tokens) == (64, 11)
    decode.decode(make_request("l1", PROMPT))
    _, report = decode.decode(make_request("l2", PROMPT))
    assert (report.reused_tokens, report.computed_tokens) == (64, 10)  # the last token is computed for its logits


def test_thirty_two_at_once_equal_each_alone(make: Make) -> None:
    prefill, decode, alone = make(Role.PREFILL), make(Role.DECODE), make(Role.AGGREGATED)
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 200))] for _ in range(32)]
    sampling: dict[str, Any] = {"max_tokens": 12}
    expected = [alone.decode(make_request(f"a{i}", p, seed=i, **sampling))[0] for i, p in enumerate(prompts)]
    for i, prompt in enumerate(prompts):
        prefill.engine.prefill(make_request(f"p{i}", prompt, seed=i, **sampling))
    for i, prompt in enumerate(prompts):
        prefill.wait(partial(_has_ended, prefill, f"p{i}"))
        done = prefill.last(f"p{i}")
        assert isinstance(done, PrefillDone)
        decode.engine.decode(_handed(done, f"d{i}", prompt, seed=i, **sampling), done.ticket)
    for i in range(32):
        tokens, report = decode.result(f"d{i}")
        done = prefill.last(f"p{i}")
        assert isinstance(done, PrefillDone)
        assert [done.token_id, *tokens] == expected[i]
        assert report.recomputed_tokens == 0


def test_a_full_pool_queues_and_preempts_but_never_fails(make: Make) -> None:
    """32 requests whose KV is several times the pool: eviction, waiting and preemption change nothing in the text."""
    small, roomy = make(Role.AGGREGATED, kv_pool_mib=1), make(Role.AGGREGATED, kv_pool_mib=32)
    rng = random.Random(4)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(20, 120))] for _ in range(32)]
    for bench in (small, roomy):
        for i, prompt in enumerate(prompts):
            bench.engine.decode(make_request(f"r{i}", prompt, max_tokens=60), None)
    assert [small.result(f"r{i}")[0] for i in range(32)] == [roomy.result(f"r{i}")[0] for i in range(32)]
    small.assert_nothing_held()


def test_after_eviction_the_text_is_the_same(make_ours: Make) -> None:
    prefill, decode = make_ours(Role.PREFILL, kv_pool_mib=1), make_ours(Role.DECODE, kv_pool_mib=1)
    first = prefill.prefill(make_request("p1", PROMPT))
    expected, _ = decode.decode(_handed(first, "d1", PROMPT), first.ticket)
    prefill.engine.release(first.lease_id or "")
    for bench in (prefill, decode):
        bench.outputs.clear()
    for i in range(8):
        flood = [random.Random(i).randrange(3, VOCAB) for _ in range(500)]
        done = prefill.prefill(make_request(f"f{i}", flood))
        prefill.engine.release(done.lease_id or "")
        decode.decode(make_request(f"g{i}", flood))
    second = prefill.prefill(make_request("p2", PROMPT))
    assert second.reused_tokens == 0, "the prefix was to be evicted"
    tokens, report = decode.decode(_handed(second, "d2", PROMPT), second.ticket)
    assert (report.reused_tokens, report.received_tokens) == (0, len(PROMPT))
    assert tokens == expected


# --- tickets that must not be believed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        (RefusalReason.BAD_SIGNATURE, lambda ticket: ticket[:20] + bytes([ticket[20] ^ 1]) + ticket[21:]),
        (RefusalReason.BAD_SIGNATURE, lambda ticket: b"nonsense"),
        (RefusalReason.EXPIRED, lambda ticket: _resealed(ticket, expires_at=time.time() - 0.1)),
        (RefusalReason.FOREIGN_FINGERPRINT, lambda ticket: _resealed(ticket, fingerprint="0" * 32)),
        (RefusalReason.FOREIGN_CONTENT, lambda ticket: _resealed(ticket, content=b"\0" * 16)),
        (RefusalReason.MALFORMED, lambda ticket: _resealed(ticket, digests=[b"\0" * 16] * 4)),
        (RefusalReason.MALFORMED, lambda ticket: _resealed(ticket, version=99)),
    ],
)
def test_a_bad_ticket_costs_a_recompute_and_not_the_text(
    make: Make, reason: RefusalReason, spoil: Callable[[bytes], bytes]
) -> None:
    _assert_recomputed(make, reason, spoil)


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        (RefusalReason.DIGEST_MISMATCH, lambda ticket: _resealed(ticket, digests=[b"\0" * 16] * 5)),
        (RefusalReason.STALE_EPOCH, lambda ticket: _resealed(ticket, epoch=Epoch(424242))),
        (RefusalReason.STALE_EPOCH, lambda ticket: _resealed(ticket, generations=[0] * 5)),
        (RefusalReason.TRANSFER_FAILED, lambda ticket: _resealed(ticket, locator="999999999/3")),
        (RefusalReason.TRANSFER_FAILED, lambda ticket: _resealed(ticket, blocks=[10**9] * 5)),
    ],
)
def test_a_ticket_with_bad_blocks_costs_a_recompute_and_not_the_text(
    make_ours: Make, reason: RefusalReason, spoil: Callable[[bytes], bytes]
) -> None:
    _assert_recomputed(make_ours, reason, spoil)


def _assert_recomputed(make: Make, reason: RefusalReason, spoil: Callable[[bytes], bytes]) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    assert done.ticket is not None
    tokens, report = decode.decode(_handed(done, "d", PROMPT), spoil(done.ticket))
    expected, _ = make(Role.AGGREGATED).decode(make_request("ref", PROMPT))
    assert [done.token_id, *tokens] == expected
    assert report.digest == reason.value
    assert (report.received_tokens, report.recomputed_tokens) == (0, len(PROMPT))
    assert decode.kv_ready("d") is not None, "the lease would not be released"


def test_a_ticket_is_good_for_one_use(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    first, _ = decode.decode(_handed(done, "d1", PROMPT), done.ticket)
    second, report = decode.decode(_handed(done, "d2", PROMPT), done.ticket)
    assert first == second
    assert report.digest == RefusalReason.REPLAYED.value


def test_a_ticket_is_good_for_its_own_tokens_and_tenant_only(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    other = [*PROMPT[:-1], PROMPT[-1] - 1]
    _, report = decode.decode(_handed(done, "d1", other), done.ticket)
    assert report.digest == RefusalReason.FOREIGN_CONTENT.value
    _, report = decode.decode(make_request("d2", PROMPT, [done.token_id], salt="other"), done.ticket)
    assert report.digest == RefusalReason.FOREIGN_CONTENT.value


@pytest.mark.parametrize("fault", ["corrupt", "truncate", "drop", "hang"])
def test_faults_of_the_transfer_are_found(make_ours: Make, fault: str) -> None:
    faulty = TransferConfig(timeout_s=0.2, faults={fault: 1.0})  # type: ignore[dict-item]
    prefill, decode = make_ours(Role.PREFILL), make_ours(Role.DECODE, transfer=faulty)
    expected, _ = make_ours(Role.AGGREGATED).decode(make_request("ref", PROMPT))
    done = prefill.prefill(make_request("p", PROMPT))
    tokens, report = decode.decode(_handed(done, "d", PROMPT), done.ticket)
    assert [done.token_id, *tokens] == expected
    assert report.recomputed_tokens == len(PROMPT)
    assert report.digest in {reason.value for reason in RefusalReason}
    decode.assert_nothing_held()


def test_kv_of_other_weights_is_refused(make: Make, tmp_path: Path) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE, model=write_tiny_llama(tmp_path / "other", seed=1))
    if prefill.engine.info.fingerprint == decode.engine.info.fingerprint:
        pytest.skip("this engine has no weights")
    done = prefill.prefill(make_request("p", PROMPT))
    _, report = decode.decode(_handed(done, "d", PROMPT), done.ticket)
    assert report.digest == RefusalReason.FOREIGN_FINGERPRINT.value


# --- leases ------------------------------------------------------------------------------------------------------------


def test_published_kv_is_held_until_released(make_ours: Make) -> None:
    prefill = make_ours(Role.PREFILL)
    done = prefill.prefill(make_request("p", PROMPT))
    prefill.wait_load(lambda: prefill.engine.load().active_leases == 1)
    assert prefill.engine.load().held_blocks == 5
    assert done.lease_id is not None
    prefill.engine.release(done.lease_id)
    prefill.engine.release(done.lease_id)
    prefill.engine.release("unknown")
    prefill.assert_nothing_held()


def test_orphaned_kv_is_back_within_the_lease_and_a_second(make: Make) -> None:
    prefill = make(Role.PREFILL, transfer=TransferConfig(lease_s=0.3))
    prefill.prefill(make_request("p", PROMPT))
    prefill.wait_load(lambda: prefill.engine.load().active_leases == 1)
    prefill.wait_load(lambda: prefill.engine.load().active_leases == 0, timeout_s=1.3)
    prefill.assert_nothing_held()


def test_abort_after_publishing_ends_the_lease(make_ours: Make) -> None:
    prefill = make_ours(Role.PREFILL)
    prefill.prefill(make_request("p", PROMPT))
    prefill.engine.abort(RequestId("p"))
    prefill.assert_nothing_held()


# --- endings -----------------------------------------------------------------------------------------------------------


def test_the_first_token_may_be_the_last(make: Make) -> None:
    prefill = make(Role.PREFILL)
    done = prefill.prefill(make_request("p", PROMPT, max_tokens=1))
    assert done.finish_reason is FinishReason.LENGTH
    assert done.ticket is None
    prefill.assert_nothing_held()


def test_stop_token_ids_end_and_min_tokens_delays_them(make: Make) -> None:
    engine = make(Role.AGGREGATED)
    free, _ = engine.decode(make_request("free", PROMPT, max_tokens=10))
    stopped, _ = engine.decode(make_request("stop", PROMPT, max_tokens=10, stop_token_ids=(free[4],)))
    assert stopped == free[: free.index(free[4]) + 1]
    last = engine.last("stop")
    assert isinstance(last, TokenChunk)
    assert last.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("when", ["before", "queued", "running", "after"])
def test_abort_gives_everything_back(make: Make, when: str) -> None:
    engine = make(Role.AGGREGATED, step_us=20_000)
    request = make_request("x", LONG, max_tokens=400)
    if when == "before":
        engine.engine.abort(request.request_id)
    engine.engine.decode(request, None)
    if when == "running":
        engine.wait(lambda: len(engine.outputs.get("x", [])) > 2)
    if when == "after":
        engine.result("x")
    engine.engine.abort(request.request_id)
    engine.engine.abort(request.request_id)
    engine.assert_nothing_held()
    count = len(engine.outputs.get("x", []))
    engine.decode(make_request("y", PROMPT))
    assert len(engine.outputs.get("x", [])) == count, "an aborted request went on"


def test_abort_during_a_transfer_gives_back_when_it_ends(make_ours: Make) -> None:
    hanging = TransferConfig(timeout_s=0.5, faults={"hang": 1.0})
    prefill, decode = make_ours(Role.PREFILL), make_ours(Role.DECODE, transfer=hanging)
    done = prefill.prefill(make_request("p", PROMPT))
    decode.engine.decode(_handed(done, "d", PROMPT), done.ticket)
    decode.wait_load(lambda: decode.engine.load().held_blocks > 0)
    decode.engine.abort(RequestId("d"))
    decode.assert_nothing_held()
    assert decode.last("d") is None


def test_abort_before_a_transfer_has_begun_gives_back_at_once(make_ours: Make) -> None:
    """Two transfers hang for long; those that wait for their turn behind them are not waited for."""
    hanging = TransferConfig(timeout_s=3.0, faults={"hang": 1.0})
    prefill, decode = make_ours(Role.PREFILL), make_ours(Role.DECODE, transfer=hanging)
    prompts = [[5 + i, *PROMPT] for i in range(6)]
    for i, ids in enumerate(prompts):
        done = prefill.prefill(make_request(f"p{i}", ids))
        decode.engine.decode(_handed(done, f"d{i}", ids), done.ticket)
    decode.wait_load(lambda: decode.engine.load().queued_requests == 6)
    held = decode.engine.load().held_blocks
    for i in range(6):
        decode.engine.abort(RequestId(f"d{i}"))
    decode.wait_load(lambda: decode.engine.load().held_blocks == held * 2 // 6, timeout_s=1.0)
    decode.assert_nothing_held()


def test_a_passed_deadline_ends_the_request(make: Make) -> None:
    engine = make(Role.AGGREGATED, step_us=20_000)
    engine.engine.decode(make_request("x", PROMPT, max_tokens=1900, timeout_s=0.05), None)
    engine.wait(lambda: engine.last("x") is not None)
    failed = engine.last("x")
    assert isinstance(failed, RequestFailed)
    assert failed.code is TritonCode.UNAVAILABLE
    engine.assert_nothing_held()


def test_prompts_that_do_not_fit_are_refused_with_the_numbers(make: Make) -> None:
    engine = make(Role.AGGREGATED)
    too_long = make_request("x", [5] * (engine.engine.info.max_context + 1))
    engine.engine.decode(too_long, None)
    engine.wait(lambda: engine.last("x") is not None)
    failed = engine.last("x")
    assert isinstance(failed, RequestFailed)
    assert failed.code is TritonCode.INVALID_ARG
    assert str(engine.engine.info.max_context - 1) in failed.message
    engine.decode(make_request("y", PROMPT))


def test_close_answers_what_runs(make: Make) -> None:
    engine = make(Role.AGGREGATED, step_us=20_000)
    engine.engine.decode(make_request("x", LONG, max_tokens=400), None)
    engine.wait_load(lambda: engine.engine.load().running_requests == 1)
    engine.engine.close()
    failed = engine.last("x")
    assert isinstance(failed, RequestFailed)
    assert failed.retryable


# --- grammars -----------------------------------------------------------------------------------------------------------

DIGITS = LLMatcher.grammar_from_regex("[0-9]{3}-[0-9]{3}")


def test_a_grammar_is_kept_across_the_handoff(make_ours: Make) -> None:
    """Output is a sentence of it, whoever computes it, and ends where it ends."""
    sampling: dict[str, Any] = {"grammar": DIGITS, "max_tokens": 30, "temperature": 1.0, "seed": 5}
    prefill, decode, alone = make_ours(Role.PREFILL), make_ours(Role.DECODE), make_ours(Role.AGGREGATED)
    whole, _ = alone.decode(make_request("alone", PROMPT, **sampling))
    assert re.fullmatch("[0-9]{3}-[0-9]{3}", byte_tokenizer().decode(whole))
    last = alone.last("alone")
    assert isinstance(last, TokenChunk)
    assert last.finish_reason is FinishReason.STOP
    done = prefill.prefill(make_request("p", PROMPT, **sampling))
    rest, report = decode.decode(_handed(done, "d", PROMPT, **sampling), done.ticket)
    assert [done.token_id, *rest] == whole
    assert report.received_tokens == len(PROMPT)
    continued, _ = decode.decode(make_request("c", PROMPT, whole[:3], **sampling))
    assert whole[:3] + continued == whole


def test_a_grammar_that_can_not_be_read_is_refused(make: Make) -> None:
    engine = make(Role.AGGREGATED)
    engine.engine.decode(make_request("x", PROMPT, grammar="start: ("), None)
    engine.wait(lambda: engine.last("x") is not None)
    failed = engine.last("x")
    assert isinstance(failed, RequestFailed)
    assert failed.code is TritonCode.INVALID_ARG
    assert "grammar" in failed.message
    engine.assert_nothing_held()


# --- fairness and events -----------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_block_a_short_one(make_ours: Make) -> None:
    engine = make_ours(Role.PREFILL, step_us=3000)
    engine.engine.prefill(make_request("long", LONG * 3))
    engine.engine.prefill(make_request("short", PROMPT[:20]))
    engine.wait(lambda: engine.last("short") is not None)
    assert engine.last("long") is None


def test_events_tell_the_prefix_cache(make: Make) -> None:
    engine = make(Role.AGGREGATED)
    engine.decode(make_request("x", [*reversed(PROMPT)]))
    engine.engine.resync()
    engine.wait(lambda: sum(change.reset for change in engine.changes) == 2)
    told: set[bytes] = set()
    for change in engine.changes[:-1]:
        told = (set() if change.reset else told) - set(change.removed) | set(change.stored)
    assert told == set(engine.changes[-1].stored)
    assert len(told) == (len(PROMPT) + 7) // BLOCK


def test_unknown_engine_is_a_config_error() -> None:
    worker = WorkerConfig(role=Role.DECODE, name="decode", engine="abacus")
    with pytest.raises(ConfigError, match="abacus"):
        create_engine(Deployment(workers=(worker,)), worker, Epoch(1), KEY)


def test_handoff_is_small(make: Make) -> None:
    done = make(Role.PREFILL).prefill(make_request("p", LONG))
    assert done.ticket is not None
    assert len(done.ticket) < 4096
    assert isinstance(unseal(done.ticket, KEY, time.time()), KVHandoff)


def test_steps_tell_all_that_was_computed_and_calibration_comes_before(make_ours: Make) -> None:
    """What the router's cost model learns from."""
    bench = make_ours(Role.AGGREGATED)
    assert isinstance(bench.engine, StepReporter)
    calibrated = bench.engine.calibration()
    assert any(sample.prefill_tokens for sample in calibrated)
    assert any(sample.decode_streams for sample in calibrated)
    assert all(sample.ms > 0 for sample in calibrated)
    bench.engine.take_steps()
    bench.decode(make_request("r", PROMPT, max_tokens=8))
    steps = bench.engine.take_steps()
    assert sum(step.prefill_tokens for step in steps) == len(PROMPT)
    assert sum(step.decode_tokens for step in steps) == 8 - 1  # the first token comes with the prompt
    assert all(step.ms > 0 for step in steps)
    assert bench.engine.take_steps() == []


def test_time_counts_as_busy_only_while_it_computes(make: Make) -> None:
    worker = make(Role.AGGREGATED, step_us=20_000)
    began = time.monotonic()
    worker.decode(make_request("r", PROMPT, max_tokens=12))
    worker.wait_load(lambda: worker.engine.load().busy_s > 0)
    worker.assert_nothing_held()
    busy_s, passed_s = worker.engine.load().busy_s, time.monotonic() - began
    assert 0 < busy_s <= passed_s
    time.sleep(0.2)
    assert worker.engine.load().busy_s == pytest.approx(busy_s, abs=0.05)
