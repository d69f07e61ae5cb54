"""Some hundred lives of each world with every promise kept; and worlds with a bug put in, in which it is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from python_backends.core.orders import _Window
from python_backends.core.types import LeaseEnd
from python_backends.engines.paged.engine import PagedEngine
from python_backends.kv.block_pool import BlockPool
from python_backends.kv.lease import LeaseTable
from router import lifecycle
from router.lifecycle import Event, Held, State
from router.run import Run
from router.service import RouterService
from scripts import explore

LIVES = {"leases": 3_000, "workers": 200, "router": 120}
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("world", explore.WORLDS)
def test_every_promise_is_kept(world: str) -> None:
    result = explore.live_through(world, range(LIVES[world]))
    assert [f"{violated.seed}: {violated.promise}" for violated in result.violations] == []
    assert result.lives == LIVES[world]


def test_everything_happens_that_a_world_is_for() -> None:
    seen = {world: explore.live_through(world, range(100)).happened for world in explore.WORLDS}
    assert {"leases", "released", "released again", "expired", "retries", "crashes", "fetched"} <= seen["leases"].keys()
    verdicts = {"verified", "replayed", "expired", "bad_signature", "stale_epoch", "transfer_failed", "foreign_content"}
    assert {f"handoff {verdict}" for verdict in verdicts} <= seen["workers"].keys()
    assert {"replayed work refused", "aborts", "orderly ends", "routers lost"} <= seen["workers"].keys()
    assert {"retries", "crashes", "freezes", "cuts", "unloads", "ended ok", "failed Cancelled"} <= seen["router"].keys()


def _release_twice(patch: pytest.MonkeyPatch) -> None:
    release = LeaseTable.release

    def twice(table: LeaseTable, lease_id: str) -> bool:
        lease = table._leases.get(lease_id)
        if lease is not None and any(table._pool._references.get(block, 0) > 1 for block in lease.blocks):
            table._pool.release([block for block in lease.blocks if table._pool._references[block] > 1])
        return release(table, lease_id)

    patch.setattr(LeaseTable, "release", twice)


def _forget_requests_leases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseTable, "release_request", lambda table, request_id: False)
    patch.setattr(LeaseTable, "expire", lambda table, now: [])


def _keep_generations(patch: pytest.MonkeyPatch) -> None:
    allocate = BlockPool.allocate

    def silently(pool: BlockPool, count: int) -> list[int]:
        before = pool._generations.copy()
        blocks = allocate(pool, count)
        pool._generations[:] = before
        return blocks

    patch.setattr(BlockPool, "allocate", silently)


def _forget_the_lease(patch: pytest.MonkeyPatch) -> None:
    table = {**lifecycle.ENDED_BY_ITSELF, (State.HANDING_OFF, Event.KV_READY): frozenset({Held.DECODE})}
    patch.setattr("scripts.exploration.leases.ENDED_BY_ITSELF", table)


def _take_orders_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_Window, "take", lambda window, number: True)


def _forget_an_aborted_request(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagedEngine, "_abort", lambda engine, request_id: None)


def _lose_references(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "release", lambda pool, blocks: None)


def _ignore_tenants(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("python_backends.core.block_hash.BlockHash", lambda hash_: hash_[:1] * 16)


def _deaf_to_leases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagedEngine, "release", lambda engine, lease_id, end=LeaseEnd.UNWANTED: None)
    patch.setattr(LeaseTable, "expire", lambda table, now: [])


def _lose_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_is_next", lambda run, chunk: True)


def _never_abort(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RouterService, "abort", lambda service, worker, request_id: None)


BUGS: list[tuple[str, Patch]] = [
    ("leases", _release_twice),
    ("leases", _forget_requests_leases),
    ("leases", _keep_generations),
    ("leases", _forget_the_lease),
    ("workers", _take_orders_twice),
    ("workers", _forget_an_aborted_request),
    ("workers", _lose_references),
    ("workers", _ignore_tenants),
    ("router", _deaf_to_leases),
    ("router", _lose_tokens),
    ("router", _never_abort),
]


@pytest.mark.parametrize(("world", "bug"), BUGS, ids=[f"{world}: {bug.__name__[1:]}" for world, bug in BUGS])
def test_a_bug_is_found(world: str, bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    for first in range(0, 4_000, 50):
        result = explore.live_through(world, range(first, first + 50))
        if result.broken:
            assert result.violations[0].promise
            return
    pytest.fail(f"{bug.__name__} was not noticed in 4000 lives")


def test_results_are_written_and_processes_share_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert explore.main(["leases", "--lives", "120", "--first", "7", "--processes", "2", "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())
    assert (result["world"], result["lives"], result["broken"]) == ("leases", 120, 0)
    assert result["happened"] == explore.explore("leases", 7, 120, 1).happened  # a seed is a world, in any process
    assert "leases" in capsys.readouterr().out


def test_a_broken_promise_is_told_with_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explore, "explore", lambda world, first, *_: explore.live_through(world, range(first, first + 20)))
    _forget_requests_leases(monkeypatch)
    assert explore.main(["leases"]) == 1
    said = capsys.readouterr().out
    assert "leak" in said
    assert "again: scripts/explore leases --first" in said


@pytest.mark.parametrize(("arguments", "says"), [(["lease"], "no world lease"), (["--lives", "0"], "not a positive number")])
def test_wrong_arguments_are_named(arguments: Sequence[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        explore.main([*arguments])
    assert says in capsys.readouterr().err
