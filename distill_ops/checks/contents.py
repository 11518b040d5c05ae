"""Checks of what tensors hold, made where a call computes: tensors are real there, under torch.compile
and vmap too. On a GPU they would wait for it, and are made in debug mode only."""

import math

import numpy as np
import torch

from ..arguments import Counted
from ..divergences.base import DIVERGENCES, Domain
from ..problem import (
    DenseInputs,
    LinearInputs,
    LinearOptions,
    LinearStatisticsInputs,
    LinearStatisticsOptions,
    LinearTokenInputs,
    LinearTokenOptions,
    Options,
    StatisticsInputs,
    StatisticsOptions,
    TokenInputs,
    TokenOptions,
    TopKInputs,
    shaped_as_all,
)
from ..results import StatisticsCoefficients
from ..scalars import INT64
from ..support import (
    GatherInputs,
    GatherOptions,
    LinearGatherInputs,
    LinearGatherOptions,
    SupportOptions,
)
from .values import readable

# a logsumexp of 32 to 64 in bfloat16 is up to 1/8 off, and the logarithm of every probability with it;
# what logits, or a wrong temperature, add up to is mostly further away
LARGEST_SUM = 1.25


def of_loss(
    inputs: DenseInputs | TopKInputs | LinearInputs,
    options: Options,
    kept_tokens: int | None = None,
) -> None:
    """Weights, labels, normalizer, parameters and slots of a loss.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    counted = Counted(inputs.loss_mask, inputs.labels, options.ignore_index)
    if not readable(inputs[0]):
        return
    if counted.loss_mask is not None:
        _weights(counted)
    if options.hard:
        _ids("labels", inputs.labels, options.bound, counted)
    if "log_prob" in options.token_outputs:
        ids, name = inputs.token_ids, "token_ids"
        if ids is None:
            ids, name = inputs.labels, "labels"
        _ids(name, ids, options.bound, counted)
    if options.soft:
        _parameters(inputs.parameters, options, counted)
    _normalizer(inputs.normalizer, options, counted, inputs[0])
    if inputs.teacher_rows is not None:
        _teacher_rows(inputs.teacher_rows, math.prod(inputs.teacher_leading), counted)
    if options.tail is not None:
        of_logits = isinstance(inputs, TopKInputs)
        names = ("log_probs", "ids") if of_logits else ("teacher_log_probs", "teacher_ids")
        log_probs, ids = (getattr(inputs, name, None) for name in names)
        if ids is not None:  # those of a support are made of logits
            _slots(log_probs, ids, options, _kept_slots(ids, inputs.teacher_rows, counted))
    if kept_tokens is not None:
        _kept_tokens(kept_tokens, counted, inputs[0])


def of_linear_loss(inputs: LinearInputs, options: LinearOptions) -> None:
    inputs = shaped_as_all(inputs, options.blocks.token_ranks)
    of_loss(inputs, options.loss, options.blocks.kept_tokens)


def of_support(inputs: DenseInputs, options: SupportOptions) -> None:
    of_loss(inputs, options.loss)


def of_gather(inputs: GatherInputs | LinearGatherInputs, options: GatherOptions) -> None:
    """Mask and ids."""
    counted = Counted(inputs.loss_mask)
    if readable(inputs.ids):
        if counted.loss_mask is not None:
            _weights(counted)
        _slot_ids("ids", inputs.ids, options.n_cols, counted.kept(inputs.ids[..., 0]))


def of_linear_gather(inputs: LinearGatherInputs, options: LinearGatherOptions) -> None:
    of_gather(inputs, options.gather)


def of_statistics(
    inputs: StatisticsInputs | LinearStatisticsInputs,
    options: StatisticsOptions | LinearStatisticsOptions,
) -> None:
    """Ids, parameters, and the coefficients of a loss."""
    _token_ids(inputs.ids, options.loss.bound, options.loss.ignore_index)
    if readable(inputs.ids):
        counted = Counted(None, inputs.ids, options.loss.ignore_index)
        _parameters(inputs.parameters, options.loss, counted)
        _coefficients(inputs.coefficients, options.coefficients, counted)


def of_tokens(inputs: TokenInputs, options: TokenOptions) -> None:
    _token_ids(inputs.ids, options.bound(inputs.logits.shape[-1]), options.ignore_index)


def of_linear_tokens(inputs: LinearTokenInputs, options: LinearTokenOptions) -> None:
    tokens = options.tokens
    _token_ids(inputs.ids, tokens.bound(inputs.weight.shape[0]), tokens.ignore_index)


def _token_ids(ids: torch.Tensor, n_cols: int, ignore_index: int) -> None:
    if readable(ids):
        _ids("token_ids", ids, n_cols, Counted(None, ids, ignore_index))


def _weights(counted: Counted) -> None:
    loss_mask, _, ignore_index = counted
    if loss_mask.dtype == torch.bool:
        return
    if loss_mask.is_floating_point():
        if math.isfinite(loss_mask.sum(dtype=torch.float64).item()):
            return
        bad = ~loss_mask.isfinite()
        if bad.any():
            raise ValueError(f"loss_mask must hold finite weights, got {loss_mask[bad][0].item()}")
        return
    weights = loss_mask.long()
    ids = weights < -1  # policy gradients have integer weights of -1
    if ignore_index not in (0, 1):
        ids = ids | (weights == ignore_index)
    if ids.any():
        raise ValueError(
            f"loss_mask must hold weights, got {loss_mask[ids][0].item()}, as token ids have it: pass "
            f"labels=, or loss_mask=labels != {ignore_index}"
        )


def _ids(name: str, ids: torch.Tensor, n_cols: int, counted: Counted) -> None:
    """What a token that does not count holds does not matter."""
    if ids.is_cpu:  # NumPy's few small operations take a fifth of the time
        held = ids.numpy()
        if not (((held < 0) | (held >= n_cols)) & (held != counted.ignore_index)).any():
            return
    outside = ((ids < 0) | (ids >= n_cols)) & counted.kept(ids)
    if outside.any():
        raise ValueError(
            f"{name} must {_range(n_cols)} or equal ignore_index={counted.ignore_index}, "
            f"got {ids[outside].flatten()[0].item()}"
        )


def _range(n_cols: int) -> str:
    """Of ids; where only the ranks together know how many columns there are, their sign is looked at."""
    return "lie in the vocabulary" if n_cols == INT64[1] else f"lie in [0, {n_cols})"


def _outside(value: torch.Tensor, domain: Domain) -> torch.Tensor:
    if domain.tensor_ends:
        return ~((value >= domain.low) & (value <= domain.high))
    return ~((value > domain.low) & (value < domain.high))


def _parameters(tensors: list[torch.Tensor], options: Options, counted: Counted) -> None:
    """Of a token that does not count any value will do."""
    kind, given = DIVERGENCES[options.divergence], iter(tensors)
    for name, number in zip(kind.__match_args__, options.parameters, strict=True):
        if number is not None:
            continue
        value, domain = next(given), kind.domain(name)
        outside = _outside(value, domain)
        if value.dim():
            outside = outside & counted.kept(outside)
        if outside.any():
            raise ValueError(
                f"{name} of {kind.name}, a tensor, must hold values {domain.text(domain.tensor_ends)}, "
                f"got {value[outside].flatten()[0].item()}"
            )


def _coefficients(
    tensors: list[torch.Tensor], numbers: tuple[float | None, ...], counted: Counted
) -> None:
    """They are finite, but of a token that does not count, which may have any."""
    names = [
        name
        for name, number in zip(StatisticsCoefficients._fields, numbers, strict=False)
        if number is None
    ]
    for name, value in zip(names, tensors, strict=True):
        bad = ~value.isfinite()
        if value.dim():
            bad = bad & counted.kept(bad)
        if bad.any():
            raise ValueError(
                f"coefficients.{name} must hold finite numbers, got {value[bad].flatten()[0].item()}"
            )


def _normalizer(
    tensor: torch.Tensor | None, options: Options, counted: Counted, rows: torch.Tensor
) -> None:
    value = options.denominator if tensor is None else tensor.item()
    if value is None or 0 < value < math.inf or not counted.kept(rows[..., 0]).any():
        return
    raise ValueError(
        f"normalizer must be positive and finite where a token counts (it is what the sum is divided "
        f"by), got {value}"
    )


def _teacher_rows(rows: torch.Tensor, n_rows: int, counted: Counted) -> None:
    """Of a token that does not count any index will do."""
    outside = (rows < 0) | (rows >= n_rows)
    if outside.any():
        outside = outside & counted.kept(rows)
    if outside.any():
        found = rows[outside][0].item()
        more = (
            "; a token without a row of the teacher's needs a loss_mask of 0" if found < 0 else ""
        )
        raise ValueError(
            f"teacher_rows must lie in [0, {n_rows}), as the teacher has that many rows, got {found}{more}"
        )


def _kept_slots(
    ids: torch.Tensor, teacher_rows: torch.Tensor | None, counted: Counted
) -> torch.Tensor:
    """Which rows of a teacher's slots count ``[...]``: those of a token that does."""
    if teacher_rows is None:
        return counted.kept(ids[..., 0])
    kept = torch.zeros_like(ids[..., 0], dtype=torch.bool).contiguous()
    kept.view(-1)[teacher_rows[counted.kept(teacher_rows)]] = True
    return kept


def _slot_ids(name: str, ids: torch.Tensor, n_cols: int, kept: torch.Tensor) -> torch.Tensor:
    """Ids ``[..., K]`` of rows that count, which ``kept [...]`` says, -1 in unused slots; returns the least
    of all."""
    low, high = ids.aminmax() if ids.numel() else (ids.new_zeros(()),) * 2
    if low < -1 or high >= n_cols:
        outside = (ids.lt(-1) | ids.ge(n_cols)) & kept[..., None]
        if outside.any():
            raise ValueError(
                f"{name} must {_range(n_cols)}, or be -1 in unused slots, "
                f"got {ids[outside][0].item()}"
            )
    return low


def _slots(
    log_probs: torch.Tensor, ids: torch.Tensor, options: Options, kept: torch.Tensor
) -> None:
    """Ids and log-probabilities of rows that count, which ``kept [...]`` says; unused slots hold an id of
    -1."""
    low = _slot_ids("teacher_ids", ids, options.bound, kept)
    kept = kept[..., None]
    twice, in_order = repeated(ids)
    if twice.any():  # a server pads with ids that it gave before, of log-probability -inf
        twice, in_order = repeated(ids.masked_fill(log_probs == -math.inf, -1))
    if twice.any() and (twice & kept).any():
        raise ValueError(
            f"teacher_ids must be unique within a token, got {in_order[twice & kept][0].item()} twice, "
            f"of log-probabilities above -inf"
        )
    unread = ~kept if low >= 0 else (ids < 0) | ~kept
    used = log_probs.masked_fill(unread, -math.inf) if unread.any() else log_probs
    largest = used.amax(-1)
    advice = "take log_softmax over the whole vocabulary, at the loss's temperature"
    # a row of +inf is NaN, as one of logits
    above = (largest > math.log(LARGEST_SUM)) & (largest < math.inf)
    if above.any():
        raise ValueError(
            f"teacher_log_probs must be logarithms of probabilities, at most 0, got "
            f"{largest[above][0].item():g}: {advice}, before choosing the K"
        )
    if options.tail in ("renormalize", "restrict"):  # rescaled rows may have any sum
        return
    sums = used.float().exp().sum(-1)
    above = (sums > LARGEST_SUM) & (largest < math.inf)
    if above.any():
        raise ValueError(
            f"teacher_log_probs of a token must be of probabilities that add up to at most 1, got "
            f"{sums[above][0].item():.4g}: {advice}"
        )


def repeated(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which ids ``[..., K]`` in their order but the first equal the one before, unused slots apart; and
    these ids, both ``[..., K - 1]``. NumPy's sort of 32 bits takes a tenth of PyTorch's time."""
    if ids.is_cpu:
        in_order = torch.from_numpy(np.sort(ids.numpy().astype(np.int32), -1))
    else:
        in_order = ids.sort(-1).values
    later = in_order[..., 1:]
    return (later == in_order[..., :-1]) & (later >= 0), later


def _kept_tokens(kept_tokens: int, counted: Counted, rows: torch.Tensor) -> None:
    """There may be no more tokens of nonzero weight; without mask and labels all of them are."""
    n_kept = counted.kept(rows[..., 0]).sum().item()
    if n_kept > kept_tokens:
        raise ValueError(
            f"kept_tokens={kept_tokens} must bound the number of tokens of nonzero weight, "
            f"got {n_kept} of them"
        )
