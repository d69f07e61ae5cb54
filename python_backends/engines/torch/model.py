"""The forward pass of a Llama-like decoder over the flat tokens of one step. Read it from top to bottom.

Where rounding matters the order of operations is that of transformers, so greedy text is the same token for token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

from python_backends.engines.torch.architecture import Architecture
from python_backends.engines.torch.rope import cos_sin, inverse_frequencies, rotate


class Attention(Protocol):
    """Where the keys and values of one step's tokens are stored, and what each token sees."""

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, window: int | None
    ) -> torch.Tensor:
        """Store keys and values [tokens, kv_heads, head_dim], and return the attention of the queries
        [tokens, heads, head_dim] to all that each may see, as [tokens, heads * head_dim]."""


class Model:
    """Weights of one model, on one device; `tensors` are named as in the checkpoint (weights.expected_tensors)."""

    def __init__(self, architecture: Architecture, tensors: Mapping[str, torch.Tensor]) -> None:
        self._embedding = tensors["model.embed_tokens.weight"]
        self._layers = [_Layer(index, architecture, tensors) for index in range(architecture.num_layers)]
        self._norm = _RMSNorm(tensors["model.norm.weight"], architecture.rms_eps)
        self._output = self._embedding if architecture.tied_embeddings else tensors["lm_head.weight"]
        self._frequencies = inverse_frequencies(architecture.rope, architecture.head_dim).to(self._embedding.device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention, drawing: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute tokens, both int64 [tokens], and have `attention` write their KV.

        Returns logits of the tokens at the indices `drawing` (None: of all), float32 [draws, vocab].
        """
        cos, sin = cos_sin(positions, self._frequencies, self._embedding.dtype)
        hidden = F.embedding(token_ids, self._embedding)
        for layer in self._layers:
            hidden = layer.forward(hidden, cos, sin, attention)
        hidden = hidden if drawing is None else hidden[drawing]
        return F.linear(self._norm(hidden), self._output).to(torch.float32)


class _Layer:
    """One decoder layer: attention and a gated feed-forward network, each added to its input."""

    def __init__(self, index: int, architecture: Architecture, tensors: Mapping[str, torch.Tensor]) -> None:
        prefix = f"model.layers.{index}"

        def linear(name: str) -> _Linear:
            return _Linear(tensors[f"{prefix}.{name}.weight"], tensors.get(f"{prefix}.{name}.bias"))

        def norm(name: str) -> _RMSNorm:
            return _RMSNorm(tensors[f"{prefix}.{name}.weight"], architecture.rms_eps)

        self._index = index
        self._window = architecture.windows[index]
        self._head_dim = architecture.head_dim
        self._attention_norm = norm("input_layernorm")
        self._query, self._key, self._value = (linear(f"self_attn.{name}_proj") for name in "qkv")
        self._query_norm = norm("self_attn.q_norm") if architecture.qk_norm else None
        self._key_norm = norm("self_attn.k_norm") if architecture.qk_norm else None
        self._attention_output = linear("self_attn.o_proj")
        self._ffn_norm = norm("post_attention_layernorm")
        self._gate, self._up, self._down = (linear(f"mlp.{name}_proj") for name in ("gate", "up", "down"))

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        hidden = hidden + self._attention(self._attention_norm(hidden), cos, sin, attention)
        return hidden + self._feed_forward(self._ffn_norm(hidden))

    def _attention(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        heads = (len(hidden), -1, self._head_dim)
        queries = self._query(hidden).view(*heads)  # [tokens, heads, head_dim]
        keys = self._key(hidden).view(*heads)  # [tokens, kv_heads, head_dim]
        values = self._value(hidden).view(*heads)
        if self._query_norm is not None and self._key_norm is not None:
            queries, keys = self._query_norm(queries), self._key_norm(keys)
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        return self._attention_output(attention.attend(queries, keys, values, self._index, self._window))

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._down(F.silu(self._gate(hidden)) * self._up(hidden))


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None  # [out]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _RMSNorm:
    """Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467) over the last dimension, in float32."""

    weight: torch.Tensor
    eps: float

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)
