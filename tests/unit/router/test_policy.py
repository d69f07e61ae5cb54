"""Who serves a request, and why."""

from __future__ import annotations

from python_backends.core.layout import KVLayout
from python_backends.core.messages import Heartbeat
from python_backends.core.types import Epoch, Role, WorkerId, WorkerLoad
from router.fleet import WorkerView
from router.policy import Query, choose
from router.types import RouteDecision, Way, Wish


def _worker(
    name: str, *, requests: int = 0, ahead: int = 0, fingerprint: str = "a", max_context: int = 4096, up: bool = True
) -> WorkerView:
    role = Role(name.split("_")[0])
    layout = KVLayout(1, 1, 1, 16, "float32")
    heartbeat = Heartbeat(WorkerId(name), role, Epoch(1), 1, WorkerLoad(), layout, fingerprint, max_context, 0)
    return WorkerView(heartbeat, 0.0, up, requests, ahead)


def _choose(
    *workers: WorkerView, tokens: int = 200, wish: Wish = Wish.AUTO, avoid: tuple[str, ...] = (), **matched: int
) -> RouteDecision | None:
    query = Query(tokens, {WorkerId(k): v for k, v in matched.items()}, wish, 32, [WorkerId(name) for name in avoid])
    return choose(query, workers)


def _way(decision: RouteDecision | None) -> tuple[str, str | None, str]:
    assert decision is not None
    assert decision.why
    return decision.way.value, decision.prefill, decision.decode


def test_a_cold_prompt_goes_to_the_least_busy_of_each_role() -> None:
    workers = [_worker("prefill", ahead=500), _worker("prefill_1"), _worker("decode", requests=3), _worker("decode_1")]
    assert _way(_choose(*workers)) == (Way.REMOTE, "prefill_1", "decode_1")


def test_the_prefill_worker_that_knows_the_prefix_wins_unless_it_is_too_busy() -> None:
    decode = _worker("decode")
    assert _way(_choose(_worker("prefill", ahead=100), _worker("prefill_1"), decode, prefill=160))[1] == "prefill"
    assert _way(_choose(_worker("prefill", ahead=200), _worker("prefill_1"), decode, prefill=160))[1] == "prefill_1"


def test_what_the_decode_worker_has_is_not_computed_elsewhere() -> None:
    workers = [_worker("prefill"), _worker("decode", requests=2), _worker("decode_1")]
    assert _way(_choose(*workers, decode=192)) == (Way.CACHED, None, "decode")
    assert _way(_choose(*workers, decode=176)) == (Way.LOCAL, None, "decode")
    assert _way(_choose(*workers, decode=160)) == (Way.REMOTE, "prefill", "decode_1")


def test_a_prefix_is_not_worth_a_crowd() -> None:
    workers = [_worker("prefill"), _worker("decode", requests=9), _worker("decode_1")]
    assert _way(_choose(*workers, decode=192))[2] == "decode_1"


def test_wishes_are_followed() -> None:
    workers = [_worker("prefill"), _worker("decode"), _worker("aggregated")]
    assert _way(_choose(*workers, wish=Wish.REMOTE, decode=192))[0] == Way.REMOTE
    assert _way(_choose(*workers, wish=Wish.LOCAL))[0] == Way.LOCAL
    assert _way(_choose(*workers, wish=Wish.AGGREGATED)) == (Way.AGGREGATED, None, "aggregated")


def test_missing_roles_are_done_without() -> None:
    assert _way(_choose(_worker("prefill", up=False), _worker("decode"))) == (Way.LOCAL, None, "decode")
    assert _way(_choose(_worker("prefill"), _worker("aggregated")))[0] == Way.AGGREGATED
    assert _choose(_worker("prefill")) is None
    assert _choose() is None


def test_kv_of_another_model_is_not_asked_for() -> None:
    assert _way(_choose(_worker("prefill", fingerprint="b"), _worker("decode")))[0] == Way.LOCAL


def test_workers_that_failed_the_request_are_avoided_while_there_are_others() -> None:
    workers = [_worker("decode"), _worker("decode_1", requests=5)]
    assert _way(_choose(*workers, avoid=("decode",)))[2] == "decode_1"
    assert _way(_choose(_worker("decode"), avoid=("decode",)))[2] == "decode"


def test_a_worker_too_small_for_the_prompt_is_not_asked() -> None:
    assert _way(_choose(_worker("decode", max_context=100), _worker("decode_1", requests=3)))[2] == "decode_1"
