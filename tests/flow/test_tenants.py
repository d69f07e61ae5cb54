"""One tenant neither finds nor times another's prefixes: what it gets, and how, is as if the other had never been there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from router.types import Proof, Way, Wish
from tests.flow.house import GREEDY, FlowHouse, deployment, eventually, prompt, reference

PROMPT = prompt(100, 1)
PROMPTS = {Wish.REMOTE: prompt(100, 2), Wish.LOCAL: prompt(100, 3), Wish.AGGREGATED: prompt(100, 4)}


@pytest.fixture(scope="module")
def house() -> Iterator[FlowHouse]:
    with FlowHouse(deployment(prefill=1, decode=1, aggregated=1)) as house:
        yield house


def ask(house: FlowHouse, salt: str, wish: Wish | None = None, prompt_ids: list[int] = PROMPT) -> Proof:
    answer = house.begin(prompt_ids, GREEDY, wish, salt=salt).wait()
    assert answer.ids == reference(prompt_ids, GREEDY)
    return answer.proof


def work(proof: Proof) -> dict[str, int]:
    """All that the time to the first token and after depends on, in tokens and bytes."""
    return {
        "prefill computed": proof.prefill_tokens_computed,
        "prefill reused": proof.prefill_tokens_reused,
        "decode computed": proof.kv_tokens_computed,
        "decode reused": proof.kv_tokens_reused,
        "received": proof.kv_tokens_received,
        "recomputed": proof.kv_tokens_recomputed,
        "bytes": proof.kv_bytes,
    }


def found(house: FlowHouse, salt: str) -> int:
    """Tokens of PROMPT that a worker is believed to have for this tenant."""
    router = house.service.house

    def look() -> int:
        match = router.match(router.prompt(PROMPT, salt))
        return max(match.get(worker.id) for worker in router.fleet)

    tokens: int = house.on_loop(look)
    return tokens


@pytest.mark.parametrize("wish", [Wish.REMOTE, Wish.LOCAL, Wish.AGGREGATED])
def test_another_tenants_prompt_is_as_new_as_one_that_nobody_asked(house: FlowHouse, wish: Wish) -> None:
    ids = PROMPTS[wish]
    ask(house, "mine", wish, ids)
    assert ask(house, "mine", wish, ids).kv_tokens_reused == 96  # the cache works: there is something to be found
    new = work(ask(house, "mine", wish, [token + 1 for token in ids]))
    assert work(ask(house, "other", wish, ids)) == new
    assert work(ask(house, "", wish, ids)) == new


def test_the_router_decides_as_if_the_other_had_never_been_there(house: FlowHouse) -> None:
    """A prompt that a decode worker has is computed by nobody; for another tenant it is."""
    ask(house, "first", Wish.LOCAL)
    assert eventually(lambda: found(house, "first") == 96)
    assert found(house, "second") == 0
    assert ask(house, "first", Wish.AUTO).route == Way.CACHED
    stranger, nobody = ask(house, "second", Wish.AUTO), ask(house, "third", Wish.AUTO)
    for proof in (stranger, nobody):
        assert proof.route != Way.CACHED
        assert (proof.kv_tokens_reused, proof.prefill_tokens_reused) == (0, 0)


def test_looking_for_anothers_prefix_leaves_it_where_it_is(house: FlowHouse) -> None:
    """Nor does a stranger's request for the same tokens replace or drop what the tenant has."""
    ask(house, "owner", Wish.REMOTE)
    for stranger in range(3):
        assert ask(house, f"stranger {stranger}", Wish.REMOTE).kv_tokens_reused == 0
    assert ask(house, "owner", Wish.REMOTE).kv_tokens_reused == 96
