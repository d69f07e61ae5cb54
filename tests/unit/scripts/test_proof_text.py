"""What demo and chat say about a proof."""

from __future__ import annotations

import msgspec
import pytest

from router.types import Proof
from scripts.proof_text import handoff_verdict, milliseconds, read_proof, size, summary, transfer

PROOF = Proof(
    route="remote",
    why="because",
    prefill_worker="prefill",
    decode_worker="decode",
    attempts=1,
    kv_tokens_reused=0,
    kv_tokens_received=92,
    kv_tokens_recomputed=0,
    kv_tokens_computed=0,
    kv_tokens_node=0,
    kv_tokens_remote=0,
    prefill_tokens_reused=0,
    prefill_tokens_node=0,
    prefill_tokens_remote=0,
    prefill_tokens_peer=0,
    prefill_tokens_computed=92,
    kv_bytes=4 << 20,
    transfer_ms=4.0,
    transport="shm",
    transport_why="same host",
    store_bytes=0,
    store_ms=0.0,
    digest="verified",
    ttft_ms=120.0,
    queue_ms=20.0,
    prefill_ms=100.0,
    handoff_ms=5.0,
    first_decode_ms=30.0,
    e2e_ms=1120.0,
    arrival_ns=1,
)


def _changed(**fields: object) -> Proof:
    return msgspec.structs.replace(PROOF, **fields)


def test_the_verdict_of_a_handoff_that_worked() -> None:
    verdict = handoff_verdict(PROOF, "Paris")
    assert verdict.ok
    assert verdict.text == "handoff OK: 92 tokens, 4.0 MiB in 4.0 ms (1000.0 MiB/s), 0 recomputed, digest verified"


@pytest.mark.parametrize(
    ("proof", "answer", "named"),
    [
        (
            _changed(kv_tokens_received=0, route="local", why="it is short"),
            "x",
            "no KV was received (route local: it is short)",
        ),
        (_changed(kv_tokens_recomputed=7), "x", "7 tokens were computed again"),
        (_changed(digest="digest_mismatch"), "x", "digest digest_mismatch"),
        (PROOF, "  ", "the answer is empty"),
    ],
)
def test_the_verdict_says_what_was_wrong(proof: Proof, answer: str, named: str) -> None:
    verdict = handoff_verdict(proof, answer)
    assert not verdict.ok
    assert verdict.text.startswith("handoff FAILED: ")
    assert named in verdict.text


def test_the_summary_names_the_route_and_where_kv_came_from() -> None:
    assert summary(PROOF, 11) == (
        "route remote (prefill -> decode) | KV tokens: 92 received | 4.0 MiB in 4.0 ms (1000.0 MiB/s), digest verified"
        " | TTFT 120 ms | 11 tokens at 10.0/s"
    )
    local = _changed(
        route="local", prefill_worker="decode", kv_tokens_received=0, kv_tokens_computed=9, digest="none", attempts=2
    )
    told = summary(local, 1)
    assert told.startswith("route local (decode) | KV tokens: 9 computed | TTFT 120 ms | 1 tokens")
    assert told.endswith("2 attempts")


def test_kv_that_the_engine_moved_is_not_called_verified() -> None:
    """TensorRT-LLM tells neither bytes nor digests of what it moves."""
    moved = _changed(kv_bytes=0, transport="UCX", digest="unchecked")
    verdict = handoff_verdict(moved, "Paris")
    assert verdict.ok
    assert verdict.text == "handoff OK: 92 tokens, 4.0 ms by UCX, 0 recomputed, digest unchecked"
    assert "4.0 ms by UCX, digest unchecked" in summary(moved, 5)


def test_a_proof_survives_its_json() -> None:
    assert read_proof(msgspec.to_builtins(PROOF)) == PROOF
    with pytest.raises(msgspec.ValidationError, match="kv_bytes"):
        read_proof({key: value for key, value in msgspec.to_builtins(PROOF).items() if key != "kv_bytes"})


def test_numbers_for_people() -> None:
    assert [size(n) for n in (5, 2048, 3 << 20, 5 << 30)] == ["5 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
    assert [milliseconds(n) for n in (0.74, 42.11, 256.4)] == ["0.7", "42.1", "256"]
    assert transfer(_changed(transfer_ms=0.0)).startswith("4.0 MiB in 0.0 ms")


def test_encoded_kv_is_told() -> None:
    moved = _changed(kv_codec="lossless", kv_wire_bytes=3 << 20)
    assert transfer(moved).startswith("4.0 MiB as 3.0 MiB lossless in ")
    assert " as " not in transfer(_changed(kv_codec="raw", kv_wire_bytes=4 << 20))
