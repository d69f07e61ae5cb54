from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.types import Role, WorkerId
from router.fleet import WorkerView
from router.policy import Query, choose
from router.types import RouteDecision, Way, Wish
from tests.unit.router.fleet_views import view

P, D, A = Role.PREFILL, Role.DECODE, Role.AGGREGATED


def query(
    num_tokens: int = 200,
    matched: Mapping[str, int] | None = None,
    wish: Wish = Wish.AUTO,
    avoid: Collection[str] = (),
    stored: Mapping[str, int] | None = None,
) -> Query:
    return Query(
        num_tokens,
        _by_worker(matched),
        wish,
        local_prefill_tokens=32,
        stored=_by_worker(stored),
        avoid={WorkerId(name) for name in avoid},
    )


def _by_worker(counts: Mapping[str, int] | None) -> dict[WorkerId, int]:
    return {WorkerId(name): count for name, count in (counts or {}).items()}


def chosen(asked: Query, *workers: WorkerView) -> RouteDecision:
    decision = choose(asked, workers)
    assert decision is not None
    return decision


def test_a_long_uncached_prompt_goes_to_a_prefill_worker() -> None:
    decision = chosen(query(), view("p", P), view("d", D))
    assert (decision.way, decision.prefill, decision.decode, decision.prefill_tokens) == (Way.REMOTE, "p", "d", 200)
    assert "200 of 200 tokens are uncached at d" in decision.why


@pytest.mark.parametrize(("num_tokens", "way"), [(1, Way.LOCAL), (32, Way.LOCAL), (33, Way.REMOTE)])
def test_a_short_prompt_is_prefilled_by_the_decode_worker(num_tokens: int, way: Way) -> None:
    decision = chosen(query(num_tokens), view("p", P), view("d", D))
    assert (decision.way, decision.prefill_tokens) == (way, num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "matched", "way"),
    [
        (200, 192, Way.CACHED),
        (200, 176, Way.LOCAL),  # a full block is missing
        (200, 160, Way.REMOTE),
        (193, 192, Way.CACHED),
        (192, 176, Way.CACHED),  # the last block counts as missing: its last token's logits are wanted
        (16, 0, Way.LOCAL),  # no block at all is not a hit
    ],
)
def test_a_cached_prompt_needs_no_prefill_worker(num_tokens: int, matched: int, way: Way) -> None:
    decision = chosen(query(num_tokens, {"d": matched}), view("p", P), view("d", D))
    assert decision.way is way
    assert decision.prefill == ("p" if way is Way.REMOTE else None)


def test_a_prefix_hit_beats_a_less_busy_worker_but_not_at_any_price() -> None:
    matched = {"d1": 192}
    idle = view("d0", D)
    assert chosen(query(200, matched), view("p", P), idle, view("d1", D, requests=4)).decode == "d1"
    assert chosen(query(200, matched), view("p", P), idle, view("d1", D, requests=5)).decode == "d0"


def test_the_least_busy_decode_worker_is_taken_and_the_better_prefix_among_equals() -> None:
    workers = [view("p", P), view("d0", D, requests=2), view("d1", D, requests=1), view("d2", D, requests=1)]
    assert chosen(query(), *workers).decode == "d1"
    assert chosen(query(matched={"d2": 16}), *workers).decode == "d2"


@pytest.mark.parametrize(
    ("ahead", "matched", "best"),
    [
        ((0, 0), {}, "p0"),
        ((10, 0), {}, "p1"),
        ((100, 0), {"p0": 96}, "p1"),
        ((95, 0), {"p0": 96}, "p0"),
        ((0, 0), {"p1": 16}, "p1"),
    ],
)
def test_the_prefill_worker_that_is_done_first_is_taken(ahead: tuple[int, int], matched: dict[str, int], best: str) -> None:
    prefills = [view(f"p{i}", P, prefill_tokens=tokens) for i, tokens in enumerate(ahead)]
    decision = chosen(query(matched=matched), *prefills, view("d", D))
    assert decision.prefill == best
    assert decision.prefill_tokens == 200 - matched.get(best, 0)


def test_workers_that_failed_the_request_are_avoided_if_there_are_others() -> None:
    workers = [view("p0", P), view("p1", P), view("d0", D), view("d1", D)]
    decision = chosen(query(avoid=["p0", "d0"]), *workers)
    assert (decision.prefill, decision.decode) == ("p1", "d1")
    decision = chosen(query(avoid=["p0", "p1", "d0", "d1"]), *workers)
    assert (decision.prefill, decision.decode) == ("p0", "d0")


def test_a_prefill_worker_of_another_model_is_not_asked() -> None:
    foreign = view("p0", P, fingerprint="other")
    assert chosen(query(), foreign, view("d", D)).way is Way.LOCAL
    assert chosen(query(), foreign, view("p1", P), view("d", D)).prefill == "p1"


@pytest.mark.parametrize(
    ("wish", "num_tokens", "matched", "way"),
    [
        (Wish.REMOTE, 5, {}, Way.REMOTE),
        (Wish.REMOTE, 200, {"d": 192}, Way.REMOTE),
        (Wish.LOCAL, 200, {}, Way.LOCAL),
        (Wish.AGGREGATED, 200, {}, Way.AGGREGATED),
        (Wish.AUTO, 200, {}, Way.REMOTE),
    ],
)
def test_wishes_are_followed(wish: Wish, num_tokens: int, matched: dict[str, int], way: Way) -> None:
    decision = chosen(query(num_tokens, matched, wish), view("p", P), view("d", D), view("a", A))
    assert decision.way is way
    assert decision.decode == ("a" if way is Way.AGGREGATED else "d")


@pytest.mark.parametrize(
    ("wish", "workers", "way"),
    [
        (Wish.REMOTE, [view("d", D)], Way.LOCAL),
        (Wish.REMOTE, [view("a", A)], Way.AGGREGATED),
        (Wish.LOCAL, [view("p", P), view("a", A)], Way.AGGREGATED),
        (Wish.AGGREGATED, [view("p", P), view("d", D)], Way.REMOTE),
        (Wish.AUTO, [view("a", A)], Way.AGGREGATED),
    ],
)
def test_wishes_that_nobody_can_serve_are_served_another_way(wish: Wish, workers: list[WorkerView], way: Way) -> None:
    assert chosen(query(wish=wish), *workers).way is way


def test_the_aggregated_worker_that_is_done_first_is_taken() -> None:
    workers = [view("a0", A, prefill_tokens=50), view("a1", A, requests=3), view("a2", A, requests=1)]
    assert chosen(query(), *workers).decode == "a2"
    assert chosen(query(matched={"a0": 192}), *workers).decode == "a0"


@pytest.mark.parametrize("workers", [[], [view("p", P)], [view("d", D, up=False)], [view("p", P), view("a", A, up=False)]])
def test_nobody_can_serve_without_a_worker_that_decodes(workers: list[WorkerView]) -> None:
    assert choose(query(), workers) is None


def test_prompts_go_only_where_they_fit() -> None:
    small, large = view("d0", D, max_context=200), view("d1", D, max_context=201, requests=9)
    assert chosen(query(200), view("p", P), small, large).decode == "d1"
    assert chosen(query(199), view("p", P), small, large).decode == "d0"
    assert choose(query(201), [view("p", P), small, large]) is None
    assert chosen(query(200), view("p", P, max_context=200), large).way is Way.LOCAL
    assert chosen(query(200), small, view("a", A)).way is Way.AGGREGATED


@st.composite
def fleets(draw: st.DrawFn) -> list[WorkerView]:
    roles = draw(st.lists(st.sampled_from(Role), max_size=6))
    return [
        view(
            f"w{i}",
            role,
            requests=draw(st.integers(0, 9)),
            prefill_tokens=draw(st.integers(0, 999)),
            up=draw(st.booleans()),
            max_context=draw(st.sampled_from([50, 300])),
            fingerprint=draw(st.sampled_from("fg")),
        )
        for i, role in enumerate(roles)
    ]


@given(fleets(), st.integers(1, 400), st.sampled_from(Wish), st.data())
def test_every_decision_can_be_carried_out(fleet: list[WorkerView], num_tokens: int, wish: Wish, data: st.DataObject) -> None:
    names = [worker.id for worker in fleet]
    most = (num_tokens - 1) // 16
    matched = {str(name): 16 * data.draw(st.integers(0, most)) for name in names}
    avoid = data.draw(st.sets(st.sampled_from(names))) if names else set()
    able = {w.id: w for w in fleet if w.up and num_tokens < w.heartbeat.max_context}
    decision = choose(query(num_tokens, matched, wish, avoid), fleet)
    if decision is None:
        assert all(worker.role is P for worker in able.values())
        return
    decode = able[decision.decode]
    computes = decode
    if decision.prefill is not None:
        computes = able[decision.prefill]
        assert computes.role is P
        assert computes.heartbeat.fingerprint == decode.heartbeat.fingerprint
    assert (decision.way is Way.REMOTE) is (decision.prefill is not None)
    assert decode.role is (A if decision.way is Way.AGGREGATED else D)
    assert decision.prefill_tokens == num_tokens - matched[computes.id] > 0
    unavoided = {worker.id for worker in able.values() if worker.role is decode.role} - avoid
    assert not unavoided or decode.id in unavoided


# --- what the stores have ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "way"), [(192, Way.CACHED), (176, Way.LOCAL), (160, Way.REMOTE), (0, Way.REMOTE)])
def test_the_stores_count_as_the_cache_does(stored: int, way: Way) -> None:
    decision = chosen(query(stored={"d": stored}), view("p", P), view("d", D))
    assert decision.way is way
    assert ("in the stores" in decision.why) is (way is not Way.REMOTE)


def test_cache_and_stores_are_not_added_up() -> None:
    decision = chosen(query(matched={"d": 192}, stored={"d": 64}), view("p", P), view("d", D))
    assert decision.way is Way.CACHED
    assert "cached" in decision.why


def test_with_stores_the_idle_worker_need_not_have_the_prefix() -> None:
    workers = (view("p", P), view("busy", D, requests=3), view("idle", D))
    decision = chosen(query(matched={"busy": 192}, stored={"idle": 192, "busy": 192}), *workers)
    assert (decision.way, decision.decode) == (Way.CACHED, "idle")


def test_a_prefill_worker_is_charged_only_for_what_it_does_not_find() -> None:
    decision = chosen(query(400, stored={"p": 160, "d": 160}), view("p", P), view("d", D))
    assert (decision.way, decision.prefill_tokens) == (Way.REMOTE, 240)


# --- lending ----------------------------------------------------------------------------------------------------------


def lenders(**ahead: int) -> list[WorkerView]:
    """Prefill workers with so many tokens ahead of each, and a decode worker; all lend."""
    prefills = [view(name, P, prefill_tokens=tokens, lends=True, max_context=4000) for name, tokens in ahead.items()]
    return [*prefills, view("d", D, lends=True, max_context=4000)]


def test_an_idle_worker_borrows_from_a_busy_one() -> None:
    decision = chosen(query(2000, {"busy": 1600}), *lenders(busy=3000, idle=0))
    assert (decision.prefill, decision.lender, decision.prefill_tokens) == ("idle", "busy", 400)
    assert "borrows 1600 from busy" in decision.why


def test_whoever_has_the_prefix_needs_no_loan_unless_it_is_busy() -> None:
    decision = chosen(query(2000, {"p": 1600}), *lenders(p=0, q=0))
    assert (decision.prefill, decision.lender, decision.prefill_tokens) == ("p", None, 400)


def test_a_decode_worker_lends_too() -> None:
    decision = chosen(query(2000, {"d": 1600}), *lenders(p=0))
    assert (decision.prefill, decision.lender, decision.decode) == ("p", "d", "d")


@pytest.mark.parametrize(
    ("matched", "stored", "borrows"),
    [(1600, 0, True), (256, 0, True), (240, 0, False), (1600, 1600, False), (1600, 1400, False), (1600, 1280, True)],
)
def test_little_is_not_borrowed(matched: int, stored: int, borrows: bool) -> None:
    workers = lenders(busy=9000, idle=0)
    decision = chosen(query(2000, {"busy": matched}, stored={"idle": stored}), *workers)
    assert (decision.lender is not None) is borrows


def test_only_workers_of_the_same_model_that_are_up_and_did_not_fail_lend() -> None:
    others = [
        view("q", P, lends=False),
        view("q", P, lends=True, up=False),
        view("q", P, lends=True, fingerprint="other"),
    ]
    for other in others:
        assert chosen(query(2000, {"q": 1600}), *lenders(p=0), other).lender is None
    assert chosen(query(2000, {"d": 1600}, avoid=["d"]), *lenders(p=0)).lender is None
