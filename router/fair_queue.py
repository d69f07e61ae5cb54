"""Who is next at the door: strict priority between classes, and within a class the same number of tokens for everybody.

Deficit round robin (Shreedhar and Varghese, "Efficient Fair Queuing Using Deficit Round Robin", SIGCOMM 1995): flows take
turns; with each turn a flow may spend `quantum` more tokens, and what it does not spend is kept as long as it waits. A
tenant with a thousand requests in the queue so costs another one with a single request no more than one turn.

Generic over what waits; costs are prompt tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

_QUANTUM = 2048  # tokens


@dataclass(slots=True)
class _Flow(Generic[Item]):
    waiting: OrderedDict[Item, int] = field(default_factory=OrderedDict)  # with its cost, in order of arrival
    cost: int = 0
    deficit: int = 0
    at_turn: bool = False  # has been given its quantum for the present turn


class FairQueue(Generic[Item]):
    """`cost`: of all that wait together."""

    def __init__(self, quantum: int = _QUANTUM) -> None:
        self._quantum = quantum
        self._classes: dict[int, OrderedDict[Hashable, _Flow[Item]]] = {}  # flows in the order of their turns
        self._places: dict[Item, tuple[int, Hashable]] = {}
        self.cost = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Item]:
        return iter(list(self._places))

    def has(self, priority: int) -> bool:
        """Whether anybody waits who is served before, or in turns with, this class."""
        return any(each <= priority for each in self._classes)

    def push(self, item: Item, cost: int, flow: Hashable, priority: int) -> None:
        """Classes with a lower number are served first."""
        place = self._classes.setdefault(priority, OrderedDict()).setdefault(flow, _Flow())
        place.waiting[item] = cost
        place.cost += cost
        self.cost += cost
        self._places[item] = (priority, flow)

    def discard(self, item: Item) -> None:
        """Take an item out, wherever it is. Unknown ones are a no-op."""
        where = self._places.pop(item, None)
        if where is None:
            return
        priority, name = where
        flows = self._classes[priority]
        flow = flows[name]
        cost = flow.waiting.pop(item)
        flow.cost -= cost
        self.cost -= cost
        if not flow.waiting:
            del flows[name]  # with its deficit: who comes back begins anew
            if not flows:
                del self._classes[priority]

    def serve(self, take: Callable[[Item], bool], kind: Callable[[Item], Hashable]) -> None:
        """Offer items in their order, as long as one is taken.

        `take` returns whether the item is taken; then it is out of the queue. Of a `kind` of which one was not taken, no
        other is offered, so that what is small and late does not overtake what is large and early.
        """
        refused: set[Hashable] = set()
        for priority in sorted(self._classes):
            self._serve_class(priority, take, kind, refused)

    def _serve_class(
        self, priority: int, take: Callable[[Item], bool], kind: Callable[[Item], Hashable], refused: set[Hashable]
    ) -> None:
        idle_turns = 0
        while (flows := self._classes.get(priority)) and idle_turns < len(flows):
            name, flow = next(iter(flows.items()))
            if not flow.at_turn:
                flow.deficit += self._quantum
                flow.at_turn = True
            item, cost = next(iter(flow.waiting.items()))
            if kind(item) in refused:
                idle_turns += 1
                flows.move_to_end(name)  # it keeps its turn, and what it may spend
                continue
            if cost > flow.deficit:
                flow.at_turn = False
                flows.move_to_end(name)
                idle_turns = 0
                continue
            flow.deficit -= cost
            if take(item):
                idle_turns = 0
                self.discard(item)
            else:
                flow.deficit += cost
                refused.add(kind(item))

    def ahead(self, cost: int, flow: Hashable, priority: int) -> int:
        """Tokens that are served before an item of this cost that is pushed now."""
        tokens = 0
        for other, flows in self._classes.items():
            if other < priority:
                tokens += sum(each.cost for each in flows.values())
            elif other == priority:
                own = flows[flow].cost if flow in flows else 0
                tokens += own + sum(min(each.cost, own + cost) for name, each in flows.items() if name != flow)
        return tokens
