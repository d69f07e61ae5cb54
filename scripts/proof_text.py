"""Proofs of the router in words: the demo's verdict, and the line under an answer in the chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from router.types import Proof

_MOVED = ("verified", "unchecked")  # the latter by an engine that tells neither digests nor bytes


@dataclass(frozen=True, slots=True)
class Verdict:
    ok: bool
    text: str


def read_proof(proof: dict[str, Any]) -> Proof:
    """The proof of a response's JSON. Raises msgspec.ValidationError when a field is missing."""
    return msgspec.convert(proof, Proof, strict=False)


def handoff_verdict(proof: Proof, answer: str) -> Verdict:
    """Whether KV was handed over and all of it used, and in one line how much or what was wrong."""
    problems = []
    if not answer.strip():
        problems.append("the answer is empty")
    if proof.kv_tokens_received == 0:
        problems.append(f"no KV was received (route {proof.route}: {proof.why})")
    if proof.kv_tokens_recomputed > 0:
        problems.append(f"{proof.kv_tokens_recomputed} tokens were computed again")
    if proof.digest not in _MOVED:
        problems.append(f"digest {proof.digest}")
    if problems:
        return Verdict(False, f"handoff FAILED: {'; '.join(problems)}")
    moved = f"{proof.kv_tokens_received} tokens, {transfer(proof)}"
    return Verdict(True, f"handoff OK: {moved}, {proof.kv_tokens_recomputed} recomputed, digest {proof.digest}")


def summary(proof: Proof, num_tokens: int) -> str:
    """One line: the route, where the KV of the prompt came from, and the times. `num_tokens`: of the answer."""
    if proof.prefill_worker == proof.decode_worker:
        route = f"{proof.route} ({proof.decode_worker})"
    else:
        route = f"{proof.route} ({proof.prefill_worker} -> {proof.decode_worker})"
    kv = [
        f"{count} {name}"
        for name, count in (
            ("reused", proof.kv_tokens_reused),
            ("received", proof.kv_tokens_received),
            ("from the node store", proof.kv_tokens_node),
            ("from the remote store", proof.kv_tokens_remote),
            ("computed", proof.kv_tokens_computed),
            ("recomputed", proof.kv_tokens_recomputed),
        )
        if count
    ]
    parts = [f"route {route}", f"KV tokens: {', '.join(kv) or 'none'}"]
    if proof.digest != "none":
        parts.append(f"{transfer(proof)}, digest {proof.digest}")
    parts += [f"TTFT {milliseconds(proof.ttft_ms)} ms", f"{num_tokens} tokens{_rate(proof, num_tokens)}"]
    if proof.attempts > 1:
        parts.append(f"{proof.attempts} attempts")
    return " | ".join(parts)


def transfer(proof: Proof) -> str:
    """`4.9 MiB in 2.1 ms (2.3 GiB/s)`; without bytes `2.1 ms by UCX`: the engine moved them and doesn't count."""
    if not proof.kv_bytes:
        return f"{milliseconds(proof.transfer_ms)} ms by {proof.transport}"
    seconds = max(proof.transfer_ms, 1e-3) / 1e3
    encoded = f" as {size(proof.kv_wire_bytes)} {proof.kv_codec}" if proof.kv_codec not in ("", "raw") else ""
    encoded += f" (rounded to {proof.kv_rounded})" if proof.kv_rounded else ""
    return f"{size(proof.kv_bytes)}{encoded} in {milliseconds(proof.transfer_ms)} ms ({size(proof.kv_bytes / seconds)}/s)"


def size(num_bytes: float) -> str:
    """In the largest binary unit that is not above it: `512 B`, `48.0 KiB`, `4.9 MiB`, `2.3 GiB`."""
    if num_bytes < 1 << 10:
        return f"{num_bytes:.0f} B"
    for unit, bits in (("KiB", 10), ("MiB", 20), ("GiB", 30)):
        if num_bytes < 1 << (bits + 10) or unit == "GiB":
            break
    return f"{num_bytes / (1 << bits):.1f} {unit}"


def milliseconds(value: float) -> str:
    """Three digits are enough: `0.7`, `42.1`, `256`."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _rate(proof: Proof, num_tokens: int) -> str:
    """Tokens after the first, per second since the first."""
    decode_s = (proof.e2e_ms - proof.ttft_ms) / 1e3
    return f" at {(num_tokens - 1) / decode_s:.1f}/s" if num_tokens > 1 and decode_s > 0 else ""
