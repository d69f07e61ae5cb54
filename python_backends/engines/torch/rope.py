"""Rotary position embeddings (Su et al., 2021, arXiv:2104.09864), pairs being the two halves of a head."""

from __future__ import annotations

import math

import torch

from python_backends.engines.torch.architecture import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair, float32 [head_dim / 2]: theta ** (-2i / head_dim), scaled as `rope` says."""
    frequency = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.rope_type == "linear":
        return frequency / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(frequency, rope)
    return frequency


def _llama3(frequency: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Llama 3.1's scaling: keep what turns often in the original context, slow down what turns seldom, blend between."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequency * kept + frequency / rope.factor * (1 - kept)


def cos_sin(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for `rotate`, each [tokens, 1, head_dim], from positions [tokens] and frequencies [head_dim / 2]."""
    angles = (positions.to(torch.float32)[:, None] * frequencies).repeat(1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [tokens, heads, head_dim] to their positions."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
