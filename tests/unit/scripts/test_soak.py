"""What the soak counts as a leak."""

from __future__ import annotations

from scripts.soak import Usage, growth_problem, pool_problem


def test_held_blocks_and_leases_are_named() -> None:
    clean = (
        'baton_kv_blocks{state="free",worker="decode"} 9\nbaton_kv_blocks{state="held",worker="decode"} 0\nbaton_leases{} 0\n'
    )
    assert pool_problem(clean) == ""
    assert "is 2" in pool_problem('baton_kv_blocks{state="held",worker="decode"} 2\n')
    assert "baton_leases" in pool_problem('baton_leases{worker="prefill"} 1\n')
    assert "baton_router_requests" in pool_problem("baton_router_requests 1\n")


def test_growth_beyond_noise_is_named() -> None:
    before = Usage(threads=50, rss_mib=700, shm_mib=4)
    assert growth_problem(before, Usage(50, 720, 4)) == ""
    assert growth_problem(before, Usage(51, 800, 9)).count("->") == 3
