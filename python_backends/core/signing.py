"""HMAC-SHA256 over bytes that cross a process boundary, with a domain so that one kind can't pass for another."""

from __future__ import annotations

import hashlib
import hmac
from enum import Enum

MAC_BYTES = 32


class Domain(bytes, Enum):
    HANDOFF = b"baton-handoff\0"
    WORK = b"baton-work\0"
    NODE_STORE = b"baton-node-store\0"
    CORES = b"baton-cores\0"
    TRANSFER_CLIENT = b"baton-transfer-client\0"
    TRANSFER_SERVER = b"baton-transfer-server\0"
    ROUNDED_KV = b"baton-rounded-kv\0"
    REGISTRATION = b"baton-registration\0"


def sign(domain: Domain, body: bytes, key: bytes) -> bytes:
    """Return body followed by its MAC."""
    return body + mac(domain, body, key)


def verify(domain: Domain, signed: bytes, key: bytes) -> bytes | None:
    """Return the body, or None when it was not signed with this key for this domain."""
    body, signature = signed[:-MAC_BYTES], signed[-MAC_BYTES:]
    return body if hmac.compare_digest(signature, mac(domain, body, key)) else None


def mac(domain: Domain, body: bytes, key: bytes) -> bytes:
    """The MAC alone, MAC_BYTES long."""
    return hmac.digest(key, domain.value + body, hashlib.sha256)
