"""The Triton model of a worker, for every role: takes signed work by a short call and returns at once."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from python_backends.core.errors import BatonError
from python_backends.core.tensors import ACCEPTED, WORK
from python_backends.triton.errors import triton_error
from python_backends.triton.home import find_home
from python_backends.triton.logs import log_to_triton
from python_backends.worker.service import Worker

log = logging.getLogger(__name__)


class WorkerModel:
    """`TritonPythonModel` of the models prefill, decode and aggregated."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton()
        name = json.loads(args["model_config"])["name"]
        try:
            home = find_home()
            self._worker = Worker(home.deployment, home.deployment.worker(name), home.channel_address(name), home.key)
            self._worker.start()
        except BatonError as error:
            raise pb_utils.TritonModelException(f"Baton worker {name}: {error}") from None

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._accept(request) for request in requests]

    def _accept(self, request: Any) -> Any:
        sealed: bytes = pb_utils.get_input_tensor_by_name(request, WORK.name).as_numpy().tobytes()
        try:
            accepted = self._worker.submit(sealed)
        except BatonError as error:
            return pb_utils.InferenceResponse(error=triton_error(error))
        return pb_utils.InferenceResponse([pb_utils.Tensor(ACCEPTED.name, np.array([accepted], np.int32))])

    def finalize(self) -> None:
        self._worker.close()
