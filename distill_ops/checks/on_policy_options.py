"""The options of on-policy distillation: names, defaults, types, and checks that need no tensor."""

from collections import namedtuple
from typing import TypedDict

import torch

from ..arguments import OTHER_NAMES, check_names
from ..divergences.base import Divergence, as_divergence
from ..divergences.built_in import ReverseKL
from ..scalars import flag, number, one_of
from .options import OTHER_REDUCTIONS, REDUCTIONS, checked_normalizer

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


class OnPolicyOptions(TypedDict, total=False):
    """Keyword arguments; :func:`distill_ops.methods.on_policy.loss` says what each does."""

    objective: str
    divergence: Divergence | str
    temperature: float
    k: int | None
    support: str
    tail: str
    mass_terms: bool
    log_prob_floor: float | None
    teacher_log_probs: torch.Tensor | None
    behaviour_log_probs: torch.Tensor | None
    importance: str
    bounds: tuple[float, float] | None
    dual_clip: float | None
    importance_level: str
    reward_clip: float | None
    token_weights: torch.Tensor | None
    reduction: str
    normalizer: float | torch.Tensor | None
    ignore_index: int


DEFAULTS = OnPolicyOptions(
    objective="full", divergence=ReverseKL(), temperature=1.0, k=None, support="student",
    tail="bucket", mass_terms=False, log_prob_floor=None, teacher_log_probs=None,
    behaviour_log_probs=None, importance="none", bounds=None, dual_clip=None,
    importance_level="token", reward_clip=None, token_weights=None, reduction="mean",
    normalizer=None, ignore_index=-100,
)  # fmt: skip
OF_SUPPORT = ("k", "support", "tail", "mass_terms", "log_prob_floor")


class OnPolicyArguments(namedtuple("OnPolicyArguments", DEFAULTS, defaults=DEFAULTS.values())):
    """All of the options, those that were not given at their defaults."""

    @property
    def of_support(self) -> dict:
        """Those that the support alone has."""
        return {name: getattr(self, name) for name in OF_SUPPORT}


# what other losses and trainers call these options
SHARED_NAMES = (
    "alpha", "batch_num_items", "beta", "jsd_beta", "kl_type", "loss_type", "num_items_in_batch",
    "skew_alpha", "T", "tau",
)  # fmt: skip
NO_LABELS = "there are no labels here: token_ids are what the student sampled"
WEIGHTED_OUTSIDE = "multiply the loss by it, and add other terms to it"
ELSEWHERE = {name: OTHER_NAMES[name] for name in SHARED_NAMES} | {
    "attention_mask": "pass mask=, of the sampled tokens alone",
    "clip_ratio": "pass importance='clip', bounds=(1 - clip_ratio, 1 + clip_ratio)",
    "clip_ratio_c": "pass dual_clip=, with importance='clip'",
    "clip_ratio_high": "pass importance='clip', bounds=(1 - clip_ratio_low, 1 + clip_ratio_high)",
    "clip_ratio_low": "pass importance='clip', bounds=(1 - clip_ratio_low, 1 + clip_ratio_high)",
    "completion_mask": "pass mask=",
    "distillation_topk": "pass objective='support', k=",
    "eps_clip": "pass importance='clip', bounds=(1 - eps_clip, 1 + eps_clip)",
    "hard_label_weight": NO_LABELS,
    "kd_ratio": WEIGHTED_OUTSIDE,
    "label": NO_LABELS,
    "labels": NO_LABELS,
    "log_prob_min_clamp": "pass log_prob_floor=, with objective='support'",
    "loss_mask": "pass mask=",
    "loss_max_clamp": "pass reward_clip=, with objective='sampled'",
    "loss_mode": "pass objective=",
    "loss_top_k": "pass objective='support', k=",
    "old_log_probs": "pass behaviour_log_probs=",
    "response_mask": "pass mask=",
    "rollout_is_threshold": "pass importance='truncate', bounds=(0, rollout_is_threshold)",
    "rollout_is_weights": "pass token_weights=",
    "rollout_log_probs": "pass behaviour_log_probs=",
    "sampling_logprobs": "pass behaviour_log_probs=",
    "shift_labels": NO_LABELS,
    "soft_weight": WEIGHTED_OUTSIDE,
    "target": NO_LABELS,
    "targets": NO_LABELS,
    "tis_clip": "pass importance='truncate', bounds=(0, tis_clip)",
    "topk": "pass objective='support', k=",
    "use_policy_gradient": "pass objective='sampled'",
    "weight_hard_loss": NO_LABELS,
    "weight_soft_loss": WEIGHTED_OUTSIDE,
}


def on_policy_options(function: str, given: OnPolicyOptions) -> OnPolicyArguments:
    """Those that a function was given as ``**options``, checked as far as they need no tensor.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check_names(function, given, DEFAULTS, ELSEWHERE)
    return _checked(OnPolicyArguments(**given))


def _only(options: OnPolicyArguments, names: tuple[str, ...], needs: str) -> None:
    """Refuse options that the others leave without a meaning."""
    for name in names:
        value, default = getattr(options, name), DEFAULTS[name]
        if value is not default and (isinstance(value, torch.Tensor) or value != default):
            shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{name} needs {needs}, got {name}={shown}: leave it out")


def _bounds(options: OnPolicyArguments) -> tuple[float, float] | None:
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


def _checked(options: OnPolicyArguments) -> OnPolicyArguments:
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
        _only(options, OF_SUPPORT, "objective='support'")
    elif options.k is None:
        raise ValueError("k is None, but objective='support' needs the number of tokens a row")
    if options.objective == "full":
        _only(options, ("teacher_log_probs",), "objective='sampled' or 'support'")
    if not sampled:
        _only(options, ("reward_clip",), "objective='sampled'")
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
    if options.importance != "clip":
        _only(options, ("dual_clip",), "importance='clip'")
    clip, dual = options.reward_clip, options.dual_clip
    if clip is not None:
        clip = number("reward_clip", clip, "None or a positive number")
        if not clip > 0:
            raise ValueError(f"reward_clip must be positive, got {clip}")
    if dual is not None:
        dual = number("dual_clip", dual, "None or a number above 1")
        if not dual > 1:
            raise ValueError(f"dual_clip must be above 1, got {dual}")
    normalizer = options.normalizer
    if normalizer is not None and options.reduction != "mean":
        raise ValueError(
            f"normalizer replaces the token count of reduction='mean', got "
            f"reduction={options.reduction!r}"
        )
    if normalizer is not None and not isinstance(normalizer, torch.Tensor):
        normalizer = checked_normalizer(normalizer)
    return options._replace(
        divergence=divergence, bounds=_bounds(options), reward_clip=clip, dual_clip=dual,
        normalizer=normalizer,
    )  # fmt: skip
