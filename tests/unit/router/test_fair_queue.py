from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from router.fair_queue import FairQueue


def served(
    queue: FairQueue[str], take: Callable[[str], bool] = lambda item: True, kind: Callable[[str], str] = str
) -> list[str]:
    """In what order items leave when `take` decides."""
    order: list[str] = []

    def taken(item: str) -> bool:
        if take(item):
            order.append(item)
            return True
        return False

    queue.serve(taken, kind)
    return order


def test_one_flow_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue(quantum=10)
    for name in "abc":
        queue.push(name, 25, "flow", 0)
    assert (len(queue), queue.cost) == (3, 75)
    assert served(queue) == ["a", "b", "c"]
    assert (len(queue), queue.cost) == (0, 0)


def test_lower_classes_wait_for_higher_ones() -> None:
    queue: FairQueue[str] = FairQueue()
    for name, priority in (("low", 5), ("high", -1), ("normal", 0)):
        queue.push(name, 10, name, priority)
    assert served(queue) == ["high", "normal", "low"]


def test_flows_get_the_same_number_of_tokens_whatever_their_sizes() -> None:
    queue: FairQueue[str] = FairQueue(quantum=100)
    costs = {"small": 10, "middle": 70, "large": 250}
    for flow, cost in costs.items():
        for i in range(5000 // cost):
            queue.push(f"{flow} {i}", cost, flow, 0)
    spent: Counter[str] = Counter()

    def take(item: str) -> bool:
        if sum(spent.values()) > 6000:
            return False
        flow = item.split()[0]
        spent[flow] += costs[flow]
        return True

    served(queue, take, lambda item: "any")
    assert max(spent.values()) - min(spent.values()) <= 2 * (250 + 100)


def test_a_late_flow_is_not_behind_a_crowd() -> None:
    queue: FairQueue[str] = FairQueue(quantum=100)
    for i in range(100):
        queue.push(f"crowd {i}", 100, "crowd", 0)
    queue.push("single", 100, "single", 0)
    assert queue.ahead(100, "single", 0) == 300  # its own, and as much again of the crowd as two of its turns
    assert queue.ahead(100, "newcomer", 0) == 200  # a turn of each
    assert queue.ahead(100, "crowd", 0) == 10_100
    assert queue.ahead(100, "newcomer", 1) == 10_100
    assert served(queue).index("single") <= 2


def test_what_is_not_taken_keeps_its_place_and_others_of_its_kind_do_not_overtake() -> None:
    queue: FairQueue[str] = FairQueue(quantum=100)
    for name in ("a1", "a2", "b1", "b2"):
        queue.push(name, 60, name[0], 0)
    queue.push("a9", 1, "other", 7)
    assert served(queue, lambda item: item[0] == "b", lambda item: item[0]) == ["b1", "b2"]
    assert served(queue) == ["a1", "a2", "a9"]


def test_discarded_items_are_gone() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 10, "flow", 0)
    queue.push("b", 20, "flow", 0)
    queue.discard("a")
    queue.discard("a")
    queue.discard("never there")
    assert (list(queue), queue.cost) == (["b"], 20)
    assert queue.has(0)
    assert not queue.has(-1)
    queue.discard("b")
    assert not queue.has(0)


_moves = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 5000), st.sampled_from("xyz"), st.integers(-1, 1)),
        st.tuples(st.just("discard"), st.integers(0, 60), st.just(""), st.just(0)),
        st.tuples(st.just("serve"), st.integers(0, 5), st.just(""), st.just(0)),
    ),
    max_size=60,
)


@given(_moves)
def test_nothing_is_lost_or_served_twice(moves: list[tuple[str, int, str, int]]) -> None:
    queue: FairQueue[str] = FairQueue(quantum=500)
    waiting: dict[str, tuple[int, str, int]] = {}
    for count, (move, number, flow, priority) in enumerate(moves):
        if move == "push":
            queue.push(f"{flow}{count}", number, flow, priority)
            waiting[f"{flow}{count}"] = (number, flow, priority)
        elif move == "discard" and waiting:
            name = list(waiting)[number % len(waiting)]
            queue.discard(name)
            del waiting[name]
        elif move == "serve":
            room = iter(range(number))
            for name in served(queue, lambda item: next(room, None) is not None, lambda item: "any"):  # noqa: B023
                _, its_flow, its_class = waiting.pop(name)
                assert its_class == min([its_class, *(each[2] for each in waiting.values())])
                earlier = [other for other, each in waiting.items() if each[1:] == (its_flow, its_class)]
                assert all(int(other[1:]) > int(name[1:]) for other in earlier)
        assert set(queue) == set(waiting)
        assert queue.cost == sum(each[0] for each in waiting.values())
    assert sorted(served(queue)) == sorted(waiting)
