"""Log-probabilities and entropies of tokens whose vocabulary ranks split.

Each rank has its columns' maximum, sum of exponentials and entropy, and the token's logit where it is among
them: one all-gather of 4 numbers a row (3 without the entropy), combined in rank order. The gradient is
local.
"""

from functools import reduce
from typing import NamedTuple

import torch

from ..checks.values import debug
from ..groups import Place, check_agreement, place_again, place_of
from ..problem import TokenInputs, TokenOptions
from ..row_statistics import distance
from ..rows import ELSEWHERE, IGNORED
from .losses import facts_of
from .rows import refuse_nowhere

INF = float("inf")


class TokenStatistics(NamedTuple):
    """Of some columns of n rows, each ``[..., n]``; y is ``(x - maximum) / temperature`` of a logit x.

    Columns without a finite logit are an empty part: maximum -inf, sums 0."""

    maximum: torch.Tensor
    total: torch.Tensor  # sum(exp(y))
    moment: torch.Tensor  # sum(exp(y) y)
    logit: torch.Tensor  # the token's; +inf where it is in no column of the part

    def combined(self, temperature: float) -> "TokenStatistics":
        """Of all columns, where these are parts', ``[ranks, ..., n]``; they are added in their order."""
        maximum = self.maximum.amax(0)
        shift = distance(self.maximum, maximum, temperature)
        factor = shift.exp()
        total = self.total * factor
        # by the factor first: near the lowest float a distance times a sum overflows
        moment = self.moment * factor + total * shift
        total, moment = (reduce(torch.add, x.unbind(0)) for x in (total, moment))
        # one that several ranks have, by a wrong vocab_offset, is in none
        several = (self.logit != INF).sum(0) > 1
        return TokenStatistics(maximum, total, moment, self.logit.amin(0).masked_fill(several, INF))

    def _where_alive(self, found: torch.Tensor) -> torch.Tensor:
        """NaN in a row without a softmax."""
        return torch.where(self.total > 0, found, torch.nan)

    def nowhere(self) -> torch.Tensor:
        """Which rows' tokens are in no part; those without a softmax may have any."""
        return (self.logit == INF) & (self.total > 0)

    def log_prob(self, temperature: float) -> torch.Tensor:
        """``log softmax(x / temperature)`` of the token, NaN of one that is in no part."""
        found = (self.logit - self.maximum) / temperature - self.total.log()
        return self._where_alive(found).masked_fill(self.nowhere(), torch.nan)

    def entropy(self) -> torch.Tensor:
        """In nats."""
        return self._where_alive(self.total.log() - self.moment / self.total)

    def kept(self, entropy: torch.Tensor) -> torch.Tensor:
        """``[n, 3]``, from which the gradient is made."""
        return torch.stack([self.maximum, self.total, entropy], -1)


def local_ids(ids: torch.Tensor, ignore_index: int, place: Place) -> torch.Tensor:
    """Ids ``[n]`` counted from this rank's first column; IGNORED, and ELSEWHERE for other ranks'."""
    ids = ids.reshape(-1)
    columns = ids - place.offset
    here = (columns >= 0) & (columns < place.n_cols)
    columns = columns.masked_fill(~here, ELSEWHERE)
    return columns.masked_fill_(ids == ignore_index, IGNORED)


def logits_at(logits: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[n]``: the logits of the tokens that are here, +inf of the others."""
    if logits.shape[-1] == 0:
        return logits.new_full(ids.shape, INF, dtype=dtype)
    index = ids.clamp(min=0).view(*logits.shape[:-1], 1)
    return logits.gather(-1, index).reshape(-1).to(dtype).masked_fill_(ids < 0, INF)


def numbers_of(
    phases, options: TokenOptions, logits: torch.Tensor, ids: torch.Tensor, n_cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """What is exchanged of this rank's columns, ``[3, n]`` or with the entropy ``[4, n]``; ids are
    :func:`local_ids`."""
    maximum, total, moment = phases.token_part(
        logits, ids, n_cols, options.temperature, options.entropy, dtype
    )
    numbers = [maximum, total, logits_at(logits, ids, dtype)]
    return torch.stack([*numbers, moment] if options.entropy else numbers)


def combined(parts: torch.Tensor, options: TokenOptions) -> TokenStatistics:
    """Of gathered numbers ``[ranks, 3 or 4, n]``."""
    maximum, total, logit, *moment = parts.unbind(1)
    moment = moment[0] if moment else torch.zeros_like(total)
    return TokenStatistics(maximum, total, moment, logit).combined(options.temperature)


def results(row: TokenStatistics, options: TokenOptions, ignored: torch.Tensor):
    """Log-probabilities and entropies ``[n]``, and what the gradient needs of the rows ``[n, 3]``.

    Raises:
        ValueError: on every rank, on a CPU, for an id that no rank has.
    """
    refuse_nowhere("token_ids", row.nowhere() & ~ignored)
    entropies = row.entropy() if options.entropy else torch.zeros_like(row.total)
    kept = row.kept(entropies)
    log_probs, entropies = (
        x.masked_fill(ignored, 0.0) for x in (row.log_prob(options.temperature), entropies)
    )
    return log_probs, entropies, kept


def log_probs(phases, inputs: TokenInputs, options: TokenOptions):
    """Log-probabilities and entropies ``[...]``, and what the backward needs: numbers of the rows and the
    offset."""
    logits, split, dtype = inputs.logits, options.split, inputs.dtype()
    if debug():
        check_agreement(split, facts_of(inputs, options), logits.device, logits.shape[-1])
    place = place_of(split, logits.shape[-1], logits.device)
    ids = local_ids(inputs.ids, options.ignore_index, place)
    numbers = numbers_of(phases, options, logits, ids, place.n_cols, dtype)
    row = combined(place.group.all_gather(numbers), options)
    found, entropies, kept = results(row, options, ids == IGNORED)
    shaped = (x.view(inputs.leading) for x in (found, entropies))
    return tuple(shaped), (kept, place.kept(kept))


def gradient(phases, inputs: TokenInputs, options: TokenOptions, kept, upstreams, out) -> None:
    """Fill ``out`` with the gradient of this rank's columns; no collective."""
    of_rows, offset = kept
    place = place_again(options.split, offset, inputs.logits.shape[-1])
    ids = local_ids(inputs.ids, options.ignore_index, place)
    phases.token_gradient(inputs.logits, ids, of_rows, options.temperature, *upstreams, out)
