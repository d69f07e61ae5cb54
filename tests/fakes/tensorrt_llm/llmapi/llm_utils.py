"""What NVIDIA's Triton model makes of its model.yaml before it calls LLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._arguments import DecodingConfig
from .._knobs import release


def update_llm_args_with_extra_dict(
    llm_args: Mapping[str, Any], llm_args_dict: Mapping[str, Any], extra_llm_api_options: str | None = None
) -> dict[str, Any]:
    """Both, with objects where up to 1.2 LLM takes no mappings."""
    extra = dict(llm_args_dict)
    if "speculative_config" in extra and release() < (1, 3):
        extra["speculative_config"] = DecodingConfig.from_dict(extra["speculative_config"])
    return {**llm_args, **extra}
