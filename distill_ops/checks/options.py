"""Checks of the options of a loss that need no tensor: when a call or a module is made."""

import math
from collections.abc import Collection

import torch

from ..arguments import LossArguments, LossOptions, loss_arguments
from ..divergences.base import as_divergence
from ..problem import BlockOptions, HeadOptions
from ..results import TOKEN_OUTPUTS, asked
from ..scalars import flag, integer, number, one_of, shown
from .values import BACKENDS, LOGIT_DTYPES, check_ignore_index, check_share, check_temperature

REDUCTIONS = ("mean", "sum", "none")
INFINITIES = ("drop", "propagate")
GRADIENTS = ("auto", "forward", "backward")
OTHER_REDUCTIONS = {
    "batchmean": "'mean' is over the tokens, as batchmean of logits [tokens, vocab] is",
    "token": "'mean' is over the tokens",
    "tokenmean": "'mean' is over the tokens",
}
OTHER_OUTPUTS = {
    "acceptancerate": "pass 'acceptance'",
    "entropy": "pass 'student_entropy' or 'teacher_entropy'",
    "entropies": "pass 'student_entropy', 'teacher_entropy'",
    "logprobs": "pass 'log_prob'",
    "logps": "pass 'log_prob'",
    "top1agreement": "pass 'student_argmax', 'teacher_argmax' and compare them",
}


def given_options(
    function: str, options: LossOptions, *without: str, own: tuple[str, ...] = ()
) -> LossArguments:
    """The options that a function was given, all of them, numbers as Python's, the divergence routed to
    the one that it is at an end point; ``own`` are further ones that it has.

    Raises:
        ValueError, TypeError: naming the option, what came and what was expected.
    """
    a = loss_arguments(function, options, *without, own=own)
    one_of("infinities", a.infinities, INFINITIES)
    one_of("reduction", a.reduction, REDUCTIONS, OTHER_REDUCTIONS)
    one_of("gradient", a.gradient, GRADIENTS)
    one_of("backend", a.backend, BACKENDS)
    flag("scale_by_temperature_squared", a.scale_by_temperature_squared)
    flag("return_components", a.return_components)
    if a.gradient == "forward" and a.reduction == "none":
        raise ValueError(
            "gradient='forward' needs reduction='mean' or 'sum', got 'none', whose incoming "
            "gradients are not known before backward: use gradient='backward' or 'auto'"
        )
    token_outputs = _token_outputs(a.token_outputs)
    if a.group is not None:
        check_splittable(a.infinities, token_outputs)
    weight, share = _weights(a.hard_label_weight, a.soft_weight)
    normalizer, vocab_size = a.normalizer, a.vocab_size
    if normalizer is not None:
        if a.reduction != "mean":
            raise ValueError(
                f"normalizer replaces the token count of reduction='mean', got "
                f"reduction={a.reduction!r}"
            )
        if not isinstance(normalizer, torch.Tensor):
            normalizer = checked_normalizer(normalizer)
    return a._replace(
        divergence=as_divergence(a.divergence),
        temperature=check_temperature(a.temperature),
        hard_label_weight=weight,
        soft_weight=share,
        ignore_index=check_ignore_index(a.ignore_index),
        normalizer=normalizer,
        vocab_size=None if vocab_size is None else integer("vocab_size", vocab_size, 1),
        token_outputs=token_outputs,
    )


def check_splittable(infinities: str, token_outputs: tuple[str, ...]) -> None:
    """What a loss over a vocabulary that ranks split does not have."""
    if infinities != "drop":
        raise ValueError(
            f"a vocabulary that ranks split needs infinities='drop', got {infinities!r}: gather the logits "
            f"for another"
        )
    if token_outputs:
        raise ValueError(
            f"token_outputs={token_outputs} are not found where ranks split the vocabulary: leave them out; "
            f"distillation_statistics and distillation_metrics take group= and have most of these numbers"
        )


def _token_outputs(given) -> tuple[str, ...]:
    """The names, each once, in the order of TokenOutputs."""
    if isinstance(given, str) or not isinstance(given, Collection):
        raise TypeError(
            f"token_outputs must be a tuple of names, such as ('log_prob',), got {shown(given)}"
        )
    for name in given:
        one_of("each of token_outputs", name, TOKEN_OUTPUTS, OTHER_OUTPUTS)
    return asked(TOKEN_OUTPUTS, tuple(given))


def _weights(hard: float, soft: float | None) -> tuple[float, float | None]:
    """Of the hard labels, and of the divergence: without one, what the hard labels leave of 1."""
    if soft is None:
        expected = "a number in [0, 1], or any beside soft_weight="
        return check_share("hard_label_weight", hard, expected), None
    found = []
    for name, value in (("hard_label_weight", hard), ("soft_weight", soft)):
        found.append(number(name, value, "a finite number"))
        if not -math.inf < found[-1] < math.inf:  # math.isfinite is no part of a graph
            raise ValueError(f"{name} must be finite, got {value}")
    if not any(found):
        raise ValueError("soft_weight=0 and hard_label_weight=0 leave no loss: give one a weight")
    return found[0], found[1]


def checked_normalizer(normalizer: float) -> float:
    normalizer = number("normalizer", normalizer, "a number or a 0-d tensor")
    if not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer must be finite and not negative, got {normalizer}")
    return normalizer


def head_options(side: str, logit_scale: float, softcap: float | None) -> HeadOptions:
    """How hidden states become logits, as Python's numbers; ``side`` begins the options' names."""
    found = []
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None or name == "logit_scale":
            value = number(f"{side}{name}", value, "a positive number")
            if not 0 < value < math.inf:
                raise ValueError(f"{side}{name} must be positive and finite, got {value}")
        found.append(value)
    return HeadOptions(*found)


def block_options(
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    kept_tokens: int | None = None,
) -> BlockOptions:
    """How logits are formed; autocast has its say where they are."""
    if logits_dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"logits_dtype must be torch.float32, bfloat16, float16 or float64, "
            f"got {shown(logits_dtype)}"
        )
    if memory_budget is not None:
        memory_budget = integer("memory_budget", memory_budget, 1)
    if kept_tokens is not None:
        kept_tokens = integer("kept_tokens", kept_tokens, 1)
    return BlockOptions(logits_dtype, None, memory_budget, kept_tokens)
