"""The stores behind a real tritonserver: workers die, come back, and find what was computed; nothing is left afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from python_backends.core.paths import run_base
from python_backends.core.shared_memory import NODE_MEMORY, hold, sweep
from scripts.tritonserver import TritonServer
from tests.kv.redis_server import RedisServer
from tests.triton.asking import Asking, metrics, total, wait_until_nothing_is_held

pytestmark = pytest.mark.triton

PROMPT = " ".join(str(number) for number in range(120))
DEPLOYMENT = """
workers:
  - {{role: prefill, engine: fake}}
  - {{role: decode, engine: fake}}
engine: {{kv_pool_mib: 32, fake: {{prefill_us_per_token: 100, step_us: 1000}}}}
store: {{node_mib: {node_mib}, read_timeout_s: 1.0, locate_timeout_s: 1.0, remote: {{servers: {servers}}}}}
router: {{worker_wait_s: 20}}
"""


def deployment(path: Path, node_mib: int = 0, servers: str = "[]") -> TritonServer:
    path.write_text(DEPLOYMENT.format(node_mib=node_mib, servers=servers))
    return TritonServer(path)


def place_of(server: TritonServer) -> Path:
    """Where the users of the server's node store meet: entries are named after them."""
    pids = {process.pid for process in psutil.Process(server.pid).children(recursive=True)}
    places = [path.parent for path in run_base().glob("node-*/*") if int(path.name.partition(".")[0]) in pids]
    (place,) = set(places)
    return place


def ask(asking: Asking, route: str = "auto") -> tuple[list[int], dict[str, Any]]:
    answer = asking.ask(text_input=PROMPT, max_tokens=12, return_output_ids=True, return_proof=True, route=route)
    return answer.ids, json.loads(answer.last("proof"))


def workers(server: TritonServer) -> dict[str, psutil.Process]:
    found = {}
    for process in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            match = re.search(r"/(prefill|decode)/1/model\.py", " ".join(process.cmdline()))
            if match:
                found[match[1]] = process
    return found


def wait_for(server: TritonServer, condition: Callable[[dict[str, float]], bool]) -> None:
    """For what the metrics say a moment later."""
    end = time.monotonic() + 10
    while not condition(metrics(server)):
        assert time.monotonic() < end, metrics(server)
        time.sleep(0.05)


def wait_for_blocks(server: TritonServer, blocks: int, tier: str) -> None:
    wait_for(server, lambda m: total(m, "baton_store_used_bytes", tier=tier, worker="decode") >= blocks * 16_384)


def test_all_workers_killed_find_their_kv_in_the_node_store(tmp_path: Path, smollm2_dir: Path) -> None:
    with deployment(tmp_path / "node.yaml", node_mib=16) as server:
        asking = Asking(server)
        expected, first = ask(asking, "remote")
        assert first["route"] == "remote"
        full_blocks = (first["kv_tokens_received"] - 1) // 16
        wait_for_blocks(server, full_blocks, "node")
        place = place_of(server)
        before = workers(server)
        for process in before.values():
            os.kill(process.pid, signal.SIGKILL)
        end = time.monotonic() + 20
        while {p.pid for p in workers(server).values()} & {p.pid for p in before.values()} or len(workers(server)) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        ids, proof = ask(asking, "local")  # left free, the way depends on who is back first and what it has told by then
        assert ids == expected
        assert proof["route"] in ("cached", "local")
        assert proof["kv_tokens_node"] == full_blocks * 16
        assert proof["kv_tokens_computed"] < 16
        wait_for(server, lambda m: total(m, "baton_prompt_tokens_total", source="node") == full_blocks * 16)
        wait_for(server, lambda m: total(m, "baton_store_up", tier="node") == 2)
        wait_until_nothing_is_held(server, within_s=2)
        asking.close()
    assert not place.exists()


def test_nothing_of_the_node_store_is_left_when_everything_is_killed(tmp_path: Path, smollm2_dir: Path) -> None:
    server = deployment(tmp_path / "node.yaml", node_mib=16)
    server.start()
    asking = Asking(server)
    ask(asking)
    place = place_of(server)
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert server._guardian is not None
    family.append(psutil.Process(server._guardian.pid))
    for process in family:
        process.send_signal(signal.SIGSTOP)  # nobody cleans up after another
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)
    assert hold(place, NODE_MEMORY) is None, "somebody still has the memory"
    assert not [path for path in Path("/dev/shm").iterdir() if "node" in path.name]
    sweep(place, NODE_MEMORY)  # as the next server does
    assert not place.exists()
    server.stop()
    asking.close(cancel=True)


def test_a_second_server_finds_in_redis_what_the_first_has_computed(tmp_path: Path, smollm2_dir: Path) -> None:
    redis = RedisServer()
    try:
        with deployment(tmp_path / "one.yaml", servers=f"['{redis.url}']") as server:
            asking = Asking(server)
            expected, first = ask(asking, "remote")
            full_blocks = (first["kv_tokens_received"] - 1) // 16
            end = time.monotonic() + 10
            while redis.client().dbsize() < full_blocks:
                assert time.monotonic() < end
                time.sleep(0.05)
            asking.close()
        with deployment(tmp_path / "two.yaml", servers=f"['{redis.url}']") as server:
            asking = Asking(server)
            ids, proof = ask(asking)
            assert ids == expected
            assert (proof["route"], proof["kv_tokens_remote"]) == ("cached", full_blocks * 16)
            asking.close()
    finally:
        redis.close()
