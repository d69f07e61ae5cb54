"""Whether disaggregation would cure what a load suffers from: the judgement, on figures that were measured before."""

from __future__ import annotations

import math
from enum import Enum

import msgspec

_ENOUGH = 50  # gaps, below which a 99th percentile is an accident
_LOST = 0.10  # of the streams' time lost to prompts: worth two pools
_LOST_LITTLE = 0.03  # below it nobody notices
_RATIO = 2.0  # p99 of disturbed over p99 of undisturbed gaps that people feel
_FULL = 0.75  # of a limit: what good engines reach; there is nothing more to have
_FOUND_MORE = 0.15  # of prompt tokens that a cache could save and does not


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds; NaN where n is 0."""

    n: int
    p50: float
    p99: float


class Use(msgspec.Struct, frozen=True):
    """Shares of the machine's limits, 0 to 1. Arithmetic: without attention. Bandwidth: weights once a step, and KV."""

    arithmetic: float  # over the whole window
    arithmetic_in_prefill: float  # while a prompt was in prefill
    bandwidth_in_prefill: float
    arithmetic_in_decode: float  # while streams ran and no prompt was in prefill
    bandwidth_in_decode: float


class Kind(msgspec.Struct, frozen=True):
    """One kind of request. Milliseconds; `good`: share that met the SLO."""

    name: str
    requests: int
    failed: int
    good: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    slo_ttft: float
    slo_itl: float


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a load on an aggregated deployment."""

    undisturbed: Spread  # gaps between tokens while no prompt was in prefill
    disturbed: Spread  # while one was
    lost_share: float  # of the streams' time
    prefill_share: float  # of the window in which some prompt was in prefill
    streams: float  # that decoded at once, on average while any did
    cache_potential: float  # share of prompt tokens that an endless cache would find
    cache_found: float  # that the server's caches found
    kinds: list[Kind]
    handed_over: float = 0.0  # share of requests that prefill and decode workers shared already
    use: Use | None = None  # None: the limits or the model's size are not known


class Level(str, Enum):
    YES = "yes"
    PARTLY = "partly"
    NO = "no"
    UNKNOWN = "unknown"


class Verdict(msgspec.Struct, frozen=True):
    """`headline`: one sentence. `reasons`: what it rests on. `advice`: what to do, cheapest first."""

    level: Level
    headline: str
    reasons: list[str]
    advice: list[str]


_COMPARE = "Put it to the test: scripts/compare one=configs/aggregated.yaml two=configs/1p1d.yaml with the same load."
_CHUNKS = (
    "Cheaper to try first: router.slo.itl_ms, or a lower engine.step_tokens, makes chunks of prompts, and so the gaps, "
    "shorter; TTFT grows."
)
_PREFIX = "Keep what prompts share at their beginning, and give the prefix cache room (engine.kv_pool_mib)."


def judge(profile: Profile) -> Verdict:
    """The verdict. Pure: the same figures, the same words."""
    unknown = _too_little(profile)
    if unknown is not None:
        return unknown
    reasons = [_interference(profile), *_use(profile.use), *_cache(profile), *_slo(profile)]
    prefix = [_PREFIX] if _could_find_more(profile) else []
    if _disturbs(profile):
        if profile.use is not None and profile.use.arithmetic >= _FULL:
            headline = "Partly: streams would run smoothly, and prompts would wait longer, since the machine is full."
            return Verdict(Level.PARTLY, headline, reasons, [*prefix, "Add hardware for prefill, then disaggregate.", _COMPARE])
        headline = "Yes: long prompts disturb running streams, which is what disaggregation cures."
        return Verdict(Level.YES, headline, reasons, [*prefix, _CHUNKS, _COMPARE])
    return Verdict(Level.NO, *_what_else(profile, reasons, prefix))


def _too_little(profile: Profile) -> Verdict | None:
    requests = sum(kind.requests for kind in profile.kinds)
    failed = sum(kind.failed for kind in profile.kinds)
    if profile.handed_over > 0.5:
        reason = f"{profile.handed_over:.0%} of the requests were served by a prefill and a decode worker."
        advice = ['Profile an aggregated deployment: configs/aggregated.yaml, or --fields \'{"route": "aggregated"}\'.']
        return Verdict(Level.UNKNOWN, "Not known: this deployment is disaggregated already.", [reason], advice)
    if failed * 2 > requests or not requests:
        reason = f"{failed} of {requests} requests failed."
        return Verdict(
            Level.UNKNOWN, "Not known: too few requests were answered.", [reason], ["Mend that first, or lower the load."]
        )
    quiet, disturbed = profile.undisturbed.n, profile.disturbed.n
    if quiet + disturbed < 2 * _ENOUGH:
        reason = f"Only {quiet + disturbed} gaps between tokens were seen."
        return Verdict(
            Level.UNKNOWN, "Not known: the run was too short.", [reason], ["Give a longer --duration, or longer answers."]
        )
    if quiet < _ENOUGH:
        reason = f"Some prompt was in prefill {profile.prefill_share:.0%} of the time, so there is nothing to compare with."
        reasons = [reason, *_use(profile.use), *_cache(profile)]
        advice = ["Lower the load until prompts don't queue, and profile again; see what is left of the trouble."]
        return Verdict(Level.UNKNOWN, "Not known: prompts were computed all the time.", reasons, advice)
    return None


def _disturbs(profile: Profile) -> bool:
    if profile.disturbed.n < _ENOUGH:
        return False
    felt = profile.disturbed.p99 >= _RATIO * profile.undisturbed.p99 and profile.disturbed.p99 > _tightest_itl(profile)
    return profile.lost_share >= _LOST or (felt and profile.lost_share >= _LOST_LITTLE)


def _tightest_itl(profile: Profile) -> float:
    return min((kind.slo_itl for kind in profile.kinds), default=0.0)


def _what_else(profile: Profile, reasons: list[str], prefix: list[str]) -> tuple[str, list[str], list[str]]:
    """(headline, reasons, advice) where prompts do not disturb streams."""
    use = profile.use
    if _meets_slo(profile):
        return "No: nothing is wrong under this load.", reasons, ["Raise the load (--rate, --streams) to find where it bends."]
    if use is not None and use.arithmetic >= _FULL:
        advice = [*prefix, "More or faster compute: disaggregation divides it, and makes none."]
        return "No: the machine's arithmetic is used up by prompts.", reasons, advice
    if use is not None and use.bandwidth_in_decode >= _FULL:
        advice = ["Narrower weights or KV (model.weights, model.kv_dtype), or another worker on memory of its own."]
        return "No: decode is at the memory's bandwidth.", reasons, advice
    if _could_find_more(profile):
        return "No: a prefix cache would save more than another worker.", reasons, prefix
    advice = [*prefix, "Look where the time goes: scripts/trace slowest, or the page."]
    return "No: prompts hardly disturb running streams.", reasons, advice


def _meets_slo(profile: Profile) -> bool:
    return all(kind.good >= 0.95 for kind in profile.kinds)


def _could_find_more(profile: Profile) -> bool:
    return profile.cache_potential - profile.cache_found >= _FOUND_MORE


def _interference(profile: Profile) -> str:
    quiet, disturbed = profile.undisturbed, profile.disturbed
    if disturbed.n < _ENOUGH:
        return f"Only {disturbed.n} of {quiet.n + disturbed.n} gaps between tokens fell into the prefill of some prompt."
    ratio = disturbed.p99 / quiet.p99
    return (
        f"Between tokens: {_ms(quiet.p50)} at the median and {_ms(quiet.p99)} at p99 while no prompt is in prefill, "
        f"{_ms(disturbed.p50)} and {_ms(disturbed.p99)} while one is ({ratio:.1f} times the p99). "
        f"Streams lose {profile.lost_share:.0%} of their time to it."
    )


def _use(use: Use | None) -> list[str]:
    if use is None:
        return []
    prefill = f"{use.arithmetic_in_prefill:.0%} of the arithmetic and {use.bandwidth_in_prefill:.0%} of the memory bandwidth"
    decode = f"{use.arithmetic_in_decode:.0%} and {use.bandwidth_in_decode:.0%}"
    return [
        f"While prompts are in prefill, {prefill} are used; while only streams run, {decode}.",
        f"Over the whole run {use.arithmetic:.0%} of the arithmetic.",
    ]


def _cache(profile: Profile) -> list[str]:
    if profile.cache_potential < 0.01:
        return ["The prompts share no beginnings: no cache would help."]
    return [
        f"An endless prefix cache would find {profile.cache_potential:.0%} of the prompt tokens; "
        f"this deployment found {profile.cache_found:.0%}."
    ]


def _slo(profile: Profile) -> list[str]:
    return [
        f"{kind.name}: {kind.good:.0%} of {kind.requests} requests met their SLO "
        f"(TTFT p99 {_ms(kind.ttft_p99)} of {_ms(kind.slo_ttft)}, ITL p99 {_ms(kind.itl_p99)} of {_ms(kind.slo_itl)})."
        for kind in profile.kinds
    ]


def _ms(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"
