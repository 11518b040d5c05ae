"""Mutations of on-policy distillation: weights, targets, masks and what is refused."""

from tests.support import sources
from tests.support.mutants import Mutation

TARGETS = "tests/methods/test_on_policy_targets.py::test_"
EDGES = "tests/methods/test_on_policy.py::test_"
ERRORS = "tests/methods/test_on_policy_errors.py::test_"

ON_POLICY = [
    Mutation(
        "on-policy: the reward is not a constant",
        sources.METHODS_ON_POLICY,
        "reverse_kl_estimate(log_q.detach(), found.teacher_log_prob",
        "reverse_kl_estimate(log_q, found.teacher_log_prob",
        f"{TARGETS}biases_of_sampled[truncate]",
    ),
    Mutation(
        "on-policy: a prefix's weight has the token's own ratio",
        sources.METHODS_ON_POLICY,
        'if options.objective != "sampled":',
        "if False:",
        f"{EDGES}against_the_reference[full, prefix-logits]",
    ),
    Mutation(
        "on-policy: a sampled token's prefix lacks its own ratio",
        sources.METHODS_ON_POLICY,
        'if options.objective != "sampled":',
        "if True:",
        f"{TARGETS}prefix_weights_are_unbiased[sampled]",
    ),
    Mutation(
        "on-policy: masked weights are truncated",
        sources.METHODS_ON_POLICY,
        "ratio = ratio.masked_fill(out, 0.0)",
        "ratio = ratio.clamp(lower, upper)",
        f"{TARGETS}biases_of_sampled[mask]",
    ),
    Mutation(
        "on-policy: the lower bound is none",
        sources.METHODS_ON_POLICY,
        "ratio = ratio.clamp(lower, upper)",
        "ratio = ratio.clamp(max=upper)",
        f"{TARGETS}biases_of_sampled[truncate]",
    ),
    Mutation(
        "on-policy: the clip takes the smaller loss",
        sources.METHODS_ON_POLICY,
        "losses = torch.maximum(",
        "losses = torch.minimum(",
        f"{TARGETS}biases_of_sampled[clip]",
    ),
    Mutation(
        "on-policy: the clip counts both sides",
        sources.METHODS_ON_POLICY,
        "out = out & torch.where(",
        "_ = out & torch.where(",
        f"{EDGES}against_the_reference[sampled, clip-logits]",
    ),
    Mutation(
        "on-policy: the reward is bounded from above alone",
        sources.METHODS_ON_POLICY,
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
        sources.METHODS_ON_POLICY,
        "cost = cost.masked_fill(weights == 0, 0.0)",
        "pass",
        f"{EDGES}a_token_that_the_student_has_come_to_exclude[truncate]",
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
]
