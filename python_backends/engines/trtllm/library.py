"""What is used of tensorrt_llm. Nothing else imports it, and this file does so only inside `load_library`.

The import claims the GPU, so the environment must be right first (environment.py); and the checks, the codec and all
their tests work on machines that don't have it.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from typing import Any

from python_backends.core.errors import ConfigError

log = logging.getLogger(__name__)

CONTAINER = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"

_OLDEST = (1, 1)  # 1.0 has no kv_transfer_timeout_ms: KV that nobody fetches would be held for ever
_NEWEST_KNOWN = (1, 3)
_PENALTIES_SINCE_RC = 24  # of 1.3.0: the first release candidate whose documentation lists penalties


@dataclass(frozen=True, slots=True)
class Library:
    """The classes in use, and what this release can do. The classes are NVIDIA's and untyped here."""

    version: str
    llm: Any
    sampling_params: Any
    disaggregated_params: Any
    logprob: Any
    request_error: type[Exception]

    @property
    def release(self) -> tuple[int, int, float]:
        """(major, minor, release candidate); a final release is after all of its candidates."""
        match = re.match(r"(\d+)\.(\d+)(?:\.\d+)?(?:rc(\d+))?", self.version)
        if match is None:
            return (0, 0, 0)
        return int(match[1]), int(match[2]), float(match[3] or "inf")

    @property
    def applies_penalties(self) -> bool:
        """Earlier releases take repetition, presence and frequency penalties and ignore them (TensorRT-LLM PR 16485)."""
        return self.release >= (1, 3, _PENALTIES_SINCE_RC)

    def typed(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments as LLM takes them: up to 1.2 it wants an object where YAML has a speculative_config.

        By the function that reads the YAML of NVIDIA's own Triton model. Raises ValueError for a method it doesn't know.
        """
        if "speculative_config" not in arguments:
            return arguments
        from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

        typed: dict[str, Any] = update_llm_args_with_extra_dict({}, arguments)
        return typed

    @property
    def params_fields(self) -> frozenset[str]:
        return frozenset(field.name for field in dataclasses.fields(self.disaggregated_params))


def load_library() -> Library:
    """Import TensorRT-LLM. Raises ConfigError when it isn't there or is too old."""
    try:
        import tensorrt_llm
        from tensorrt_llm.executor.result import Logprob
        from tensorrt_llm.executor.utils import RequestError
    except ImportError as error:
        raise ConfigError(
            f"engine trtllm: tensorrt_llm can't be imported ({error}); it comes with the container {CONTAINER}, "
            "see docs/tensorrt-llm.md"
        ) from error
    library = Library(
        version=str(tensorrt_llm.__version__),
        llm=tensorrt_llm.LLM,
        sampling_params=tensorrt_llm.SamplingParams,
        disaggregated_params=tensorrt_llm.DisaggregatedParams,
        logprob=Logprob,
        request_error=RequestError,
    )
    if library.release[:2] < _OLDEST:
        raise ConfigError(
            f"engine trtllm: TensorRT-LLM {library.version} is too old: it would hold KV that nobody fetches for ever; "
            f"use 1.1 or later, such as that of {CONTAINER}"
        )
    if library.release[:2] > _NEWEST_KNOWN:
        log.warning("TensorRT-LLM %s is newer than the engine knows (1.1 to 1.3); watch it closely", library.version)
    return library
