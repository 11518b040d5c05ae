"""Calls of ``methods.on_policy`` that are wrong: the exception, and words of its message."""

import inspect
import math
import re

import pytest
import torch

import distill_ops
from distill_ops.checks.on_policy_options import ELSEWHERE
from distill_ops.methods import on_policy

B, S, V, D = 3, 5, 11, 4
NAN, INF = math.nan, math.inf
OLD = torch.full((B, S), -1.0, dtype=torch.float64)
SAMPLED = {"objective": "sampled"}
TRUNCATE, CLIP = ({"importance": name, "behaviour_log_probs": OLD} for name in ("truncate", "clip"))
WRONG = [
    ({"objective": "reverse_kl"}, ValueError, "objective must be one of 'full', 'support', 'sampled'"),
    ({"objective": "topk"}, ValueError, "objective .*'topk': 'support', with k="),
    ({"objective": "policy_gradient"}, ValueError, "objective .*'sampled'"),
    ({"importance": "tis"}, ValueError, "importance must be one of .*'tis': 'truncate'"),
    ({"importance": "icepop"}, ValueError, "'icepop': 'mask'"),
    ({"importance": "mask"}, ValueError, "importance='mask' needs behaviour_log_probs"),
    ({"behaviour_log_probs": OLD}, ValueError, "behaviour_log_probs needs importance='trunc.*a tensor"),
    ({"bounds": (0, 2)}, ValueError, "bounds needs importance='truncate', 'mask' or 'clip'"),
    ({"importance_level": "prefix"}, ValueError, "importance_level needs importance="),
    ({"importance_level": "sequence"}, ValueError, "importance_level must be one of 'token', 'prefix'"),
    (CLIP, ValueError, "importance='clip' is PPO's.*needs objective='sampled', got objective='full'"),
    (CLIP | SAMPLED | {"importance_level": "prefix"}, ValueError, "importance='clip' needs importance_level='token'"),
    (CLIP | SAMPLED | {"bounds": (1.1, 1.2)}, ValueError, r"must enclose 1, got \(1.1, 1.2\)"),
    (TRUNCATE | {"bounds": 2.0}, TypeError, r"bounds must be two numbers \(lower, upper\), got 2.0"),
    (TRUNCATE | {"bounds": (2.0, 0.5)}, ValueError, r"bounds must be 0 <= lower < upper, got \(2.0, 0.5\)"),
    (TRUNCATE | {"bounds": (-1, 2)}, ValueError, "bounds must be 0 <= lower"),
    (TRUNCATE | {"bounds": (0, NAN)}, ValueError, "bounds must be 0 <= lower"),
    (TRUNCATE | {"bounds": ("0", 2)}, TypeError, "each of bounds must be a number, got str"),
    ({"objective": "support"}, ValueError, "k is None, but objective='support'"),
    ({"objective": "support", "k": V + 1}, ValueError, rf"k must be in \[1, {V}\]"),
    ({"objective": "support", "k": 2, "tail": "rest"}, ValueError, "tail must be one of"),
    ({"k": 3}, ValueError, "k needs objective='support', got k=3"),
    (SAMPLED | {"tail": "restrict"}, ValueError, "tail needs objective='support'"),
    (SAMPLED | {"divergence": "forward_kl"}, ValueError, "divergence of objective='sampled' must be the reverse KL"),
    ({"divergence": "jsd"}, ValueError, "'jsd': pass 'jensen_shannon'"),
    ({"reward_clip": 5}, ValueError, "reward_clip needs objective='sampled'"),
    (SAMPLED | {"reward_clip": 0}, ValueError, "reward_clip must be positive, got 0"),
    (SAMPLED | {"reward_clip": "5"}, TypeError, "reward_clip must be None or a positive number, got str"),
    ({"teacher_log_probs": OLD}, ValueError, "teacher_log_probs needs objective='sampled'"),
    (SAMPLED | {"teacher_log_probs": OLD}, ValueError, "teacher_logits must be None where teacher_log_probs"),
    ({"teacher": None}, TypeError, "teacher_logits must be a tensor"),
    (SAMPLED | {"teacher": None}, ValueError, "teacher_logits is None, which needs teacher_log_probs"),
    ({"teacher": torch.zeros(B, S, V + 1).double()}, ValueError, "pass vocab_size="),
    ({"teacher": torch.zeros(B, S, V).double().requires_grad_()}, ValueError, "teacher_logits requires grad"),
    ({"student": [[1.0]]}, TypeError, "student_logits must be a tensor"),
    ({"temperature": 0}, ValueError, "temperature must be positive"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer replaces .*reduction='sum'"),
    ({"normalizer": 0}, ValueError, "normalizer must be positive where a token counts, got 0"),
    ({"normalizer": torch.tensor(-1.0)}, ValueError, "normalizer must be positive where a token"),
    ({"vocab_size": V + 1}, ValueError, "vocab_size must be in"),
    ({"mask": None}, TypeError, r"mask must be a tensor \[...\], got NoneType"),
    ({"mask": torch.ones(B, S + 1)}, ValueError, r"mask must have the leading shape .*\(3, 5\), got \(3, 6\)"),
    ({"mask": torch.full((B, S), NAN)}, ValueError, "mask must hold finite numbers, not negative .*got nan"),
    ({"mask": torch.full((B, S), -100)}, ValueError, "mask must hold finite numbers, not negative .*got -100"),
    ({"mask": torch.ones(B, S, requires_grad=True)}, ValueError, "mask requires grad"),
    ({"mask": torch.ones(B, S, dtype=torch.complex64)}, TypeError, "mask must be bool, int or float"),
    ({"ids": torch.full((B, S), V)}, ValueError, rf"token_ids must lie in \[0, {V}\)"),
    ({"ids": torch.zeros(B, S)}, TypeError, "token_ids must be int64 or int32"),
    ({"ids": torch.zeros(B, S, V).long()}, ValueError, "token_ids must have the leading shape"),
    ({"token_weights": torch.full((B, S), INF)}, ValueError, "token_weights must hold finite numbers, got inf"),
    ({"token_weights": torch.ones(S)}, ValueError, "token_weights must have the leading shape"),
    ({"token_weights": 2.0}, TypeError, "token_weights must be a tensor"),
    (TRUNCATE | {"behaviour_log_probs": OLD * NAN}, ValueError, "behaviour_log_probs must hold finite .*nan"),
    (TRUNCATE | {"behaviour_log_probs": -OLD}, ValueError, "log-probabilities, at most 0, got 1"),
    (TRUNCATE | {"behaviour_log_probs": OLD.long()}, TypeError, "behaviour_log_probs must be float32"),
    (TRUNCATE | {"behaviour_log_probs": OLD.clone().requires_grad_()}, ValueError, "requires grad.*detach"),
    (SAMPLED | {"teacher": None, "teacher_log_probs": -OLD}, ValueError, "teacher_log_probs must hold log-prob"),
    (SAMPLED | {"teacher": None, "teacher_log_probs": OLD[:1]}, ValueError, "teacher_log_probs must have the"),
    ({"loss_mode": "k3"}, TypeError, r"on_policy.loss\(\) got an unexpected .*'loss_mode': pass objective="),
    ({"old_log_probs": OLD}, TypeError, "'old_log_probs': pass behaviour_log_probs="),
    ({"tis_clip": 2.0}, TypeError, "'tis_clip': pass importance='truncate', bounds="),
    ({"beta": 0.5}, TypeError, r"'beta': a divergence takes it"),
    ({"temprature": 2.0}, TypeError, "'temprature': did you mean 'temperature'"),
    (SAMPLED | {"dual_clip": 3.0}, ValueError, "dual_clip needs importance='clip', got dual_clip=3.0"),
    (CLIP | SAMPLED | {"dual_clip": 1}, ValueError, "dual_clip must be above 1, got 1"),
    (CLIP | SAMPLED | {"dual_clip": "3"}, TypeError, "dual_clip must be None or a number above 1, got str"),
    ({"attention_mask": OLD}, TypeError, "'attention_mask': pass mask=, of the sampled tokens alone"),
    ({"eps_clip": 0.2}, TypeError, "'eps_clip': pass importance='clip', bounds="),
    ({"labels": OLD}, TypeError, "'labels': there are no labels here: token_ids are"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), WRONG, ids=lambda x: str(x)[:50])
def test_errors(change, error, words):
    given, logits = dict(change), torch.zeros(B, S, V).double()
    positional = {
        "student": logits, "teacher": logits, "ids": torch.zeros(B, S).long(),
        "mask": torch.ones(B, S, dtype=torch.bool),
    }  # fmt: skip
    positional = [given.pop(name, value) for name, value in positional.items()]
    with pytest.raises(error, match=words):
        on_policy.loss(*positional, **given)


HIDDEN_WRONG = [
    ({"student_weight": None}, TypeError, "student_weight must be a tensor"),
    ({"teacher_hidden": None}, TypeError, "teacher_hidden must be a tensor"),
    (SAMPLED | {"teacher_hidden": None}, ValueError, "teacher_hidden is None, which needs teacher_log"),
    (
        SAMPLED | {"teacher_hidden": None, "teacher_log_probs": OLD, "teacher_softcap": 2.0},
        ValueError, "teacher_softcap is unused",
    ),
    ({"student_softcap": 0}, ValueError, "student_softcap must be positive"),
    ({"mask": torch.ones(B, S + 1)}, ValueError, "mask must have the leading shape of student_hidden"),
    ({"inplace": True}, TypeError, r"on_policy.linear_loss\(\) got an unexpected .*'inplace'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), HIDDEN_WRONG, ids=lambda x: str(x)[:50])
def test_errors_of_hidden_states(change, error, words):
    given = dict(change)
    names = "student_hidden", "student_weight", "teacher_hidden", "teacher_weight"
    heads = (torch.zeros(*shape).double() for shape in 2 * [(B, S, D), (V, D)])
    positional = dict(zip(names, heads, strict=True))
    positional |= {"ids": torch.zeros(B, S).long(), "mask": torch.ones(B, S)}
    positional = [given.pop(name, value) for name, value in positional.items()]
    with pytest.raises(error, match=words):
        on_policy.linear_loss(*positional, **given)


def test_what_was_sampled_has_a_probability():
    logits, ids = torch.zeros(B, S, V), torch.zeros(B, S).long()
    old = {"importance": "truncate", "behaviour_log_probs": OLD * INF}
    with pytest.raises(ValueError, match="behaviour_log_probs must hold finite .*got -inf"):
        on_policy.loss(logits, logits, ids, torch.ones(B, S), **old)


def test_a_prefix_is_along_an_axis():
    logits, one = torch.zeros(V), torch.tensor(1)
    with pytest.raises(
        ValueError, match=r"'prefix' needs token_ids \[..., S\], .* got a single token"
    ):
        on_policy.loss(
            logits, logits, one, one, importance="truncate", importance_level="prefix",
            behaviour_log_probs=torch.tensor(-1.0),
        )  # fmt: skip


@pytest.mark.parametrize("function", [on_policy.loss, on_policy.linear_loss])
def test_hints_name_what_there_is(function):
    """Every ``x=`` of a hint is an argument, of the function or of the divergence that it shows."""
    known = set(inspect.signature(function).parameters)
    for name, hint in ELSEWHERE.items():
        assert name not in known
        rest = hint
        for divergence, argument in re.findall(r"(\w+)\((\w+)=", hint):
            assert argument in inspect.signature(getattr(distill_ops, divergence)).parameters
            rest = hint.replace(f"{argument}=", "")
        assert set(re.findall(r"(\w+)=", rest)) <= known, name
