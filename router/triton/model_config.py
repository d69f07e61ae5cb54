"""How a worker is told the role that it is to be loaded in: by a parameter of its model's configuration.

Triton lets whoever loads a model give its configuration, whole. The worker itself remembers the role from then on
(python_backends/triton/home.py), so that later loads need not tell it.
"""

from __future__ import annotations

from typing import Any

from python_backends.core.errors import Unavailable
from python_backends.core.tensors import ROLE_PARAMETER
from python_backends.core.types import Role
from router.seams import Destination


def in_role(worker: Destination, config: dict[str, Any] | None, role: Role) -> dict[str, Any]:
    """The configuration to load the worker with.

    `config`: the one that its server has now, in the JSON of Triton's API. Raises Unavailable when it tells none.
    """
    if config is None:
        raise Unavailable(
            f"worker {worker.worker}: Triton does not tell the configuration of model {worker.model}; "
            "a role is changed on servers that scripts/serve has started"
        )
    return {**config, "parameters": {**config.get("parameters", {}), ROLE_PARAMETER: {"string_value": role.value}}}
