"""The Triton model that clients call: tensors in, RouterService, text out. `execute` returns at once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from python_backends.core.config import Deployment
from python_backends.core.curve import CurveKeys
from python_backends.core.errors import BatonError
from python_backends.core.paths import resolve_model
from python_backends.core.place import place_of
from python_backends.triton.garbage import freeze_what_is_there
from python_backends.triton.home import Home, find_home
from python_backends.triton.logs import log_to_triton
from python_backends.triton.stream import ResponseStream
from router.discovery import sources_of
from router.door.door import Door
from router.metrics import Meter
from router.service import Channels, RouterService
from router.tokenizer import Tokenizer
from router.triton.bls import TritonModelControl, TritonSubmitter
from router.triton.codec import decode_request, wants_error_codes
from router.triton.metrics import TritonSink
from router.triton.remote import RemoteServers
from router.triton.reply import CancelWatch, TritonReply, Writer
from router.triton.restart_marks import RestartMarks

if TYPE_CHECKING:
    from router.tracing import Tracer

log = logging.getLogger(__name__)


class RouterModel:
    """`TritonPythonModel` of the model router."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton()
        try:
            home = find_home()
            tokenizer = Tokenizer(resolve_model(home.deployment.model.path))
            remote = RemoteServers(home.deployment.cluster, home.key)
            own = {place_of(home.deployment, worker).worker for worker in home.deployment.workers}
        except BatonError as error:
            raise pb_utils.TritonModelException(f"Baton router: {error}") from None
        self._default_max_tokens = home.deployment.router.default_max_tokens
        self._sink = TritonSink()
        meter = Meter(self._sink)
        self._service = RouterService(
            home.deployment,
            _channels(home),
            tokenizer,
            TritonSubmitter(home.key, own, remote),
            TritonModelControl(home.triton_address, home.operator_headers, own, remote, RestartMarks(home.run_dir)),
            meter,
            home,
        )
        self._tracer = _begin_tracing(home.deployment, self._service, meter)
        self._service.start()
        self._service.attend(lambda: Door(self._service, home.door_address).attend())
        self._writer = Writer(tokenizer.token_text, home.deployment.router.stream_interval_ms / 1e3)
        self._watch = CancelWatch(self._service.cancel)
        freeze_what_is_there()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._accept(request)

    def _accept(self, request: Any) -> None:
        stream = ResponseStream(request)
        try:
            client_request, wanted = decode_request(request, self._default_max_tokens)
        except BatonError as error:
            self._writer.refuse(stream, error, wants_error_codes(request))
            return
        run = self._service.accept(client_request, TritonReply(stream, wanted, self._writer))
        self._watch.add(run, stream)

    def finalize(self) -> None:
        self._watch.close()
        self._service.close()
        self._writer.close()
        self._sink.close()
        if self._tracer is not None:
            self._tracer.close()


def _channels(home: Home) -> Channels:
    own = [home.channel_address(worker.name) for worker in home.deployment.workers]
    return Channels(str(home.run_dir), CurveKeys.derive(home.key), own, sources_of(home.deployment.cluster, home.key))


def _begin_tracing(deployment: Deployment, service: RouterService, meter: Meter) -> Tracer | None:
    """None when the deployment wants none: then the SDK is not even loaded."""
    if not deployment.tracing.otlp_endpoint:
        return None
    from router.tracing import Tracer

    tracer = Tracer(deployment.tracing, deployment.model_name, lambda: meter.count("baton_traces_dropped_total"))
    service.house.journal.listeners.append(tracer.put)
    return tracer
