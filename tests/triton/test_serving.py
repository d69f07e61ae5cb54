"""The whole way through a real tritonserver, with the fake engine: protocols, concurrency, cancellation, failures."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from python_backends.core.deployment_key import OPERATOR_HEADER, OPERATOR_METADATA, deployment_key, operator_secret
from scripts.tritonserver import TritonServer
from tests.triton.asking import Asking, metrics, tensors, total, wait_until_nothing_is_held, worker_process

pytestmark = pytest.mark.triton

PROMPT = " ".join(str(number) for number in range(60))
OTHER = " ".join(str(number) for number in range(100, 160))


def _post(server: TritonServer, path: str, body: bytes) -> Iterator[dict[str, Any]]:
    url = f"http://{server.host}:{server.http_port}/v2/models/router/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(("data: ", "{")):
                yield json.loads(line.removeprefix("data: "))


def _reference(asking: Asking, **fields: Any) -> list[int]:
    return asking.ask(**{**fields, "route": "aggregated", "return_output_ids": True}).ids


# --- protocols ---------------------------------------------------------------------------------------------------------


def test_generate_answers_a_plain_json_body(fake_server: TritonServer) -> None:
    (answer,) = _post(fake_server, "generate", json.dumps({"text_input": PROMPT, "max_tokens": 5}).encode())
    assert answer["text_output"]
    assert set(answer) == {"model_name", "model_version", "text_output"}


def test_generate_stream_sends_deltas(fake_server: TritonServer) -> None:
    body = {"text_input": PROMPT, "max_tokens": 6, "return_num_output_tokens": True, "return_finish_reason": True}
    (whole,) = _post(fake_server, "generate", json.dumps(body).encode())
    pieces = list(_post(fake_server, "generate_stream", json.dumps({**body, "stream": True}).encode()))
    assert len(pieces) > 3
    assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"]
    assert sum(piece["num_output_tokens"] for piece in pieces) == whole["num_output_tokens"] == 6
    assert [piece["finish_reason"] for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]


def test_every_output_that_can_be_asked_for(asking: Asking) -> None:
    answer = asking.ask(
        text_input=f"outputs {OTHER}",
        route="remote",
        max_tokens=4,
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
        return_log_probs=True,
        return_logprobs=True,
        return_output_ids=True,
        return_perf_metrics=True,
    )
    (response,) = answer.responses
    assert response["num_output_tokens"] == [4]
    assert len(response["output_ids"]) == len(response["output_log_probs"]) == 4
    assert len(json.loads(answer.last("logprobs"))) == 4
    proof = json.loads(answer.last("proof"))
    assert proof["kv_tokens_received"] + proof["kv_tokens_reused"] == response["num_input_tokens"][0]
    assert proof["kv_tokens_recomputed"] == 0
    assert proof["queue_ms"] + proof["prefill_ms"] == pytest.approx(proof["ttft_ms"])
    times = [answer.last(f"{name}_time_ns") for name in ("arrival", "first_scheduled", "first_token", "last_token")]
    assert times == sorted(times)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tensorrt_llm_ensemble_client_works_unchanged(fake_server: TritonServer, stream: bool) -> None:
    """The tensors that TensorRT-LLM's gRPC client sends, shaped and read as it does: the text is element 0 of its output."""
    fields = {
        "text_input": PROMPT,
        "max_tokens": 8,
        "bad_words": [""],
        "stop_words": ["no such text"],
        "stream": stream,
        "beam_width": 1,
        "temperature": 1.0,
        "top_k": 1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 17,
        "exclude_input_in_output": False,
        "return_log_probs": True,
        "return_context_logits": False,
        "return_generation_logits": False,
        "end_id": 50256,  # of GPT-2, as such clients have it; no token here
        "pad_id": 2,
        "num_return_sequences": 1,
    }
    wanted = [triton.InferRequestedOutput(name) for name in ("text_output", "cum_log_probs", "output_log_probs")]
    events: list[Any] = []
    with triton.InferenceServerClient(f"{fake_server.host}:{fake_server.grpc_port}") as client:
        client.start_stream(lambda result, error: events.append(error or result))
        client.async_stream_infer("router", tensors(fields), outputs=wanted, request_id="1")
        client.stop_stream()  # waits for the server to end the stream
    texts = [event.as_numpy("text_output")[0].decode("utf-8") for event in events]
    assert len(texts) == (8 if stream else 1)
    assert "".join(texts).startswith(PROMPT)
    assert all(event.as_numpy("cum_log_probs").shape == (1, 1) for event in events)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # vLLM's: `vllm bench serve`
        ("completions", {"prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None, "ignore_eos": True}),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}], "max_completion_tokens": 8},
        ),
        # SGLang's bench_serving
        ("completions", {"prompt": PROMPT, "temperature": 0.0, "best_of": 1, "max_tokens": 8, "ignore_eos": True}),
        ("chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0.0, "max_tokens": 8}),
    ],
)
def test_benchmark_clients_of_others_work_unchanged(fake_server: TritonServer, path: str, body: dict[str, Any]) -> None:
    """The bodies that they send, and the stream as they read it: by lines, a prefix, `[DONE]`, the first choice's text."""
    usage = {"stream_options": {"include_usage": True}} if "best_of" not in body and "temperature" not in body else {}
    sent = json.dumps({"model": "smollm2-135m-instruct", "stream": True, **body, **usage}).encode()
    url = f"http://{fake_server.host}:{fake_server.openai_port}/v1/{path}"
    request = urllib.request.Request(url, sent, {"Content-Type": "application/json", "Authorization": "Bearer EMPTY"})
    with urllib.request.urlopen(request, timeout=30) as response:
        lines = [line.decode().strip().removeprefix("data: ") for line in response if line.strip()]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line) for line in lines[:-1]]
    choices = [piece["choices"][0] for piece in pieces if piece["choices"]]
    assert sum(bool(choice.get("text") or choice.get("delta", {}).get("content")) for choice in choices) >= 4
    if usage:
        assert pieces[-1]["usage"]["completion_tokens"] == 8
    else:
        assert all(piece["choices"] for piece in pieces), "they take choices[0] of every piece"


def test_sampling_parameters_may_be_strings(asking: Asking) -> None:
    one = asking.ask(text_input=PROMPT, sampling_parameters='{"max_tokens": "7", "temperature": "0.5", "seed": "3"}')
    two = asking.ask(text_input=PROMPT, max_tokens=7, temperature=0.5, seed=3)
    assert one.text == two.text


def test_messages_and_input_ids_are_prompts_too(asking: Asking) -> None:
    chat = asking.ask(messages='[{"role": "user", "content": "Hello"}]', max_tokens=4, return_num_input_tokens=True)
    assert chat.last("num_input_tokens") > 10, "the chat template was not applied"
    ids = asking.ask(input_ids=list(range(300, 340)), max_tokens=4, return_num_input_tokens=True)
    assert ids.last("num_input_tokens") == 40


def test_stop_words_cut_the_text_and_end_the_request(asking: Asking) -> None:
    whole = asking.ask(text_input=PROMPT, max_tokens=30).text
    stop = whole[len(whole) // 2 :][:5]
    for stream in (False, True):
        answer = asking.ask(text_input=PROMPT, max_tokens=30, stop_words=[stop], stream=stream, return_finish_reason=True)
        assert answer.text == whole[: whole.index(stop)]
        assert answer.last("finish_reason") == b"stop"
        assert answer.finals == 1


def test_internal_models_refuse_calls_that_no_router_signed(fake_server: TritonServer) -> None:
    with triton.InferenceServerClient(f"{fake_server.host}:{fake_server.grpc_port}") as client:
        work = triton.InferInput("work", [100], "UINT8")
        work.set_data_from_numpy(np.zeros(100, np.uint8))
        for worker in ("prefill", "decode", "aggregated"):
            with pytest.raises(InferenceServerException, match="internal model") as refused:
                client.infer(worker, [work], client_timeout=30)
            assert "INVALID_ARGUMENT" in str(refused.value)


def test_triton_itself_is_operated_by_the_deployment_alone(fake_server: TritonServer) -> None:
    """Over HTTP and gRPC: who could load models, map memory, write traces or change logs. Clients keep what they need."""
    base = f"http://{fake_server.host}:{fake_server.http_port}/v2"
    key = deployment_key("", fake_server.run_dir)
    assert stat.S_IMODE((fake_server.run_dir / "key").stat().st_mode) == 0o600
    closed = ["repository/index", "repository/models/prefill/unload", "systemsharedmemory/status", "trace/setting", "logging"]
    for path in closed:
        body = b"{}" if path.startswith("repository") else None
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{base}/{path}", body), timeout=30)
        assert refused.value.code == 403, path
        refused.value.close()
    headers = {OPERATOR_HEADER: operator_secret(key)}
    with urllib.request.urlopen(urllib.request.Request(f"{base}/repository/index", b"{}", headers), timeout=30) as response:
        assert {model["name"] for model in json.load(response)} == {*fake_server.models}
    with triton.InferenceServerClient(f"{fake_server.host}:{fake_server.grpc_port}") as client:
        calls: list[Callable[..., Any]] = [
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_trace_settings,
            client.get_log_settings,
        ]
        for call in calls:
            with pytest.raises(InferenceServerException, match="restricted"):
                call(client_timeout=30)
        assert client.get_model_repository_index(headers={OPERATOR_METADATA: operator_secret(key)}).models
        assert client.is_server_ready()
        assert client.get_model_metadata("router").inputs
        assert client.get_inference_statistics("router").model_stats


# --- bad input ---------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"text_input": ""}, "text_input is empty"),
    ({"max_tokens": 3}, "exactly one of text_input, messages and input_ids"),
    ({"text_input": "x", "input_ids": [1]}, "exactly one of"),
    ({"text_input": b"\xff\xfe\xfa"}, "text_input is not valid UTF-8"),
    ({"text_input": "x" * 10_000_000}, "router.max_prompt_bytes"),
    ({"text_input": "word " * 60_000}, "the prompt has .* tokens"),
    ({"input_ids": [5, 10**6]}, "input_ids: token id 1000000 is not in the vocabulary"),
    ({"input_ids": [-1]}, "input_ids: token id -1"),
    ({"messages": "hello"}, "messages is not the JSON"),
    ({"messages": "[]"}, "messages"),
    ({"messages": '[{"role": "user"}]'}, r"messages\[0\].content"),
    ({"text_input": "x", "max_tokens": -1}, "max_tokens is -1; it must be at least 1"),
    ({"text_input": "x", "max_tokens": 0}, "max_tokens is 0"),
    ({"text_input": "x", "temperature": float("nan")}, "temperature is nan"),
    ({"text_input": "x", "temperature": -1.0}, "temperature is -1.0"),
    ({"text_input": "x", "top_p": 0.0}, "top_p is 0.0"),
    ({"text_input": "x", "min_tokens": 9, "max_tokens": 3}, "min_tokens is 9"),
    ({"text_input": "x", "sampling_parameters": "{"}, "sampling_parameters is not the JSON"),
    ({"text_input": "x", "sampling_parameters": '{"temprature": 1}'}, "unknown key 'temprature'; did you mean 'temperature'"),
    ({"text_input": "x", "sampling_parameters": '{"top_k": "many"}'}, "top_k"),
    ({"text_input": "x", "sampling_parameters": '{"n": 2}'}, "n must be 1"),
    ({"text_input": "x", "beam_width": 4}, "beam_width is 4"),
    ({"text_input": "x", "bad_words": ["no"]}, "bad_words is not supported"),
    ({"text_input": "x", "route": "nowhere"}, "route is 'nowhere'"),
    ({"text_input": "x", "sampling_parameters": '{"logit_bias": {"99999999": 1}}'}, "logit_bias: token id 99999999"),
]


def test_bad_input_is_one_clear_error_and_harms_nobody(fake_server: TritonServer, asking: Asking) -> None:
    expected = _reference(asking, text_input=PROMPT, max_tokens=150)
    neighbour = Asking(fake_server)
    neighbour.send("n", text_input=PROMPT, max_tokens=150, stream=True, return_output_ids=True)
    for fields, message in BAD:
        client = Asking(fake_server, with_codes=True)
        answer = client.ask(**fields)
        client.close()
        assert answer.error is not None, f"{fields} was accepted"
        assert re.search(message, str(answer.error)), f"{str(fields)[:100]}: {answer.error}"
        assert str(answer.error).partition("INVALID_ARG: ")[1], str(answer.error)
        assert "Traceback" not in str(answer.error)
        assert not answer.responses
        assert answer.finals == 1
    (answer,) = neighbour.collect("n")
    assert answer.ids == expected
    neighbour.close()


def test_wrong_dtype_and_bad_json_are_refused_by_name(fake_server: TritonServer) -> None:
    with triton.InferenceServerClient(f"{fake_server.host}:{fake_server.grpc_port}") as client:
        wrong = triton.InferInput("max_tokens", [1, 1], "FP32")
        wrong.set_data_from_numpy(np.ones((1, 1), np.float32))
        events: list[Any] = []
        client.start_stream(lambda result, error: events.append(error))
        client.async_stream_infer("router", [*tensors({"text_input": "x"}), wrong])
        end = time.monotonic() + 30
        while not events and time.monotonic() < end:
            time.sleep(0.01)
        client.stop_stream()
    assert "max_tokens" in str(events[0])
    with pytest.raises(urllib.error.HTTPError) as refused:
        list(_post(fake_server, "generate", b'{"text_input": "x", "max_tokens": -5}'))
    assert refused.value.code == 400
    assert "max_tokens" in refused.value.read().decode()
    refused.value.close()


# --- many at once ------------------------------------------------------------------------------------------------------


def test_thirty_two_streams_at_once_are_right_and_prompt(fake_server: TritonServer, asking: Asking) -> None:
    prompts = [f"{PROMPT} and {i}" for i in range(32)]
    sampling = {"max_tokens": 20, "temperature": 0.9, "seed": 5, "return_output_ids": True}
    expected = [asking.ask(text_input=prompt, route="aggregated", **sampling).ids for prompt in prompts]
    router = worker_process(fake_server, "router")
    threads_before = router.num_threads()
    for i, prompt in enumerate(prompts):
        asking.send(f"s{i}", text_input=prompt, stream=True, **sampling)
    threads = 0
    while any(not answer.finals for answer in [asking._answers[f"s{i}"] for i in range(32)]):
        asking.next_response()
        threads = max(threads, router.num_threads())
    assert [answer.ids for answer in asking.collect(*[f"s{i}" for i in range(32)])] == expected
    assert all(answer.finals == 1 for answer in asking.collect(*[f"s{i}" for i in range(32)]))
    assert threads <= threads_before + 2, "threads grow with streams"
    wait_until_nothing_is_held(fake_server, within_s=2)


def test_first_tokens_do_not_wait_for_other_streams(fake_server: TritonServer, asking: Asking) -> None:
    """A router whose streams block each other sends them after seconds; the bound is far above what a busy machine needs."""
    sent = time.monotonic()
    first: dict[str, float] = {}
    for i in range(32):
        asking.send(f"t{i}", text_input=f"{i} first tokens", max_tokens=100, stream=True)
    while len(first) < 32:
        first.setdefault(asking.next_response(), time.monotonic() - sent)
    assert statistics.median(first.values()) < 1.0
    asking.collect(*first)


def test_responses_can_be_kept_apart_and_then_carry_several_tokens(tmp_path: Path, asking: Asking) -> None:
    fields: dict[str, Any] = {"text_input": PROMPT, "max_tokens": 100, "seed": 4, "temperature": 0.8, "return_output_ids": True}
    expected = asking.ask(**fields)
    config = tmp_path / "interval.yaml"
    config.write_text(
        "workers: [{role: aggregated, engine: fake}]\nengine: {fake: {step_us: 4000}}\nrouter: {stream_interval_ms: 100}\n"
    )
    with TritonServer(config) as server:
        client = Asking(server)
        answer = client.ask(**fields, stream=True, return_num_output_tokens=True)
        client.close()
    assert (answer.text, answer.ids) == (expected.text, expected.ids)
    counts = [response["num_output_tokens"][0] for response in answer.responses]
    assert sum(counts) == 100
    assert counts[0] <= 2, "the first token was held back"
    assert 3 <= len(counts) <= 20


# --- cancellation and death --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_seen", [0, 1, 5])
def test_a_client_that_goes_away_frees_everything_within_a_second(fake_server: TritonServer, tokens_seen: int) -> None:
    """In whatever state its four requests are; half a second more is given for metrics to be refreshed."""
    before = total(metrics(fake_server), "baton_requests_total", outcome="cancelled")
    client = Asking(fake_server)
    for i in range(4):
        client.send(f"c{i}", text_input=f"{i} {PROMPT} {OTHER}", max_tokens=2000, stream=True)
    _wait_for(lambda: metrics(fake_server)["baton_router_requests"] == 4, 5)
    for _ in range(tokens_seen * 4):
        client.next_response()
    client.close(cancel=True)
    _wait_for(lambda: total(metrics(fake_server), "baton_requests_total", outcome="cancelled") == before + 4, 1)
    wait_until_nothing_is_held(fake_server, within_s=0.5)


def _wait_for(condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.02)


def test_a_timeout_ends_the_request_with_one_error(fake_server: TritonServer) -> None:
    with triton.InferenceServerClient(f"{fake_server.host}:{fake_server.grpc_port}") as client:
        events: list[Any] = []
        client.start_stream(lambda result, error: events.append(error))
        client.async_stream_infer("router", tensors({"text_input": PROMPT, "max_tokens": 3000}), timeout=300_000)
        end = time.monotonic() + 10
        while not events and time.monotonic() < end:
            time.sleep(0.01)
        client.stop_stream()
    assert "deadline" in str(events[0])
    wait_until_nothing_is_held(fake_server, within_s=1.5)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_worker_costs_no_request_and_comes_back(fake_server: TritonServer, asking: Asking, role: str) -> None:
    fields = {"max_tokens": 200, "temperature": 0.8, "seed": 9, "return_output_ids": True}
    prompts = [f"{role} {i} {PROMPT} {OTHER}" for i in range(6)]
    expected = [_reference(asking, text_input=prompt, **fields) for prompt in prompts]
    victim = worker_process(fake_server, role)
    for i, prompt in enumerate(prompts):
        asking.send(f"{role}{i}", text_input=prompt, stream=True, **fields)
    if role == "decode":
        for _ in range(60):
            asking.next_response()
    os.kill(victim.pid, signal.SIGKILL)
    answers = asking.collect(*[f"{role}{i}" for i in range(6)])
    assert [answer.ids for answer in answers] == expected
    end = time.monotonic() + 20
    while total(metrics(fake_server), "baton_worker_available") < 3 or not _is_up_again(fake_server, role, victim.pid):
        assert time.monotonic() < end, f"{role} did not come back"
        time.sleep(0.1)
    again = asking.ask(text_input=f"again {role} {PROMPT}", route="remote", return_proof=True, max_tokens=5)
    proof = json.loads(again.last("proof"))
    assert proof["route"] == "remote"
    assert proof["kv_tokens_recomputed"] == 0
    wait_until_nothing_is_held(fake_server, within_s=2)


def _is_up_again(server: TritonServer, role: str, old: int) -> bool:
    try:
        return worker_process(server, role).pid != old
    except (AssertionError, psutil.NoSuchProcess):
        return False


def test_stops_cleanly_with_streams_in_flight(fake_server: TritonServer, tmp_path: Any) -> None:
    config = tmp_path / "one.yaml"
    config.write_text("workers: [{role: prefill, engine: fake}, {role: decode, engine: fake}]\n")
    server = TritonServer(config)
    server.start()
    client = Asking(server)
    for i in range(8):
        client.send(f"x{i}", text_input=f"{i} {PROMPT}", max_tokens=5000, stream=True)
    for _ in range(20):
        client.next_response()
    children = [process.pid for process in psutil.Process(server.pid).children(recursive=True)]
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 12
    for answer in client.collect(*[f"x{i}" for i in range(8)]):
        assert "the server is shutting down" in str(answer.error)
    client.close(cancel=True)
    assert not any(psutil.pid_exists(pid) for pid in children)
    assert not server.run_dir.exists()
    left = subprocess.run(["ls", "/dev/shm"], capture_output=True, text=True, check=True).stdout
    assert server.shm_prefix not in left
