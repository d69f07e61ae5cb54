"""From logits to tokens: penalties, filters and one position-deterministic draw per row.

A row takes one of three ways, each computed for all its rows at once:

    greedy    temperature 0                argmax
    in order  no top_k and no top_p        inverse CDF in the order of token ids, nothing is sorted
    ranked    top_k or top_p               inverse CDF in the order of (logit descending, id ascending)

The ranked way looks at the likeliest tokens only. Its sums are exact all the same: the mass outside is known from the
whole row, and when the cut does not fall clearly inside what was looked at, that row is sorted whole. So the token of a
row depends on its logits, its Draw and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from python_backends.core.errors import EngineFailure
from python_backends.core.types import SamplingParams, TokenLogprob
from python_backends.engines.paged.runner import Draw, Sampled

_WIDE = 1024  # leaders looked at when top_p may need many: nearly always enough, and far cheaper than a sort
_NARROW = 128  # ... when every top_k of the batch is smaller
_TIE_SLACK = 32  # leaders looked at beyond the n of top logprobs, to see ties at the n-th

_U32 = 0xFFFFFFFF
_PHILOX_ROUNDS = 10

_Choice = tuple[torch.Tensor, torch.Tensor]  # highest logit and chosen token, both [rows]


class Sampler:
    """Stateless but for the vocabulary's size; one instance serves any device.

    kernels/sampler.py has the three ways compiled for CPUs.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def sample(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        """Choose one token per row.

        logits: float32 [len(draws), vocab_size] on any device, not changed. Token ids of a Draw that are outside the
        vocabulary (bias, bans, penalties) have no effect. Raises EngineFailure naming the first row without a
        distribution: NaN or +inf in it, or nothing but -inf.
        """
        if logits.shape != (len(draws), self._vocab_size):
            raise EngineFailure(
                f"logits have shape {list(logits.shape)} where {[len(draws), self._vocab_size]} was expected; "
                "check vocab_size in the model's config.json"
            )
        tokens = [0] * len(draws)
        for choose, rows in self._ways(draws):
            group = [draws[row] for row in rows]
            peaks, chosen = choose(_edited(_take(logits, rows), group), group)
            _require_finite(peaks, rows, draws)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                tokens[row] = token
        logprobs = self._logprobs(logits, draws, tokens)
        return [Sampled(token, logprobs.get(row)) for row, token in enumerate(tokens)]

    def _ways(self, draws: Sequence[Draw]) -> list[tuple[Callable[[torch.Tensor, list[Draw]], _Choice], list[int]]]:
        greedy: list[int] = []
        in_order: list[int] = []
        ranked: list[int] = []
        for row, draw in enumerate(draws):
            sampling = draw.sampling
            if sampling.temperature == 0:
                greedy.append(row)
            elif sampling.top_p == 1 and self._top_k(sampling) == self._vocab_size:
                in_order.append(row)
            else:
                ranked.append(row)
        ways = [(self._argmax, greedy), (self._draw_in_order, in_order), (self._draw_ranked, ranked)]
        return [(choose, rows) for choose, rows in ways if rows]

    def _top_k(self, sampling: SamplingParams) -> int:
        return min(sampling.top_k or self._vocab_size, self._vocab_size)

    def _argmax(self, scores: torch.Tensor, _draws: list[Draw]) -> _Choice:
        """The lowest id among equals, as torch.max promises."""
        peaks, tokens = scores.max(dim=1)
        return peaks, tokens

    def _draw_in_order(self, scores: torch.Tensor, draws: list[Draw]) -> _Choice:
        peaks = scores.amax(dim=1, keepdim=True)
        weights = _weights(scores, peaks, _column([draw.sampling.temperature for draw in draws], scores.device))
        if any(draw.sampling.min_p for draw in draws):
            weights.masked_fill_(weights < _column([draw.sampling.min_p for draw in draws], scores.device), 0)
        cumulative = weights.cumsum_(dim=1)
        target = uniforms(draws, scores.device) * cumulative[:, -1:]
        return peaks[:, 0], torch.searchsorted(cumulative, target, right=True)[:, 0]

    def _draw_ranked(self, scores: torch.Tensor, draws: list[Draw]) -> _Choice:
        """Temperature, top_k, top_p over what top_k left, min_p, draw; only the leaders of each row are ordered."""
        top_k = [self._top_k(draw.sampling) for draw in draws]
        filters = _Filters(scores, draws, top_k)
        width = _NARROW if max(top_k) < _NARROW else _WIDE
        values, ids = _leaders(scores, min(width, self._vocab_size))
        tokens, settled = filters.pick(values, ids, slice(None))
        open_rows = (~settled).nonzero().flatten()
        if len(open_rows):
            values_all, ids_all = _ranking(scores[open_rows])
            tokens[open_rows], _ = filters.pick(values_all, ids_all, open_rows)
        return values[:, 0], tokens

    def _logprobs(self, logits: torch.Tensor, draws: Sequence[Draw], tokens: list[int]) -> dict[int, TokenLogprob]:
        """By row, where asked for: of the model's own distribution, before any edit."""
        wanted = {row: draw.sampling.logprobs for row, draw in enumerate(draws) if draw.sampling.logprobs is not None}
        if not wanted:
            return {}
        rows = list(wanted)
        raw = _take(logits, rows)
        norm = raw.double().logsumexp(dim=1, keepdim=True)
        _require_finite(norm[:, 0], rows, draws)
        own = torch.tensor([[tokens[row]] for row in rows], device=raw.device)
        own_logprobs = (raw.gather(1, own) - norm)[:, 0].tolist()
        values, ids = _exact_top(raw, max(wanted.values()))
        top_logprobs, top_ids = (values - norm).tolist(), ids.tolist()
        return {
            row: TokenLogprob(tokens[row], own_logprobs[i], list(zip(top_ids[i], top_logprobs[i], strict=True))[:count])
            for i, (row, count) in enumerate(wanted.items())
        }


class _Filters:
    """The parameters of the ranked rows as columns [rows, 1], and the whole mass where a filter needs it."""

    def __init__(self, scores: torch.Tensor, draws: list[Draw], top_k: list[int]) -> None:
        device = scores.device
        self.vocab_size = scores.shape[1]
        self.temperature = _column([draw.sampling.temperature for draw in draws], device)
        self.top_k = torch.tensor(top_k, device=device).unsqueeze(1)
        self.top_p = _column([draw.sampling.top_p for draw in draws], device)
        self.min_p = _column([draw.sampling.min_p for draw in draws], device)
        self.uniform = uniforms(draws, device)
        self.mass = torch.zeros_like(self.top_p)
        unbounded = [i for i, k in enumerate(top_k) if k == self.vocab_size]
        if unbounded:
            rows = _take(scores, unbounded)
            weights = _weights(rows, rows.amax(dim=1, keepdim=True), self.temperature[unbounded])
            self.mass[unbounded] = weights.sum(dim=1, keepdim=True)

    def pick(self, values: torch.Tensor, ids: torch.Tensor, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw for `rows` from their leaders (both [rows, width], best first).

        Returns the token of each row, and whether it is exact: false when the cut may lie outside the leaders, or
        among tokens of the same logit of which some are outside.
        """
        width = values.shape[1]
        top_k = self.top_k[rows]
        weights = _weights(values, values[:, :1], self.temperature[rows])
        cumulative = weights.cumsum(dim=1)
        limit = top_k.clamp(max=width)
        mass = torch.where(top_k < self.vocab_size, cumulative.gather(1, limit - 1), self.mass[rows])
        reaching = (cumulative < self.top_p[rows] * mass).sum(dim=1, keepdim=True) + 1
        likely = (weights >= self.min_p[rows]).sum(dim=1, keepdim=True)
        # A row of NaN keeps nothing; the clamp lets it through to the check that names it.
        last = torch.minimum(torch.minimum(reaching, likely), limit).clamp(min=1) - 1
        target = self.uniform[rows] * cumulative.gather(1, last)
        rank = (cumulative <= target).sum(dim=1, keepdim=True)
        if width == self.vocab_size:
            settled = torch.ones_like(last, dtype=torch.bool)
        else:
            settled = (values.gather(1, last) > values[:, -1:]) & ((top_k <= width) | (top_k == self.vocab_size))
        return ids.gather(1, rank)[:, 0], settled[:, 0]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1), of 53 bits, that decides output position `position` of a request.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the 64-bit seed as key
    and the position as counter, in integers: the same on every machine. The first output word gives the high bits.
    """
    high, low = _philox4x32((position & _U32, position >> 32, 0, 0), (seed & _U32, seed >> 32))[:2]
    return ((high << 32 | low) >> 11) * 2.0**-53


def _philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product0 = 0xD2511F53 * c0
        product1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _U32, (product0 >> 32) ^ c3 ^ k1, product0 & _U32
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return c0, c1, c2, c3


def uniforms(draws: list[Draw], device: torch.device) -> torch.Tensor:
    column = []
    for draw in draws:
        seed = draw.sampling.seed
        assert seed is not None, "the router draws a seed for every request"
        column.append(uniform(seed, len(draw.output_ids)))
    return _column(column, device)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)


def _take(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """`rows`, ascending, of logits: a copy, unless it is all of them."""
    return logits if len(rows) == len(logits) else logits[rows]


def _weights(scores: torch.Tensor, peaks: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """exp((score - peak) / temperature), float64, new: probabilities relative to the likeliest token's."""
    return scores.to(torch.float64, copy=True).sub_(peaks).div_(temperature).exp_()


def _leaders(scores: torch.Tensor, width: int) -> _Choice:
    """The `width` highest values and their ids, highest first, then by id; which of those equal to the last is open."""
    values, ids = scores.topk(width, dim=1)
    ids, by_id = ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _ranking(scores: torch.Tensor) -> _Choice:
    """All values and ids, highest first, then by id."""
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    return values, ids


def _exact_top(scores: torch.Tensor, count: int) -> _Choice:
    """The `count` highest values and their ids; among equals the lower id comes first, also at the end."""
    width = min(count + _TIE_SLACK, scores.shape[1])
    values, ids = _leaders(scores, width)
    if 0 < count < width < scores.shape[1]:
        tied = (values[:, count - 1] == values[:, -1]).nonzero().flatten()
        if len(tied):
            values_all, ids_all = _ranking(scores[tied])
            values[tied], ids[tied] = values_all[:, :width], ids_all[:, :width]
    return values[:, :count], ids[:, :count]


_Part = tuple[int, npt.ArrayLike, npt.ArrayLike]  # row, token ids, one amount for all or one each


def _edited(scores: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Bias, penalties, bans and grammars applied, in this order, to a copy; `scores` itself when no row has any."""
    edits: list[tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], list[_Part]]] = [
        (torch.add, [_bias(i, d) for i, d in enumerate(draws) if d.sampling.logit_bias]),
        (_repel, [_repetition(i, d) for i, d in enumerate(draws) if d.sampling.repetition_penalty != 1]),
        (torch.sub, [_occurrence(i, d) for i, d in enumerate(draws) if _penalises_output(d.sampling)]),
        (torch.add, [(i, d.banned_ids, -torch.inf) for i, d in enumerate(draws) if d.banned_ids]),
    ]
    result = scores
    for change, parts in edits:
        if not parts:
            continue
        cells, amounts = _cells(parts, scores)
        if len(cells):
            result = scores.clone(memory_format=torch.contiguous_format) if result is scores else result
            flat = result.view(-1)
            flat[cells] = change(flat[cells], amounts)
    return _guided(result, draws, is_copy=result is not scores)


def _guided(scores: torch.Tensor, draws: list[Draw], *, is_copy: bool) -> torch.Tensor:
    """-inf for what grammars forbid. Where nothing that is allowed was left, the grammar wins over bias and bans."""
    rows = [i for i, draw in enumerate(draws) if draw.allowed is not None]
    if not rows:
        return scores
    result = scores if is_copy else scores.clone(memory_format=torch.contiguous_format)
    for row in rows:
        allowed = torch.from_numpy(draws[row].allowed).to(scores.device)
        guided = torch.where(allowed, result[row], -torch.inf)
        result[row] = guided if bool(torch.isfinite(guided).any()) else torch.where(allowed, 0.0, -torch.inf)
    return result


def _penalises_output(sampling: SamplingParams) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _bias(row: int, draw: Draw) -> _Part:
    return row, [*draw.sampling.logit_bias], [*draw.sampling.logit_bias.values()]


def _repetition(row: int, draw: Draw) -> _Part:
    return row, [*draw.prompt_ids, *draw.output_ids], draw.sampling.repetition_penalty


def _occurrence(row: int, draw: Draw) -> _Part:
    """presence once, frequency per occurrence."""
    ids, counts = np.unique(np.asarray(draw.output_ids, dtype=np.int64), return_counts=True)
    return row, ids, draw.sampling.presence_penalty + draw.sampling.frequency_penalty * counts


def _repel(values: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """The repetition penalty as Hugging Face defines it: towards -inf on either side of zero."""
    return torch.where(values < 0, values * penalty, values / penalty)


def _cells(parts: list[_Part], scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat indices into `scores` and one float32 amount each; a cell named twice has the same amount twice."""
    vocab_size = scores.shape[1]
    cells: list[npt.NDArray[np.int64]] = []
    amounts: list[npt.NDArray[np.float32]] = []
    for row, token_ids, amount in parts:
        ids = np.asarray(token_ids, dtype=np.int64)
        known = ids < vocab_size
        cells.append(ids[known] + row * vocab_size)
        amounts.append(np.broadcast_to(np.asarray(amount, dtype=np.float32), ids.shape)[known])
    device = scores.device
    return torch.from_numpy(np.concatenate(cells)).to(device), torch.from_numpy(np.concatenate(amounts)).to(device)


def _require_finite(peaks: torch.Tensor, rows: list[int], draws: Sequence[Draw]) -> None:
    finite = torch.isfinite(peaks).tolist()
    if not all(finite):
        row = rows[finite.index(False)]
        raise EngineFailure(
            f"logits of row {row} (output position {len(draws[row].output_ids)}) hold NaN or +inf, or no token that may "
            "be drawn; the weights are damaged or model.dtype overflows: try float32"
        )
