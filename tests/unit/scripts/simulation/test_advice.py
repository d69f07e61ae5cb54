from __future__ import annotations

from functools import partial
from random import Random

import msgspec
import pytest

from python_backends.core.config import EngineConfig, SloConfig
from python_backends.core.errors import Unavailable
from python_backends.core.types import Role
from scripts.simulation.advice import Advice, advise
from scripts.simulation.fleets import default_fleets, parse_fleet, run_all
from scripts.simulation.hardware import Rates
from scripts.simulation.measured import MeasuredServer, learned_rates, parse_metrics
from scripts.simulation.workload import Workload, generate

GPU = Rates((7.8, 0.032, 1.8e-6, 0.05, 5.6e-5), 131_072, 420_000, 4e7, 0.5, 1.0)
ENGINE = EngineConfig(step_tokens=2048, max_batch=256)
SLO = SloConfig(ttft_ms=2000, itl_ms=25)


def advice(workload: Workload, rates: Rates = GPU, workers: int = 4, slo: SloConfig = SLO) -> Advice:
    return advise(workload, workers, dict.fromkeys(Role, rates), slo, ENGINE, partial(run_all, jobs=1))


def said(given: Advice) -> str:
    return "\n".join(given.reasons)


def test_long_prompts_beside_many_streams_are_a_yes_with_numbers() -> None:
    """A target that leaves aggregated workers hardly any time for prompts beside their streams."""
    given = advice(generate("mixed", 18, 20, Random(0)), slo=SloConfig(ttft_ms=2000, itl_ms=12))
    assert given.disaggregate
    assert given.gain > 1.05
    assert given.fleet.endswith("D")
    assert given.threshold >= 0
    assert 0 < given.link_gb_s <= 40
    assert "goodput stays the same" in said(given)
    assert "every stream beside it waits" in said(given)


def test_short_prompts_are_a_no() -> None:
    given = advice(generate("chat", 20, 15, Random(0)).scaled(length=0.1), slo=SloConfig(ttft_ms=2000, itl_ms=60))
    assert (given.disaggregate, given.fleet, given.link_gb_s) == (False, "4A", 0.0)
    assert "prompts are short" in said(given)
    assert "nothing to mend" in said(given)


def test_few_users_are_a_no() -> None:
    given = advice(generate("chat", 0.3, 100, Random(0)), slo=SloConfig(ttft_ms=2000, itl_ms=60))
    assert not given.disaggregate
    assert "users are few" in said(given)


def test_a_slow_link_is_named() -> None:
    slow = msgspec.structs.replace(GPU, link_bytes_per_ms=1e6 / 8)  # 1 Gbit/s
    given = advice(generate("chat", 4, 40, Random(0)), slow, slo=SloConfig(ttft_ms=2000, itl_ms=100))
    assert not given.disaggregate
    assert "the link is slow" in said(given)


def test_fleets_are_read_and_made() -> None:
    assert parse_fleet("2:6") == {Role.PREFILL: 2, Role.DECODE: 6}
    assert parse_fleet("8") == {Role.AGGREGATED: 8}
    assert default_fleets(1) == [{Role.AGGREGATED: 1}]
    assert default_fleets(8)[1:] == [{Role.PREFILL: n, Role.DECODE: 8 - n} for n in (2, 4, 6)]


METRICS = """
# HELP baton_worker_up 1 when the worker is up
# TYPE baton_worker_up gauge
baton_worker_up{role="prefill",worker="prefill"} 1
baton_worker_up{role="decode",worker="decode"} 1
baton_requests_total{outcome="ok"} %d
baton_request_prompt_tokens_bucket{le="32"} 0
baton_request_prompt_tokens_bucket{le="64"} 10
baton_request_prompt_tokens_bucket{le="512"} 10
baton_request_prompt_tokens_bucket{le="1024"} 40
baton_request_prompt_tokens_bucket{le="+Inf"} 40
baton_request_output_tokens_bucket{le="8"} 0
baton_request_output_tokens_bucket{le="16"} 40
baton_request_output_tokens_bucket{le="+Inf"} 40
baton_prompt_tokens_total{source="reused"} 250
baton_prompt_tokens_total{source="received"} 500
baton_prompt_tokens_total{source="computed"} 250
baton_kv_received_bytes_total 50000
baton_step_cost_seconds{role="prefill",worker="prefill",term="constant"} 0.008
baton_step_cost_seconds{role="prefill",worker="prefill",term="prefill_token"} 3e-05
baton_step_cost_seconds{role="decode",worker="decode",term="constant"} 0.009
baton_step_cost_seconds{role="decode",worker="decode",term="decode_stream"} 0.0005
baton_step_cost_error_ratio{role="decode",worker="decode"} 0.08
baton_hop_seconds{role="decode",worker="decode"} 0.002
baton_link_bytes_per_second{role="decode",worker="decode"} 2e9
baton_link_overhead_seconds{role="decode",worker="decode"} 0.004
nv_inference_count{model="router",version="1"} 12
"""


def test_a_running_server_tells_its_requests_and_its_rates() -> None:
    server = MeasuredServer(parse_metrics(METRICS % 40), parse_metrics(METRICS % 100), seconds=30)
    assert (server.rate, server.workers, server.reused) == (2.0, 2, 0.25)
    workload = server.workload(500, Random(0))
    assert len(workload.arrivals) == pytest.approx(1000, rel=0.15)
    assert all(arrival.input_length <= 768 for arrival in workload.arrivals)
    assert sum(arrival.input_length > 48 for arrival in workload.arrivals) == pytest.approx(750, rel=0.2)
    assert all(9 <= arrival.output_length <= 16 for arrival in workload.arrivals)
    decode = server.rates()[Role.DECODE]
    assert decode.coefficients == pytest.approx((9, 0, 0, 0.5, 0))
    assert (decode.token_bytes, decode.link_bytes_per_ms, decode.link_ms, decode.hop_ms) == (100, 2e6, 4, 2)
    assert decode.noise == pytest.approx(0.1)


def test_a_server_without_requests_can_not_be_advised() -> None:
    with pytest.raises(Unavailable, match="no request ended within 30 s"):
        MeasuredServer(parse_metrics(METRICS % 40), parse_metrics(METRICS % 40), seconds=30)
    with pytest.raises(Unavailable, match="has served no request"):
        MeasuredServer({}, {}, seconds=30)
    with pytest.raises(Unavailable, match="learned no step times"):
        learned_rates({}, 1, {})
