"""The ways to ask a server, one module each; `connect` takes the one that an address means."""

from __future__ import annotations

from urllib.parse import urlsplit

from loadtest.options import Options
from loadtest.protocols.base import Connection
from loadtest.protocols.generate import GenerateConnection
from loadtest.protocols.grpc import GrpcConnection
from loadtest.protocols.openai import OpenAIConnection
from python_backends.core.errors import ConfigError


def connect(address: str, options: Options) -> Connection:
    """`grpc://HOST:PORT`: Triton's gRPC. `http://HOST:PORT`: generate_stream. `http://HOST:PORT/v1`: OpenAI's API.

    Raises ConfigError for anything else. https works as http does. Nothing is sent yet.
    """
    url = urlsplit(address)
    if url.scheme not in ("grpc", "http", "https") or not url.netloc:
        raise ConfigError(f"{address!r} is not an address like grpc://127.0.0.1:8001 or http://127.0.0.1:8000/v1")
    if url.scheme == "grpc":
        return GrpcConnection(url.netloc, options)
    if url.path.strip("/"):
        return OpenAIConnection(address, options)
    return GenerateConnection(address, options)
