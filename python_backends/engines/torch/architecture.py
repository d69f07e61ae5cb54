"""What a Hugging Face `config.json` says about a decoder-only model, checked before any weight is read.

Llama, Mistral, Qwen2 and Qwen3 are one architecture with a few switches: biases, norms of queries and keys, rotary
scaling, sliding windows. What this engine does not compute is refused by name: a model that loads is computed right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from python_backends.core.errors import ConfigError

Windows = tuple[int | None, ...]


class Rope(msgspec.Struct, frozen=True):
    """Rotary positions: base, and how frequencies are scaled for long contexts (rope.py has the formulas)."""

    rope_type: str  # default | linear | llama3
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0  # tokens


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """A model's shape. Sizes in elements, windows in tokens."""

    name: str  # as in `architectures`, for example LlamaForCausalLM
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: Windows  # per layer: a token sees itself and the window - 1 tokens before it; None: all before it
    eos_token_ids: tuple[int, ...]


def load_architecture(directory: Path) -> Architecture:
    """Read config.json and generation_config.json. Raises ConfigError naming file and key of what can't be served."""
    path = directory / "config.json"
    kind = _decode(path, _Kind)
    name = kind.architectures[0] if kind.architectures else "none"
    if name not in _FAMILIES:
        raise ConfigError(f"{path}: architectures: {name} is not supported; supported are {', '.join(_FAMILIES)}")
    if kind.quantization_config is not None:
        raise ConfigError(f"{path}: quantization_config: quantized weights are not supported; give unquantized ones")
    family, config = _FAMILIES[name], _decode(path, _Config)
    missing = [key for key in family.required if getattr(config, key) is UNSET]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing; {name} needs it")
    if config.hidden_act != "silu":
        raise ConfigError(f"{path}: hidden_act {config.hidden_act!r} is not supported; supported is silu")
    return Architecture(
        name=name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=_num_kv_heads(config, path),
        head_dim=_head_dim(config, path),
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        rms_eps=config.rms_norm_eps,
        rope=_rope(config, path),
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=config.attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=config.attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=config.mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        windows=family.windows(config, path),
        eos_token_ids=_eos_token_ids(directory, config),
    )


_Size = Annotated[int, Meta(ge=1)]
_Positive = Annotated[float, Meta(gt=0)]


class _Kind(msgspec.Struct):
    """What is looked at first, so that a foreign model is refused by its name and not for a key it lacks."""

    architectures: list[str] = []
    quantization_config: dict[str, object] | None = None


class _RopeJson(msgspec.Struct):
    rope_type: str | None = None
    type: str | None = None  # rope_type, as older checkpoints call it
    rope_theta: _Positive | None = None
    partial_rotary_factor: float = 1.0
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Size | None = None


class _Config(msgspec.Struct, kw_only=True):
    """config.json. Defaults are transformers' own, and only where published checkpoints leave the key out."""

    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | UnsetType | None = UNSET  # None, or unset where not required: as many as attention heads
    head_dim: _Size | UnsetType | None = UNSET  # None, or unset where not required: hidden_size / num_attention_heads
    intermediate_size: _Size
    vocab_size: _Size
    max_position_embeddings: _Size
    rms_norm_eps: _Positive
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: _Positive | None = 10_000.0
    rope_scaling: _RopeJson | None = None  # until transformers 4
    rope_parameters: _RopeJson | None = None  # from transformers 5 on, rope_theta included
    partial_rotary_factor: float = 1.0
    sliding_window: _Size | UnsetType | None = UNSET
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    eos_token_id: int | list[int] | None = None


class _Generation(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


_Json = TypeVar("_Json", bound=msgspec.Struct)


def _decode(path: Path, kind: type[_Json]) -> _Json:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; model.path must be a Hugging Face model directory") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _num_kv_heads(config: _Config, path: Path) -> int:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if heads % kv_heads:
        raise ConfigError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return kv_heads


def _head_dim(config: _Config, path: Path) -> int:
    if config.head_dim:
        head_dim, rest = config.head_dim, 0
    else:
        head_dim, rest = divmod(config.hidden_size, config.num_attention_heads)
    if rest or head_dim % 2:
        raise ConfigError(
            f"{path}: head_dim must be whole and even; it is {config.head_dim or 'not given'}, hidden_size "
            f"{config.hidden_size}, num_attention_heads {config.num_attention_heads}"
        )
    return head_dim


_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope(config: _Config, path: Path) -> Rope:
    where = f"{path}: rope_scaling" if config.rope_parameters is None else f"{path}: rope_parameters"
    given = config.rope_parameters or config.rope_scaling or _RopeJson(rope_type="default")
    # The base alone is the default type; an object with neither is one for each kind of layer, of foreign models.
    rope_type = given.rope_type or given.type or ("default" if given.rope_theta else "missing")
    theta = given.rope_theta or config.rope_theta
    if rope_type not in _ROPE_KEYS or theta is None:
        raise ConfigError(f"{where}: rope_type {rope_type!r} is not supported; supported are {', '.join(_ROPE_KEYS)}")
    if {given.partial_rotary_factor, config.partial_rotary_factor} != {1.0}:
        raise ConfigError(f"{where}: partial_rotary_factor is not supported; only models that rotate whole heads are")
    missing = [key for key in _ROPE_KEYS[rope_type] if getattr(given, key) is None]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing; rope_type {rope_type!r} needs it")
    if rope_type == "llama3" and given.high_freq_factor == given.low_freq_factor:
        raise ConfigError(f"{where}: high_freq_factor equals low_freq_factor; they must differ")
    return Rope(
        rope_type=rope_type,
        theta=theta,
        factor=given.factor or 1.0,
        low_freq_factor=given.low_freq_factor or 1.0,
        high_freq_factor=given.high_freq_factor or 1.0,
        original_max_positions=given.original_max_position_embeddings or 0,
    )


def _eos_token_ids(directory: Path, config: _Config) -> tuple[int, ...]:
    """generation_config.json wins over config.json: chat models end their turns with more tokens than one."""
    path = directory / "generation_config.json"
    generation = _decode(path, _Generation) if path.exists() else _Generation()
    ids = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _no_windows(config: _Config, path: Path) -> Windows:
    return (None,) * config.num_hidden_layers


def _mistral_windows(config: _Config, path: Path) -> Windows:
    return (config.sliding_window or None,) * config.num_hidden_layers


def _qwen_windows(config: _Config, path: Path) -> Windows:
    layers = config.num_hidden_layers
    if not config.use_sliding_window or not config.sliding_window:
        return (None,) * layers
    if config.layer_types is not None:
        types = config.layer_types
    elif config.max_window_layers is not None:
        full = min(config.max_window_layers, layers)
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    else:
        raise ConfigError(f"{path}: layer_types is missing; use_sliding_window needs it, or max_window_layers")
    window = {"full_attention": None, "sliding_attention": config.sliding_window}
    unknown = sorted(set(types) - set(window))
    if unknown:
        raise ConfigError(f"{path}: layer_types: {unknown[0]!r} is not supported; supported are {', '.join(window)}")
    if len(types) != layers:
        raise ConfigError(f"{path}: layer_types has {len(types)} entries, num_hidden_layers is {layers}")
    return tuple(window[kind] for kind in types)


@dataclass(frozen=True)
class _Family:
    """One supported architecture. Biases: True or False always, None as config.json says."""

    required: tuple[str, ...]  # keys whose default in transformers would be a guess here
    qkv_bias: bool | None
    o_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool
    windows: Callable[[_Config, Path], Windows]


_FAMILIES = {
    "LlamaForCausalLM": _Family((), None, None, None, False, _no_windows),
    "MistralForCausalLM": _Family(("num_key_value_heads", "sliding_window"), False, False, False, False, _mistral_windows),
    "Qwen2ForCausalLM": _Family(("num_key_value_heads",), True, False, False, False, _qwen_windows),
    "Qwen3ForCausalLM": _Family(("num_key_value_heads", "head_dim"), None, None, False, True, _qwen_windows),
}
