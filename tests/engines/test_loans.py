"""Engines that lend cached blocks to each other: what one has in its pool, another one fetches instead of computing it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.config import Deployment, EngineConfig, FakeConfig, ModelConfig, TransferConfig, WorkerConfig
from python_backends.core.handoff import seal, unseal
from python_backends.core.messages import Followed, KVReady, Lent, PrefillDone
from python_backends.core.types import BlockHash, Epoch, RequestId, Role
from python_backends.engines.base import Lender, create_engine
from tests.engines.bench import KEY, EngineBench, make_request
from tests.engines.test_stores import BLOCK, tokens_of
from tests.engines.tiny_model import write_tiny_llama

PROMPT = tokens_of(1, 75)  # 4 full blocks and a partial one

Make = Callable[..., EngineBench]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["fake", "torch"])
def make(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Make]:
    benches: list[EngineBench] = []

    def make_bench(role: Role, **transfer: Any) -> EngineBench:
        deployment = Deployment(
            model=ModelConfig(path=str(tiny)),
            workers=(WorkerConfig(role=role, name=role.value, engine=request.param, threads=1),),
            engine=EngineConfig(
                block_size=BLOCK, kv_pool_mib=8, step_tokens=64, fake=FakeConfig(prefill_us_per_token=200, step_us=200)
            ),
            transfer=TransferConfig(**({"timeout_s": 0.3} | transfer)),
        )
        bench = EngineBench(create_engine(deployment, deployment.workers[0], Epoch(len(benches) + 1), KEY))
        benches.append(bench)
        return bench

    yield make_bench
    for bench in benches:
        bench.engine.close()


def hashes_of(bench: EngineBench, tokens: list[int], salt: str = "") -> list[BlockHash]:
    return block_hashes(tokens, BLOCK, chain_root(bench.engine.info.fingerprint, salt))


def lend(bench: EngineBench, hashes: list[BlockHash]) -> Lent:
    assert isinstance(bench.engine, Lender)
    question = f"q{time.monotonic_ns()}"
    bench.engine.lend(RequestId(question), hashes)
    bench.wait(lambda: question in bench.outputs)
    (lent,) = bench.outputs[question]
    assert isinstance(lent, Lent)
    return lent


def prefill_with(bench: EngineBench, request_id: str, tokens: list[int], loan: bytes, **sampling: Any) -> PrefillDone:
    assert isinstance(bench.engine, Lender)
    bench.engine.prefill_with(make_request(request_id, tokens, **sampling), loan)
    bench.wait(lambda: bench.last(request_id) is not None)
    done = bench.last(request_id)
    assert isinstance(done, PrefillDone), done
    return done


@pytest.mark.parametrize("lender_role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_what_a_peer_has_is_not_computed(make: Make, lender_role: Role, transport: str) -> None:
    transfer: dict[str, Any] = {"transport": transport, "timeout_s": 5.0}
    lender, borrower = make(lender_role, **transfer), make(Role.PREFILL, **transfer)
    if lender_role is Role.DECODE:
        lender.decode(make_request("a", PROMPT))
    else:
        lender.prefill(make_request("a", PROMPT, max_tokens=1))
    lent = lend(lender, hashes_of(lender, PROMPT))
    assert lent.tokens == 64
    assert lent.ticket is not None
    longer = [*PROMPT[:64], *tokens_of(2, 50)]
    done = prefill_with(borrower, "b", longer, lent.ticket)
    assert (done.prefix.peer_tokens, done.prefix.tokens, done.computed_tokens, done.reused_tokens) == (64, 64, 50, 0)
    assert done.prefix.bytes == 4 * borrower.engine.info.layout.block_bytes
    alone = make(Role.PREFILL).prefill(make_request("alone", longer))
    assert done.token_id == alone.token_id
    ready = borrower.kv_ready("b")
    assert isinstance(ready, KVReady)
    assert ready.lease_id == lent.lease_id
    lender.engine.release(lent.lease_id or "")
    lender.assert_nothing_held()


def test_the_borrowed_blocks_are_handed_on(make: Make) -> None:
    lender, borrower, decode = make(Role.PREFILL), make(Role.PREFILL), make(Role.DECODE)
    lender.prefill(make_request("a", PROMPT, max_tokens=1))
    loan = lend(lender, hashes_of(lender, PROMPT)).ticket
    assert loan is not None
    done = prefill_with(borrower, "b", PROMPT, loan, max_tokens=12)
    tokens, report = decode.decode(make_request("d", PROMPT, [done.token_id], max_tokens=12), done.ticket)
    assert (report.received_tokens, report.digest) == (75, "verified")
    expected, _ = make(Role.AGGREGATED).decode(make_request("ref", PROMPT, max_tokens=12))
    assert [done.token_id, *tokens] == expected


def test_only_what_is_missing_is_fetched(make: Make) -> None:
    lender, borrower = make(Role.PREFILL), make(Role.PREFILL)
    lender.prefill(make_request("a", PROMPT, max_tokens=1))
    borrower.prefill(make_request("b", PROMPT[:40], max_tokens=1))
    loan = lend(lender, hashes_of(lender, PROMPT)).ticket
    assert loan is not None
    done = prefill_with(borrower, "c", PROMPT, loan)
    assert (done.reused_tokens, done.prefix.peer_tokens, done.computed_tokens) == (32, 32, 11)
    assert done.prefix.bytes == 2 * borrower.engine.info.layout.block_bytes


def test_nothing_cached_lends_nothing(make: Make) -> None:
    lender = make(Role.PREFILL)
    lent = lend(lender, hashes_of(lender, PROMPT))
    assert (lent.tokens, lent.ticket, lent.lease_id) == (0, None, None)
    lender.prefill(make_request("a", PROMPT, max_tokens=1, salt="a"))
    assert lend(lender, hashes_of(lender, PROMPT, "b")).ticket is None, "another tenant's blocks"


def test_a_loan_that_nobody_takes_ends_with_its_lease(make: Make) -> None:
    lender = make(Role.PREFILL, lease_s=0.3)
    lender.prefill(make_request("a", PROMPT, max_tokens=1))
    lend(lender, hashes_of(lender, PROMPT))
    lender.wait_load(lambda: lender.engine.load().active_leases == 1)
    lender.wait_load(lambda: lender.engine.load().active_leases == 0, timeout_s=1.5)
    lender.assert_nothing_held()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ticket: b"nonsense",
        lambda ticket: _resealed(ticket, content=b"\0" * 16),
        lambda ticket: _resealed(ticket, fingerprint="0" * 32),
        lambda ticket: _resealed(ticket, expires_at=time.time() - 1),
        lambda ticket: _resealed(ticket, num_tokens=63),
        lambda ticket: _resealed(ticket, digests=[b"\0" * 16] * 4),
        lambda ticket: _resealed(ticket, epoch=Epoch(4711)),
    ],
)
def test_a_bad_loan_costs_computing_and_not_the_text(make: Make, spoil: Callable[[bytes], bytes]) -> None:
    lender, borrower = make(Role.PREFILL), make(Role.PREFILL)
    expected = lender.prefill(make_request("a", PROMPT))
    lent = lend(lender, hashes_of(lender, PROMPT))
    assert lent.ticket is not None
    done = prefill_with(borrower, "b", PROMPT, spoil(lent.ticket))
    assert done.token_id == expected.token_id
    assert (done.prefix.tokens, done.computed_tokens) == (0, 75)
    assert borrower.kv_ready("b") is not None, "the loan would not be given back"


def _resealed(ticket: bytes, **changes: object) -> bytes:
    return seal(msgspec.structs.replace(unseal(ticket, KEY, time.time()), **changes), KEY)


def test_a_loan_of_another_prompt_is_refused(make: Make) -> None:
    lender, borrower = make(Role.PREFILL), make(Role.PREFILL)
    lender.prefill(make_request("a", PROMPT, max_tokens=1))
    loan = lend(lender, hashes_of(lender, PROMPT)).ticket
    assert loan is not None
    other = tokens_of(9, 75)
    done = prefill_with(borrower, "b", other, loan)
    assert (done.prefix.tokens, done.computed_tokens) == (0, 75)
    assert done.token_id == make(Role.PREFILL).prefill(make_request("ref", other)).token_id


def test_a_loan_that_is_slower_than_computing_is_not_fetched(make: Make) -> None:
    lender, borrower = make(Role.PREFILL), make(Role.PREFILL)
    lender.prefill(make_request("a", PROMPT, max_tokens=1))
    engine: Any = borrower.engine
    engine._loan_pace.measure(1, 1.0)  # a byte in a second
    engine._compute_pace.measure(1000, 1.0)
    loan = lend(lender, hashes_of(lender, PROMPT)).ticket
    assert loan is not None
    done = prefill_with(borrower, "b", PROMPT, loan)
    assert (done.prefix.tokens, done.computed_tokens) == (0, 75)
    assert borrower.kv_ready("b") is not None


def test_abort_while_a_loan_is_fetched_gives_everything_back(make: Make) -> None:
    lender, borrower = make(Role.PREFILL), make(Role.PREFILL, faults={"hang": 1.0}, timeout_s=0.5)
    lender.prefill(make_request("a", PROMPT, max_tokens=1))
    loan = lend(lender, hashes_of(lender, PROMPT)).ticket
    assert isinstance(borrower.engine, Lender)
    assert loan is not None
    borrower.engine.prefill_with(make_request("b", PROMPT), loan)
    borrower.wait_load(lambda: borrower.engine.load().held_blocks > 0)
    borrower.engine.abort(RequestId("b"))
    borrower.assert_nothing_held()
    assert borrower.last("b") is None


# --- a decode worker follows a prefill ---


def follow(bench: EngineBench, request_id: str, tokens: list[int], lent: Lent) -> Followed:
    """As the router asks for it."""
    assert isinstance(bench.engine, Lender)
    bench.engine.follow(make_request(request_id, tokens[: lent.tokens + 1]), lent.ticket or b"")
    bench.wait(lambda: request_id in bench.outputs)
    (followed,) = bench.outputs[request_id]
    assert isinstance(followed, Followed), followed
    return followed


def test_what_came_ahead_is_not_moved_again(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    prefill.prefill(make_request("begun", PROMPT[:40], max_tokens=1))
    size = decode.engine.info.layout.block_bytes
    first = follow(decode, "f1", PROMPT, lend(prefill, hashes_of(prefill, PROMPT)))
    assert (first.tokens, first.bytes) == (32, 2 * size)
    decode.assert_nothing_held()
    done = prefill.prefill(make_request("whole", PROMPT, max_tokens=12))
    second = follow(decode, "f2", PROMPT, lend(prefill, hashes_of(prefill, PROMPT)))
    assert (second.tokens, second.bytes) == (32, 2 * size), "only what is new"
    tokens, report = decode.decode(make_request("d", PROMPT, [done.token_id], max_tokens=12), done.ticket)
    assert (report.reused_tokens, report.received_tokens, report.recomputed_tokens) == (64, 11, 0)
    assert report.received_bytes == size
    expected, _ = make(Role.AGGREGATED).decode(make_request("ref", PROMPT, max_tokens=12))
    assert [done.token_id, *tokens] == expected


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ticket: b"nonsense",
        lambda ticket: _resealed(ticket, content=b"\0" * 16),
        lambda ticket: _resealed(ticket, digests=[b"\0" * 16] * 4),
        lambda ticket: _resealed(ticket, epoch=Epoch(4711)),
    ],
)
def test_what_can_not_be_fetched_ahead_leaves_nothing_behind(make: Make, spoil: Callable[[bytes], bytes]) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    done = prefill.prefill(make_request("a", PROMPT, max_tokens=12))
    lent = lend(prefill, hashes_of(prefill, PROMPT))
    assert lent.ticket is not None
    spoilt = msgspec.structs.replace(lent, ticket=spoil(lent.ticket))
    assert follow(decode, "f", PROMPT, spoilt) == Followed(RequestId("f"))
    decode.assert_nothing_held()
    assert decode.engine.load().cached_blocks == 0, "bad KV can be found"
    _, report = decode.decode(make_request("d", PROMPT, [done.token_id], max_tokens=12), done.ticket)
    assert (report.reused_tokens, report.received_tokens) == (0, 75)


def test_where_there_is_no_room_nothing_is_fetched_ahead(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE)
    prefill.prefill(make_request("a", PROMPT, max_tokens=1))
    lent = lend(prefill, hashes_of(prefill, PROMPT))
    load, longest = decode.engine.load(), decode.engine.info.max_context - 40
    names = [f"long{i}" for i in range(load.total_blocks * BLOCK // longest + 1)]  # the last one has to wait
    for seed, name in enumerate(names):
        decode.engine.decode(make_request(name, tokens_of(50 + seed, longest), max_tokens=30, ignore_eos=True), None)
    decode.wait_load(lambda: decode.engine.load().queued_requests > 0)
    assert follow(decode, "f", PROMPT, lent) == Followed(RequestId("f"))
    for name in names:
        decode.engine.abort(RequestId(name))
    decode.assert_nothing_held()


def test_abort_while_it_follows_gives_everything_back(make: Make) -> None:
    prefill, decode = make(Role.PREFILL), make(Role.DECODE, faults={"hang": 1.0}, timeout_s=0.5)
    prefill.prefill(make_request("a", PROMPT, max_tokens=1))
    lent = lend(prefill, hashes_of(prefill, PROMPT))
    assert isinstance(decode.engine, Lender)
    assert lent.ticket is not None
    decode.engine.follow(make_request("f", PROMPT[:65]), lent.ticket)
    decode.wait_load(lambda: decode.engine.load().held_blocks > 0)
    decode.engine.abort(RequestId("f"))
    decode.assert_nothing_held()
    assert "f" not in decode.outputs
