"""A model's weights in panels (tile.py), made once per host from the checkpoint and mapped by all workers.

    <cache>/prepared/<digest of checkpoint, architecture and precision>.npy

One array of bytes: for each layer its linear layers, norms and biases, then the final norm, the output matrix and the
embedding (one panel set when they are tied), in the order of `_sections`. Quantising looks at the weights only, GROUP
steps of a column at a time. The output matrix and the embedding stay INT8 where the layers are INT4: their errors go
straight to the logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from python_backends.engines.torch.architecture import Architecture
from python_backends.engines.torch.kernels.forward import Decoder, Linear
from python_backends.engines.torch.kernels.tile import (
    BFLOAT16,
    CODE_BITS,
    FLOAT16,
    FLOAT32,
    GROUP,
    INT4,
    INT8,
    panel_bytes,
)
from python_backends.engines.torch.kernels.vector import LANES
from python_backends.engines.torch.weights import Checkpoint, prepared

_VERSION = 2
_FORMATS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16, "int8": INT8, "int4": INT4}
_ALIGNMENT = 64
_PANELS_AT_ONCE = 64  # packed in one go: bounds the memory that packing takes

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def load_decoder(checkpoint: Checkpoint, architecture: Architecture, precision: str, cache: Path) -> tuple[Decoder, Bytes]:
    """precision: float32, bfloat16, float16, int8 or int4. With the model comes the mapped file: the model's addresses are
    valid as long as that lives."""
    identity = msgspec.json.encode([_VERSION, checkpoint.digest, precision, msgspec.to_builtins(architecture)])
    name = hashlib.blake2b(identity, digest_size=16).hexdigest()
    sections = list(_sections(architecture, precision))

    def write(partial: Path) -> None:
        total = sum(section.room for section in sections)
        out = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            partial, mode="w+", dtype=np.uint8, shape=(total,)
        )
        offset = 0
        for section in sections:
            section.write([checkpoint.read(tensor) for tensor in section.tensors], out[offset : offset + section.room])
            offset += section.room
        out.flush()

    path = prepared(cache / "prepared" / f"{name}.npy", write)
    mapped: Bytes = np.load(path, mmap_mode="r")
    return _decoder(architecture, sections, mapped), mapped


def padded(columns: int) -> int:
    """Columns of whole panels."""
    return -(-columns // LANES) * LANES


@dataclass(frozen=True)
class _Section:
    """One piece of the file. tensors: their names in the checkpoint. rows: of them all, which become columns of panels."""

    name: str
    tensors: tuple[str, ...]
    rows: int
    depth: int
    weight_format: int
    interleaved: bool = False  # panels of two matrices in turns, each padded to whole panels

    @property
    def panels(self) -> int:
        return 2 * (padded(self.rows // 2) // LANES) if self.interleaved else padded(self.rows) // LANES

    @property
    def panel_bytes(self) -> int:
        return panel_bytes(self.weight_format, self.depth)

    @property
    def room(self) -> int:
        size = self.panels * self.panel_bytes if self.depth else 4 * self.panels * LANES
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def write(self, tensors: list[torch.Tensor], out: Bytes) -> None:
        if not self.depth:
            self._place(tensors, out.view(np.float32)[: self.panels * LANES])
            return
        panels = out[: self.panels * self.panel_bytes].reshape(self.panels, self.panel_bytes)
        step = len(tensors) if self.interleaved else 1
        matrices = tensors if self.interleaved else [torch.cat(tensors)]
        for which, matrix in enumerate(matrices):
            mine = panels[which::step]
            for first in range(0, len(mine), _PANELS_AT_ONCE):
                rows = matrix[first * LANES : (first + _PANELS_AT_ONCE) * LANES].to(torch.float32).numpy()
                packed = pack(rows, self.weight_format)
                mine[first : first + len(packed)] = packed

    def _place(self, tensors: list[torch.Tensor], out: Floats) -> None:
        """Vectors, as the outputs of the panels that they belong to."""
        if self.interleaved:
            for which, tensor in enumerate(tensors):
                wide = np.zeros(padded(len(tensor)), np.float32)
                wide[: len(tensor)] = tensor.to(torch.float32).numpy()
                out.reshape(-1, 2, LANES)[:, which] = wide.reshape(-1, LANES)
        else:
            vector = torch.cat(tensors).to(torch.float32).numpy()
            out[: len(vector)] = vector


def _sections(architecture: Architecture, precision: str) -> Iterator[_Section]:
    layer_format = _FORMATS[precision]
    output_format = INT8 if layer_format == INT4 else layer_format
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim

    def vector(name: str, tensors: tuple[str, ...], size: int, *, interleaved: bool = False) -> _Section:
        return _Section(name, tensors, size, 0, FLOAT32, interleaved)

    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = tuple(f"{attention}.{name}_proj" for name in "qkv")
        gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")

        def weights(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{name}.weight" for name in names)

        def biases(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{name}.bias" for name in names)

        yield _Section(f"{layer}.qkv", weights(qkv), queries + 2 * keys, hidden, layer_format)
        yield _Section(f"{layer}.attention_output", (f"{attention}.o_proj.weight",), hidden, queries, layer_format)
        yield _Section(f"{layer}.gate_up", weights(gate_up), 2 * ffn, hidden, layer_format, interleaved=True)
        yield _Section(f"{layer}.down", (f"{mlp}.down_proj.weight",), hidden, ffn, layer_format)
        yield vector(f"{layer}.input_norm", (f"{prefix}.input_layernorm.weight",), hidden)
        yield vector(f"{layer}.ffn_norm", (f"{prefix}.post_attention_layernorm.weight",), hidden)
        if architecture.qk_norm:
            yield vector(f"{layer}.query_norm", (f"{attention}.q_norm.weight",), architecture.head_dim)
            yield vector(f"{layer}.key_norm", (f"{attention}.k_norm.weight",), architecture.head_dim)
        if architecture.qkv_bias:
            yield vector(f"{layer}.qkv.bias", biases(qkv), queries + 2 * keys)
        if architecture.o_bias:
            yield vector(f"{layer}.attention_output.bias", (f"{attention}.o_proj.bias",), hidden)
        if architecture.mlp_bias:
            yield vector(f"{layer}.gate_up.bias", biases(gate_up), 2 * ffn, interleaved=True)
            yield vector(f"{layer}.down.bias", (f"{mlp}.down_proj.bias",), hidden)
    yield vector("final_norm", ("model.norm.weight",), hidden)
    yield _Section("embedding", ("model.embed_tokens.weight",), architecture.vocab_size, hidden, output_format)
    if not architecture.tied_embeddings:
        yield _Section("output", ("lm_head.weight",), architecture.vocab_size, hidden, output_format)


def _decoder(architecture: Architecture, sections: list[_Section], data: Bytes) -> Decoder:
    offsets = np.cumsum([0, *(section.room for section in sections)])
    at = {section.name: (section, int(offset)) for section, offset in zip(sections, offsets[:-1], strict=True)}
    base = data.ctypes.data
    layers = range(architecture.num_layers)

    def vectors(names: list[str], size: int) -> Floats:
        """Copies, stacked; [0, 0] where the model has none."""
        if names[0] not in at:
            return np.zeros((0, 0), np.float32)
        return np.stack([data[at[name][1] :][: 4 * size].view(np.float32) for name in names])

    def linear(names: list[str]) -> Linear:
        section = at[names[0]][0]
        return Linear(
            addresses=np.array([base + at[name][1] for name in names], np.int64),
            bias=vectors([f"{name}.bias" for name in names], section.panels * LANES),
            panels=section.panels,
            panel_bytes=section.panel_bytes,
            depth=section.depth,
            weight_format=section.weight_format,
        )

    def layered(name: str) -> list[str]:
        return [f"{layer}.{name}" for layer in layers]

    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    embedding = linear(["embedding"])
    return Decoder(
        num_layers=architecture.num_layers,
        hidden=hidden,
        heads=architecture.num_heads,
        kv_heads=architecture.num_kv_heads,
        head_dim=head_dim,
        eps=architecture.rms_eps,
        qkv=linear(layered("qkv")),
        attention_output=linear(layered("attention_output")),
        gate_up=linear(layered("gate_up")),
        down=linear(layered("down")),
        output=embedding if architecture.tied_embeddings else linear(["output"]),
        embedding=embedding,
        input_norms=vectors(layered("input_norm"), hidden),
        ffn_norms=vectors(layered("ffn_norm"), hidden),
        final_norm=vectors(["final_norm"], hidden)[0],
        query_norms=vectors(layered("query_norm"), head_dim),
        key_norms=vectors(layered("key_norm"), head_dim),
        windows=np.array([window or 0 for window in architecture.windows], np.int64),
    )


# --- formats ---


def pack(rows: Floats, weight_format: int) -> Bytes:
    """Rows [columns of panels, depth] as panels, uint8 [panels, panel_bytes]; missing columns are zero."""
    columns, depth = rows.shape
    wide = np.zeros((padded(columns), depth), np.float32)
    wide[:columns] = rows
    steps = np.ascontiguousarray(wide.reshape(-1, LANES, depth).transpose(0, 2, 1))  # [panels, depth, LANES]
    if weight_format in CODE_BITS:
        content = _quantised(steps, CODE_BITS[weight_format])
    elif weight_format == BFLOAT16:
        content = torch.from_numpy(steps).to(torch.bfloat16).view(torch.int16).numpy()
    else:
        content = steps.astype(np.float16) if weight_format == FLOAT16 else steps
    flat = np.ascontiguousarray(content).reshape(len(steps), -1).view(np.uint8)
    out = np.zeros((len(steps), panel_bytes(weight_format, depth)), np.uint8)
    out[:, : flat.shape[1]] = flat[:, : out.shape[1]]
    return out


def _quantised(steps: Floats, bits: int) -> Bytes:
    """Codes of each group and column: with INT8 around zero, with INT4 between the group's least and greatest weight."""
    panels, depth, _ = steps.shape
    groups, per_word, low, high = -(-depth // GROUP), 32 // bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wide = np.zeros((panels, groups * GROUP, LANES), np.float32)
    wide[:, :depth] = steps
    wide[:, depth:] = steps[:, -1:]  # changes no range
    grouped = wide.reshape(panels, groups, GROUP, LANES)
    least, greatest = grouped.min(axis=2), grouped.max(axis=2)
    if bits == 8:
        scales, offsets = _halves(np.maximum(greatest, -least) / high), np.zeros_like(least, np.float16)
    else:
        scales = _halves((greatest - least) / (high - low))
        offsets = (least - low * scales.astype(np.float32)).astype(np.float16)
    wide_scales, wide_offsets = (halves.astype(np.float32)[:, :, None] for halves in (scales, offsets))
    codes = np.divide(grouped - wide_offsets, wide_scales, out=np.zeros_like(grouped), where=wide_scales > 0)
    codes = np.clip(np.rint(codes), low, high).astype(np.int32).reshape(panels, -1, LANES)
    codes[:, depth:] = 0
    fields = (codes & (2**bits - 1)).astype(np.uint32).reshape(panels, groups, GROUP // per_word, per_word, LANES)
    words = np.bitwise_or.reduce(fields << (bits * np.arange(per_word, dtype=np.uint32))[:, None], axis=3)
    parts = [scales, words] if bits == 8 else [scales, offsets, words]
    return np.concatenate([part.view(np.uint8).reshape(panels, groups, -1) for part in parts], axis=2)


def _halves(scales: Floats) -> npt.NDArray[np.float16]:
    """float16, rounded up: the weight that a scale was made for is not cut off."""
    halves = scales.astype(np.float16)
    return np.where(halves.astype(np.float32) < scales, np.nextafter(halves, np.float16(np.inf)), halves)
