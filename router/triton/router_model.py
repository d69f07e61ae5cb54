"""The Triton model that clients call: tensors in, RouterService, text out. `execute` returns at once."""

from __future__ import annotations

import logging
from typing import Any

import triton_python_backend_utils as pb_utils

from python_backends.core.errors import BatonError
from python_backends.core.paths import resolve_model
from python_backends.triton.home import find_home
from python_backends.triton.logs import log_to_triton
from python_backends.triton.stream import ResponseStream
from router.door.door import Door
from router.service import RouterService
from router.tokenizer import Tokenizer
from router.triton.bls import BlsSubmitter, TritonModelControl
from router.triton.codec import decode_request
from router.triton.metrics import Metrics
from router.triton.reply import CancelWatch, TritonReply, Writer

log = logging.getLogger(__name__)


class RouterModel:
    """`TritonPythonModel` of the model router."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton()
        try:
            home = find_home()
            tokenizer = Tokenizer(resolve_model(home.deployment.model.path))
        except BatonError as error:
            raise pb_utils.TritonModelException(f"Baton router: {error}") from None
        self._default_max_tokens = home.deployment.router.default_max_tokens
        self._metrics = Metrics()
        self._service = RouterService(
            home.deployment,
            home.channel_address,
            tokenizer,
            BlsSubmitter(home.key),
            TritonModelControl(),
            self._metrics,
            home.stopping,
        )
        self._service.start()
        self._service.attend(lambda: Door(self._service, home.door_address).attend())
        self._writer = Writer(tokenizer.token_text)
        self._watch = CancelWatch(self._service.cancel)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._accept(request)

    def _accept(self, request: Any) -> None:
        stream = ResponseStream(request)
        try:
            client_request, wanted = decode_request(request, self._default_max_tokens)
        except BatonError as error:
            self._writer.put(stream, error, None)
            return
        run = self._service.accept(client_request, TritonReply(stream, wanted, self._writer))
        self._watch.add(run, stream)

    def finalize(self) -> None:
        self._watch.close()
        self._service.close()
        self._writer.close()
        self._metrics.close()
