"""Transfers that break cost a recompute, never a wrong text."""

from __future__ import annotations

import pytest

from python_backends.core.errors import RefusalReason
from python_backends.core.types import SamplingParams
from tests.flow.house import Fault, FlowHouse, ask_all, deployment, prompt, reference

SAMPLING = SamplingParams(seed=3, max_tokens=6)
REASONS = {
    "corrupt": {RefusalReason.DIGEST_MISMATCH},
    "truncate": {RefusalReason.DIGEST_MISMATCH},
    "drop": {RefusalReason.TRANSFER_FAILED},
    "hang": {RefusalReason.TRANSFER_TIMEOUT},
    "delay": {RefusalReason.TRANSFER_TIMEOUT},
}


@pytest.mark.parametrize("fault", ["corrupt", "truncate", "drop", "hang"])
@pytest.mark.parametrize("transport", ["shm", "inline"])
def test_every_transfer_breaks(fault: Fault, transport: str) -> None:
    prompts = [prompt(30 + 7 * i, seed=i) for i in range(8)]
    config = deployment(transport=transport, faults={fault: 1.0}, transfer_timeout_s=0.1)  # type: ignore[arg-type]
    with FlowHouse(config) as house:
        for answer, ids in zip(ask_all(house, prompts, SAMPLING), prompts, strict=True):
            assert answer.ids == reference(ids, SAMPLING)
            assert answer.proof.kv_tokens_recomputed == len(ids)
            assert answer.proof.kv_tokens_received == 0
            assert answer.proof.digest in REASONS[fault]
        house.assert_nothing_held()


def test_late_transfers_are_used_or_recomputed() -> None:
    """Delays of 0 to 0.2 s under a time-out of 0.1 s."""
    prompts = [prompt(40, seed=i) for i in range(10)]
    with FlowHouse(deployment(faults={"delay": 1.0}, transfer_timeout_s=0.1)) as house:
        for answer, ids in zip(ask_all(house, prompts, SAMPLING), prompts, strict=True):
            assert answer.ids == reference(ids, SAMPLING)
            proof = answer.proof
            verified = proof.digest == "verified"
            assert verified or proof.digest in REASONS["delay"]
            assert (proof.kv_tokens_received, proof.kv_tokens_recomputed) == ((40, 0) if verified else (0, 40))
        house.assert_nothing_held()


def test_some_of_everything() -> None:
    prompts = [prompt(20 + 3 * i, seed=i) for i in range(24)] * 2
    faults: dict[Fault, float] = {"corrupt": 0.2, "truncate": 0.2, "drop": 0.2, "delay": 0.2, "hang": 0.1}
    with FlowHouse(deployment(2, 2, faults=faults, transfer_timeout_s=0.2)) as house:
        for answer, ids in zip(ask_all(house, prompts, SAMPLING), prompts, strict=True):
            assert answer.ids == reference(ids, SAMPLING)
        house.assert_nothing_held()
