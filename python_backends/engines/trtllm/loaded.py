"""A model that TensorRT-LLM has loaded, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from python_backends.engines.base import EngineInfo
from python_backends.engines.trtllm.library import Library


@dataclass(frozen=True, slots=True)
class Loaded:
    llm: Any  # tensorrt_llm.LLM
    library: Library
    info: EngineInfo
    eos_token_ids: tuple[int, ...]
