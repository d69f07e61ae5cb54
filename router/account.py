"""The account of one request: times taken as they pass, counts as the workers report them, and the proof made of both."""

from __future__ import annotations

from python_backends.core.messages import Followed, PrefillDone
from python_backends.core.types import KVReport
from router.clock import Clock
from router.types import Proof, RouteDecision


class Account:
    """All instants are monotonic seconds; 0 means not yet."""

    def __init__(self, arrival: float, clock: Clock, resumed: int = 0) -> None:
        """resumed: tokens that an earlier life of the router has sent."""
        self._resumed = resumed
        self._clock = clock
        self._arrival = arrival
        self._arrival_ns = int((clock.wall() - (clock.now() - arrival)) * 1e9)
        self._first_token = 0.0
        self._kv_ready = 0.0
        self._second_token = 0.0
        self._last_token = 0.0
        self._num_output = 0
        self._predicted_ttft_ms = 0.0  # by the decision that led to the first token
        self._decision: RouteDecision | None = None
        self._attempts = 0
        self._prefill: PrefillDone | None = None
        self._prefill_ms: float | None = None  # of the attempt that made the first token, once known
        self._report = KVReport()
        self._ahead: list[Followed] = []

    def routed(self, decision: RouteDecision, attempt: int) -> None:
        """A new attempt: what an earlier one moved does not count."""
        self._decision = decision
        self._attempts = attempt
        if not self._first_token:
            self._predicted_ttft_ms = (self._clock.now() - self._arrival) * 1e3 + decision.ttft_ms
        self._prefill = None
        self._report = KVReport()
        self._ahead = []

    def followed(self, followed: Followed) -> None:
        """KV was moved before the prompt was computed."""
        self._ahead.append(followed)

    def prefilled(self, done: PrefillDone) -> None:
        self._prefill = done

    def kv_ready(self, report: KVReport) -> None:
        self._report = report
        if not self._second_token:  # a later handoff, of a retry, is no part of the way to the second token
            self._kv_ready = self._clock.now()

    def tokens(self, num_output: int, report: KVReport | None) -> None:
        """New tokens: `num_output` have now been produced in all."""
        now = self._last_token = self._clock.now()
        self._num_output = num_output
        if not self._first_token:
            self._first_token = now
            self._prefill_ms = self._prefill.compute_ms if self._prefill else None
        if num_output > 1:
            self._second_token = self._second_token or now
        self._report = report or self._report

    def proof(self) -> Proof:
        decision, prefill, report = self._decision, self._prefill, self._report
        prefill_prefix = prefill.prefix if prefill else report.prefix
        both = (prefill.prefix, report.prefix) if prefill else (report.prefix,)
        assert decision is not None
        now = self._clock.now()
        ttft_ms = (self._first_token - self._arrival) * 1e3
        prefill_ms = min(report.compute_ms if self._prefill_ms is None else self._prefill_ms, ttft_ms)
        handed_over = prefill is not None and self._kv_ready > 0
        ready = max(self._kv_ready, self._first_token)
        # The decode worker found what came ahead in its cache, unless it was evicted meanwhile.
        ahead = min(sum(followed.tokens for followed in self._ahead), report.reused_tokens) if handed_over else 0
        return Proof(
            route=decision.way.value,
            why=decision.why,
            prefill_worker=decision.prefill or decision.decode,
            decode_worker=decision.decode,
            attempts=self._attempts,
            kv_tokens_reused=report.reused_tokens - ahead,
            kv_tokens_received=report.received_tokens + ahead,
            kv_tokens_ahead=ahead,
            kv_tokens_recomputed=report.recomputed_tokens,
            kv_tokens_computed=report.computed_tokens,
            kv_tokens_node=report.prefix.node_tokens,
            kv_tokens_remote=report.prefix.remote_tokens,
            prefill_tokens_reused=prefill.reused_tokens if prefill else report.reused_tokens,
            prefill_tokens_node=prefill_prefix.node_tokens,
            prefill_tokens_remote=prefill_prefix.remote_tokens,
            prefill_tokens_peer=prefill_prefix.peer_tokens,
            prefill_tokens_computed=prefill.computed_tokens if prefill else report.computed_tokens,
            kv_bytes=report.received_bytes + sum(followed.bytes for followed in self._ahead),
            transfer_ms=report.transfer_ms + sum(followed.ms for followed in self._ahead),
            transport=report.transport,
            transport_why=report.transport_why,
            kv_codec=report.codec,
            kv_wire_bytes=report.wire_bytes + sum(followed.wire_bytes for followed in self._ahead),
            kv_rounded=report.rounded,
            store_bytes=sum(prefix.bytes for prefix in both),
            store_ms=sum(prefix.ms for prefix in both),
            digest=report.digest,
            ttft_ms=ttft_ms,
            queue_ms=ttft_ms - prefill_ms,
            prefill_ms=prefill_ms,
            handoff_ms=(ready - self._first_token) * 1e3 if handed_over else 0.0,
            first_decode_ms=(self._second_token - ready) * 1e3 if handed_over and self._second_token else 0.0,
            e2e_ms=(now - self._arrival) * 1e3,
            arrival_ns=self._arrival_ns,
            itl_ms=(self._last_token - self._first_token) * 1e3 / max(self._num_output - self._resumed - 1, 1),
            predicted_ttft_ms=self._predicted_ttft_ms,
            predicted_itl_ms=decision.itl_ms,
        )
