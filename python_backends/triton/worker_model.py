"""The Triton model of a worker, for every role: takes signed work by a short call and returns at once."""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from python_backends.core.errors import BatonError, ConfigError
from python_backends.core.tensors import ACCEPTED, ROLE_PARAMETER, WORK
from python_backends.core.types import Role
from python_backends.triton.errors import triton_error
from python_backends.triton.garbage import freeze_what_is_there
from python_backends.triton.home import Home, find_home
from python_backends.triton.logs import log_to_triton
from python_backends.worker.service import Worker

log = logging.getLogger(__name__)


class WorkerModel:
    """`TritonPythonModel` of the models prefill, decode and aggregated."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton()
        model = json.loads(args["model_config"])
        name = model["name"]
        try:
            home = find_home()
            config = home.deployment.worker(name)
            given = _given_role(model)
            role = given or home.role_of(name) or config.role
            config = msgspec.structs.replace(config, role=role)
            self._worker = Worker(home.deployment, config, home.channel_address(name), home.key)
            self._worker.start()
        except BatonError as error:
            raise pb_utils.TritonModelException(f"Baton worker {name}: {error}") from None
        if given is not None:  # and it works
            _remember(home, name, given)
        freeze_what_is_there()

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


def _given_role(model: dict[str, Any]) -> Role | None:
    """That which came with the load. Raises ConfigError."""
    given = model.get("parameters", {}).get(ROLE_PARAMETER, {}).get("string_value")
    try:
        return None if given is None else Role(given)
    except ValueError:
        known = ", ".join(role.value for role in Role)
        raise ConfigError(f"parameters: {ROLE_PARAMETER} {given!r} is no role; give one of {known}") from None


def _remember(home: Home, worker: str, role: Role) -> None:
    try:
        home.remember_role(worker, role)
    except OSError as error:  # a full disk, say
        log.error(
            "worker %s is %s only until it is loaded again, since that can't be written down: %s", worker, role.value, error
        )
