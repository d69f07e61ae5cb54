"""The bounded queue at the door: a request gets a place at once or is refused at once."""

from __future__ import annotations

from python_backends.core.errors import QueueFull, Unavailable

SHUTTING_DOWN = "the server is shutting down; send the request again elsewhere or later"


class Admission:
    """Counts requests in the house and prompt tokens that wait for their first token."""

    def __init__(self, max_requests: int, max_queued_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_queued_tokens = max_queued_tokens
        self.requests = 0
        self.queued_tokens = 0
        self._closed = False

    def close(self) -> None:
        """Refuse everybody from now on."""
        self._closed = True

    def enter(self) -> Place:
        """Take a place. Raises QueueFull, or Unavailable when closed."""
        if self._closed:
            raise Unavailable(SHUTTING_DOWN)
        if self.requests >= self._max_requests:
            raise QueueFull(f"{self.requests} requests are being served (router.max_requests); try again in a moment")
        self.requests += 1
        return Place(self)

    def queue(self, tokens: int) -> None:
        """Count waiting tokens. Raises QueueFull. One prompt may always wait, however long."""
        if self.queued_tokens and self.queued_tokens + tokens > self._max_queued_tokens:
            raise QueueFull(f"{self.queued_tokens} prompt tokens are waiting (router.max_queued_tokens); try again in a moment")
        self.queued_tokens += tokens


class Place:
    """One request's place in the house. Everything but `queue` may be called twice."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._queued = 0
        self._left = False

    def queue(self, tokens: int) -> None:
        """The prompt waits for its first token from now on. Raises QueueFull."""
        self._admission.queue(tokens)
        self._queued = tokens

    def first_token(self) -> None:
        """The prompt waits no more."""
        self._admission.queued_tokens -= self._queued
        self._queued = 0

    def leave(self) -> None:
        self.first_token()
        if not self._left:
            self._left = True
            self._admission.requests -= 1
