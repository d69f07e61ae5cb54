"""A worker's restart, which takes seconds, is nothing that the others' streams notice."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.tritonserver import TritonServer
from tests.triton.asking import Asking, metrics, total, worker_process

pytestmark = pytest.mark.triton


def test_streams_elsewhere_go_on_while_a_worker_is_restarted(tmp_path: Path) -> None:
    config = tmp_path / "three.yaml"
    config.write_text(
        "workers: [{role: decode, engine: fake}, {role: aggregated, engine: fake}]\nengine: {fake: {step_us: 50000}}\n"
    )
    with TritonServer(config) as server:
        asking = Asking(server)
        ended = threading.Event()

        def stream() -> None:
            asking.ask(text_input="a long one", max_tokens=500, stream=True, route="aggregated")
            ended.set()

        thread = threading.Thread(target=stream)
        thread.start()
        while not metrics(server)["baton_router_requests"]:
            time.sleep(0.05)
        time.sleep(0.5)
        worker_process(server, "decode").kill()
        end = time.monotonic() + 24
        while total(metrics(server), "baton_worker_starts_total", worker="decode") < 2:
            assert time.monotonic() < end, "it does not come back"
            time.sleep(0.1)
        assert not ended.is_set(), "the stream was to outlast the restart"
        thread.join(90)
        asking.close()
        url = f"http://{server.host}:{server.openai_port}/baton/requests/latest"
        with urllib.request.urlopen(url, timeout=10) as response:
            (record,) = json.loads(response.read())["requests"]
        assert record["outcome"] == "ok"
        assert record["longest_gap_ms"] < 1500


def test_a_worker_that_stood_still_when_it_was_handed_work_does_not_go_on(fake_server: TritonServer) -> None:
    """Triton 24.10 gives up calls after a second, and aborts when what it has freed by then is used all the same."""
    asking = Asking(fake_server)
    prompts = [f"{number} stands still" for number in range(4)]
    fields: dict[str, Any] = {"max_tokens": 20, "seed": 1, "route": "local"}
    expected = [asking.ask(text_input=prompt, **fields).text for prompt in prompts]
    starts = total(metrics(fake_server), "baton_worker_starts_total", worker="decode")
    worker = worker_process(fake_server, "decode")
    worker.suspend()
    for prompt in prompts:
        asking.send(prompt, text_input=prompt, **fields)
    time.sleep(2.5)  # nobody would take it for dead yet
    with suppress(psutil.NoSuchProcess):
        worker.resume()
    assert [answer.text for answer in asking.collect(*prompts)] == expected
    asking.close()
    end = time.monotonic() + 20
    while total(metrics(fake_server), "baton_worker_starts_total", worker="decode") == starts:
        assert time.monotonic() < end, "it does not come back"
        time.sleep(0.1)
    assert not fake_server.has_ended()
