"""Everything that is injected: strikes, which hit at a moment, and deployments in which something is always wrong.

A strike on a worker waits until a request is in the wanted state at a worker of the wanted role, hits that very worker, and
says when it serves again. Most of them are in files beside this one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from python_backends.core.deployment_key import OPERATOR_HEADER, deployment_key, operator_secret
from python_backends.core.errors import BatonError
from python_backends.core.types import Role
from router.lifecycle import State
from scripts.client import Client
from scripts.injection import clocks, disks, hangs, roles, routers, signals, slow, waiting
from scripts.injection.scene import (
    BACK_S,
    GRACE_S,
    VICTIM_S,
    Hit,
    Scene,
    Strike,
    at_every_worker,
    back,
    clients_of,
    victim,
)
from scripts.injection.watch import wait_for

_BURST = 16
_BURST_ID = "burst"
_LOAD_S = 60.0
_RED_S = 10.0  # as promised


def _reload_worker(role: Role, state: State) -> Callable[[Scene], Hit]:
    """Somebody has Triton unload and load the model."""

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        key = deployment_key(scene.server.deployment.security.key_file, scene.server.run_dir)
        headers = {OPERATOR_HEADER: operator_secret(key)}
        at = time.monotonic()
        for action in ("unload", "load"):
            url = f"http://{scene.server.host}:{scene.server.http_port}/v2/repository/models/{worker.id}/{action}"
            with urllib.request.urlopen(urllib.request.Request(url, b"{}", headers), timeout=_LOAD_S) as response:
                response.read()
        return Hit(at, clients, back(scene, worker, new_life=True))

    return strike


def _drain_and_restart(role: Role, state: State) -> Callable[[Scene], Hit]:
    """As scripts/rolling-restart does with each worker."""

    def strike(scene: Scene) -> Hit:
        worker, clients = victim(scene, role, state)
        at = time.monotonic()
        scene.door.manage("restart", worker.id, GRACE_S, BACK_S)
        return Hit(at, clients, back(scene, worker, new_life=True))

    return strike


def _stop_all_that_decode(scene: Scene) -> Hit:
    """Nobody can serve: readiness must say so in time, and come back by itself."""
    news = wait_for(scene.door, lambda news: news if not news.trouble else None, VICTIM_S, "a server that is ready")
    at = time.monotonic()
    for worker in news.workers:
        if worker.role is not Role.PREFILL:
            os.kill(worker.pid, signal.SIGSTOP)
    wait_for(scene.door, lambda news: news.trouble or None, _RED_S, "readiness is red")
    wait_for(scene.door, lambda news: not news.trouble or None, BACK_S, "readiness is green again")
    return Hit(at, clients_of(news), time.monotonic())


def _cancel_burst(scene: Scene) -> Hit:
    """Many requests are begun at once and cancelled one by one, in whatever state they are."""
    at = time.monotonic()
    with Client(f"{scene.server.host}:{scene.server.grpc_port}", _BURST_ID) as client:
        threads = [threading.Thread(target=_cancel_after, args=(client, 0.02 * number)) for number in range(_BURST)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BACK_S)
    wait_for(
        scene.door,
        lambda news: not any(record.client_id == _BURST_ID for record in news.live) or None,
        BACK_S,
        "nothing of the cancelled requests is left",
    )
    return Hit(at, [], time.monotonic())


def _cancel_after(client: Client, seconds: float) -> None:
    prompt = f"{seconds} " + "a prompt that takes a while " * 60
    with client.stream(prompt, max_tokens=500, timeout_s=BACK_S) as stream:
        timer = threading.Timer(seconds, stream.close)
        timer.start()
        try:
            for _ in stream:
                pass
        except BatonError:  # cancelled, most of the time
            return


STRIKES = [
    *signals.STRIKES,
    *slow.STRIKES,
    *hangs.STRIKES,
    *at_every_worker("unload, load", _reload_worker),
    *at_every_worker("drain, restart", _drain_and_restart),
    *roles.STRIKES,
    *routers.STRIKES,
    *waiting.STRIKES,
    Strike("SIGSTOP", "all that decode", "", _stop_all_that_decode),
    Strike("cancel burst", "clients", "", _cancel_burst),
    *clocks.STRIKES,
    *disks.STRIKES,
]


@dataclass(frozen=True, slots=True)
class Condition:
    """A deployment in which something is wrong all the time. `counted`: metrics that say how often, by the labels' text."""

    what: str
    where: str
    settings: dict[str, object]
    counted: tuple[str, ...]


def _faulty(fault: str, share: float, *verdicts: str) -> Condition:
    counted = tuple(f'baton_handoffs_total{{verdict="{verdict}"}}' for verdict in verdicts)
    return Condition(f"{fault} {share:.0%} of transfers", "transport", {"transfer": {"faults": {fault: share}}}, counted)


CONDITIONS = [
    _faulty("corrupt", 0.4, "digest_mismatch"),
    _faulty("truncate", 0.4, "digest_mismatch"),
    _faulty("drop", 0.4, "transfer_failed"),
    Condition(
        "hang 30% of transfers",
        "transport",
        {"transfer": {"faults": {"hang": 0.3}, "timeout_s": 0.3}},
        ('baton_handoffs_total{verdict="transfer_timeout"}',),
    ),
    Condition(
        "leases that expire",
        "prefill",
        {"transfer": {"lease_s": 0.001}},
        ('baton_handoffs_total{verdict="expired"}',),
    ),
    Condition(
        "KV pool full",
        "workers",
        {"engine": {"kv_pool_mib": 1}},
        ("baton_requests_total",),
    ),
]
