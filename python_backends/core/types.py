"""The values that travel between client, router, workers and engines.

All are frozen msgspec structs: typed, validated when decoded, equal by value. Nothing here does I/O.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NewType

import msgspec

from python_backends.core.errors import InvalidRequest

RequestId = NewType("RequestId", str)
"""Unique per request *attempt* inside a deployment: the router makes it, clients' own ids are only logged."""

WorkerId = NewType("WorkerId", str)
"""The Triton model name of a worker, for example `decode_1`."""

Epoch = NewType("Epoch", int)
"""Identity of one life of a worker process; a restarted worker has another."""

BlockHash = NewType("BlockHash", bytes)
"""16-byte chained hash of one full block (core/block_hash.py)."""


class Role(str, Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


class LeaseEnd(str, Enum):
    """Why nobody needs published KV any more."""

    FETCHED = "fetched"  # it has arrived
    LOST = "lost"  # it was asked for and did not arrive in time
    UNWANTED = "unwanted"  # nobody asked for it, or nobody will


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"


_MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_GRAMMAR = 200_000
MAX_STOPS = 16
MAX_STOP_CHARS = 1_000
MAX_TOKENS_NAMED = 1_024  # of logit_bias and of stop_token_ids


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are chosen. Build it with `validated()`; engines may rely on every bound stated here."""

    max_tokens: int = 128  # new tokens, >= 1; prompt + new never exceeds the model's context
    min_tokens: int = 0  # no stop of any kind before so many new tokens
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 means all
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1]
    repetition_penalty: float = 1.0  # > 0, over prompt and output tokens
    presence_penalty: float = 0.0  # [-2, 2], over output tokens
    frequency_penalty: float = 0.0  # [-2, 2], over output tokens
    logit_bias: dict[int, float] = {}  # token id -> added to its logit
    seed: int | None = None  # [0, 2**64); the router draws one when None
    stop: tuple[str, ...] = ()  # strings, matched on text by the router
    stop_token_ids: tuple[int, ...] = ()  # matched by the engine
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: of the sampled token; n <= 20: and of the n likeliest
    grammar: str | None = None  # what the output must be a sentence of, as llguidance reads it (router/grammar.py makes them)

    def validated(self) -> SamplingParams:
        """Return self. Raises InvalidRequest naming the first field that is out of bounds."""
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "0 to max_tokens")
        _require(_between(self.temperature, 0, 100), "temperature", self.temperature, "0 (greedy) to 100")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _require(_between(self.top_p, 0, 1) and self.top_p > 0, "top_p", self.top_p, "above 0, at most 1")
        _require(_between(self.min_p, 0, 1), "min_p", self.min_p, "0 to 1")
        _require(
            _between(self.repetition_penalty, 0, 100) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "above 0, at most 100",
        )
        _require(_between(self.presence_penalty, -2, 2), "presence_penalty", self.presence_penalty, "-2 to 2")
        _require(_between(self.frequency_penalty, -2, 2), "frequency_penalty", self.frequency_penalty, "-2 to 2")
        size = len(self.logit_bias)
        _require(size <= MAX_TOKENS_NAMED, "logit_bias", f"of {size} tokens", f"of at most {MAX_TOKENS_NAMED}")
        for token, bias in self.logit_bias.items():
            _require(token >= 0 and _between(bias, -100, 100), "logit_bias", {token: bias}, "token ids with -100 to 100")
        _require(self.seed is None or 0 <= self.seed <= _MAX_SEED, "seed", self.seed, "0 to 2**64 - 1")
        lengths = [len(text) for text in self.stop]
        _require(len(lengths) <= MAX_STOPS, "stop", f"of {len(lengths)} strings", f"of at most {MAX_STOPS}")
        allowed = f"non-empty strings of at most {MAX_STOP_CHARS} characters"
        _require(all(0 < length <= MAX_STOP_CHARS for length in lengths), "stop", f"of {lengths} characters", allowed)
        size = len(self.stop_token_ids)
        _require(size <= MAX_TOKENS_NAMED, "stop_token_ids", f"of {size} tokens", f"of at most {MAX_TOKENS_NAMED}")
        _require(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids, 0 or more")
        size = len(self.grammar or "")
        _require(size <= MAX_GRAMMAR, "grammar", f"{size} characters long", f"at most {MAX_GRAMMAR} characters")
        _require(not (self.grammar and self.ignore_eos), "ignore_eos", True, "false together with a grammar, which has an end")
        _require(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, f"0 to {MAX_LOGPROBS}")
        return self


def _between(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequest(f"{field} is {value!r}; it must be {allowed}")


class GenerateRequest(msgspec.Struct, frozen=True):
    """What every engine understands: token ids in, token ids out.

    `prompt_ids` is the prompt; `output_ids` are tokens already sent to the client by an earlier attempt, so that an
    engine continues at position `len(output_ids)` exactly as the lost one would have (position-deterministic sampling).
    """

    request_id: RequestId
    prompt_ids: list[int]
    sampling: SamplingParams
    deadline: float  # monotonic seconds of the process that has the request (orders carry it over); engines drop it then
    output_ids: list[int] = []
    salt: str = ""  # tenant isolation: part of every block hash
    priority: int = 0  # lower is served first

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural, of the model before penalties and temperature) of a sampled token."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []  # the n likeliest, best first


class PrefixReport(msgspec.Struct, frozen=True):
    """What a worker took of a request's prefix from elsewhere instead of computing it, verified."""

    node_tokens: int = 0  # from the node store
    remote_tokens: int = 0  # from the remote store
    peer_tokens: int = 0  # from another worker's pool, lent
    bytes: int = 0
    ms: float = 0.0  # looking included, also when nothing was found

    @property
    def tokens(self) -> int:
        return self.node_tokens + self.remote_tokens + self.peer_tokens


class KVReport(msgspec.Struct, frozen=True):
    """Where the KV of a request's prompt came from, counted by the decode worker as it happened.

    received + reused + prefix + recomputed + computed covers every prompt token but the last one or so, whose KV is
    always computed to get the logits.
    """

    reused_tokens: int = 0  # already in this worker's prefix cache
    received_tokens: int = 0  # moved here by the transfer and verified
    recomputed_tokens: int = 0  # handed over, yet computed again here
    computed_tokens: int = 0  # prompt tokens computed here by plan (local prefill)
    received_bytes: int = 0
    transfer_ms: float = 0.0
    compute_ms: float = 0.0  # from the first step here to the first token sampled here
    # verified | unchecked (the engine moved the KV and tells no more) | none | the RefusalReason
    digest: str = "none"
    transport: str = ""  # that moved the bytes
    transport_why: str = ""  # it was taken, where there was a choice
    codec: str = ""  # raw | lossless | float16 | int8: how received_bytes travelled
    wire_bytes: int = 0  # that travelled for them
    rounded: str = ""  # the dtype that what was received was rounded to; empty: it is what was published, bit for bit
    prefix: PrefixReport = PrefixReport()


class StoreCounts(msgspec.Struct, frozen=True):
    """What one worker has done with one store tier since its start, in blocks, and how full the tier is."""

    read: int = 0  # found, verified and taken
    missed: int = 0  # looked for in vain: the first block of a prefix that was not there
    written: int = 0
    corrupt: int = 0  # found, and refused by digest or header
    dropped: int = 0  # not written: the queue was full, the block was reused too soon, or the tier could not take it
    used_bytes: int = 0
    budget_bytes: int = 0  # 0: the tier's own affair
    up: bool = True


class WorkerLoad(msgspec.Struct, frozen=True):
    """A worker's state. Blocks: free + cached + held == total, always."""

    queued_requests: int = 0
    queued_tokens: int = 0  # prompt tokens not yet computed
    running_requests: int = 0
    output_tokens: int = 0  # of the requests here, made since they came or to come, for which held_blocks have room
    free_blocks: int = 0  # never used or evicted
    cached_blocks: int = 0  # unused now, kept for prefix hits, evictable
    held_blocks: int = 0  # owned by requests and leases
    total_blocks: int = 0
    active_leases: int = 0
    busy_s: float = 0.0  # seconds in which it has computed, in this life
    step_ms: float = 0.0  # that steps with running streams are kept to now, by smaller chunks of prompts; 0: no such limit
    tells_blocks: bool = True  # False: what its prefix cache holds is not told, so the router routes to it blindly
    standing_s: int = 0  # whole seconds in which the engine's loop has not turned, though there is something to do
    fault: str = ""  # why the engine can't go on: a sentence; the worker is to be taken out and restarted
