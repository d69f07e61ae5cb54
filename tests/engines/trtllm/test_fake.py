"""The fake itself, against what is known of the real LLM API: strictness, results, handoffs, and the traps."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.trtllm.playing import RELEASES, Knobs, playing

PROMPT = list(range(3, 80))
TRANSCEIVER = {"backend": "UCX", "kv_transfer_timeout_ms": 300}


class Api:
    """The package of one release, and the LLMs made of it."""

    def __init__(self, release: str, model: Path, knobs: Knobs) -> None:
        self.package: Any = importlib.import_module("tensorrt_llm")
        self.release = release
        self.model = model
        self.knobs = knobs
        self.llms: list[Any] = []

    def llm(self, **arguments: Any) -> Any:
        defaults = {
            "model": str(self.model),
            "backend": "pytorch",
            "max_seq_len": 2048,
            "disable_overlap_scheduler": True,
            "kv_cache_config": {"max_tokens": 2048, "tokens_per_block": 16, "event_buffer_max_size": 1024},
            "cache_transceiver_config": TRANSCEIVER,
        }
        llm = self.package.LLM(**{**defaults, **arguments})
        self.llms.append(llm)
        return llm

    def sampling(self, **fields: Any) -> Any:
        return self.package.SamplingParams(**{"max_tokens": 8, "top_k": 1, **fields})

    def context(self) -> Any:
        own = {"disagg_request_id": time.time_ns()} if self.release == "1.3" else {}
        return self.package.DisaggregatedParams(request_type="context_only", **own)

    def generation(self, output: Any) -> Any:
        params = output.disaggregated_params
        params.request_type = "generation_only"
        return params


@pytest.fixture(params=list(RELEASES))
def api(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Iterator[Api]:
    with playing(RELEASES[request.param], tmp_path) as knobs:
        api = Api(request.param, tiny, knobs)
        yield api
        for llm in api.llms:
            llm.shutdown()


def run(make: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(make(), 20)

    return asyncio.run(bounded())


async def stays_silent(result: Any, seconds: float = 0.3) -> bool:
    step = asyncio.ensure_future(result.__anext__())
    done, _ = await asyncio.wait({step}, timeout=seconds)
    step.cancel()
    return not done


# --- strictness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokenizer_mode": "auto"},
        {"kv_cache_config": {"tokens_per_blok": 16}},
        {"cache_transceiver_config": {"backend": "ucx"}},
        {"cache_transceiver_config": {"backend": "UCX", "kv_transfer_timeout_ms": 0}},
        {"cache_transceiver_config": {"backend": "UCX", "surprise": 1}},
        {"speculative_config": {"decoding_type": "MTP", "surprise": 1}},
    ],
)
def test_unknown_keys_and_wrong_values_raise(api: Api, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Extra inputs|Input should be"):
        api.llm(**arguments)


@pytest.mark.parametrize(
    ("config", "since"),
    [
        ({"backend": "MOONCAKE"}, "1.2"),
        ({"backend": "UCX", "kv_transfer_sender_future_timeout_ms": 500}, "1.2"),
        ({"backend": "UCX", "transceiver_runtime": "CPP"}, "1.3"),
    ],
)
def test_keys_appear_with_their_release(api: Api, config: dict[str, Any], since: str) -> None:
    if api.release >= since:
        api.llm(cache_transceiver_config=config)
    else:
        with pytest.raises(ValueError, match=r"Extra inputs|Input should be"):
            api.llm(cache_transceiver_config=config)


def test_sampling_params_take_documented_fields_only(api: Api) -> None:
    with pytest.raises(TypeError):
        api.sampling(min_p=0.1)


def test_prompts_that_are_too_long_raise_at_once(api: Api) -> None:
    llm = api.llm()
    with pytest.raises(ValueError, match="max_seq_len"):
        llm.generate_async([1] * 2048, sampling_params=api.sampling())


# --- results -----------------------------------------------------------------------------------------------------------


def test_outputs_are_cumulative_and_end_with_a_reason(api: Api) -> None:
    llm = api.llm()

    async def stream() -> list[list[int]]:
        result = llm.generate_async(PROMPT, sampling_params=api.sampling(), streaming=True)
        seen = [list(step.outputs[0].token_ids) async for step in result]
        assert (result.finished, result.outputs[0].finish_reason) == (True, "length")
        assert result.prompt_token_ids == PROMPT
        return seen

    seen = run(stream)
    assert [len(tokens) for tokens in seen] == list(range(1, 9))
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(seen))


def test_awaited_iterated_and_synchronous_results_agree(api: Api) -> None:
    llm = api.llm()

    async def awaited() -> list[int]:
        return list((await llm.generate_async(PROMPT, sampling_params=api.sampling())).outputs[0].token_ids)

    assert run(awaited) == llm.generate_async(PROMPT, sampling_params=api.sampling()).result(5).outputs[0].token_ids


def test_a_result_made_without_a_loop_can_not_be_iterated(api: Api) -> None:
    result = api.llm().generate_async(PROMPT, sampling_params=api.sampling(), streaming=True)

    async def iterate() -> None:
        async for _ in result:
            pass

    with pytest.raises(AssertionError):
        run(iterate)


def test_abort_ends_a_stream(api: Api) -> None:
    api.knobs.set(step_ms=5)
    llm = api.llm()

    async def aborted() -> Any:
        result = llm.generate_async(PROMPT, sampling_params=api.sampling(max_tokens=500), streaming=True)
        async for _ in result:
            if not result.aborted():
                result.abort()
        return result

    result = run(aborted)
    assert (result.outputs[0].finish_reason, len(result.outputs[0].token_ids) < 50) == ("cancelled", True)
    api.knobs.wait_state(used_blocks=0)


def test_stop_token_ids_are_taken_off_and_named(api: Api) -> None:
    llm = api.llm()
    free = llm.generate_async(PROMPT, sampling_params=api.sampling()).result(5).outputs[0].token_ids
    stopped = llm.generate_async(PROMPT, sampling_params=api.sampling(stop_token_ids=[free[3]])).result(5).outputs[0]
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (free[:3], "stop", free[3])


def test_a_temperature_without_top_p_is_greedy(api: Api) -> None:
    llm = api.llm()
    greedy = llm.generate_async(PROMPT, sampling_params=api.sampling()).result(5).outputs[0].token_ids
    alone = api.package.SamplingParams(max_tokens=8, temperature=0.9)
    assert llm.generate_async(PROMPT, sampling_params=alone).result(5).outputs[0].token_ids == greedy


def test_cache_salt_separates(api: Api) -> None:
    llm = api.llm()

    def reused(salt: str | None) -> int:
        sampling = api.sampling(return_perf_metrics=True)
        result = llm.generate_async(PROMPT, sampling_params=sampling, cache_salt=salt).result(5)
        return int(result.outputs[0].request_perf_metrics.kv_cache_metrics.num_reused_blocks)

    assert [reused(None), reused(None), reused("a"), reused("a"), reused("b")] == [0, 4, 0, 4, 0]


# --- handoffs ----------------------------------------------------------------------------------------------------------


def test_context_then_generation_equals_one_request(api: Api) -> None:
    context, generation = api.llm(), api.llm()
    expected = generation.generate_async(PROMPT, sampling_params=api.sampling()).result(5).outputs[0].token_ids

    async def both() -> list[list[int]]:
        sampling = api.sampling()
        first = await context.generate_async(PROMPT, sampling_params=sampling, disaggregated_params=api.context())
        assert sampling.max_tokens == 1, "changed in place"
        output = first.outputs[0]
        assert (output.finish_reason, len(output.token_ids)) == ("length", 1)
        assert isinstance(output.disaggregated_params.opaque_state, bytes)
        params = api.generation(output)
        second = generation.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=params, streaming=True)
        return [list(step.outputs[0].token_ids) async for step in second]

    seen = run(both)
    assert seen[0] == expected[:1], "the first output is the context's token"
    assert seen[-1] == expected


def test_other_kv_gives_other_text(api: Api) -> None:
    context, generation = api.llm(), api.llm()

    async def both(spoiled: bool) -> list[int]:
        api.knobs.set(spoiled_kv=spoiled)
        first = await context.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=api.context())
        params = api.generation(first.outputs[0])
        second = await generation.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=params)
        return list(second.outputs[0].token_ids)

    assert run(lambda: both(False))[1:] != run(lambda: both(True))[1:]


def test_context_without_a_transceiver_fails(api: Api) -> None:
    llm = api.llm(cache_transceiver_config=None)
    result = llm.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=api.context())
    with pytest.raises(RuntimeError, match="cache_transceiver_config: backend"):
        result.result(5)


def test_context_with_overlap_fails_up_to_1_2(api: Api) -> None:
    llm = api.llm(disable_overlap_scheduler=False)
    result = llm.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=api.context())
    if api.release == "1.3":
        assert result.result(5).finished
    else:
        with pytest.raises(RuntimeError, match="overlap"):
            result.result(5)


def test_kv_is_held_until_it_is_pulled(api: Api) -> None:
    context, generation = api.llm(), api.llm(kv_cache_config={"max_tokens": 4096, "tokens_per_block": 16})
    assert context.executor.state().total_blocks == 128

    async def both() -> None:
        first = await context.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=api.context())
        await asyncio.sleep(0.1)
        assert (context.executor.state().pinned_requests, context.executor.state().used_blocks) == (1, 5)
        params = api.generation(first.outputs[0])
        await generation.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=params)
        await asyncio.sleep(0.1)
        assert (context.executor.state().pinned_requests, context.executor.state().used_blocks) == (0, 0)

    run(both)


def test_orphans_end_by_their_time_out_but_only_with_new_work(api: Api) -> None:
    llm = api.llm()

    async def orphan() -> None:
        await llm.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=api.context())
        await asyncio.sleep(0.6)
        assert llm.executor.state().pinned_requests == 1, "its time is over, and nobody looks"
        await llm.generate_async([5], sampling_params=api.sampling(max_tokens=1))
        assert llm.executor.state().pinned_requests == 0

    run(orphan)


def test_without_a_time_out_orphans_are_held_for_ever(api: Api) -> None:
    llm = api.llm(cache_transceiver_config={"backend": "UCX", "kv_transfer_timeout_ms": None})  # the default up to 1.2

    async def orphan() -> None:
        await llm.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=api.context())
        await asyncio.sleep(0.6)
        await llm.generate_async([5], sampling_params=api.sampling(max_tokens=1))
        assert llm.executor.state().pinned_requests == 1

    run(orphan)


def test_generation_for_an_unknown_context_hangs_and_an_abort_then_leaks(api: Api) -> None:
    llm = api.llm()

    async def lost() -> None:
        params = api.package.DisaggregatedParams(
            request_type="generation_only", first_gen_tokens=[5], ctx_request_id=999, opaque_state=b'{"address": "/nowhere"}'
        )
        result = llm.generate_async(PROMPT, sampling_params=api.sampling(), disaggregated_params=params, streaming=True)
        assert await stays_silent(result), "it does not fail"
        result.abort()
        async for _ in result:
            pass
        assert result.outputs[0].finish_reason == "cancelled"
        assert llm.executor.state().leaked_blocks == 6

    run(lost)


def test_logprobs_of_a_generation_need_the_contexts(api: Api) -> None:
    context, generation = api.llm(), api.llm()

    async def both() -> int:
        sampling = {"logprobs": 2}
        first = await context.generate_async(
            PROMPT, sampling_params=api.sampling(**sampling), disaggregated_params=api.context()
        )
        params = api.generation(first.outputs[0])
        second = await generation.generate_async(PROMPT, sampling_params=api.sampling(**sampling), disaggregated_params=params)
        return len(second.outputs[0].logprobs)

    if api.release == "1.3":
        assert run(both) == 8
    else:
        with pytest.raises(AssertionError):
            run(both)


# --- events and statistics ---------------------------------------------------------------------------------------------


def test_events_tell_blocks_and_the_iterator_ends_in_silence(api: Api) -> None:
    llm = api.llm()

    async def read() -> list[dict[str, Any]]:
        await llm.generate_async(PROMPT, sampling_params=api.sampling())
        began = time.monotonic()
        events = [event async for event in llm.get_kv_cache_events_async(timeout=0.2)]
        assert 0.15 < time.monotonic() - began < 2
        return events

    events = run(read)
    assert [event["event_id"] for event in events] == list(range(len(events)))
    assert events[0]["data"]["type"] == "created"
    stored = [block for event in events if event["data"]["type"] == "stored" for block in event["data"]["blocks"]]
    assert [token["token_id"] for block in stored for token in block["tokens"]][:64] == PROMPT[:64]


def test_a_last_block_that_is_not_full_is_told_too(api: Api) -> None:
    """Whoever reads events must know the blocks that can be found from those that can't."""
    llm = api.llm()

    async def read() -> list[dict[str, Any]]:
        await llm.generate_async(PROMPT, sampling_params=api.sampling(max_tokens=1))
        return [event["data"] async for event in llm.get_kv_cache_events_async(timeout=0.2)]

    (*_, full, partial, removed) = run(read)
    assert [len(block["tokens"]) for block in full["blocks"]] == [16] * 4
    assert partial["parent_hash"] == full["blocks"][-1]["block_hash"]
    assert [token["token_id"] for token in partial["blocks"][0]["tokens"]] == PROMPT[64:]
    assert removed == {"type": "removed", "block_hashes": [partial["blocks"][0]["block_hash"]]}


def test_updates_tell_no_news_of_what_is_there(api: Api) -> None:
    api.knobs.set(updates=True)
    llm = api.llm()

    async def read() -> list[str]:
        await llm.generate_async(PROMPT, sampling_params=api.sampling())
        return [event["data"]["type"] async for event in llm.get_kv_cache_events_async(timeout=0.2)]

    assert run(read).count("updated") == 8


def test_prompts_beyond_max_num_tokens_need_chunked_prefill(api: Api) -> None:
    with pytest.raises(ValueError, match="max_num_tokens"):
        api.llm(max_num_tokens=64).generate_async(PROMPT, sampling_params=api.sampling())
    chunked = api.llm(max_num_tokens=64, enable_chunked_prefill=True)
    assert chunked.generate_async(PROMPT, sampling_params=api.sampling()).result(5).finished


def test_a_dead_executor_raises_for_every_request(api: Api) -> None:
    llm = api.llm()
    api.knobs.set(dead=True)
    with pytest.raises(RuntimeError, match="the executor has failed"):
        llm.generate_async(PROMPT, sampling_params=api.sampling())


def test_events_and_statistics_are_read_on_the_loop_of_the_requests(api: Api) -> None:
    llm = api.llm(enable_iter_perf_stats=True)

    async def read() -> list[Any]:
        return [entry async for entry in llm.get_stats_async(timeout=0.1)]

    with pytest.raises(AssertionError, match="after the first one"):
        run(read)

    async def request_and_read() -> list[Any]:
        await llm.generate_async(PROMPT, sampling_params=api.sampling())
        return await read()

    stats = run(request_and_read)
    assert stats[-1]["kvCacheStats"]["maxNumBlocks"] == 128
    with pytest.raises(AssertionError):
        run(read)


# --- many --------------------------------------------------------------------------------------------------------------


def test_a_full_pool_queues(api: Api) -> None:
    llm = api.llm(kv_cache_config={"max_tokens": 256, "tokens_per_block": 16}, max_seq_len=250)

    async def many() -> None:
        results = [llm.generate_async([i, *PROMPT], sampling_params=api.sampling(max_tokens=40)) for i in range(12)]
        for result in results:
            assert len((await result).outputs[0].token_ids) == 40

    run(many)
    api.knobs.wait_state(used_blocks=0, active_requests=0)


def test_nothing_is_left_running(api: Api) -> None:
    before = threading.active_count()
    llm = api.llm()
    llm.generate_async(PROMPT, sampling_params=api.sampling()).result(5)
    llm.shutdown()
    end = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before
