"""Mutations of on-policy distillation: weights, targets, masks and what is refused."""

from tests.support import sources
from tests.support.mutants import Mutation

TARGETS = "tests/methods/test_on_policy_targets.py::test_"
EDGES = "tests/methods/test_on_policy.py::test_"
EXTREMES = "tests/methods/test_on_policy_edges.py::test_"
WEIGHTS = "tests/methods/test_on_policy_weights.py::test_"
ERRORS = "tests/methods/test_on_policy_errors.py::test_"

ON_POLICY = [
    Mutation(
        "on-policy: the reward is not a constant",
        sources.METHODS_IMPORTANCE,
        "reverse_kl_estimate(log_q.detach(), log_p",
        "reverse_kl_estimate(log_q, log_p",
        f"{TARGETS}biases_of_sampled[truncate]",
    ),
    Mutation(
        "on-policy: a prefix's weight has the token's own ratio",
        sources.METHODS_IMPORTANCE,
        'if options.objective != "sampled":',
        "if False:",
        f"{EDGES}against_the_reference[full, prefix-logits]",
    ),
    Mutation(
        "on-policy: a sampled token's prefix lacks its own ratio",
        sources.METHODS_IMPORTANCE,
        'if options.objective != "sampled":',
        "if True:",
        f"{TARGETS}prefix_weights_are_unbiased[sampled]",
    ),
    Mutation(
        "on-policy: masked weights are truncated",
        sources.METHODS_IMPORTANCE,
        "ratio = ratio.masked_fill(out, 0.0)",
        "ratio = ratio.clamp(lower, upper)",
        f"{TARGETS}biases_of_sampled[mask]",
    ),
    Mutation(
        "on-policy: the lower bound is none",
        sources.METHODS_IMPORTANCE,
        "ratio = ratio.clamp(lower, upper)",
        "ratio = ratio.clamp(max=upper)",
        f"{TARGETS}biases_of_sampled[truncate]",
    ),
    Mutation(
        "on-policy: the clip takes the smaller loss",
        sources.METHODS_IMPORTANCE,
        "losses = torch.maximum(",
        "losses = torch.minimum(",
        f"{TARGETS}biases_of_sampled[clip]",
    ),
    Mutation(
        "on-policy: the clip counts both sides",
        sources.METHODS_IMPORTANCE,
        "out = out & torch.where(",
        "_ = out & torch.where(",
        f"{EDGES}against_the_reference[sampled, clip-logits]",
    ),
    Mutation(
        "on-policy: the reward is bounded from above alone",
        sources.METHODS_IMPORTANCE,
        "cost.clamp(-options.reward_clip, options.reward_clip)",
        "cost.clamp(max=options.reward_clip)",
        f"{TARGETS}biases_of_sampled[reward_clip]",
    ),
    Mutation(
        "on-policy: a token of weight 0 is not read",
        sources.METHODS_ON_POLICY,
        "fused = known and options.token_weights is None",
        "fused = known",
        f"{EDGES}against_the_reference[support, weights-logits]",
    ),
    Mutation(
        "on-policy: a weight of 0 leaves an infinite term",
        sources.METHODS_IMPORTANCE,
        "return weights * values.masked_fill(weights == 0, 0.0)",
        "return weights * values",
        f"{EXTREMES}a_token_that_the_student_has_come_to_exclude[truncate]",
    ),
    Mutation(
        "on-policy: the weights are counted in the mean",
        sources.METHODS_ON_POLICY,
        "tokens.weights / tokens.denominator, None, None",
        "tokens.weights / tokens.weights.sum(), None, None",
        f"{EDGES}a_float_mask_weighs_and_is_counted",
    ),
    Mutation(
        "on-policy: an id to ignore counts",
        sources.CHECKS_ON_POLICY,
        "kept = (mask != 0) & (ids != ignore_index)",
        "kept = mask != 0",
        f"{EDGES}an_id_to_ignore_does_not_count",
    ),
    Mutation(
        "on-policy: what does not count reaches the ratios",
        sources.CHECKS_ON_POLICY,
        "x.detach().to(dtype).masked_fill(~kept, 0.0)",
        "x.detach().to(dtype)",
        f"{EDGES}no_token_counts[sampled, served-logits]",
    ),
    Mutation(
        "on-policy: behaviours of probability 0 are taken",
        sources.CHECKS_ON_POLICY,
        "fine & (values > -math.inf)",
        "fine",
        f"{ERRORS}what_was_sampled_has_a_probability",
    ),
    Mutation(
        "on-policy: a token weight of 0 leaves an infinite gradient",
        sources.METHODS_IMPORTANCE,
        "losses = losses.masked_fill(tokens.weights == 0, 0.0)",
        "pass",
        f"{EXTREMES}a_token_weight_of_0_beside_an_infinite_term[sampled-loss]",
    ),
    Mutation(
        "on-policy: ratios may be infinite",
        sources.METHODS_IMPORTANCE,
        "log_ratio.clamp(max=largest).exp()",
        "log_ratio.exp()",
        f"{EXTREMES}a_ratio_beyond_floats_times_0[full-loss]",
    ),
    Mutation(
        "on-policy: padding is lifted to the lower bound",
        sources.METHODS_IMPORTANCE,
        "ratio.clamp(lower, upper).masked_fill(~tokens.kept, 0.0)",
        "ratio.clamp(lower, upper)",
        f"{WEIGHTS}a_lower_bound_is_none_of_padding",
    ),
    Mutation(
        "on-policy: the dual clip is of both signs",
        sources.METHODS_IMPORTANCE,
        "capped = (cost > 0) & (",
        "capped = (cost != 0) & (",
        f"{WEIGHTS}the_clip_is_verl_s",
    ),
    Mutation(
        "on-policy: the gradient is made in the backward",
        sources.METHODS_ON_POLICY,
        'known = options.importance == "none" and options.reduction != "none"',
        "known = False",
        f"{WEIGHTS}the_gradient_is_made_in_the_forward[full]",
    ),
    Mutation(
        "on-policy: a server's log-probabilities are not recorded",
        sources.METHODS_ON_POLICY,
        "log_p if log_p is None else log_p.to(log_q.dtype)",
        "None",
        f"{WEIGHTS}log_probs_of_a_server_are_at_the_temperature[support]",
    ),
    Mutation(
        "on-policy: a normalizer counts twice",
        sources.CHECKS_ON_POLICY,
        "weights.new_full((), normalizer)",
        "weights.new_full((), 2 * normalizer)",
        f"{WEIGHTS}micro_batches_make_the_whole[number-full]",
    ),
    Mutation(
        "on-policy: a normalizer that is a tensor counts twice",
        sources.CHECKS_ON_POLICY,
        "normalizer.to(dtype)",
        "2 * normalizer.to(dtype)",
        f"{WEIGHTS}micro_batches_make_the_whole[tensor-full]",
    ),
    Mutation(
        "on-policy: token weights lose their sign",
        sources.CHECKS_ON_POLICY,
        "options.token_weights.to(dtype).masked",
        "options.token_weights.to(dtype).abs().masked",
        f"{WEIGHTS}token_weights_keep_their_sign[sum-full]",
    ),
    Mutation(
        "on-policy: a behaviour's rounding is refused",
        sources.CHECKS_ON_POLICY,
        "values <= math.log(LARGEST_SUM)",
        "values <= 0",
        f"{WEIGHTS}rounding_of_a_behaviour_is_no_error",
    ),
    Mutation(
        "on-policy: masked outside of other bounds",
        sources.CHECKS_ON_POLICY_OPTIONS,
        '"mask": (0.5, 2.0)',
        '"mask": (0.4, 2.5)',
        f"{WEIGHTS}bounds_by_default[mask-0.0-ratios1-weights1]",
    ),
    Mutation(
        "on-policy: clipped at other bounds",
        sources.CHECKS_ON_POLICY_OPTIONS,
        '"clip": (0.8, 1.2)',
        '"clip": (0.7, 1.3)',
        f"{WEIGHTS}bounds_by_default[clip-1.0-ratios3-weights3]",
    ),
]
