from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import ENGINE_TRANSPORT, TICKET_VERSION, KVHandoff, seal, unseal
from python_backends.core.layout import KVLayout
from python_backends.core.signing import Domain, sign
from python_backends.core.types import Epoch, WorkerId

KEY = b"k" * 32
NOW = 1_000.0
HANDOFF = KVHandoff(
    version=TICKET_VERSION,
    transport="shm",
    source=WorkerId("prefill_1"),
    epoch=Epoch(2**63 + 1),
    lease_id="0123456789abcdef",
    expires_at=NOW + 10,
    layout=KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype="float32"),
    fingerprint="f" * 32,
    num_tokens=9,
    blocks=[5, 0, 7],
    generations=[1, 2, 2**64 - 1],
    digests=[b"\1" * 16, b"\2" * 16, b"\3" * 16],
    locator="12/3",
    opaque=b"opaque",
    content=b"c" * 16,
)


def sealed(**fields: Any) -> bytes:
    return seal(msgspec.structs.replace(HANDOFF, **fields), KEY)


def refusal(ticket: bytes, *, key: bytes = KEY, now: float = NOW) -> RefusalReason:
    with pytest.raises(HandoffRefused) as refused:
        unseal(ticket, key, now)
    return refused.value.reason


def test_unseal_is_the_inverse_of_seal() -> None:
    assert unseal(seal(HANDOFF, KEY), KEY, NOW) == HANDOFF


def test_every_flipped_bit_is_refused() -> None:
    ticket = seal(HANDOFF, KEY)
    for index in range(len(ticket)):
        for bit in range(8):
            forged = bytearray(ticket)
            forged[index] ^= 1 << bit
            assert refusal(bytes(forged)) is RefusalReason.BAD_SIGNATURE


def test_every_truncation_and_any_tail_is_refused() -> None:
    ticket = seal(HANDOFF, KEY)
    for length in range(len(ticket)):
        assert refusal(ticket[:length]) is RefusalReason.BAD_SIGNATURE
    assert refusal(ticket + b"\0") is RefusalReason.BAD_SIGNATURE


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(ticket: bytes) -> None:
    assert refusal(ticket) is RefusalReason.BAD_SIGNATURE


@given(st.binary(max_size=400))
def test_signed_nonsense_is_malformed(body: bytes) -> None:
    assert refusal(sign(Domain.HANDOFF, body, KEY)) is RefusalReason.MALFORMED


def test_signed_text_that_is_no_utf8_is_malformed() -> None:
    body = msgspec.msgpack.encode(HANDOFF).replace(b"prefill_1", b"prefill\xff1")
    assert refusal(sign(Domain.HANDOFF, body, KEY)) is RefusalReason.MALFORMED


def test_other_deployments_key_is_refused() -> None:
    assert refusal(seal(HANDOFF, KEY), key=b"x" * 32) is RefusalReason.BAD_SIGNATURE


def test_signature_for_another_purpose_is_refused() -> None:
    body = msgspec.msgpack.encode(HANDOFF)
    assert refusal(sign(Domain.WORK, body, KEY)) is RefusalReason.BAD_SIGNATURE


@pytest.mark.parametrize("late", [0.0, 0.001, 1e9])
def test_ticket_is_refused_from_its_expiry_on(late: float) -> None:
    ticket = seal(HANDOFF, KEY)
    assert refusal(ticket, now=HANDOFF.expires_at + late) is RefusalReason.EXPIRED
    assert unseal(ticket, KEY, HANDOFF.expires_at - 0.001) == HANDOFF


@pytest.mark.parametrize("version", [0, TICKET_VERSION + 1])
def test_foreign_version_is_refused(version: int) -> None:
    assert refusal(sealed(version=version)) is RefusalReason.MALFORMED


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": [5, 0]},
        {"generations": [1, 2]},
        {"digests": [b"", b"", b"", b""]},
        {"num_tokens": 8},
        {"num_tokens": 13},
        {"num_tokens": 0},
        {"num_tokens": -9},
    ],
)
def test_lists_that_do_not_cover_the_tokens_are_refused(fields: dict[str, Any]) -> None:
    assert refusal(sealed(**fields)) is RefusalReason.MALFORMED


def test_ticket_does_not_grow_much_with_the_prompt() -> None:
    """40 bytes a block are enough: KV bytes travel elsewhere."""
    count = 512
    ticket = sealed(num_tokens=count * 4, blocks=[2**20] * count, generations=[2**20] * count, digests=[b"d" * 16] * count)
    assert len(ticket) < 40 * count + 500


MOVED_BY_ENGINE: dict[str, Any] = {"transport": ENGINE_TRANSPORT, "blocks": [], "generations": [], "digests": []}


def test_ticket_of_kv_that_the_engine_moves_lists_no_blocks() -> None:
    handoff = msgspec.structs.replace(HANDOFF, **MOVED_BY_ENGINE)
    assert unseal(seal(handoff, KEY), KEY, NOW) == handoff


@pytest.mark.parametrize("fields", [{"blocks": [1]}, {"digests": [b"d"]}, {"num_tokens": 0}, {"num_tokens": -1}])
def test_ticket_of_kv_that_the_engine_moves_is_checked_too(fields: dict[str, Any]) -> None:
    assert refusal(sealed(**MOVED_BY_ENGINE | fields)) is RefusalReason.MALFORMED


def test_blocks_may_be_missing_only_if_the_engine_moves_them() -> None:
    assert refusal(sealed(**MOVED_BY_ENGINE | {"transport": "shm"})) is RefusalReason.MALFORMED
