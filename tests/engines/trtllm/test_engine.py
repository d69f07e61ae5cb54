"""What the TensorRT-LLM engine does when things go as they go wrong in TensorRT-LLM. Over the fake, whose LLM has its own
counters: `knobs.state` is what really is held, `engine.load()` what the engine believes."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.config import Deployment, EngineConfig, ModelConfig, WorkerConfig
from python_backends.core.errors import ConfigError, RefusalReason, TritonCode
from python_backends.core.handoff import unseal
from python_backends.core.messages import PrefillDone, RequestFailed, TokenChunk
from python_backends.core.trtllm import CacheTransceiverConfig, KvCacheConfig, LlmConfig, TrtllmConfig
from python_backends.core.types import Epoch, FinishReason, LeaseEnd, RequestId, Role, TokenLogprob
from python_backends.engines.base import create_engine
from python_backends.engines.trtllm.library import load_library
from python_backends.engines.trtllm.opaque import unpack
from tests.engines.bench import KEY, make_request
from tests.engines.trtllm.bench import BLOCK, MAX_CONTEXT, Trtllm, TrtllmBench

PROMPT = [random.Random(1).randrange(3, 300) for _ in range(75)]


def _prompt(seed: int, length: int = 75) -> list[int]:
    return [random.Random(seed).randrange(3, 300) for _ in range(length)]


def _reference(engines: Trtllm, prompt: list[int], **sampling: Any) -> list[int]:
    return engines.make(Role.AGGREGATED).decode(make_request("ref", prompt, **sampling))[0]


def unpacked(ticket: bytes | None) -> Any:
    """The DisaggregatedParams in a ticket."""
    library = load_library()
    return unpack(unseal(ticket or b"", KEY, time.time()).opaque, library.disaggregated_params, library.logprob)


def _failed(bench: TrtllmBench, request_id: str) -> RequestFailed:
    bench.wait(lambda: bench.last(request_id) is not None)
    failed = bench.last(request_id)
    assert isinstance(failed, RequestFailed), failed
    return failed


# --- the handoff -------------------------------------------------------------------------------------------------------


def test_the_kv_really_comes_from_the_prefill_worker(engines: Trtllm) -> None:
    """With other KV on the way the text is another: decode does not compute the prompt by itself."""
    prefill, decode = engines.make(Role.PREFILL), engines.make(Role.DECODE)
    expected = _reference(engines, PROMPT)
    prefill.knobs.set(spoiled_kv=True)
    done = prefill.prefill(make_request("p", PROMPT))
    tokens, _ = decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    assert done.token_id == expected[0]
    assert tokens != expected[1:]
    assert decode.knobs.state["generation_requests"] == 1
    assert decode.knobs.state["plain_requests"] == 1, "the start-up request and nothing else"


def test_the_report_says_what_the_engine_knows_and_no_more(engines: Trtllm) -> None:
    prefill, decode = engines.make(Role.PREFILL), engines.make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    _, report = decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    assert (report.digest, report.transport, report.received_bytes) == ("unchecked", "UCX", 0)
    assert report.transfer_ms > 0
    ready = decode.kv_ready("d")
    assert ready is not None
    assert (ready.lease_id, ready.report.received_tokens) == (done.lease_id, len(PROMPT))


def test_a_handoff_that_went_well_leaves_nothing_on_either_side(engines: Trtllm) -> None:
    prefill, decode = engines.make(Role.PREFILL), engines.make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    assert prefill.engine.load().active_leases == 1
    decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    prefill.fetched(done.lease_id)
    for bench in (prefill, decode):
        bench.assert_nothing_held()
        bench.knobs.wait_state(used_blocks=0, pinned_requests=0, leaked_blocks=0, active_requests=0)


def test_max_tokens_1_is_no_handoff(engines: Trtllm) -> None:
    """Its KV would wait for nobody."""
    prefill = engines.make(Role.PREFILL)
    done = prefill.prefill(make_request("p", PROMPT, max_tokens=1))
    assert (done.ticket, done.lease_id, done.finish_reason) == (None, None, FinishReason.LENGTH)
    prefill.knobs.wait_state(context_requests=0, used_blocks=0)


def test_a_prompt_of_full_context_but_one_ends_at_the_first_token(engines12: Trtllm) -> None:
    prefill = engines12.make(Role.PREFILL)
    done = prefill.prefill(make_request("p", _prompt(3, MAX_CONTEXT - 1), max_tokens=50))
    assert (done.ticket, done.finish_reason) == (None, FinishReason.LENGTH)


def test_a_stop_at_the_first_token_is_no_handoff_and_its_kv_is_dropped(engines: Trtllm) -> None:
    first = _reference(engines, PROMPT, max_tokens=1)[0]
    prefill = engines.make(Role.PREFILL, lease_s=0.3)
    done = prefill.prefill(make_request("p", PROMPT, stop_token_ids=(first,)))
    assert (done.token_id, done.finish_reason, done.ticket) == (first, FinishReason.STOP, None)
    prefill.assert_nothing_held()
    prefill.knobs.wait_state(used_blocks=0)


def test_each_attempt_has_an_id_of_its_own(engines13: Trtllm) -> None:
    """Asked twice under one id, generation can wait for ever."""
    prefill, decode = engines13.make(Role.PREFILL), engines13.make(Role.DECODE)
    dones = [prefill.prefill(make_request(f"p{i}", PROMPT)) for i in range(3)]
    ids = {unpacked(done.ticket).disagg_request_id for done in dones}
    assert len(ids) == 3
    assert min(ids) >= 2**40, "below are TensorRT-LLM's own"
    answers = [decode.decode(decode.handed(done, f"d{i}", PROMPT), done.ticket) for i, done in enumerate(dones)]
    assert {tuple(tokens) for tokens, _ in answers} == {tuple(_reference(engines13, PROMPT)[1:])}
    assert [report.received_tokens for _, report in answers] == [len(PROMPT)] * 3


# --- handoffs that fail ------------------------------------------------------------------------------------------------


def test_kv_that_does_not_come_costs_a_recompute_and_not_the_text(engines: Trtllm) -> None:
    prefill, decode = engines.make(Role.PREFILL), engines.make(Role.DECODE, first_output_s=0.3)
    expected = _reference(engines, PROMPT)
    prefill.knobs.set(silent_sender=True)
    done = prefill.prefill(make_request("p", PROMPT))
    tokens, report = decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    assert [done.token_id, *tokens] == expected
    assert report.digest == RefusalReason.TRANSFER_TIMEOUT.value
    assert (report.received_tokens, report.recomputed_tokens) == (0, len(PROMPT))
    assert decode.kv_ready("d") is not None
    assert decode.engine.load().fault == "", "one lost handoff is no reason to restart"


def test_a_transfer_that_tensorrt_llm_gives_up_costs_a_recompute(engines: Trtllm) -> None:
    """Without waiting for our own deadline, and nothing is left of it."""
    prefill, decode = engines.make(Role.PREFILL), engines.make(Role.DECODE, knobs={"gives_up_ms": 100})
    expected = _reference(engines, PROMPT)
    prefill.knobs.set(silent_sender=True)
    done = prefill.prefill(make_request("p", PROMPT))
    began = time.monotonic()
    tokens, report = decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    assert time.monotonic() - began < 4, "engine.trtllm.first_output_s is 5"
    assert [done.token_id, *tokens] == expected
    assert report.digest == RefusalReason.TRANSFER_TIMEOUT.value
    decode.assert_nothing_held()
    decode.knobs.wait_state(used_blocks=0, leaked_blocks=0, active_requests=0)


def test_a_handoff_left_behind_ends_when_tensorrt_llm_gives_it_up(engines12: Trtllm) -> None:
    prefill = engines12.make(Role.PREFILL)
    decode = engines12.make(Role.DECODE, first_output_s=0.2, knobs={"gives_up_ms": 800})
    prefill.knobs.set(silent_sender=True)
    done = prefill.prefill(make_request("p", PROMPT))
    decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    assert decode.engine.load().held_blocks > 0
    decode.assert_nothing_held()
    decode.knobs.wait_state(used_blocks=0, leaked_blocks=0, active_requests=0)


def test_a_sender_that_is_gone_costs_a_recompute(engines: Trtllm) -> None:
    prefill, decode = engines.make(Role.PREFILL), engines.make(Role.DECODE, first_output_s=0.3)
    expected = _reference(engines, PROMPT)
    done = prefill.prefill(make_request("p", PROMPT))
    prefill.engine.close()
    tokens, report = decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    assert [done.token_id, *tokens] == expected
    assert report.digest == RefusalReason.TRANSFER_TIMEOUT.value


def test_a_ticket_that_expires_while_it_waits_for_a_slot_is_recomputed(engines12: Trtllm) -> None:
    prefill = engines12.make(Role.PREFILL, lease_s=0.6)
    decode = engines12.make(Role.DECODE, lease_s=0.6, max_batch=1, knobs={"step_ms": 10})
    decode.engine.decode(make_request("long", _prompt(2), max_tokens=100), None)
    done = prefill.prefill(make_request("p", PROMPT))
    tokens, report = decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    assert report.digest == RefusalReason.EXPIRED.value
    assert [done.token_id, *tokens] == _reference(engines12, PROMPT)
    assert decode.knobs.state["generation_requests"] == 0


def test_a_ticket_of_another_transceiver_is_refused(engines12: Trtllm) -> None:
    prefill = engines12.make(Role.PREFILL, cache_transceiver_config=CacheTransceiverConfig(backend="NIXL"))
    decode = engines12.make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    _, report = decode.decode(decode.handed(done, "d", PROMPT), done.ticket)
    assert report.digest == RefusalReason.TRANSFER_FAILED.value


def test_a_ticket_is_good_for_its_own_first_token_only(engines12: Trtllm) -> None:
    prefill, decode = engines12.make(Role.PREFILL), engines12.make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT))
    _, report = decode.decode(make_request("d", PROMPT, [done.token_id + 1]), done.ticket)
    assert report.digest == RefusalReason.FOREIGN_CONTENT.value


# --- aborts ------------------------------------------------------------------------------------------------------------


def test_an_abort_in_transit_waits_until_the_kv_has_landed(engines: Trtllm) -> None:
    """Aborted at once the blocks would be lost for ever: the fake shows it as the real one does."""
    prefill, decode = engines.make(Role.PREFILL, knobs={"transfer_ms": 300}), engines.make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT, max_tokens=500))
    decode.engine.decode(decode.handed(done, "d", PROMPT, max_tokens=500), done.ticket)
    decode.knobs.wait_state(active_requests=1)
    decode.engine.abort(RequestId("d"))
    decode.assert_nothing_held()
    decode.knobs.wait_state(used_blocks=0, leaked_blocks=0, active_requests=0)
    assert decode.last("d") is None
    assert decode.kv_ready("d") is None


@pytest.mark.parametrize("when", ["at once", "in transit", "streaming"])
def test_a_burst_of_aborts_leaks_nothing(engines12: Trtllm, when: str) -> None:
    prefill, decode = engines12.make(Role.PREFILL, lease_s=0.5, knobs={"transfer_ms": 50}), engines12.make(Role.DECODE)
    for i in range(40):
        prefill.engine.prefill(make_request(f"p{i}", _prompt(i), max_tokens=500))
    if when != "at once":
        for i in range(40):
            done = prefill.result_of(f"p{i}")
            decode.engine.decode(decode.handed(done, f"d{i}", _prompt(i), max_tokens=500), done.ticket)
    if when == "streaming":
        decode.wait(lambda: sum(decode.kv_ready(f"d{i}") is not None for i in range(40)) > 20)
    for i in range(40):
        prefill.engine.abort(RequestId(f"p{i}"))
        decode.engine.abort(RequestId(f"d{i}"))
    for bench in (prefill, decode):
        bench.assert_nothing_held()
        bench.knobs.wait_state(used_blocks=0, leaked_blocks=0, pinned_requests=0, active_requests=0)
        assert bench.engine.load().fault == ""
        bench.wait_load(lambda: bench.engine.load().active_leases == 0, timeout_s=10)  # noqa: B023
    done = prefill.prefill(make_request("again", PROMPT))
    tokens, report = decode.decode(decode.handed(done, "dagain", PROMPT), done.ticket)
    assert report.received_tokens == len(PROMPT)
    assert [done.token_id, *tokens] == _reference(engines12, PROMPT)


def test_a_stream_with_logprobs_can_be_aborted(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED, knobs={"step_ms": 2})
    engine.engine.decode(make_request("x", PROMPT, max_tokens=900, logprobs=2), None)
    engine.wait(lambda: len(engine.outputs.get("x", [])) > 3)
    engine.engine.abort(RequestId("x"))
    engine.assert_nothing_held()
    engine.knobs.wait_state(used_blocks=0)
    engine.decode(make_request("y", PROMPT, logprobs=2))


def test_a_recompute_can_be_aborted_too(engines12: Trtllm) -> None:
    prefill, decode = engines12.make(Role.PREFILL), engines12.make(Role.DECODE, first_output_s=0.2, knobs={"step_ms": 5})
    prefill.knobs.set(silent_sender=True)
    done = prefill.prefill(make_request("p", PROMPT, max_tokens=900))
    decode.engine.decode(decode.handed(done, "d", PROMPT, max_tokens=900), done.ticket)
    decode.wait(lambda: any(isinstance(output, TokenChunk) for output in decode.outputs.get("d", [])))
    decode.engine.abort(RequestId("d"))
    decode.wait_load(lambda: decode.engine.load().running_requests == 0)
    decode.knobs.wait_state(active_requests=1)  # the handoff that never came; nobody can take it back


def test_a_request_that_does_not_end_when_aborted_is_let_go(engines12: Trtllm) -> None:
    engine = engines12.make(Role.AGGREGATED, knobs={"deaf_to_abort": True, "step_ms": 5})
    engine.engine.decode(make_request("x", PROMPT, max_tokens=900), None)
    engine.wait(lambda: len(engine.outputs.get("x", [])) > 2)
    engine.engine.abort(RequestId("x"))
    engine.assert_nothing_held()


def test_aborted_prompts_give_their_kv_back_when_their_time_is_over(engines: Trtllm) -> None:
    prefill = engines.make(Role.PREFILL, lease_s=0.5)
    prefill.prefill(make_request("p", PROMPT))
    prefill.engine.abort(RequestId("p"))
    assert prefill.engine.load().active_leases == 1, "TensorRT-LLM still has it"
    began = time.monotonic()
    prefill.assert_nothing_held()
    prefill.knobs.wait_state(used_blocks=0, pinned_requests=0)
    assert time.monotonic() - began < 1.5


# --- limits ------------------------------------------------------------------------------------------------------------


def test_a_prefill_worker_holds_so_many_handoffs_and_the_rest_wait(engines: Trtllm) -> None:
    prefill = engines.make(Role.PREFILL, lease_s=30, max_handoffs=3)
    for i in range(6):
        prefill.engine.prefill(make_request(f"p{i}", _prompt(i)))
    prefill.wait(lambda: sum(prefill.last(f"p{i}") is not None for i in range(6)) == 3)
    time.sleep(0.2)
    assert prefill.knobs.state["pinned_requests"] == 3
    load = prefill.engine.load()
    assert (load.active_leases, load.queued_requests) == (3, 3)
    prefill.fetched(prefill.result_of("p0").lease_id)
    prefill.wait(lambda: sum(prefill.last(f"p{i}") is not None for i in range(6)) == 4)
    prefill.engine.abort(RequestId("p5"))
    prefill.wait_load(lambda: prefill.engine.load().queued_requests == 1)


def test_waiting_prompts_go_on_when_nobody_fetches(engines12: Trtllm) -> None:
    """Orphans end by their time-out: the queue moves without a single release."""
    prefill = engines12.make(Role.PREFILL, lease_s=0.3, max_handoffs=2)
    for i in range(5):
        prefill.engine.prefill(make_request(f"p{i}", _prompt(i)))
    prefill.wait(lambda: all(prefill.last(f"p{i}") is not None for i in range(5)), timeout_s=10)


def test_published_kv_leaves_room_for_prompts(engines12: Trtllm) -> None:
    """A pool full of KV for others could compute nothing, and in 1.2 nothing would ever free it."""
    prefill = engines12.make(Role.PREFILL, lease_s=30, pool_tokens=1024)
    for i in range(8):
        prefill.engine.prefill(make_request(f"p{i}", _prompt(i, 200)))
    time.sleep(0.5)
    held = prefill.engine.load().held_blocks
    assert held <= 1024 // BLOCK * 0.75
    assert held > 1024 // BLOCK * 0.5


def test_handoffs_wait_here_and_not_in_tensorrt_llm(engines12: Trtllm) -> None:
    """There their time to the first output would run while they queue, and a busy worker would look like a broken one."""
    prefill = engines12.make(Role.PREFILL, lease_s=30)
    decode = engines12.make(Role.DECODE, lease_s=30, pool_tokens=600, first_output_s=0.4, knobs={"step_ms": 5})
    for i in range(8):
        done = prefill.prefill(make_request(f"p{i}", _prompt(i), max_tokens=120))
        decode.engine.decode(decode.handed(done, f"d{i}", _prompt(i), max_tokens=120), done.ticket)
    assert all(decode.result(f"d{i}")[1].digest == "unchecked" for i in range(8))
    assert decode.engine.load().fault == ""


def test_waiting_requests_meet_their_deadline(engines12: Trtllm) -> None:
    prefill = engines12.make(Role.PREFILL, lease_s=30, max_handoffs=1)
    prefill.prefill(make_request("p0", _prompt(0)))
    prefill.engine.prefill(make_request("p1", _prompt(1), timeout_s=0.3))
    failed = _failed(prefill, "p1")
    assert (failed.code, failed.retryable) == (TritonCode.UNAVAILABLE, False)


def test_a_full_queue_refuses_at_once(engines12: Trtllm) -> None:
    prefill = engines12.make(Role.PREFILL, lease_s=30, max_handoffs=1, max_queue=2)
    for i in range(4):
        prefill.engine.prefill(make_request(f"p{i}", _prompt(i)))
    failed = _failed(prefill, "p3")
    assert (failed.code, failed.retryable) == (TritonCode.UNAVAILABLE, True)
    assert "queue" in failed.message


def test_priority_decides_who_waits(engines12: Trtllm) -> None:
    engine = engines12.make(Role.AGGREGATED, max_batch=1, knobs={"step_ms": 5})
    engine.engine.decode(make_request("first", PROMPT, max_tokens=20), None)
    engine.engine.decode(make_request("later", _prompt(1), max_tokens=2), None)
    engine.engine.decode(msgspec.structs.replace(make_request("urgent", _prompt(2), max_tokens=2), priority=-1), None)
    engine.result("later")
    order = list(engine.outputs)
    assert order.index("urgent") < order.index("later")


# --- failures of the engine --------------------------------------------------------------------------------------------


def test_one_requests_failure_is_its_own(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED, knobs={"fail_on_token": 299_999})
    failing = make_request("x", [*PROMPT, 299_999])
    engine.engine.decode(failing, None)
    failed = _failed(engine, "x")
    assert (failed.code, failed.retryable) == (TritonCode.INTERNAL, True)
    assert "the request has failed" in failed.message
    engine.decode(make_request("y", PROMPT))
    assert engine.engine.load().fault == ""


def test_any_other_failure_is_the_engines(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED, knobs={"crash_on_token": 299_999, "step_ms": 5})
    engine.engine.decode(make_request("bystander", PROMPT, max_tokens=900), None)
    engine.wait(lambda: len(engine.outputs.get("bystander", [])) > 1)
    engine.engine.decode(make_request("x", [*PROMPT, 299_999]), None)
    for request_id in ("x", "bystander"):
        assert _failed(engine, request_id).retryable
    assert "illegal memory access" in engine.engine.load().fault
    engine.engine.decode(make_request("later", PROMPT), None)
    failed = _failed(engine, "later")
    assert (failed.code, failed.retryable) == (TritonCode.UNAVAILABLE, True)


def test_an_engine_that_failed_idle_is_a_fault_at_the_third_request(engines: Trtllm) -> None:
    """Nothing runs whose answer would tell: TensorRT-LLM raises for whatever it is asked, as if each were at fault."""
    engine = engines.make(Role.AGGREGATED)
    engine.decode(make_request("well", PROMPT))
    engine.knobs.set(dead=True)
    for i in range(3):
        assert engine.engine.load().fault == ""
        engine.engine.decode(make_request(f"x{i}", PROMPT), None)
        failed = _failed(engine, f"x{i}")
        assert (failed.code, failed.retryable) == (TritonCode.INTERNAL, True)
    assert "takes no requests: RuntimeError: the executor has failed" in engine.engine.load().fault


def test_a_stream_that_stalls_is_a_fault(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED, stall_s=0.5, knobs={"step_ms": 5})
    engine.engine.decode(make_request("x", PROMPT, max_tokens=900), None)
    engine.wait(lambda: len(engine.outputs.get("x", [])) > 2)
    assert engine.engine.load().fault == ""
    engine.knobs.set(wedged=True)
    engine.wait_load(lambda: "said nothing" in engine.engine.load().fault, timeout_s=2)


def test_prompts_may_take_longer_than_a_token(engines12: Trtllm) -> None:
    engine = engines12.make(Role.PREFILL, stall_s=0.2, prompt_stall_s=5.0, knobs={"prefill_us_per_token": 10_000})
    engine.engine.prefill(make_request("x", PROMPT))
    time.sleep(0.5)
    assert engine.engine.load().fault == ""
    engine.knobs.set(wedged=True)
    assert isinstance(engine.result_of("x"), PrefillDone)


def test_an_idle_engine_is_no_stalled_one(engines12: Trtllm) -> None:
    engine = engines12.make(Role.AGGREGATED, stall_s=0.2, prompt_stall_s=0.2)
    engine.decode(make_request("x", PROMPT))
    time.sleep(0.5)
    assert engine.engine.load().fault == ""
    engine.decode(make_request("y", PROMPT))
    assert engine.engine.load().fault == ""


def test_a_loop_that_stands_still_is_a_fault(engines12: Trtllm) -> None:
    engine = engines12.make(Role.AGGREGATED, stall_s=0.3)
    engine.engine._loop.call_soon_threadsafe(time.sleep, 1.0)  # type: ignore[attr-defined]
    engine.engine.decode(make_request("x", PROMPT), None)
    engine.wait_load(lambda: "event loop" in engine.engine.load().fault, timeout_s=0.9)
    engine.result("x")
    assert engine.engine.load().fault == "", "it turns again"


def test_a_transceiver_that_fails_every_handoff_is_a_fault_on_both_sides(engines: Trtllm) -> None:
    prefill = engines.make(Role.PREFILL, lease_s=30)
    decode = engines.make(Role.DECODE, lease_s=30, first_output_s=0.2)
    prefill.knobs.set(silent_sender=True)
    for i in range(4):
        assert decode.engine.load().fault == prefill.engine.load().fault == ""
        done = prefill.prefill(make_request(f"p{i}", _prompt(i)))
        _, report = decode.decode(decode.handed(done, f"d{i}", _prompt(i)), done.ticket)
        assert report.digest == RefusalReason.TRANSFER_TIMEOUT.value
        prefill.engine.release(done.lease_id or "", LeaseEnd.LOST)
    assert "handoffs" in decode.engine.load().fault
    prefill.wait_load(lambda: "handoffs" in prefill.engine.load().fault)


def test_handoffs_of_one_dead_sender_are_no_fault(engines12: Trtllm) -> None:
    """However many were under way when it died: they came before the first failure was seen."""
    prefill, decode = engines12.make(Role.PREFILL), engines12.make(Role.DECODE, first_output_s=0.3)
    dones = [prefill.prefill(make_request(f"p{i}", _prompt(i))) for i in range(10)]
    prefill.engine.close()
    for i, done in enumerate(dones):
        decode.engine.decode(decode.handed(done, f"d{i}", _prompt(i)), done.ticket)
    for i in range(10):
        _, report = decode.result(f"d{i}")
        assert report.digest == RefusalReason.TRANSFER_TIMEOUT.value
    assert decode.engine.load().fault == ""


def test_lost_handoffs_that_hold_half_of_the_worker_are_a_fault(engines12: Trtllm) -> None:
    prefill, decode = engines12.make(Role.PREFILL), engines12.make(Role.DECODE, first_output_s=0.2, max_batch=8)
    dones = [prefill.prefill(make_request(f"p{i}", _prompt(i))) for i in range(4)]
    prefill.engine.close()
    for i, done in enumerate(dones):
        decode.engine.decode(decode.handed(done, f"d{i}", _prompt(i)), done.ticket)
    decode.wait_load(lambda: "never arrived" in decode.engine.load().fault)


# --- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        ({"min_p": 0.1, "temperature": 1.0}, "min_p"),
        ({"logit_bias": {5: 1.0}}, "logit_bias"),
        ({"min_tokens": 3, "stop_token_ids": (77,)}, "stop_token_ids"),
    ],
)
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_what_it_can_not_do_is_refused_by_name(engines: Trtllm, role: Role, sampling: dict[str, Any], name: str) -> None:
    bench = engines.make(role)
    request = make_request("x", PROMPT, **sampling)
    if role is Role.PREFILL:
        bench.engine.prefill(request)
    else:
        bench.engine.decode(request, None)
    failed = _failed(bench, "x")
    assert (failed.code, failed.retryable) == (TritonCode.INVALID_ARG, False)
    assert name in failed.message


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_are_refused_where_they_have_no_effect(engines: Trtllm, name: str) -> None:
    engine = engines.make(Role.AGGREGATED)
    penalty: dict[str, Any] = {name: 1.5}
    plain, _ = engine.decode(make_request("plain", PROMPT))
    engine.engine.decode(make_request("x", PROMPT, **penalty), None)
    if engines.release == "1.3":
        assert engine.result("x")[0] != plain
    else:
        assert name in _failed(engine, "x").message


def test_a_temperature_samples_in_every_release(engines: Trtllm) -> None:
    """Given alone, 1.1 and 1.2 would take it for greedy."""
    engine = engines.make(Role.AGGREGATED)
    greedy, _ = engine.decode(make_request("greedy", PROMPT, temperature=0))
    sampled, _ = engine.decode(make_request("sampled", PROMPT, temperature=0.7))
    assert sampled != greedy


def test_a_seed_reproduces_where_the_release_honours_it(engines13: Trtllm) -> None:
    engine = engines13.make(Role.AGGREGATED)
    one, _ = engine.decode(make_request("one", PROMPT, temperature=0.7, seed=5))
    two, _ = engine.decode(make_request("two", PROMPT, temperature=0.7, seed=5))
    other, _ = engine.decode(make_request("other", PROMPT, temperature=0.7, seed=6))
    assert one == two != other


@pytest.mark.parametrize("handed_over", [False, True])
def test_an_end_token_ends_the_stream_and_is_its_last_token(engines: Trtllm, handed_over: bool) -> None:
    """By TensorRT-LLM's own end token or by a stop token id, which it takes off the tokens."""
    knobs = {"eos_every": 4, "step_ms": 0.2}
    prefill, decode = engines.make(Role.PREFILL, knobs=knobs), engines.make(Role.DECODE, knobs=knobs)
    ended = 0
    for i in range(8):
        prompt, ticket, given = _prompt(i), None, []
        if handed_over:
            done = prefill.prefill(make_request(f"p{i}", prompt, max_tokens=30))
            if done.finish_reason is not None:
                assert (done.finish_reason, done.token_id, done.ticket) == (FinishReason.STOP, 2, None)
                continue
            ticket, given = done.ticket, [done.token_id]
        tokens, _ = decode.decode(make_request(f"d{i}", prompt, given, max_tokens=30), ticket)
        last = decode.last(f"d{i}")
        assert isinstance(last, TokenChunk)
        assert 2 not in tokens[:-1]
        assert (last.finish_reason is FinishReason.STOP) == (tokens[-1] == 2)
        ended += tokens[-1] == 2
    assert ended > 2


def test_min_tokens_and_ignore_eos_hold_on_both_halves(engines: Trtllm) -> None:
    knobs = {"eos_every": 2, "step_ms": 0.2}
    prefill, decode = engines.make(Role.PREFILL, knobs=knobs), engines.make(Role.DECODE, knobs=knobs)
    for i in range(6):
        done = prefill.prefill(make_request(f"p{i}", _prompt(i), max_tokens=30, min_tokens=10))
        tokens, _ = decode.decode(decode.handed(done, f"d{i}", _prompt(i), max_tokens=30, min_tokens=10), done.ticket)
        assert len(tokens) + 1 >= 10
        done = prefill.prefill(make_request(f"q{i}", _prompt(i), max_tokens=12, ignore_eos=True))
        tokens, _ = decode.decode(decode.handed(done, f"e{i}", _prompt(i), max_tokens=12, ignore_eos=True), done.ticket)
        assert len(tokens) + 1 == 12


@pytest.mark.parametrize("wanted", [0, 3])
def test_logprobs_of_every_token(engines: Trtllm, wanted: int) -> None:
    """Before 1.3 the first token's can't be handed over: then the prompt is computed again, and says so."""
    prefill, decode = engines.make(Role.PREFILL), engines.make(Role.DECODE)
    done = prefill.prefill(make_request("p", PROMPT, logprobs=wanted))
    assert done.logprob == TokenLogprob(done.token_id, -0.5, done.logprob.top if done.logprob else [])
    tokens, report = decode.decode(decode.handed(done, "d", PROMPT, logprobs=wanted), done.ticket)
    chunks = [output for output in decode.outputs["d"] if isinstance(output, TokenChunk)]
    entries = [entry for chunk in chunks for entry in chunk.logprobs or []]
    assert [entry.token_id for entry in entries] == tokens
    assert all(entry.logprob == -0.5 and len(entry.top) == wanted for entry in entries)
    if engines.release == "1.3":
        assert (report.digest, report.received_tokens) == ("unchecked", len(PROMPT))
    else:
        assert (report.digest, done.lease_id) == (RefusalReason.UNSUPPORTED.value, None)
        assert prefill.knobs.state["context_requests"] == 0, "KV would be kept for nobody"
    assert [done.token_id, *tokens] == _reference(engines, PROMPT)


def test_stream_interval_changes_the_pieces_and_not_the_text(engines12: Trtllm) -> None:
    coarse = engines12.make(
        Role.AGGREGATED, aggregated=LlmConfig(stream_interval=4, kv_cache_config=KvCacheConfig(max_tokens=8192))
    )
    tokens, _ = coarse.decode(make_request("x", PROMPT, max_tokens=20))
    assert tokens == _reference(engines12, PROMPT, max_tokens=20)
    chunks = [output for output in coarse.outputs["x"] if isinstance(output, TokenChunk)]
    assert len(chunks) < 10


SPECULATIVE = {"decoding_type": "MTP", "num_nextn_predict_layers": 3}


def _speculating(**fields: Any) -> LlmConfig:
    return LlmConfig(speculative_config=SPECULATIVE, kv_cache_config=KvCacheConfig(max_tokens=8192), **fields)


def test_speculative_decoding_changes_the_pieces_and_not_the_text(engines: Trtllm) -> None:
    """Drafts travel with the handoff, and a step brings as many tokens as were accepted."""
    prefill = engines.make(Role.PREFILL, prefill=_speculating())
    decode = engines.make(Role.DECODE, decode=_speculating())
    done = prefill.prefill(make_request("p", PROMPT, max_tokens=40))
    tokens, report = decode.decode(decode.handed(done, "d", PROMPT, max_tokens=40), done.ticket)
    assert [done.token_id, *tokens] == _reference(engines, PROMPT, max_tokens=40)
    assert (report.received_tokens, report.recomputed_tokens) == (len(PROMPT), 0)
    chunks = [output for output in decode.outputs["d"] if isinstance(output, TokenChunk)]
    assert len(chunks) < 30
    for bench in (prefill, decode):
        bench.knobs.wait_state(leaked_blocks=0, active_requests=0)


@pytest.mark.parametrize(
    ("prefill", "warning"),
    [
        (LlmConfig(tensor_parallel_size=2), "tensor_parallel_size is 2 for prefill and 1 for decode.*#6507"),
        (LlmConfig(pipeline_parallel_size=2), "pipeline_parallel_size is 2 for prefill and 1 for decode"),
        (LlmConfig(speculative_config=SPECULATIVE), "speculative_config differs"),
    ],
)
def test_what_is_allowed_and_known_to_go_wrong_is_warned_of(
    tiny: Path, caplog: pytest.LogCaptureFixture, prefill: LlmConfig, warning: str
) -> None:
    workers = (
        WorkerConfig(Role.PREFILL, "prefill", "trtllm", gpus="0,1" if prefill.num_gpus == 2 else "0"),
        WorkerConfig(Role.DECODE, "decode", "trtllm", gpus="2"),
    )
    trtllm = TrtllmConfig(prefill=prefill, cache_transceiver_config=CacheTransceiverConfig(backend="UCX"))
    deployment = Deployment(
        model=ModelConfig(path=str(tiny), max_context=MAX_CONTEXT), workers=workers, engine=EngineConfig(trtllm=trtllm)
    )
    create_engine(deployment, workers[1], Epoch(1), KEY)
    assert re.search(warning, caplog.text)


# --- events ------------------------------------------------------------------------------------------------------------


def _told(bench: TrtllmBench) -> set[bytes]:
    told: set[bytes] = set()
    for change in bench.changes:
        told = (set() if change.reset else told) - set(change.removed) | set(change.stored)
    return told


def _hashes(bench: TrtllmBench, tokens: list[int], salt: str = "") -> set[bytes]:
    return set(block_hashes(tokens, BLOCK, chain_root(bench.engine.info.fingerprint, salt)))


def test_events_name_blocks_as_the_router_does(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED)
    tokens, _ = engine.decode(make_request("x", PROMPT, max_tokens=30))
    whole = _hashes(engine, [*PROMPT, *tokens[:-1]])
    engine.wait(lambda: _told(engine) == whole, timeout_s=3)
    assert engine.engine.load().tells_blocks


def test_evicted_blocks_are_told(engines12: Trtllm) -> None:
    engine = engines12.make(Role.AGGREGATED, pool_tokens=512)
    engine.decode(make_request("x", PROMPT))
    engine.wait(lambda: _hashes(engine, PROMPT) <= _told(engine), timeout_s=3)
    for i in range(8):
        engine.decode(make_request(f"f{i}", _prompt(100 + i, 200)))
    engine.wait(lambda: not _hashes(engine, PROMPT) & _told(engine), timeout_s=3)


def test_salted_blocks_are_told_under_their_own_salt(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED)
    engine.decode(make_request("x", PROMPT, salt="tenant"))
    engine.wait(lambda: _hashes(engine, PROMPT, "tenant") <= _told(engine), timeout_s=3)
    assert not _hashes(engine, PROMPT) & _told(engine)


def test_a_first_block_under_two_salts_is_told_under_neither(engines: Trtllm) -> None:
    """The events don't say whose blocks they are."""
    engine = engines.make(Role.AGGREGATED)
    engine.engine.decode(make_request("a", PROMPT, salt="a"), None)
    engine.engine.decode(make_request("b", PROMPT, salt="b"), None)
    engine.result("a")
    engine.result("b")
    engine.decode(make_request("other", _prompt(5)))
    engine.wait(lambda: _hashes(engine, _prompt(5)) <= _told(engine), timeout_s=3)
    assert not _told(engine) & (_hashes(engine, PROMPT, "a") | _hashes(engine, PROMPT, "b") | _hashes(engine, PROMPT))


def test_lost_events_reset_what_was_told(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED)
    engine.decode(make_request("x", PROMPT))
    engine.wait(lambda: bool(_told(engine)), timeout_s=3)
    engine.knobs.set(lose_event=2)
    for i in range(6):
        engine.decode(make_request(f"y{i}", _prompt(10 + i)))
    engine.wait(lambda: sum(change.reset for change in engine.changes) > 1, timeout_s=3)
    assert not _hashes(engine, PROMPT) & _told(engine)
    assert engine.engine.load().tells_blocks
    engine.knobs.set()
    engine.decode(make_request("z", _prompt(20)))  # a loss is noticed with the event after it
    engine.wait(lambda: _hashes(engine, _prompt(20)) <= _told(engine), timeout_s=10)
    engine.decode(make_request("again", PROMPT))
    engine.wait(lambda: _hashes(engine, PROMPT) <= _told(engine), timeout_s=10)


def test_a_busy_engine_tells_everything_when_asked(engines12: Trtllm) -> None:
    """Its events never pause; a router that was restarted must not wait for a pause."""
    engine = engines12.make(Role.AGGREGATED, knobs={"updates": True, "step_ms": 5})
    engine.engine.decode(make_request("x", PROMPT, max_tokens=1900), None)
    engine.wait(lambda: _hashes(engine, PROMPT) <= _told(engine), timeout_s=5)
    before = len(engine.changes)
    engine.engine.resync()
    engine.wait(lambda: any(change.reset for change in engine.changes[before:]), timeout_s=5)
    assert engine.engine.load().running_requests == 1, "it is busy for ten seconds"
    told = next(change for change in engine.changes[before:] if change.reset)
    assert _hashes(engine, PROMPT) <= set(told.stored)
    engine.engine.abort(RequestId("x"))


def test_an_engine_without_events_says_that_it_is_blind(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED, knobs={"no_events": True})
    engine.wait_load(lambda: not engine.engine.load().tells_blocks, timeout_s=8)
    engine.engine.resync()
    engine.wait(lambda: sum(change.reset for change in engine.changes) == 2, timeout_s=2)
    engine.decode(make_request("x", PROMPT))


def test_events_that_are_switched_off_are_blindness_too(engines12: Trtllm) -> None:
    off = LlmConfig(kv_cache_config=KvCacheConfig(max_tokens=8192, event_buffer_max_size=0))
    assert not engines12.make(Role.AGGREGATED, aggregated=off).engine.load().tells_blocks
    no_cache = LlmConfig(kv_cache_config=KvCacheConfig(max_tokens=8192, enable_block_reuse=False))
    assert engines12.make(Role.AGGREGATED, aggregated=no_cache).engine.load().tells_blocks, "there is nothing to tell"


# --- start and end -----------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_load_is_told_in_its_own_words(engines: Trtllm) -> None:
    with pytest.raises(ConfigError, match=r"TensorRT-LLM 1.* does not load the model: RuntimeError: CUDA out of memory"):
        engines.make(Role.AGGREGATED, knobs={"load_error": "CUDA out of memory\nTried to allocate"})


def test_loading_has_an_end(engines12: Trtllm) -> None:
    with pytest.raises(ConfigError, match=r"not loaded the model within 0\.3 s \(engine\.trtllm\.load_timeout_s\)"):
        engines12.make(Role.AGGREGATED, load_timeout_s=0.3, knobs={"load_s": 2.0})


def test_closing_answers_what_waits_and_what_runs(engines: Trtllm) -> None:
    engine = engines.make(Role.AGGREGATED, max_batch=1, knobs={"step_ms": 5})
    engine.engine.decode(make_request("runs", PROMPT, max_tokens=900), None)
    engine.engine.decode(make_request("waits", _prompt(2)), None)
    engine.wait(lambda: len(engine.outputs.get("runs", [])) > 1)
    engine.engine.close()
    for request_id in ("runs", "waits"):
        failed = engine.last(request_id)
        assert isinstance(failed, RequestFailed)
        assert failed.retryable


def test_a_wedged_engine_can_be_closed(engines12: Trtllm) -> None:
    engine = engines12.make(Role.AGGREGATED, knobs={"step_ms": 5})
    engine.engine.decode(make_request("x", PROMPT, max_tokens=900), None)
    engine.wait(lambda: len(engine.outputs.get("x", [])) > 1)
    engine.knobs.set(wedged=True)
    began = time.monotonic()
    engine.engine.close()
    assert time.monotonic() - began < 15
    assert isinstance(engine.last("x"), RequestFailed)
