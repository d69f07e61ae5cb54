"""The parts of sampling that look at whole rows of logits, compiled: highest token, inverse CDF, and likeliest tokens.

Probabilities are float32 powers, summed in double precision in an order that depends on the vocabulary's size only: a
row draws the same token in any batch. Vocabularies smaller than a vector are left to PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from python_backends.engines.paged.runner import Draw
from python_backends.engines.torch.kernels.compiler import kernel
from python_backends.engines.torch.kernels.vector import (
    LANES,
    VECTOR,
    Float32x16,
    broadcast,
    constant,
    exp2,
    keep_lanes,
    lane_max,
    lane_sum,
    load,
    maximum,
    store,
)
from python_backends.engines.torch.sampler import Sampler, uniforms

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MOST_LEADERS = 16_384  # likeliest tokens that are put in order at most
_CUT = 10.0  # in units of temperature below the highest logit: tokens less likely than e ** -10 of it rarely matter
_TRIES = 40  # halvings until the cut leaves few enough leaders, or enough
_BLOCK = 512  # tokens of which one sum is kept, in the inverse CDF
_LOG2E = np.log2(np.e)


class CompiledSampler(Sampler):
    """For logits in the memory of this process."""

    def __init__(self, vocab_size: int) -> None:
        """Loads the machine code, or compiles it at the first start of all: not under the first request."""
        super().__init__(vocab_size)
        scores, temperatures, random = _rows(torch.zeros(1, LANES)), np.ones(1, np.float32), np.zeros(1)
        peaks, tokens = np.empty(1, np.float32), np.empty(1, np.int64)
        highest(scores, peaks, tokens)
        draw_in_order(scores, temperatures, np.zeros(1, np.float32), random, peaks, tokens)
        draw_ranked(scores, temperatures, np.ones(1, np.int64), np.ones((1, 2)), random, peaks, tokens)

    def _argmax(self, scores: torch.Tensor, draws: list[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._vocab_size < LANES:
            return super()._argmax(scores, draws)
        peaks, tokens = np.empty(len(draws), np.float32), np.empty(len(draws), np.int64)
        highest(_rows(scores), peaks, tokens)
        return torch.from_numpy(peaks), torch.from_numpy(tokens)

    def _draw_in_order(self, scores: torch.Tensor, draws: list[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._vocab_size < LANES:
            return super()._draw_in_order(scores, draws)
        peaks, tokens = np.empty(len(draws), np.float32), np.empty(len(draws), np.int64)
        min_p = np.array([draw.sampling.min_p for draw in draws], np.float32)
        random = uniforms(draws, scores.device)[:, 0].numpy()
        draw_in_order(_rows(scores), _temperatures(draws), min_p, random, peaks, tokens)
        return torch.from_numpy(peaks), torch.from_numpy(tokens)

    def _draw_ranked(self, scores: torch.Tensor, draws: list[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._vocab_size < LANES:
            return super()._draw_ranked(scores, draws)
        peaks, tokens = np.empty(len(draws), np.float32), np.empty(len(draws), np.int64)
        top_k = np.array([self._top_k(draw.sampling) for draw in draws], np.int64)
        filters = np.array([(draw.sampling.top_p, draw.sampling.min_p) for draw in draws], np.float64)
        random = uniforms(draws, scores.device)[:, 0].numpy()
        draw_ranked(_rows(scores), _temperatures(draws), top_k, filters, random, peaks, tokens)
        chosen = torch.from_numpy(tokens)
        open_rows = [row for row, token in enumerate(tokens) if token < 0]
        if open_rows:
            chosen[open_rows] = super()._draw_ranked(scores[open_rows], [draws[row] for row in open_rows])[1]
        return torch.from_numpy(peaks), chosen


def _rows(scores: torch.Tensor) -> Floats:
    """With a gap between rows, as the forward pass leaves them: kernels are compiled for this kind of array only."""
    if scores.stride(1) == 1 and scores.stride(0) > scores.shape[1]:
        rows: Floats = scores.numpy()
        return rows
    wide = np.empty((scores.shape[0], scores.shape[1] + LANES), np.float32)
    wide[:, : scores.shape[1]] = scores.numpy()
    return wide[:, : scores.shape[1]]


def _temperatures(draws: list[Draw]) -> Floats:
    return np.array([draw.sampling.temperature for draw in draws], np.float32)


@intrinsic
def _at_least(_context: Any, _vector: Any, _threshold: Any) -> Any:
    """One bit per lane: is it not below?"""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.bitcast(builder.fcmp_ordered(">=", args[0], args[1]), ir.IntType(LANES))
        return builder.zext(bits, ir.IntType(64))

    return types.intp(Float32x16, Float32x16), codegen


@intrinsic
def _population(_context: Any, _bits: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.intp(types.intp), codegen


@intrinsic
def _keep_nan(_context: Any, _sum: Any, _vector: Any) -> Any:
    """NaN in the lanes where `vector` is."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_unordered("uno", args[1], args[1]), constant(np.nan), args[0])

    return Float32x16(Float32x16, Float32x16), codegen


@intrinsic
def _zero_under(_context: Any, _vector: Any, _limit: Any) -> Any:
    """0 in the lanes that are below the limit."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), ir.Constant(VECTOR, [0.0] * LANES), args[0])

    return Float32x16(Float32x16, Float32x16), codegen


@kernel
def _load_part(row: int, first: int, size: int) -> Any:
    """Sixteen logits from `first` on; at the end of the row the last sixteen, of which those before `first` are -inf."""
    if first + LANES <= size:
        return load(row + 4 * first)
    return keep_lanes(load(row + 4 * (size - LANES)), LANES - (size - first), LANES)


@kernel
def _peak(row: int, size: int) -> float:
    """The highest logit; NaN if one is."""
    highest, nans = broadcast(np.float32(-np.inf)), broadcast(np.float32(0.0))
    for first in range(0, size, LANES):
        part = _load_part(row, first, size)
        highest = maximum(highest, part)
        nans = _keep_nan(nans, part)
    return lane_max(highest) + lane_sum(nans)


@kernel
def highest(scores: Floats, peaks: Floats, tokens: Ints) -> None:
    """Per row the highest logit and its lowest token."""
    for row in range(scores.shape[0]):
        address, size = scores[row].ctypes.data, scores.shape[1]
        peaks[row], tokens[row] = _peak(address, size), 0
        for first in range(0, size, LANES):
            if _at_least(_load_part(address, first, size), broadcast(peaks[row])):
                token = first
                while token < size and scores[row, token] != peaks[row]:
                    token += 1
                tokens[row] = min(token, size - 1)
                break


@kernel
def draw_in_order(scores: Floats, temperatures: Floats, min_p: Floats, random: Doubles, peaks: Floats, tokens: Ints) -> None:
    """Per row the token at which the running sum of probabilities, in the order of ids, passes the random number."""
    size = scores.shape[1]
    sums = np.empty((size + _BLOCK - 1) // _BLOCK)
    weights = np.empty(_BLOCK + LANES, np.float32)
    for row in range(scores.shape[0]):
        address = scores[row].ctypes.data
        peak = _peak(address, size)
        scale, least = np.float32(_LOG2E) / temperatures[row], broadcast(min_p[row])
        total = 0.0
        for block in range(sums.size):
            begin, end = block * _BLOCK, min(size, (block + 1) * _BLOCK)
            part = broadcast(np.float32(0.0))
            for first in range(begin, end, LANES):
                part = part + _zero_under(_weights(address, first, size, peak, scale), least)
            sums[block] = lane_sum(part)
            total += sums[block]
        target, block, before = random[row] * total, 0, 0.0
        while block < sums.size - 1 and before + sums[block] <= target:
            before += sums[block]
            block += 1
        begin, end = block * _BLOCK, min(size, (block + 1) * _BLOCK)
        kept = weights[LANES:]
        # From the end: the row's last part reaches back, perhaps to before the block, with zeros that the others replace.
        for first in range(begin + (end - begin - 1) // LANES * LANES, begin - 1, -LANES):
            place = min(first, size - LANES) - begin + LANES
            store(weights[place:].ctypes.data, _zero_under(_weights(address, first, size, peak, scale), least))
        chosen = -1
        for i in range(end - begin):
            if kept[i] > 0:
                chosen = begin + i  # the last one that may be drawn, should rounding leave the sum short of the target
                before += kept[i]
                if before > target:
                    break
        peaks[row], tokens[row] = peak, max(chosen, 0)


@kernel
def _weights(row: int, first: int, size: int, peak: float, scale: float) -> Any:
    """Probabilities relative to the likeliest token's."""
    return exp2((_load_part(row, first, size) - broadcast(peak)) * broadcast(scale))


@kernel
def draw_ranked(
    scores: Floats, temperatures: Floats, top_k: Ints, filters: Doubles, random: Doubles, peaks: Floats, tokens: Ints
) -> None:
    """Per row: the likeliest tokens that top_k, top_p and min_p (filters [rows, 2]) leave, and the one of them at which the
    running sum of probabilities, best first, then by id, passes the random number. -1 where more tokens matter than are
    looked at, or one of several equal ones is the last."""
    size = scores.shape[1]
    most = min(_MOST_LEADERS, size)
    found, negative, weights = np.empty(most, np.int64), np.empty(most, np.float32), np.empty(most)
    for row in range(scores.shape[0]):
        address = scores[row].ctypes.data
        peak, temperature = _peak(address, size), temperatures[row]
        scale, unlimited = np.float32(_LOG2E) / temperature, top_k[row] == size
        peaks[row], tokens[row] = peak, -1
        mass = _mass(address, size, peak, scale) if unlimited else 0.0
        least = 1 if unlimited else min(top_k[row] + 1, size)
        cut, count = _cut(address, size, peak, _CUT * temperature, least, most)
        settled = False
        while count > 0 and not settled:
            _collect(scores[row], np.float32(peak - cut), found)
            for i in range(count):
                negative[i] = -scores[row, found[i]]
            order = np.argsort(negative[:count], kind="mergesort")  # stable: ids ascend among equals
            limit = min(count, top_k[row])
            total = 0.0
            for i in range(limit):
                weights[i] = np.exp((-negative[order[i]] - np.float64(peak)) / temperature)
                total += weights[i]
            wanted = filters[row, 0] * (mass if unlimited else total)
            kept, before, sum_kept = 0, 0.0, 0.0
            while kept < limit and (kept == 0 or (before < wanted and weights[kept] >= filters[row, 1])):
                sum_kept = before + weights[kept]
                before, kept = sum_kept, kept + 1
            settled = count == size or negative[order[kept - 1]] < negative[order[count - 1]]
            if settled:
                target, before, rank = random[row] * sum_kept, weights[0], 0
                while rank < kept - 1 and before <= target:
                    rank += 1
                    before += weights[rank]
                tokens[row] = found[order[rank]]
            elif count < most // 2:  # a flat row: as many as there is room for
                cut, count = _cut(address, size, peak, cut, most // 2, most)
            else:
                break


@kernel
def _mass(row: int, size: int, peak: float, scale: float) -> float:
    """The sum of all probabilities relative to the likeliest token's."""
    total = 0.0
    for begin in range(0, size, _BLOCK):
        part = broadcast(np.float32(0.0))
        for first in range(begin, min(size, begin + _BLOCK), LANES):
            part = part + _weights(row, first, size, peak, scale)
        total += lane_sum(part)
    return total


@kernel
def _cut(row: int, size: int, peak: float, cut: float, least: int, most: int) -> tuple[float, int]:
    """How far below the peak at least and at most so many tokens are, and how many; 0 tokens if there is no such place."""
    too_low, too_high = 0.0, np.inf
    for _ in range(_TRIES):
        count = _count(row, size, np.float32(peak - cut))
        if least <= count <= most:
            return cut, count
        if count > most:
            too_high = cut
        else:
            too_low = cut
        cut = 2 * cut if too_high == np.inf else (too_low + too_high) / 2
    return cut, 0


@kernel
def _count(row: int, size: int, threshold: Any) -> int:
    count = 0
    for first in range(0, size, LANES):
        count += _population(_at_least(_load_part(row, first, size), broadcast(threshold)))
    return count


@kernel
def _collect(row: Floats, threshold: Any, found: Ints) -> None:
    count = 0
    for first in range(0, row.size, LANES):
        if _at_least(_load_part(row.ctypes.data, first, row.size), broadcast(threshold)):
            for token in range(first, min(row.size, first + LANES)):
                if row[token] >= threshold:
                    found[count] = token
                    count += 1
