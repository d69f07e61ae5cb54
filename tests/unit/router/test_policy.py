from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.messages import StepSample
from python_backends.core.types import Role, WorkerId
from router.fleet import Fleet
from router.policy import Choice, Query, Room, choose, has_room
from router.types import RouteDecision, Slo, Way, Wish
from tests.unit.router.fleet_views import heartbeat, put

P, D, A = Role.PREFILL, Role.DECODE, Role.AGGREGATED
SLOW_PREFILL = (2.0, 1.0, 0.0, 1.0, 0.0)


class Believed:
    """Stands for router.prefix_index.Match."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens

    def get(self, worker: WorkerId) -> int:
        return self._tokens.get(worker, 0)


def query(
    num_tokens: int = 200,
    matched: Mapping[str, int] | None = None,
    wish: Wish = Wish.AUTO,
    slo: Slo = Slo(),  # noqa: B008 (immutable)
    avoid: Collection[str] = (),
    stored: Mapping[str, int] | None = None,
) -> Query:
    tokens = matched or {}
    hits = [WorkerId(name) for name in sorted(tokens, key=lambda name: -tokens[name])]
    return Query(
        num_tokens,
        Believed(tokens),
        hits,
        wish,
        slo,
        output_tokens=16,
        avoid={WorkerId(name) for name in avoid},
        stored={WorkerId(name): count for name, count in (stored or {}).items()},
    )


def chosen(asked: Query, fleet: Fleet, seed: int = 0) -> RouteDecision:
    return choice(asked, fleet, seed).decision


def choice(asked: Query, fleet: Fleet, seed: int = 0) -> Choice:
    made = choose(asked, fleet, Random(seed))
    assert made is not None
    return made


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


# --- which way ---------------------------------------------------------------------------------------------------------


def test_on_an_idle_fleet_the_decode_worker_does_it_itself_and_spares_the_transfer(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D)
    decision = chosen(query(), fleet)
    assert (decision.way, decision.prefill, decision.decode, decision.prefill_tokens) == (Way.LOCAL, None, "d", 200)
    assert decision.ttft_ms == pytest.approx(1 + 2 + 20)
    assert decision.itl_ms == pytest.approx(2 + 1)


def test_streams_that_a_prompt_would_delay_send_it_to_a_prefill_worker(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D, streams=6)
    decision = chosen(query(), fleet)
    assert (decision.way, decision.prefill, decision.decode) == (Way.REMOTE, "p", "d")
    assert decision.ttft_ms == pytest.approx(1 + 2 + 20)


def test_a_long_queue_at_the_prefill_worker_sends_it_to_the_decode_worker(fleet: Fleet) -> None:
    put(fleet, "p", P, prompts=[500]), put(fleet, "d", D, streams=2)
    assert chosen(query(), fleet).way is Way.LOCAL


def test_the_time_between_tokens_comes_first(fleet: Fleet) -> None:
    put(fleet, "p", P, prompts=[500]), put(fleet, "d", D, streams=2)
    assert chosen(query(slo=Slo(itl_ms=30.0)), fleet).way is Way.LOCAL
    decision = chosen(query(slo=Slo(itl_ms=20.0)), fleet)  # a step with 200 tokens takes 24 ms
    assert decision.way is Way.REMOTE
    assert chosen(query(50, slo=Slo(itl_ms=20.0)), fleet).way is Way.LOCAL


@pytest.mark.parametrize(("cores", "way"), [("", Way.REMOTE), ("c", Way.LOCAL)])
def test_on_cores_that_they_share_a_long_prompt_waits_for_a_short_one(cores: str, way: Way) -> None:
    """Beside the 12 ms of the other one it would take as much longer, and so would that."""
    fleet = Fleet()
    put(fleet, "p", P, cores=cores), put(fleet, "d", D, prompts=[100], cores=cores)
    assert chosen(query(800), fleet).way is way


@pytest.mark.parametrize(("cores", "ttft_ms"), [("", 23), ("c", 46)])
def test_on_cores_that_they_share_a_short_prompt_does_not_wait_for_a_long_one(cores: str, ttft_ms: float) -> None:
    """Together they lose less than it would by waiting."""
    fleet = Fleet()
    put(fleet, "p", P, cores=cores), put(fleet, "d", D, prompts=[800], cores=cores)
    decision = chosen(query(), fleet)
    assert (decision.way, round(decision.ttft_ms)) == (Way.REMOTE, ttft_ms)


@pytest.mark.parametrize(("cores", "way"), [("", Way.REMOTE), ("c", Way.LOCAL)])
def test_on_cores_that_they_share_streams_lose_by_either_way(cores: str, way: Way) -> None:
    fleet = Fleet()
    put(fleet, "p", P, coefficients=(2.0, 0.127, 0.0, 1.0, 0.0), fingerprint="other", family="f", cores=cores)
    put(fleet, "d", D, streams=2, step_ms=16.0, family="f", cores=cores)
    assert chosen(query(900, slo=Slo(itl_ms=20.0)), fleet).way is way


@pytest.mark.parametrize(("cores", "way"), [("", Way.REMOTE), ("c", Way.LOCAL)])
def test_on_cores_that_they_share_nobody_is_taken_to_be_slower_for_having_had_less_to_do(cores: str, way: Way) -> None:
    fleet = Fleet()
    worked = put(fleet, "p", P, cores=cores)
    worked.model.prompt_samples = 100
    put(fleet, "d", D, coefficients=(2.0, 0.2, 0.0, 1.0, 0.0), cores=cores).model.prompt_samples = 1
    made = choice(query(), fleet)
    assert (made.decision.way, round(made.decision.ttft_ms), round(made.alone_ms)) == (way, 23, 23)
    worked.model.coefficients = [2.0, 0.3, 0.0, 1.0, 0.0]
    assert round(chosen(query(wish=Wish.REMOTE), fleet).ttft_ms) == 63, "what it has learned counts, for better or worse"


def test_who_is_down_or_elsewhere_takes_no_cores() -> None:
    fleet = Fleet()
    put(fleet, "p", P, cores="c"), put(fleet, "d", D, cores="c"), put(fleet, "p2", P, prompts=[800], cores="other")
    put(fleet, "p3", P, prompts=[800], cores="c", up=False)
    assert round(chosen(query(wish=Wish.REMOTE), fleet).ttft_ms) == 23
    put(fleet, "p5", P, prompts=[800], cores="c")
    fleet.forget(WorkerId("p5"))
    put(fleet, "p4", P, prompts=[100], cores="c")
    assert round(chosen(query(wish=Wish.LOCAL), fleet).ttft_ms) == 23 + 12
    fleet.hear(heartbeat("p4", P, epoch=2, cores="c"), 0.0)
    assert round(chosen(query(wish=Wish.LOCAL), fleet).ttft_ms) == 23, "its new life has nothing to do"


def test_a_worker_that_keeps_its_steps_short_may_compute_a_prompt_beside_streams() -> None:
    """With the whole prompt in one step streams would wait 26 ms. Cut chunks take longer, but less than a long queue."""

    def way(step_ms: float, queued: int) -> Way:
        fleet = Fleet()
        put(fleet, "p", P, prompts=[queued] if queued else []), put(fleet, "d", D, streams=4, step_ms=step_ms)
        return chosen(query(slo=Slo(itl_ms=20.0)), fleet).way

    assert way(16.0, 0) is Way.REMOTE
    assert way(16.0, 900) is Way.LOCAL
    assert way(0.0, 900) is Way.REMOTE


def test_a_target_for_the_first_token_is_worth_a_delay_of_others(fleet: Fleet) -> None:
    put(fleet, "p", P, prompts=[80]), put(fleet, "d", D, streams=7)
    assert chosen(query(), fleet).way is Way.REMOTE
    assert chosen(query(slo=Slo(ttft_ms=35.0)), fleet).way is Way.LOCAL


def test_what_no_way_can_keep_is_said(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D)
    assert "no way keeps the targets" in chosen(query(slo=Slo(ttft_ms=1.0)), fleet).why
    assert "no way" not in chosen(query(slo=Slo(ttft_ms=100.0)), fleet).why


@pytest.mark.parametrize(
    ("num_tokens", "matched", "way"),
    [
        (200, 192, Way.CACHED),
        (200, 176, Way.LOCAL),  # a full block is missing
        (193, 192, Way.CACHED),
        (192, 176, Way.CACHED),  # the last block counts as missing: its last token's logits are wanted
        (16, 0, Way.LOCAL),  # no block at all is not a hit
    ],
)
def test_a_prompt_with_every_full_block_here_is_called_cached(fleet: Fleet, num_tokens: int, matched: int, way: Way) -> None:
    put(fleet, "p", P), put(fleet, "d", D)
    assert chosen(query(num_tokens, {"d": matched}), fleet).way is way


def test_the_reasons_name_workers_and_milliseconds(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D, streams=6)
    why = chosen(query(200, {"p": 64}), fleet).why
    assert why == (
        "first token in 17 ms on p (64 of 200 tokens cached, 0 ahead), then 9.0 ms per token on d; "
        "local 33 ms and 28 ms between tokens of 6 streams"
    )


# --- which worker ------------------------------------------------------------------------------------------------------


def test_a_conversation_stays_with_its_worker_while_it_pays(fleet: Fleet) -> None:
    put(fleet, "d0", D)
    busy = put(fleet, "d1", D, streams=2)
    asked = query(400, {"d1": 384})
    assert chosen(asked, fleet).decode == "d1"
    for _ in range(5):
        fleet.charge(busy.id, 0, 100, 100)
    assert chosen(asked, fleet).decode == "d0"


def test_a_hot_prefix_is_queued_for_and_then_computed_elsewhere(fleet: Fleet) -> None:
    put(fleet, "d", D, streams=7, coefficients=SLOW_PREFILL)
    put(fleet, "cold", P)
    hot = put(fleet, "hot", P)
    chosen_at = []
    for _ in range(8):
        decision = chosen(query(400, {"hot": 320}), fleet)
        chosen_at.append(decision.prefill)
        fleet.charge(hot.id if decision.prefill == "hot" else WorkerId("cold"), decision.prefill_tokens)
    assert chosen_at[:3] == ["hot", "hot", "hot"]
    assert "cold" in chosen_at


@pytest.mark.parametrize(
    ("ahead", "matched", "best"),
    [
        ((0, 100), {}, "p0"),
        ((100, 0), {}, "p1"),
        ((200, 0), {"p0": 96}, "p1"),
        ((0, 0), {"p1": 96}, "p1"),
    ],
)
def test_the_prefill_worker_that_is_done_first_is_taken(
    fleet: Fleet, ahead: tuple[int, int], matched: dict[str, int], best: str
) -> None:
    for i, tokens in enumerate(ahead):
        put(fleet, f"p{i}", P, prompts=[tokens] if tokens else [])
    put(fleet, "d", D, streams=7, coefficients=SLOW_PREFILL)
    decision = chosen(query(matched=matched), fleet)
    assert decision.prefill == best
    assert decision.prefill_tokens == 200 - matched.get(best, 0)


def test_a_faster_worker_is_worth_a_longer_queue(fleet: Fleet) -> None:
    put(fleet, "slow", P, coefficients=(2.0, 0.5, 0.0, 1.0, 0.0))
    put(fleet, "fast", P, prompts=[200])
    put(fleet, "d", D, streams=7, coefficients=SLOW_PREFILL)
    assert chosen(query(), fleet).prefill == "fast"


def test_the_decode_worker_with_the_quicker_step_is_taken(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d0", D, streams=5), put(fleet, "d1", D, streams=4)
    assert chosen(query(wish=Wish.REMOTE), fleet).decode == "d1"


def test_a_worker_that_was_calibrated_on_a_busy_machine_is_given_work_after_a_few_canaries(fleet: Fleet) -> None:
    """What it was not given could not show that it is as fast as the other."""
    law = (20.0, 0.1, 0.0, 0.5, 0.0)
    shapes = [(64, 0, 0, 0), (0, 0, 1, 64), (0, 0, 8, 512), (256, 0, 0, 0)]
    for name, busy in (("fine", 1.0), ("slow", 3.0)):
        steps = [StepSample(*shape, busy * step_ms(law, shape)) for shape in shapes]
        fleet.hear(msgspec.structs.replace(heartbeat(name, max_batch=32), calibration=steps), 0.0)
    for _ in range(4):
        for name in ("fine", "slow"):
            fleet.stepped(WorkerId(name), [StepSample(8, 0, 0, 0, step_ms(law, (8, 0, 0, 0)))])
    given = []
    for seed in range(32):
        given.append(chosen(query(16), fleet, seed).decode)
        fleet.charge(given[-1], 0, 16, 32)
    assert given.count(WorkerId("slow")) >= 8


def step_ms(law: Sequence[float], shape: Sequence[float]) -> float:
    return law[0] + sum(cost * count for cost, count in zip(law[1:], shape, strict=True))


def test_near_equals_are_drawn_and_the_less_busy_one_is_taken(fleet: Fleet) -> None:
    for i in range(30):
        put(fleet, f"d{i}", D)
    drawn = {chosen(query(), fleet, seed).decode for seed in range(60)}
    assert len(drawn) > 15


def test_workers_that_failed_the_request_are_avoided_if_there_are_others(fleet: Fleet) -> None:
    for name, role in (("p0", P), ("p1", P), ("d0", D), ("d1", D)):
        put(fleet, name, role)
    decision = chosen(query(wish=Wish.REMOTE, avoid=["p0", "d0"]), fleet)
    assert (decision.prefill, decision.decode) == ("p1", "d1")
    decision = chosen(query(wish=Wish.REMOTE, avoid=["p0", "p1", "d0", "d1"]), fleet)
    assert decision.prefill in ("p0", "p1")
    assert decision.decode in ("d0", "d1")


def test_the_only_prefill_worker_is_not_asked_again_when_it_failed_the_request(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D, streams=7, coefficients=SLOW_PREFILL)
    assert chosen(query(), fleet).way is Way.REMOTE
    assert chosen(query(avoid=["p"]), fleet).way is Way.LOCAL
    assert chosen(query(avoid=["p", "d"]), fleet).way is Way.LOCAL
    assert chosen(query(wish=Wish.REMOTE, avoid=["p"]), fleet).way is Way.REMOTE, "as asked"


def test_a_prefill_worker_of_another_model_is_not_asked(fleet: Fleet) -> None:
    put(fleet, "p0", P, fingerprint="other"), put(fleet, "d", D, streams=7, coefficients=SLOW_PREFILL)
    assert chosen(query(), fleet).way is Way.LOCAL
    put(fleet, "p1", P)
    assert chosen(query(), fleet).prefill == "p1"


def test_a_prefill_worker_whose_kv_is_converted_is_asked(fleet: Fleet) -> None:
    put(fleet, "p0", P, fingerprint="float16", family="k")
    put(fleet, "d", D, family="k", streams=7, coefficients=SLOW_PREFILL)
    assert chosen(query(), fleet).prefill == "p0"


def test_workers_that_say_different_things_of_conversion_still_share_what_is_equal(fleet: Fleet) -> None:
    put(fleet, "p0", P, family="k"), put(fleet, "d", D, family="l", streams=7, coefficients=SLOW_PREFILL)
    assert chosen(query(), fleet).prefill == "p0"


def test_what_would_have_to_be_converted_is_not_lent(fleet: Fleet) -> None:
    put(fleet, "p", P, lends=True, fingerprint="float16", family="k"), put(fleet, "d", D, lends=True, family="k")
    decision = chosen(query(900, {"d": 640}, wish=Wish.REMOTE), fleet)
    assert (decision.prefill, decision.lender) == ("p", None)


def test_prompts_go_only_where_they_fit(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d0", D, max_context=200), put(fleet, "d1", D, max_context=201, streams=7)
    assert chosen(query(200), fleet).decode == "d1"
    assert chosen(query(199), fleet).decode == "d0"
    assert choose(query(201), fleet, Random(0)) is None


# --- wishes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "way"),
    [(Wish.REMOTE, Way.REMOTE), (Wish.LOCAL, Way.LOCAL), (Wish.AGGREGATED, Way.AGGREGATED), (Wish.AUTO, Way.LOCAL)],
)
def test_wishes_are_followed(fleet: Fleet, wish: Wish, way: Way) -> None:
    fleet.standby = frozenset({WorkerId("a")})
    put(fleet, "p", P), put(fleet, "d", D), put(fleet, "a", A)
    decision = chosen(query(wish=wish), fleet)
    assert decision.way is way
    assert decision.decode == ("a" if way is Way.AGGREGATED else "d")
    assert decision.why.startswith(f"{wish.value} as asked") is (wish is not Wish.AUTO)


@pytest.mark.parametrize(
    ("wish", "workers", "way"),
    [
        (Wish.REMOTE, {"d": D}, Way.LOCAL),
        (Wish.REMOTE, {"a": A}, Way.AGGREGATED),
        (Wish.LOCAL, {"p": P, "a": A}, Way.AGGREGATED),
        (Wish.AGGREGATED, {"d": D}, Way.LOCAL),
        (Wish.AUTO, {"a": A}, Way.AGGREGATED),
    ],
)
def test_wishes_that_nobody_can_serve_are_served_another_way(
    fleet: Fleet, wish: Wish, workers: dict[str, Role], way: Way
) -> None:
    for name, role in workers.items():
        put(fleet, name, role)
    assert chosen(query(wish=wish), fleet).way is way


def test_an_aggregated_worker_on_cores_of_its_own_is_as_good_as_any(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D, streams=7), put(fleet, "a", A)
    assert chosen(query(), fleet).decode == "a"
    fleet.standby = frozenset({WorkerId("a")})
    assert chosen(query(), fleet).decode == "d"


@pytest.mark.parametrize("workers", [{}, {"p": P}])
def test_nobody_can_serve_without_a_worker_that_decodes(fleet: Fleet, workers: dict[str, Role]) -> None:
    for name, role in workers.items():
        put(fleet, name, role)
    put(fleet, "down", D, up=False)
    assert choose(query(), fleet, Random(0)) is None


# --- room --------------------------------------------------------------------------------------------------------------


def test_a_worker_is_given_as_much_in_advance_as_it_needs_and_the_rest_waits_here(fleet: Fleet) -> None:
    put(fleet, "d", D)
    prefill = put(fleet, "p", P, prompts=[500])
    assert choice(query(wish=Wish.REMOTE), fleet).lacks is None
    fleet.charge(prefill.id, 12)
    assert choice(query(wish=Wish.REMOTE), fleet).lacks is Room.PROMPT
    assert not has_room(Room.PROMPT, fleet)
    assert choice(query(), fleet).lacks is None  # the decode worker does it


def test_a_very_long_prompt_leaves_room_for_others(fleet: Fleet) -> None:
    put(fleet, "d", D)
    prefill = put(fleet, "p", P, prompts=[100_000], total_blocks=10_000)
    assert choice(query(wish=Wish.REMOTE), fleet).lacks is None
    fleet.charge(prefill.id, 256)
    assert choice(query(wish=Wish.REMOTE), fleet).lacks is Room.PROMPT


def test_a_decode_worker_takes_only_what_its_batch_and_its_pool_hold(fleet: Fleet) -> None:
    put(fleet, "p", P)
    decode = put(fleet, "d", D, streams=7, total_blocks=20)  # 320 tokens
    assert choice(query(wish=Wish.REMOTE), fleet).lacks is None
    charge = fleet.charge(decode.id, 0)
    assert choice(query(wish=Wish.REMOTE), fleet).lacks is Room.STREAM
    assert choice(query(wish=Wish.LOCAL), fleet).lacks is Room.BOTH
    assert not has_room(Room.STREAM, fleet)
    charge.undo()
    decode.kv.take(97, 0)
    assert choice(query(wish=Wish.REMOTE), fleet).lacks is None
    decode.kv.take(1, 0)
    assert choice(query(wish=Wish.REMOTE), fleet).lacks is Room.STREAM
    assert choice(query(200, {"d": 16}, wish=Wish.REMOTE), fleet).lacks is None  # what is cached needs no room


def test_the_targets_decide_whether_another_worker_with_room_will_do(fleet: Fleet) -> None:
    """Local prefill would break the target: the request rather waits for the prefill worker."""
    put(fleet, "p", P, prompts=[600]), put(fleet, "d", D, streams=2)
    assert choice(query(slo=Slo(itl_ms=20.0)), fleet).lacks is Room.PROMPT
    assert choice(query(slo=Slo(itl_ms=40.0)), fleet).lacks is None


@pytest.mark.parametrize(("follows", "way"), [(False, Way.LOCAL), (True, Way.REMOTE)])
def test_a_slow_link_matters_less_where_kv_moves_while_the_prompt_is_computed(fleet: Fleet, follows: bool, way: Way) -> None:
    put(fleet, "p", P, lends=True)
    decode = put(fleet, "d", D, streams=3, lends=True, follows=follows)
    decode.link.learn(1, 10_000.0, 10_000.0)  # about 80 ms for this prompt, which takes 100 to compute
    assert chosen(query(900), fleet).way is way


@pytest.mark.parametrize("wish", [Wish.REMOTE, Wish.LOCAL])
def test_a_worker_takes_only_as_many_streams_as_keep_the_target(fleet: Fleet, wish: Wish) -> None:
    put(fleet, "p", P), put(fleet, "d", D, streams=4)
    asked = msgspec.structs.replace(query(wish=wish), longest_step_ms=7.0)  # a step takes 2 ms and 1 for each
    assert choice(asked, fleet).lacks is None
    put(fleet, "d2", D, streams=3)
    fleet.charge(WorkerId("d"), 0, 100, 1)
    assert choice(asked, fleet).decision.decode == "d2"
    fleet.charge(WorkerId("d2"), 0, 100, 1), fleet.charge(WorkerId("d2"), 0, 100, 1)
    assert choice(asked, fleet).lacks in (Room.STREAM, Room.BOTH)


def test_a_worker_whose_steps_are_often_late_takes_fewer(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D, streams=4)
    asked = msgspec.structs.replace(query(wish=Wish.REMOTE), longest_step_ms=7.0)
    worker = fleet.get(WorkerId("d"))
    assert worker is not None
    for learned_ms, lacks in ((9.0, None), (7.0, None), (6.5, Room.STREAM)):
        worker.step_ms = learned_ms
        assert choice(asked, fleet).lacks is lacks


def test_a_target_that_no_stream_keeps_keeps_nobody_away(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D, streams=4)
    assert choice(msgspec.structs.replace(query(), longest_step_ms=2.5), fleet).lacks is None


@pytest.mark.parametrize(("lacked", "name"), [(Room.PROMPT, "p"), (Room.STREAM, "d"), (Room.BOTH, "d"), (Room.AGGREGATED, "a")])
def test_room_is_looked_for_where_it_was_missed(fleet: Fleet, lacked: Room, name: str) -> None:
    for each, role in (("p", P), ("d", D), ("a", A)):
        put(fleet, each, role)
    assert has_room(lacked, fleet)
    fleet.lose(WorkerId(name))
    assert not has_room(lacked, fleet)


# --- any fleet ---------------------------------------------------------------------------------------------------------


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    fleet = Fleet()
    for i, role in enumerate(draw(st.lists(st.sampled_from(Role), max_size=8))):
        put(
            fleet,
            f"w{i}",
            role,
            streams=draw(st.integers(0, 9)),
            prompts=draw(st.lists(st.integers(1, 2000), max_size=3)),
            up=draw(st.booleans()),
            max_context=draw(st.sampled_from([50, 300])),
            fingerprint=draw(st.sampled_from("fg")),
        )
    return fleet


@given(
    fleets(),
    st.integers(1, 400),
    st.sampled_from(Wish),
    st.builds(Slo, st.sampled_from([0.0, 20.0]), st.sampled_from([0.0, 8.0])),
    st.data(),
)
def test_every_decision_can_be_carried_out(fleet: Fleet, num_tokens: int, wish: Wish, slo: Slo, data: st.DataObject) -> None:
    names = [worker.id for worker in fleet]
    most = (num_tokens - 1) // 16
    matched = {str(name): 16 * data.draw(st.integers(0, most)) for name in names}
    avoid = data.draw(st.sets(st.sampled_from(names))) if names else set()
    able = {w.id: w for w in fleet if w.up and num_tokens < w.max_context}
    made = choose(query(num_tokens, matched, wish, slo, avoid), fleet, Random(0))
    if made is None:
        assert all(worker.role is P for worker in able.values())
        return
    decision = made.decision
    decode = able[decision.decode]
    computes = decode
    if decision.prefill is not None:
        computes = able[decision.prefill]
        assert computes.role is P
        assert computes.fingerprint == decode.fingerprint
    assert (decision.way is Way.REMOTE) is (decision.prefill is not None)
    assert decode.role is (A if decision.way is Way.AGGREGATED else D)
    assert decision.prefill_tokens == num_tokens - matched[computes.id] > 0
    assert made.missing == num_tokens - matched[decode.id]
    assert decision.ttft_ms >= made.alone_ms > 0
    unavoided = {worker.id for worker in able.values() if worker.role is decode.role} - avoid
    assert not unavoided or decode.id in unavoided
    assert bool(decision.why) is (made.lacks is None)


# --- stores and loans ---------------------------------------------------------------------------------------------------


def test_what_the_stores_have_is_not_computed(fleet: Fleet) -> None:
    put(fleet, "p", P), put(fleet, "d", D, streams=2)
    decision = chosen(query(200, {"d": 32}, stored={"d": 192}), fleet)
    assert (decision.way, decision.decode, decision.prefill_tokens) == (Way.CACHED, "d", 8)
    assert "192 of 200 tokens in the stores" in decision.why
    assert chosen(query(200, {"d": 192}, stored={"d": 192}), fleet).why.count("192 of 200 tokens cached") == 1


def test_what_comes_from_a_store_needs_room_in_the_pool(fleet: Fleet) -> None:
    put(fleet, "d", D, streams=1, total_blocks=10)
    assert choice(query(200, stored={"d": 192}), fleet).lacks is not None
    assert choice(query(200, {"d": 192}), fleet).lacks is None


def test_a_prefill_worker_borrows_what_another_has_cached(fleet: Fleet) -> None:
    put(fleet, "p", P, lends=True), put(fleet, "d", D, lends=True)
    asked = query(900, {"d": 640}, wish=Wish.REMOTE)
    decision = chosen(asked, fleet)
    assert (decision.prefill, decision.lender, decision.prefill_tokens) == ("p", "d", 260)
    assert "640 of 900 tokens cached or lent by d" in decision.why
    assert decision.ttft_ms < chosen(query(900, wish=Wish.REMOTE), fleet).ttft_ms


@pytest.mark.parametrize(
    ("matched", "p_lends", "d_lends", "fingerprint"),
    [
        ({"d": 640, "p": 400}, True, True, "f"),  # too little more
        ({"d": 640}, False, True, "f"),
        ({"d": 640}, True, False, "f"),
        ({"p": 640}, True, True, "f"),  # from itself
        ({"x": 640}, True, True, "another"),
        ({}, True, True, "f"),
    ],
)
def test_where_nothing_is_lent(fleet: Fleet, matched: dict[str, int], p_lends: bool, d_lends: bool, fingerprint: str) -> None:
    put(fleet, "p", P, lends=p_lends), put(fleet, "d", D, lends=d_lends)
    put(fleet, "x", P, lends=True, fingerprint=fingerprint, up="x" in matched)
    decision = chosen(query(900, matched, wish=Wish.REMOTE), fleet)
    assert (decision.prefill, decision.lender) == ("p", None)


def test_of_a_worker_that_failed_nothing_is_borrowed(fleet: Fleet) -> None:
    put(fleet, "p", P, lends=True), put(fleet, "q", P, lends=True), put(fleet, "d", D)
    decision = chosen(query(900, {"q": 800}, wish=Wish.REMOTE, avoid=["q"]), fleet)
    assert (decision.prefill, decision.lender) == ("p", None)
