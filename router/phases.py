"""The phases of a request, from its record: what its trace's spans are, and the bars that scripts/trace draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from router.journal import Record
from router.types import Way

Attribute = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Phase:
    """A span of a request. Times are milliseconds after the record's arrival; a front end's are negative."""

    name: str
    start_ms: float
    end_ms: float
    parent: str = "request"  # name of the phase it belongs to
    attributes: dict[str, Attribute] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        return self.end_ms - self.start_ms


def phases(record: Record) -> list[Phase]:
    """What a request consisted of, parents first, as far as it came.

    queue + prefill reach from the arrival to the first token, handoff + first decode from there to the second one.
    """
    return [*_around(record), *_until_first_token(record), *_until_end(record)]


def _around(record: Record) -> Iterator[Phase]:
    started = 0.0
    if record.front_end is not None:
        started = min((record.front_end.received_ns - record.arrival_ns) / 1e6, 0.0)
    yield Phase("request", started, record.age_ms, "", _attributes(record))
    if record.front_end is not None:
        yield Phase("front end", started, 0.0)
        tokenize_ms = min(record.front_end.tokenize_ms, -started)
        yield Phase("tokenize", -tokenize_ms, 0.0, "front end")
    yield Phase("router", 0.0, record.age_ms, attributes={"baton.request_id": record.id})


def _until_first_token(record: Record) -> Iterator[Phase]:
    proof = record.proof
    if proof is None:  # it failed, or goes on: where the time to the first token went is not known
        yield Phase("queue and prefill", 0.0, record.ttft_ms or record.age_ms, "router")
        return
    yield Phase("queue", 0.0, proof.queue_ms, "router")
    reused, computed = proof.prefill_tokens_reused, proof.prefill_tokens_computed
    attributes: dict[str, Attribute] = {
        "baton.worker": proof.prefill_worker,
        "baton.tokens.reused": reused,
        "baton.tokens.computed": computed,
    }
    yield Phase("prefill", proof.queue_ms, proof.ttft_ms, "router", attributes)


def _until_end(record: Record) -> Iterator[Phase]:
    if not record.ttft_ms:
        return
    proof, ready = record.proof, record.ttft_ms
    if proof is not None and proof.route == Way.REMOTE and proof.decode_worker and record.second_token_ms:
        ready = record.ttft_ms + proof.handoff_ms
        yield Phase("handoff", record.ttft_ms, ready, "router", {"baton.worker": proof.decode_worker})
        if proof.transport:
            transferred: dict[str, Attribute] = {
                "baton.transport": proof.transport,
                "baton.kv.bytes": proof.kv_bytes,
                "baton.kv.codec": proof.kv_codec,
                "baton.kv.wire_bytes": proof.kv_wire_bytes,
                "baton.kv.rounded": proof.kv_rounded,
                "baton.kv.digest": proof.digest,
            }
            yield Phase("transfer", ready - min(proof.transfer_ms, proof.handoff_ms), ready, "handoff", transferred)
    if record.second_token_ms:
        yield Phase("decode", ready, record.age_ms, "router", {"baton.worker": record.decode_worker})
        yield Phase("first decode", ready, max(record.second_token_ms, ready), "decode")


def _attributes(record: Record) -> dict[str, Attribute]:
    """Those of the request's own span; gen_ai.* as OpenTelemetry's conventions for generative AI name them."""
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baton",
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "baton.outcome": record.outcome.value if record.outcome else "in flight",
        "baton.attempts": record.attempts,
        "baton.ttft_ms": record.ttft_ms,
        "baton.itl_ms": record.itl_ms,
    }
    told = {"route": record.route, "why": record.why, "client_id": record.client_id, "answer_id": record.answer_id}
    attributes |= {f"baton.{name}": text for name, text in told.items() if text}
    if record.proof is not None:
        for source in ("reused", "received", "recomputed", "computed"):
            attributes[f"baton.kv.tokens.{source}"] = getattr(record.proof, f"kv_tokens_{source}")
    return attributes
