"""A decode worker that follows a prefill: it fetches the KV of a long prompt while the rest of it is still computed.

The prefill worker lends what it has, chunk by chunk, as it would to any other worker (House.borrow), and the decode worker
puts it into its prefix cache. So the handoff finds most of the prompt there, and moves the last chunks only. Nothing is
held for it at the decode worker: what is evicted again, or did not come, the handoff fetches as if nobody had followed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from python_backends.core.messages import Followed
from python_backends.core.types import GenerateRequest, LeaseEnd
from router.fleet import FOLLOWED_TOKENS, WorkerView
from router.house import House
from router.prompt import Prompt

_LOOK_S = 0.02  # from one look at what the prefill worker has to the next, at least ...
_LOOKS = 8  # ... and at most so many in one of its steps
_LEND_S = 10.0  # it answers between two steps, and a step may take seconds
_FETCH_S = 10.0  # for one part; transfer.timeout_s usually ends it before
_FAILURES = 3  # parts that did not come; then the rest is left to the handoff
_SETTLE_S = 1.0  # a part that is on its way when the prompt is done is waited for so long


class Following:
    """Begins with its construction; `settle` or `cancel` ends it. Belongs to the event loop."""

    def __init__(
        self,
        house: House,
        prompt: Prompt,
        request: GenerateRequest,
        prefill: WorkerView,
        decode: WorkerView,
        on_followed: Callable[[Followed], None],
    ) -> None:
        """request: what the decode worker will be asked. on_followed: told of each part that has come."""
        self._house = house
        self._prompt = prompt
        self._request = request
        self._prefill = prefill
        self._decode = decode
        self._on_followed = on_followed
        self._fetching = False
        self._ending = False
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def settle(self) -> None:
        """The prompt is computed: nothing more is begun, and what is on its way comes in, if it does so soon."""
        self._ending = True
        if self._fetching:
            await asyncio.wait({self._task}, timeout=_SETTLE_S)
        self.cancel()

    def cancel(self) -> None:
        """Idempotent."""
        self._task.cancel()

    async def _follow(self) -> None:
        step_ms = self._prefill.model.step_ms(self._prefill.step_tokens, 0, 0, 0)
        pause_s = max(_LOOK_S, step_ms / 1e3 / _LOOKS)
        have, failures = self._house.match(self._prompt).get(self._decode.id), 0
        while not self._ending and failures < _FAILURES:
            await asyncio.sleep(pause_s)
            if self._house.match(self._prompt).get(self._prefill.id) - have < FOLLOWED_TOKENS:
                continue
            fetched = await self._fetch_more()
            if fetched > have:
                have = fetched
            else:
                failures += 1  # no room just then, or they can't reach each other: the handoff will tell

    async def _fetch_more(self) -> int:
        """Leading tokens of the prompt that the decode worker has then; 0 when nothing came."""
        house, prefill = self._house, self._prefill.id
        lent = await house.borrow(prefill, self._prompt, _LEND_S)
        if lent is None or lent.ticket is None or lent.lease_id is None:
            return 0
        try:
            followed = await self._fetch(lent.tokens, lent.ticket)
        finally:
            house.calls.release(prefill, lent.lease_id, LeaseEnd.FETCHED)
        if followed is None:
            return 0
        self._on_followed(followed)
        return lent.tokens

    async def _fetch(self, tokens: int, ticket: bytes) -> Followed | None:
        deadline = min(self._request.deadline, self._house.clock.now() + _FETCH_S)
        known = self._request.prompt_ids + self._request.output_ids
        part = msgspec.structs.replace(self._request, prompt_ids=known[: tokens + 1], output_ids=[], deadline=deadline)
        self._fetching = True
        try:
            return await self._house.follow(self._decode.id, part, ticket)
        finally:
            self._fetching = False
