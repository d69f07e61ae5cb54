"""CURVE keys (CurveCP, as ZeroMQ has it) of a deployment, derived from the key that all its processes share.

Routers of other hosts talk to workers only over sockets that both ends have proved the deployment's key for; what they say
is encrypted and authenticated. There is nothing to distribute but the one key.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils import z85


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """Secret and public keys, Z85: of the worker's end and of the router's end."""

    worker_secret: bytes
    worker_public: bytes
    router_secret: bytes
    router_public: bytes

    @classmethod
    def derive(cls, key: bytes) -> CurveKeys:
        """From the deployment's key. X25519 secrets may be any 32 bytes; HMAC-SHA256 tells the two ends apart."""
        worker, router = (
            z85.encode(hmac.digest(key, f"baton-channel-{end}".encode(), hashlib.sha256)) for end in ("worker", "router")
        )
        return cls(worker, zmq.curve_public(worker), router, zmq.curve_public(router))

    def serve(self, socket: zmq.Socket[Any]) -> None:
        """Before binding. Only who knows the worker's public key gets in, and it is no public one: it takes the key."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.worker_secret)

    def connect(self, socket: zmq.Socket[Any]) -> None:
        """Before connecting."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.worker_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.router_secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.router_public)
