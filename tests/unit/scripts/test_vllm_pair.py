"""vLLM's disaggregated mode as a rival: launcher and proxy, before two little servers that bind themselves as vLLM does."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtest.options import Options
from loadtest.protocols import connect
from python_backends.core.errors import BatonError, Unavailable
from python_backends.core.paths import repository_root
from scripts.rivalry.servers import Rival, RivalServer, Served
from scripts.tritonserver import free_port

_CORES = sorted(os.sched_getaffinity(0))
_INSTANCE = """
import argparse, json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--kv-transfer-config", type=json.loads)
given = parser.parse_args()
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the main thread; the others may run anywhere
if os.environ.get("BREAK") == os.environ["VLLM_CPU_OMP_THREADS_BIND"]:
    sys.exit("no such model")

def spin():
    while True:
        pass

threading.Thread(target=spin, daemon=True).start()

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer({"data": [{"id": "little"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        main = sorted(os.sched_getaffinity(os.getpid()))
        started = {"bind": os.environ["VLLM_CPU_OMP_THREADS_BIND"], "transfer": given.kv_transfer_config, "main": main}
        with open(os.environ["ASKED"], "a") as file:
            print(json.dumps({**started, **asked}), file=file)
        if asked["kv_transfer_params"].get("do_remote_decode"):
            if len(asked["prompt"]) > 1000:
                self.answer({"error": {"message": "too long"}}, 400)
            else:
                self.answer({"kv_transfer_params": {"remote_block_ids": [len(asked["prompt"])]}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(asked["max_tokens"]):
            last = number + 1 == asked["max_tokens"]
            choice = {"text": " word", "finish_reason": "length" if last else None}
            self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\\n\\n")
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\\n\\n")

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()
"""


def _rival(**variables: str) -> Rival:
    cores = ",".join(map(str, _CORES if len(_CORES) > 1 else _CORES * 2))

    def command(served: Served) -> list[str]:
        ports = [served.port]
        while len(ports) < 5:
            ports.append(free_port("127.0.0.1", set(ports)))
        return [
            *(sys.executable, "-m", "scripts.rivalry.vllm_pair"),
            *("--ports", ",".join(map(str, ports)), "--cores", cores),
            *("--transfer", '{"kv_connector": "NixlConnector"}', "--", sys.executable, "-c", _INSTANCE),
        ]

    variables["PYTHONPATH"] = str(repository_root())
    return Rival("pair", "two little servers", "none", command, lambda served: variables)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """What the instances were asked, a line each."""
    return tmp_path / "asked"


@pytest.fixture
def server(tmp_path: Path, asked: Path) -> Iterator[RivalServer]:
    made = RivalServer(_rival(ASKED=str(asked)), tmp_path, tmp_path / "pair.log")
    made.start()
    yield made
    made.stop()


def _requests(asked: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in asked.read_text().splitlines()]


def test_prefill_has_the_prompt_first_and_decode_answers(server: RivalServer, asked: Path) -> None:
    asked.unlink()  # the warm-up
    with server.awake() as address:
        connection = connect(address, server.rival.options(Options()))
        connection.wait_ready(5)
        assert sum(part.tokens for part in connection.prepare([1, 2, 3], 4).parts()) == 4
        with pytest.raises(BatonError, match="too long"):
            list(connection.prepare([1] * 1001, 4).parts())
        connection.close()
    prefill, decode, refused = _requests(asked)
    assert (prefill["prompt"], prefill["max_tokens"], prefill["stream"]) == ([1, 2, 3], 1, False)
    assert "stream_options" not in prefill
    assert prefill["kv_transfer_params"]["remote_block_ids"] is None
    assert (decode["prompt"], decode["max_tokens"], decode["stream"]) == ([1, 2, 3], 4, True)
    assert decode["kv_transfer_params"] == {"remote_block_ids": [3]}
    assert prefill["transfer"] == {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
    assert decode["transfer"] == {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}
    assert refused["bind"] == prefill["bind"] != decode["bind"] or len(_CORES) == 1


@pytest.mark.skipif(len(_CORES) < 2, reason="needs two cores")
def test_each_computes_on_its_own_cores(server: RivalServer, asked: Path) -> None:
    for request in _requests(asked):
        assert set(request["main"]) <= set(map(int, request["bind"].split(",")))


def test_what_spins_lets_others_go_first(server: RivalServer) -> None:
    assert server._process is not None
    for instance in psutil.Process(server._process.pid).children():
        niceness = [os.getpriority(os.PRIO_PROCESS, thread.id) for thread in instance.threads()]
        assert (niceness[0], max(niceness)) == (os.getpriority(os.PRIO_PROCESS, 0), 19)


def test_all_processes_stand_still_and_end_together(server: RivalServer) -> None:
    assert server._process is not None
    launcher = psutil.Process(server._process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    assert len(family) == 3
    end = time.monotonic() + 10
    while any(one.status() != psutil.STATUS_STOPPED for one in family):
        assert time.monotonic() < end
        time.sleep(0.01)
    server.stop()
    assert not any(one.is_running() for one in family)


def test_an_instance_that_ends_is_told(tmp_path: Path, asked: Path) -> None:
    broken = ",".join(map(str, _CORES[: max(1, len(_CORES) // 2)]))
    made = RivalServer(_rival(ASKED=str(asked), BREAK=broken), tmp_path, tmp_path / "pair.log")
    with pytest.raises(Unavailable, match=r"(?s)pair has ended: .*no such model.*prefill ended: 1"):
        made.start()
