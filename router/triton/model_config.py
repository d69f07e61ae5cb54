"""Configurations with which workers' models are loaded anew: as the repository has them, but for a role that was changed.

Triton lets whoever loads a model give its configuration. That carries the role, so Triton itself remembers it while the
model counts as loaded, dead or not; what it said last is kept here for when a load has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from python_backends.core.errors import Unavailable
from python_backends.core.tensors import ROLE_PARAMETER
from python_backends.core.types import Role, WorkerId
from router.seams import Destination


class ModelConfigs:
    """Any number of threads may use it."""

    def __init__(self, read: Callable[[Destination], dict[str, Any] | None]) -> None:
        """`read`: the configuration that the worker's server has now, in the JSON of Triton's API; None when it says none."""
        self._read = read
        self._last: dict[WorkerId, dict[str, Any]] = {}

    def to_load(self, worker: Destination, role: Role | None) -> dict[str, Any] | None:
        """To be given to Triton; None: what the repository has. Ask before the model is unloaded.

        `role`: None keeps the one it has. Raises Unavailable when it is to change and the present configuration is not known.
        """
        config = self._read(worker)
        if config is None:
            config = self._last.get(worker.worker)
        else:
            self._last[worker.worker] = config
        if role is None:
            return config if config is not None and ROLE_PARAMETER in config.get("parameters", {}) else None
        if config is None:
            raise Unavailable(
                f"worker {worker.worker}: Triton does not tell the configuration of model {worker.model}; "
                "a role is changed on servers that scripts/serve has started"
            )
        parameters = {**config.get("parameters", {}), ROLE_PARAMETER: {"string_value": role.value}}
        return {**config, "parameters": parameters}
