"""Engine trtllm over the fake, through a real tritonserver: handoff, cancel bursts, death and wedging of workers."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import BadRequestError, OpenAI
from rich.console import Console

from scripts.client import Client
from scripts.demo import run_demo
from scripts.tritonserver import TritonServer
from scripts.verification import Failed, Result, Verification, verify
from tests.engines.trtllm.playing import Knobs
from tests.triton.asking import Asking, metrics, total, wait_until_nothing_is_held
from tests.triton.trtllm_models import write_models

pytestmark = pytest.mark.triton

LEASE_S = 1.5
CONFIG = f"""
model: {{path: smollm2-135m-instruct, dtype: bfloat16, max_context: 4096}}
workers:
  - {{role: prefill, engine: trtllm, gpus: "0"}}
  - {{role: decode, engine: trtllm, gpus: "0"}}
  - {{role: aggregated, engine: trtllm, gpus: "0"}}
engine:
  block_size: 32
  trtllm:
    prefill: {{kv_cache_config: {{max_tokens: 32768}}}}
    decode: {{kv_cache_config: {{max_tokens: 32768}}}}
    aggregated: {{kv_cache_config: {{max_tokens: 32768}}}}
    cache_transceiver_config: {{backend: UCX}}
    first_output_s: 1.0
    stall_s: 1.0
transfer: {{lease_s: {LEASE_S}, timeout_s: 0.3}}
router: {{worker_wait_s: 20}}
"""
PROMPT = " ".join(str(number) for number in range(60))
OTHER = " ".join(str(number) for number in range(100, 160))
SPEED = {"step_ms": 2.0, "prefill_us_per_token": 20.0}


@dataclass(frozen=True)
class Served:
    server: TritonServer
    knobs: dict[str, Knobs]

    def process(self, name: str) -> psutil.Process:
        for process in psutil.Process(self.server.pid).children(recursive=True):
            if process.status() != psutil.STATUS_ZOMBIE and re.search(rf"/{name}/1/model\.py", " ".join(process.cmdline())):
                return process
        raise AssertionError(f"no process of {name}")

    def assert_clean(self) -> None:
        """As the metrics tell it, and as TensorRT-LLM itself knows it."""
        wait_until_nothing_is_held(self.server, within_s=LEASE_S + 1.5)
        for knobs in self.knobs.values():
            knobs.wait_state(used_blocks=0, leaked_blocks=0, pinned_requests=0, active_requests=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("trtllm")
    config = directory / "trtllm.yaml"
    config.write_text(CONFIG)
    knobs = write_models(directory, config, **SPEED)
    with TritonServer(config, model_repository=directory / "models") as server:
        yield Served(server, knobs)


@pytest.fixture
def trtllm(served: Served) -> Iterator[Asking]:
    client = Asking(served.server)
    yield client
    client.close()


def _wait_for(condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.05)


def _reference(client: Asking, prompts: list[str], **fields: Any) -> list[list[int]]:
    """By the aggregated worker, in which nothing moves."""
    return [client.ask(text_input=prompt, route="aggregated", return_output_ids=True, **fields).ids for prompt in prompts]


def test_router_prefill_handoff_decode(served: Served, trtllm: Asking) -> None:
    fields = {"text_input": PROMPT, "max_tokens": 12, "return_output_ids": True, "return_proof": True}
    alone = trtllm.ask(**fields, route="aggregated")
    answer = trtllm.ask(**fields, route="remote", stream=True)
    proof = json.loads(answer.last("proof"))
    assert answer.ids == alone.ids
    assert (proof["prefill_worker"], proof["decode_worker"]) == ("prefill", "decode")
    assert proof["kv_tokens_received"] > 100
    assert proof["kv_tokens_recomputed"] == proof["kv_tokens_computed"] == 0
    assert (proof["digest"], proof["transport"]) == ("unchecked", "UCX")
    assert served.knobs["prefill"].state["context_requests"] >= 1
    assert served.knobs["decode"].state["generation_requests"] >= 1
    served.assert_clean()


def test_metrics_tell_of_first_handoffs_and_events(served: Served) -> None:
    _wait_for(lambda: total(metrics(served.server), "baton_warm_ups_total", verdict="unchecked") >= 1, 10)
    _wait_for(lambda: total(metrics(served.server), "baton_prefix_events") == 3, 5)


def test_a_known_prefix_is_found(trtllm: Asking) -> None:
    fields = {"text_input": f"prefix {PROMPT}", "max_tokens": 4, "route": "remote", "return_proof": True}
    trtllm.ask(**fields)
    time.sleep(0.5)  # the events are on their way
    proof = json.loads(trtllm.ask(**fields).last("proof"))
    assert proof["prefill_tokens_reused"] >= 96


def test_what_the_engine_can_not_do_is_one_clear_error(served: Served, trtllm: Asking) -> None:
    for parameters, name in (('{"logit_bias": {"5": 1}}', "logit_bias"), ('{"repetition_penalty": 1.2}', "repetition_penalty")):
        answer = trtllm.ask(text_input=PROMPT, sampling_parameters=parameters, route="remote")
        assert answer.error is not None
        assert name in str(answer.error)
        assert answer.finals == 1
    served.assert_clean()


def test_thirty_two_streams_at_once(served: Served, trtllm: Asking) -> None:
    prompts = [f"{i} {PROMPT}" for i in range(32)]
    fields = {"max_tokens": 20}
    expected = _reference(trtllm, prompts, **fields)
    for i, prompt in enumerate(prompts):
        trtllm.send(f"s{i}", text_input=prompt, stream=True, route="remote", return_output_ids=True, **fields)
    answers = trtllm.collect(*[f"s{i}" for i in range(32)])
    assert [answer.ids for answer in answers] == expected
    assert all(answer.finals == 1 for answer in answers)
    served.assert_clean()


def test_bursts_of_clients_that_go_away_leave_nothing(served: Served, trtllm: Asking) -> None:
    """300 requests in all, gone at every stage; in TensorRT-LLM itself that is what leaks until nothing is left."""
    served.knobs["prefill"].set(**SPEED, transfer_ms=20)
    for burst in range(5):
        client = Asking(served.server)
        for i in range(60):
            client.send(f"c{i}", text_input=f"{burst} {i} {PROMPT} {OTHER}", max_tokens=2000, stream=True, route="remote")
        for _ in range([0, 1, 30, 100, 300][burst]):
            client.next_response()
        client.close(cancel=True)
    _wait_for(lambda: metrics(served.server)["baton_router_requests"] == 0, 10)
    served.assert_clean()
    served.knobs["prefill"].set(**SPEED)
    proof = json.loads(trtllm.ask(text_input=PROMPT, max_tokens=4, route="remote", return_proof=True).last("proof"))
    assert (proof["route"], proof["kv_tokens_recomputed"]) == ("remote", 0)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_worker_costs_no_request_and_comes_back(served: Served, trtllm: Asking, role: str) -> None:
    fields = {"max_tokens": 150}
    prompts = [f"{role} {i} {PROMPT} {OTHER}" for i in range(6)]
    expected = _reference(trtllm, prompts, **fields)
    victim = served.process(role).pid
    for i, prompt in enumerate(prompts):
        trtllm.send(f"{role}{i}", text_input=prompt, stream=True, return_output_ids=True, **fields)
    if role == "decode":
        for _ in range(60):
            trtllm.next_response()
    os.kill(victim, signal.SIGKILL)
    answers = trtllm.collect(*[f"{role}{i}" for i in range(6)])
    assert [answer.ids for answer in answers] == expected
    _wait_until_back(served, trtllm, role, victim)
    served.assert_clean()


def test_a_wedged_worker_is_restarted_by_triton(served: Served, trtllm: Asking) -> None:
    """Its process, its heartbeats and Triton's readiness are all well; only TensorRT-LLM is stuck."""
    prompts = [f"wedge {i} {PROMPT}" for i in range(4)]
    expected = _reference(trtllm, prompts, max_tokens=400)
    victim = served.process("decode").pid
    for i, prompt in enumerate(prompts):
        trtllm.send(f"w{i}", text_input=prompt, stream=True, route="remote", max_tokens=400, return_output_ids=True)
    for _ in range(40):
        trtllm.next_response()
    served.knobs["decode"].set(**SPEED, wedged=True)
    _wait_for(lambda: not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE, 10)
    served.knobs["decode"].set(**SPEED)
    answers = trtllm.collect(*[f"w{i}" for i in range(4)])
    assert [answer.ids for answer in answers] == expected
    _wait_until_back(served, trtllm, "decode", victim)
    served.assert_clean()


def _wait_until_back(served: Served, client: Asking, role: str, old: int) -> None:
    def is_back() -> bool:
        try:
            return served.process(role).pid != old and total(metrics(served.server), "baton_worker_available") == 3
        except (AssertionError, psutil.NoSuchProcess):
            return False

    _wait_for(is_back, 30)
    answer = client.ask(text_input=f"back {role} {old} {PROMPT}", max_tokens=4, route="remote", return_proof=True)
    proof = json.loads(answer.last("proof"))
    assert (proof["route"], proof["kv_tokens_recomputed"]) == ("remote", 0)


# --- the OpenAI API ----------------------------------------------------------------------------------------------------

MODEL = "smollm2-135m-instruct"
CHAT: list[Any] = [{"role": "user", "content": f"Continue: {PROMPT}"}]


@pytest.fixture
def openai(served: Served) -> Iterator[OpenAI]:
    address = f"http://{served.server.host}:{served.server.openai_port}/v1"
    with OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_chat_completions_are_handed_over(served: Served, openai: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 16}
    alone = openai.chat.completions.create(**asked, extra_body={"baton": {"route": "aggregated"}})
    before = served.knobs["decode"].state["generation_requests"]
    whole = openai.chat.completions.create(**asked, extra_body={"baton": {"route": "remote", "proof": True}})
    assert whole.choices[0].message.content == alone.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    proof = whole.model_extra["baton"]["proof"] if whole.model_extra else {}
    assert (proof["route"], proof["transport"], proof["digest"]) == ("remote", "UCX", "unchecked")
    assert (proof["kv_tokens_received"], proof["kv_tokens_recomputed"]) == (whole.usage.prompt_tokens, 0)
    assert served.knobs["decode"].state["generation_requests"] == before + 1
    chunks = list(
        openai.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body={"baton": {"route": "remote"}}
        )
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == alone.choices[0].message.content
    )
    assert len(chunks) > 8, "it was not streamed"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    served.assert_clean()


def test_completions_with_choices_stop_and_logprobs(served: Served, openai: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    remote = {"baton": {"route": "remote", "proof": True}}
    answer = openai.completions.create(**asked, n=2, extra_body=remote)
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1]
    stopped = openai.completions.create(**asked, stop=texts[0][10:14], extra_body=remote)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (texts[0][:10], "stop")
    logged = openai.completions.create(**asked, logprobs=2, extra_body=remote)
    assert logged.choices[0].text == texts[0]
    assert logged.choices[0].logprobs is not None
    assert logged.choices[0].logprobs.token_logprobs == [-0.5] * 8
    proof = logged.model_extra["baton"]["proof"] if logged.model_extra else {}
    assert proof["digest"] == "unsupported", "of 1.2, which can't hand over the first token's"
    served.assert_clean()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]}, "tools"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_openai_clients_can_not_have_is_a_400_that_names_it(
    served: Served, openai: OpenAI, fields: dict[str, Any], named: str, stream: bool
) -> None:
    with pytest.raises(BadRequestError, match=named):
        openai.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=8, stream=stream, **fields)
    served.assert_clean()


def test_openai_clients_that_go_away_leave_nothing(served: Served, openai: OpenAI) -> None:
    for i in range(20):
        stream = openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"{i} {PROMPT}"}],
            max_tokens=2000,
            stream=True,
            extra_body={"baton": {"route": "remote"}},
        )
        for _ in range(i % 4):
            next(stream)
        stream.close()
    _wait_for(lambda: metrics(served.server)["baton_router_requests"] == 0, 10)
    served.assert_clean()


# --- the scripts -------------------------------------------------------------------------------------------------------


def test_the_demo_shows_a_handoff_and_does_not_call_it_verified(served: Served) -> None:
    shown = StringIO()
    with Client(f"{served.server.host}:{served.server.grpc_port}") as client:
        verdict = run_demo(client, Console(file=shown, width=120), "What is the capital of France?")
    assert verdict.ok, verdict.text
    assert re.fullmatch(r"handoff OK: \d+ tokens, [\d.]+ ms by UCX, 0 recomputed, digest unchecked", verdict.text)
    assert "aggregated worker: same text" in shown.getvalue()
    served.assert_clean()


def test_the_command_that_verifies_a_gpu_machine_works(served: Served) -> None:
    """Over the fake: what it will find on a GPU nobody knows, but it must not fail for reasons of its own."""
    told: list[Result] = []
    with Client(f"{served.server.host}:{served.server.grpc_port}") as client:
        results = verify(served.server, client, told.append, load_s=2)
    assert [result for result in results if not result.ok] == []
    assert told == results
    assert len(results) == 12


def test_verification_tells_what_does_not_hold(served: Served) -> None:
    served.knobs["prefill"].set(**SPEED, silent_sender=True)
    with Client(f"{served.server.host}:{served.server.grpc_port}") as client:
        check = Verification(served.server, client, load_s=1)
        check._ask("so that it looks into the file", route="remote", max_tokens=2)
        with pytest.raises(Failed, match=r"transfer_timeout|no KV was received"):
            check.first_token()
    served.knobs["prefill"].set(**SPEED)
