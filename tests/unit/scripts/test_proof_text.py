from __future__ import annotations

from typing import Any

import msgspec
import pytest

from router.types import Proof
from scripts.proof_text import handoff_verdict, summary

PROOF = Proof(
    route="remote",
    why="",
    prefill_worker="prefill",
    decode_worker="decode",
    attempts=1,
    kv_tokens_reused=0,
    kv_tokens_received=312,
    kv_tokens_recomputed=0,
    kv_tokens_computed=0,
    prefill_tokens_reused=0,
    prefill_tokens_computed=312,
    kv_bytes=14_376_960,
    transfer_ms=4.1,
    transport="shm",
    digest="verified",
    ttft_ms=50.0,
    queue_ms=1.0,
    prefill_ms=49.0,
    handoff_ms=5.0,
    first_decode_ms=10.0,
    e2e_ms=100.0,
    arrival_ns=0,
)


def proof(**fields: Any) -> Proof:
    return msgspec.structs.replace(PROOF, **fields)


def test_verified_kv_is_told_with_its_rate() -> None:
    verdict = handoff_verdict(PROOF, "Paris")
    assert verdict.ok
    assert verdict.text == "handoff OK: 312 tokens, 13.7 MiB in 4.1 ms (3.3 GiB/s), 0 recomputed, digest verified"


def test_kv_that_the_engine_moved_is_not_called_verified() -> None:
    moved = proof(kv_bytes=0, transport="UCX", digest="unchecked")
    verdict = handoff_verdict(moved, "Paris")
    assert verdict.ok
    assert verdict.text == "handoff OK: 312 tokens, 4.1 ms by UCX, 0 recomputed, digest unchecked"
    assert "4.1 ms by UCX, digest unchecked" in summary(moved, 5)


@pytest.mark.parametrize(
    ("fields", "answer", "problem"),
    [
        ({}, " ", "the answer is empty"),
        ({"kv_tokens_received": 0}, "x", "no KV was received"),
        (
            {"kv_tokens_recomputed": 312, "digest": "transfer_timeout"},
            "x",
            "312 tokens were computed again; digest transfer_timeout",
        ),
    ],
)
def test_what_went_wrong_is_named(fields: dict[str, Any], answer: str, problem: str) -> None:
    verdict = handoff_verdict(proof(**fields), answer)
    assert not verdict.ok
    assert problem in verdict.text
