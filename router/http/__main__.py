"""The OpenAI-compatible front end of the router of this machine. scripts/serve starts it with the server.

BATON_CONFIG and BATON_RUN_DIR say which server, as for the model processes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn

from python_backends.core.errors import BatonError, ConfigError
from python_backends.core.paths import resolve_model
from python_backends.triton.home import find_home
from router.http.app import create_app
from router.http.keeper import RouterKeeper
from router.tokenizer import Tokenizer

_GRACE_S = 3  # streams that are running when it is told to stop
_BACKLOG = 2048
_TICK_S = 1.0


class _Server(uvicorn.Server):
    """Sets the date of its answers once a second, and is woken by signals. uvicorn's own looks for them ten times a second,
    which were four in ten of the times that an idle front end woke up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._told is not None:
            loop, event = self._told
            loop.call_soon_threadsafe(event.set)

    async def main_loop(self) -> None:
        event = asyncio.Event()
        self._told = asyncio.get_running_loop(), event
        while not await self.on_tick(0):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(event.wait(), _TICK_S)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m router.http", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--address", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--triton", default="127.0.0.1:8000", metavar="HOST:PORT", help="Triton's HTTP service")
    parser.add_argument("--metrics", default="127.0.0.1:8002", metavar="HOST:PORT", help="Triton's metrics")
    parser.add_argument("--keep-router", action="store_true", help="restart the router if its process dies")
    return parser.parse_args()


def read_api_keys(path: str) -> frozenset[bytes]:
    """SHA-256 of each line that is not empty; an empty path gives none. Raises ConfigError."""
    if not path:
        return frozenset()
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"http.api_keys_file: {path}: {error}") from error
    keys = frozenset(hashlib.sha256(line.strip().encode()).digest() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"http.api_keys_file: {path} holds no key; write one per line")
    return keys


def _listen(address: str, port: int) -> socket.socket:
    """Shared by all processes of the front end: the kernel spreads connections. Raises ConfigError."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        raise ConfigError(f"port {port} on {address}: {error.strerror}") from error
    listener.listen(_BACKLOG)
    return listener


def main() -> int:
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="front end: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        home = find_home()
        app = create_app(
            home.deployment,
            Tokenizer(resolve_model(home.deployment.model.path)),
            home.door_address,
            read_api_keys(home.deployment.http.api_keys_file),
            metrics=options.metrics,
            keeper=RouterKeeper(options.triton, home.operator_headers) if options.keep_router else None,
        )
        listener = _listen(options.address, options.port)
    except BatonError as error:
        print(f"front end: error: {error}", file=sys.stderr)
        return 1
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", lifespan="on", timeout_graceful_shutdown=_GRACE_S
    )
    _Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
