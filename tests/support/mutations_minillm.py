"""Mutations of MiniLLM: rewards, weights, the clipped loss, its coefficients, and the sampling."""

from tests.support import sources
from tests.support.mutants import Mutation

PARTS = "tests/methods/test_minillm.py::test_"
WHOLE = "tests/methods/test_minillm_loss.py::test_"
EXACT = "tests/methods/test_minillm_exact.py::test_"
MIXED = "tests/methods/test_mixed_sampling.py::test_"
LOSS = f"{WHOLE}loss[logits-first update-right]"

MINILLM = [
    Mutation(
        "minillm: rewards are multiplied by the scaling",
        sources.METHODS_REWARDS,
        "neither, 0.0)) / scaling",
        "neither, 0.0)) * scaling",
        f"{PARTS}token_rewards[all]",
    ),
    Mutation(
        "minillm: padding takes a discount",
        sources.METHODS_REWARDS,
        "torch.where(valid.mask, gamma, 1.0)",
        "torch.full(valid.mask.shape, gamma)",
        f"{PARTS}rewards_to_go[next-holes]",
    ),
    Mutation(
        "minillm: the next reward is the current one",
        sources.METHODS_REWARDS,
        "total, count = _later(total, 1), count - 1",
        "pass",
        f"{EXACT}next_with_the_single_step_is_exact[None-True]",
    ),
    Mutation(
        "minillm: an excluded token's reward is NaN where gamma is 0",
        sources.METHODS_REWARDS,
        ".masked_fill(factor == 0, 0.0)",
        "",
        f"{PARTS}rewards_of_excluded_tokens",
    ),
    Mutation(
        "minillm: whitening counts padding",
        sources.METHODS_REWARDS,
        "torch.ones_like(valid.mask) if count_padding else valid.mask",
        "torch.ones_like(valid.mask)",
        f"{PARTS}whitening[False-right]",
    ),
    Mutation(
        "minillm: a token's own weight is before it",
        sources.METHODS_REWARDS,
        'log_w = through if product == "through" else before',
        'log_w = through if product != "through" else before',
        f"{PARTS}importance_weights[before-all]",
    ),
    Mutation(
        "minillm: the ratio is clipped from above alone",
        sources.METHODS_POLICY,
        "return above | (",
        "return above | False & (",
        f"{PARTS}policy_loss[mean-True-all]",
    ),
    Mutation(
        "minillm: an exponential overflows where it is clipped",
        sources.METHODS_POLICY,
        "without = clipped | (self.advantages == 0)",
        "without = (self.advantages == 0)",
        f"{PARTS}a_ratio_that_overflows",
    ),
    Mutation(
        "minillm: the mean counts padding",
        sources.CHECKS_SEQUENCES,
        "valid / self.mask.sum().clamp(min=1)",
        "valid / self.mask.numel()",
        LOSS,
    ),
    Mutation(
        "minillm: the first update's clipped tokens have a gradient",
        sources.METHODS_MINILLM,
        "(-terms.advantages * ratio).masked_fill(clipped, 0.0)",
        "(-terms.advantages * ratio)",
        f"{WHOLE}the_first_update_is_that_of_old_log_probabilities_of_now[logits]",
    ),
    Mutation(
        "minillm: the first update's value is that of its coefficients",
        sources.METHODS_MINILLM,
        "total = _GradientOf.apply(total, made)",
        "total = made",
        LOSS,
    ),
    Mutation(
        "minillm: ids of padding reach the statistics",
        sources.CHECKS_SEQUENCES,
        "return token_ids.long().masked_fill(~self.mask, IGNORE_INDEX)",
        "return token_ids.long()",
        LOSS,
    ),
    Mutation(
        "minillm: the teacher's positions count padding",
        sources.METHODS_SAMPLING,
        "(self._mask.cumsum(-1) - 1).clamp(min=0)",
        "(torch.ones_like(self._mask).cumsum(-1) - 1).clamp(min=0)",
        f"{MIXED}generating_samples_from_the_mixture_with_the_teachers_own_cache[absolute positions]",
    ),
    Mutation(
        "minillm: the teacher may sample what is excluded",
        sources.METHODS_SAMPLING,
        ".masked_fill(student == EXCLUDED, EXCLUDED)",
        "",
        f"{MIXED}what_a_processor_before_has_excluded_stays_so",
    ),
    Mutation(
        "minillm: the teacher's cache is forgotten",
        sources.METHODS_SAMPLING,
        "self._cache = outputs[cache_name]",
        "self._cache = None",
        f"{MIXED}generating_samples_from_the_mixture_with_the_teachers_own_cache[rotary positions]",
    ),
]
