"""The options of on-policy distillation, and checks of them and of what comes with the tokens."""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar, get_type_hints

import torch

from ..arguments import OTHER_NAMES
from ..divergences.base import Divergence, as_divergence
from ..divergences.built_in import ReverseKL
from ..problem import working_dtype
from ..scalars import flag, meant, number, one_of
from .contents import LARGEST_SUM
from .options import OTHER_REDUCTIONS, REDUCTIONS, checked_normalizer
from .tokens import check_normalizer, check_token_ids
from .values import WEIGHT_DTYPES, TokenRows, check_float_dtype, constant, of_teacher, readable

Function = TypeVar("Function", bound=Callable)

OBJECTIVES = ("full", "support", "sampled")
IMPORTANCE = ("none", "truncate", "mask", "clip")
LEVELS = ("token", "prefix")
# verl and slime truncate at 2, verl masks outside of [0.5, 2], PPO clips at 0.2 from 1
BOUNDS = {"truncate": (0.0, 2.0), "mask": (0.5, 2.0), "clip": (0.8, 1.2)}
OTHER_OBJECTIVES = {
    "gkd": "'full', with divergence=",
    "k1": "'sampled' has the reward -k1",
    "k2": "'sampled' has the gradient of k2",
    "policygradient": "'sampled'",
    "topk": "'support', with k=",
}
OTHER_IMPORTANCE = {
    "clamp": "'truncate'",
    "icepop": "'mask'",
    "mis": "'mask'",
    "ppo": "'clip'",
    "tis": "'truncate'",
}


class OnPolicyOptions(NamedTuple):
    """What a user may give beside the models' outputs, the ids and the mask, with the defaults."""

    objective: str = "full"
    divergence: Divergence | str = ReverseKL()
    temperature: float = 1.0
    k: int | None = None
    support: str = "student"
    tail: str = "bucket"
    mass_terms: bool = False
    log_prob_floor: float | None = None
    teacher_log_probs: torch.Tensor | None = None
    behaviour_log_probs: torch.Tensor | None = None
    importance: str = "none"
    bounds: tuple[float, float] | None = None
    importance_level: str = "token"
    reward_clip: float | None = None
    token_weights: torch.Tensor | None = None
    reduction: str = "mean"
    normalizer: float | torch.Tensor | None = None
    ignore_index: int = -100

    @property
    def of_support(self) -> dict:
        """Options that the support alone has."""
        names = ("k", "support", "tail", "mass_terms", "log_prob_floor")
        return {name: getattr(self, name) for name in names}


DEFAULTS = OnPolicyOptions()


class OnPolicyTokens(NamedTuple):
    """What comes with the tokens, checked; numbers float32, or float64 where a model's are."""

    ids: torch.Tensor  # int64; ignore_index where a token does not count
    kept: torch.Tensor  # bool: those that count
    weights: torch.Tensor  # mask * token_weights; 0 where a token does not count
    denominator: torch.Tensor  # 0-d: what their sum is divided by; 1 for "sum" and "none"
    behaviour_log_probs: torch.Tensor | None  # 0 where a token does not count
    teacher_log_probs: torch.Tensor | None  # likewise


# what trainers call these options, beside the names that every loss knows
ELSEWHERE = OTHER_NAMES | {
    "clip_ratio": "pass importance='clip', bounds=(1 - clip_ratio, 1 + clip_ratio)",
    "distillation_topk": "pass objective='support', k=",
    "log_prob_min_clamp": "pass log_prob_floor=, with objective='support'",
    "loss_max_clamp": "pass reward_clip=, with objective='sampled'",
    "loss_mode": "pass objective=",
    "loss_top_k": "pass objective='support', k=",
    "old_log_probs": "pass behaviour_log_probs=",
    "rollout_log_probs": "pass behaviour_log_probs=",
    "sampling_logprobs": "pass behaviour_log_probs=",
    "tis_clip": "pass importance='truncate', bounds=(0, tis_clip)",
    "topk": "pass objective='support', k=",
    "use_policy_gradient": "pass objective='sampled'",
}


def on_policy_options(function: str, given: dict) -> OnPolicyOptions:
    """Those that a function was given as ``**options``, checked as far as they need no tensor.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    for name in given:
        if name not in OnPolicyOptions._fields:
            hint = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
            hint = hint or meant(name, OnPolicyOptions._fields)
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    return _checked(OnPolicyOptions(**given))


def with_on_policy_options(function: Function) -> Function:
    """Give a function with ``**options`` the signature that lists them."""
    signature = inspect.signature(function)
    own = list(signature.parameters.values())[:-1]
    hints = get_type_hints(OnPolicyOptions)
    shared = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name]
        )
        for name, default in OnPolicyOptions._field_defaults.items()
    ]
    function.__signature__ = signature.replace(parameters=own + shared)
    listed = {p.name: p.annotation for p in own + shared}
    function.__annotations__ = {**listed, "return": signature.return_annotation}
    return function


def _only(options: OnPolicyOptions, names: tuple[str, ...], needs: str) -> None:
    """Refuse options that the others leave without a meaning."""
    for name in names:
        value, default = getattr(options, name), getattr(DEFAULTS, name)
        if value is not default and (isinstance(value, torch.Tensor) or value != default):
            shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{name} needs {needs}, got {name}={shown}: leave it out")


def _bounds(options: OnPolicyOptions) -> tuple[float, float] | None:
    """As Python's numbers; the default of how the ratio is bounded."""
    default = BOUNDS.get(options.importance)
    if options.bounds is None or default is None:
        return default
    if not isinstance(options.bounds, tuple | list) or len(options.bounds) != 2:
        raise TypeError(f"bounds must be two numbers (lower, upper), got {options.bounds!r}")
    lower, upper = (number("each of bounds", x, "a number") for x in options.bounds)
    if not 0 <= lower < upper:
        raise ValueError(f"bounds must be 0 <= lower < upper, got ({lower}, {upper})")
    if options.importance == "clip" and not lower <= 1 <= upper:
        raise ValueError(f"bounds of importance='clip' must enclose 1, got ({lower}, {upper})")
    return lower, upper


def _checked(options: OnPolicyOptions) -> OnPolicyOptions:
    """Those that need no tensor, as Python's own."""
    one_of("objective", options.objective, OBJECTIVES, OTHER_OBJECTIVES)
    one_of("importance", options.importance, IMPORTANCE, OTHER_IMPORTANCE)
    one_of("importance_level", options.importance_level, LEVELS)
    one_of("reduction", options.reduction, REDUCTIONS, OTHER_REDUCTIONS)
    flag("mass_terms", options.mass_terms)
    divergence, sampled = as_divergence(options.divergence), options.objective == "sampled"
    if sampled and divergence.name != ReverseKL.name:
        raise ValueError(
            f"divergence of objective='sampled' must be the reverse KL, which the sampled token's log-ratio "
            f"estimates, got {divergence.name}: objective='full' takes any"
        )
    if options.objective != "support":
        names = ("k", "support", "tail", "mass_terms", "log_prob_floor")
        _only(options, names, "objective='support'")
    elif options.k is None:
        raise ValueError("k is None, but objective='support' needs the number of tokens a row")
    if not sampled:
        _only(options, ("reward_clip", "teacher_log_probs"), "objective='sampled'")
        if options.importance == "clip":
            raise ValueError(
                f"importance='clip' is PPO's, of a sampled token's reward, and needs objective='sampled', "
                f"got objective={options.objective!r}: use 'truncate' or 'mask'"
            )
    if options.importance == "none":
        given = ("behaviour_log_probs", "bounds", "importance_level")
        _only(options, given, "importance='truncate', 'mask' or 'clip'")
    elif options.behaviour_log_probs is None:
        raise ValueError(
            f"importance={options.importance!r} needs behaviour_log_probs, the log-probabilities under the "
            f"policy that sampled, got None"
        )
    if options.importance == "clip" and options.importance_level != "token":
        raise ValueError("importance='clip' needs importance_level='token', got 'prefix'")
    clip = options.reward_clip
    if clip is not None:
        clip = number("reward_clip", clip, "None or a positive number")
        if not clip > 0:
            raise ValueError(f"reward_clip must be positive, got {clip}")
    normalizer = options.normalizer
    if normalizer is not None and options.reduction != "mean":
        raise ValueError(
            f"normalizer replaces the token count of reduction='mean', got "
            f"reduction={options.reduction!r}"
        )
    if normalizer is not None and not isinstance(normalizer, torch.Tensor):
        normalizer = checked_normalizer(normalizer)
    return options._replace(
        divergence=divergence, bounds=_bounds(options), reward_clip=clip, normalizer=normalizer
    )


def _check_weights(name: str, tensor: torch.Tensor, rows: TokenRows) -> None:
    rows.check_per_token(name, tensor)
    constant(name, tensor)
    if tensor.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{name} must be bool, int or float, got {tensor.dtype}")


def _check_log_probs(name: str, tensor: torch.Tensor, rows: TokenRows) -> None:
    rows.check_per_token(name, tensor)
    check_float_dtype(name, tensor)
    of_teacher(name, tensor) if name == "teacher_log_probs" else constant(name, tensor)


def _look(name: str, tensor: torch.Tensor, bad: torch.Tensor, expected: str) -> None:
    if bad.any():
        raise ValueError(f"{name} must hold {expected}, got {tensor[bad].flatten()[0].item():g}")


def _check_contents(tokens: OnPolicyTokens, mask: torch.Tensor, options: OnPolicyOptions) -> None:
    """What tensors hold where a token counts, which is looked at where it can be read."""
    if mask.dtype != torch.bool:
        numbers = "finite numbers, not negative (1 where a token counts, 0 elsewhere)"
        _look("mask", mask, ~(mask.isfinite() & (mask >= 0)), numbers)
    if options.token_weights is not None:
        _look(
            "token_weights", options.token_weights,
            ~options.token_weights.isfinite() & tokens.kept, "finite numbers",
        )  # fmt: skip
    for name in ("behaviour_log_probs", "teacher_log_probs"):
        values = getattr(tokens, name)
        if values is None:
            continue
        fine, expected = values <= math.log(LARGEST_SUM), "log-probabilities, at most 0"
        if name == "behaviour_log_probs":  # a token of probability 0 would not have been sampled
            fine, expected = fine & (values > -math.inf), f"finite {expected}"
        _look(name, values, ~fine & tokens.kept, expected)
    if options.normalizer is not None and tokens.kept.any():
        over = tokens.denominator.item()
        if not 0 < over < math.inf:
            raise ValueError(f"normalizer must be positive where a token counts, got {over}")


def check_on_policy_tokens(
    rows: TokenRows,
    models: tuple[torch.Tensor | None, ...],
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    options: OnPolicyOptions,
) -> OnPolicyTokens:
    """Check what comes with the tokens; ``models``: the tensors that say in which dtype is computed."""
    ids, _, ignore_index = check_token_ids(
        rows, token_ids, options.temperature, options.ignore_index
    )
    _check_weights("mask", mask, rows)
    if options.token_weights is not None:
        _check_weights("token_weights", options.token_weights, rows)
    for name in ("behaviour_log_probs", "teacher_log_probs"):
        if getattr(options, name) is not None:
            _check_log_probs(name, getattr(options, name), rows)
    normalizer, dtype = check_normalizer(options.normalizer, rows), working_dtype(*models)
    kept = (mask != 0) & (ids != ignore_index)
    weights = mask.to(dtype).masked_fill(~kept, 0.0)
    total = weights.new_ones(())
    if isinstance(normalizer, torch.Tensor):
        total = normalizer.to(dtype)
    elif normalizer is not None:
        total = weights.new_full((), normalizer)
    elif options.reduction == "mean":
        total = weights.sum()
    # without a token that counts the sum is 0, and so is the mean
    denominator = torch.where(kept.any(), total, torch.ones_like(total))
    if options.token_weights is not None:
        weights = weights * options.token_weights.to(dtype).masked_fill(~kept, 0.0)
    given = (options.behaviour_log_probs, options.teacher_log_probs)
    given = (x if x is None else x.detach().to(dtype).masked_fill(~kept, 0.0) for x in given)
    tokens = OnPolicyTokens(
        ids.masked_fill(~kept, ignore_index), kept, weights, denominator, *given
    )
    if readable(mask, *given_tensors(options)):
        _check_contents(tokens, mask, options)
    return tokens


def given_tensors(options: OnPolicyOptions) -> list[torch.Tensor]:
    return [x for x in options if isinstance(x, torch.Tensor)]


def check_teacher_of_sampled(
    options: OnPolicyOptions, name: str, teacher: torch.Tensor | None
) -> bool:
    """Whether a teacher is its log-probabilities of the tokens, and not logits or hidden states, ``name``."""
    served = options.teacher_log_probs is not None
    if served and teacher is not None:
        raise ValueError(f"{name} must be None where teacher_log_probs is given, got both")
    if options.objective == "sampled" and teacher is None and not served:
        raise ValueError(f"{name} is None, which needs teacher_log_probs, got None")
    return served
