"""Teacher-mixed sampling: the mixture, and generating from it with two small models of transformers."""

import sys
from unittest import mock

import pytest
import torch

import distill_ops
from distill_ops.methods import minillm, sampling
from distill_ops.reference import minillm as reference
from tests.support.helpers import make_logits
from tests.support.recipes import VOCAB_SIZE, causal_model

transformers = pytest.importorskip("transformers")

NEW, PAD, END = 6, 0, 2
PROMPT = torch.tensor([[0, 0, 7, 9], [5, 8, 3, 4], [0, 6, 1, 5]])
ATTENTION = (PROMPT != 0).long()


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_mixture(share, dtype):
    student, teacher = make_logits((3, 40), dtype=dtype, scale=4.0)
    student[0, 1] = teacher[0, 2] = teacher[1, 3] = student[1, 3] = float("-inf")
    found = minillm.mix(student, teacher, share, temperature=2.0)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference.mix(student.double(), teacher.double(), share, temperature=2.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, dtype=found.dtype))
    assert not minillm.mix(student.requires_grad_(), teacher, share).requires_grad


@pytest.fixture(scope="module")
def models():
    student, teacher = causal_model(0).eval(), causal_model(1, hidden_size=48)
    with torch.no_grad():  # far from uniform, and from each other
        student.lm_head.weight *= 20
        teacher.lm_head.weight *= 20
    return student, teacher


def generate(student, processor, **options):
    torch.manual_seed(3)
    return student.generate(
        PROMPT, attention_mask=ATTENTION, logits_processor=[processor], do_sample=True, top_k=0,
        top_p=1.0, max_new_tokens=NEW, pad_token_id=PAD, **options,
    )  # fmt: skip


def row_logits(model, sequences):
    """Of the generated tokens, each row alone and without its padding, no cache: the truth."""
    found = []
    for ids, attention in zip(sequences, ATTENTION, strict=True):
        start = int((attention == 0).sum())
        with torch.no_grad():
            logits = model(ids[None, start:]).logits[0]
        found.append(logits[PROMPT.shape[1] - start - 1 : -1])
    return torch.stack(found)


def with_absolute_positions():
    """To which how far a prompt is padded is no matter of distances alone."""
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=16, n_embd=16, n_layer=1, n_head=2
    )
    teacher = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        teacher.transformer.wpe.weight *= 50
        teacher.lm_head.weight *= 20
    return teacher


@pytest.mark.parametrize("kind", ["rotary positions", "absolute positions"])
def test_generating_samples_from_the_mixture_with_the_teachers_own_cache(models, kind):
    student, teacher = models
    teacher = teacher if kind == "rotary positions" else with_absolute_positions()
    processor = minillm.MixedSampling(teacher.train(), ATTENTION, teacher_share=0.4)
    forwards = []
    hook = teacher.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = generate(student, processor, min_new_tokens=NEW, eos_token_id=None,
                      return_dict_in_generate=True, output_scores=True)  # fmt: skip
    hook.remove()
    assert forwards == [PROMPT.shape[1]] + [1] * (NEW - 1)
    assert not teacher.training
    sequences = output.sequences
    student_logits, teacher_logits = (row_logits(model, sequences) for model in (student, teacher))
    mixture = minillm.mix(student_logits, teacher_logits, 0.4)
    scores = torch.stack(output.scores, 1)
    torch.testing.assert_close(scores, mixture, rtol=1e-4, atol=1e-4)
    ids = sequences[:, PROMPT.shape[1] :]
    expected = distill_ops.mixture_token_log_probs(student_logits, teacher_logits, ids, 0.4)
    found = processor.log_probs(sequences)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # the plain function, token by token and without a cache, draws the same
    torch.manual_seed(3)
    drawn = [torch.multinomial(mixture[:, t].exp(), 1) for t in range(NEW)]
    assert torch.equal(torch.cat(drawn, 1), ids)


def test_sequences_that_end_early(models):
    student, teacher = models
    processor = minillm.MixedSampling(teacher, ATTENTION, temperature=2.0)
    with mock.patch.object(student.generation_config, "eos_token_id", None):
        whole = generate(student, processor, eos_token_id=None)
    end = whole[1, PROMPT.shape[1] + 2].item()  # what one row samples third
    other = minillm.MixedSampling(teacher, ATTENTION, temperature=2.0)
    sequences = generate(student, other, eos_token_id=end)
    found, expected = other.log_probs(sequences), processor.log_probs(whole)
    torch.testing.assert_close(found[1, :3], expected[1, :3])
    assert found.shape == (3, sequences.shape[1] - PROMPT.shape[1])
    assert found.isfinite().all()


def test_what_a_processor_before_has_excluded_stays_so(models):
    student, teacher = models
    processor = minillm.MixedSampling(teacher, ATTENTION, teacher_share=1.0)
    output = generate(student, processor, min_new_tokens=2, eos_token_id=END,
                      return_dict_in_generate=True, output_scores=True)  # fmt: skip
    assert output.scores[0][:, END].isneginf().all()
    assert output.scores[2][:, END].isfinite().all()
    total = output.scores[0].exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(3))


def test_heads_of_two_widths(models):
    student, _ = models
    narrow = causal_model(1)
    narrow.lm_head = torch.nn.Linear(32, 50, bias=False)
    with pytest.raises(ValueError, match="have 60 columns and the teacher's logits 50: pass vocab"):
        generate(student, minillm.MixedSampling(narrow, ATTENTION))
    processor = minillm.MixedSampling(narrow, ATTENTION, vocab_size=50)
    sequences = generate(student, processor)
    assert sequences[:, PROMPT.shape[1] :].max() < 50
    assert processor.log_probs(sequences).isfinite().all()


def test_an_instance_serves_one_generate(models):
    student, teacher = models
    processor = minillm.MixedSampling(teacher, ATTENTION)
    with pytest.raises(ValueError, match="after generate has run"):
        processor.log_probs(PROMPT)
    sequences = generate(student, processor)
    with pytest.raises(ValueError, match="an instance serves one generate"):
        generate(student, processor)
    with pytest.raises(ValueError, match="sequences do not continue"):
        processor.log_probs(sequences + 1)
    with pytest.raises(ValueError, match="8 generated tokens, but 6 were sampled"):
        processor.log_probs(torch.nn.functional.pad(sequences, (0, 2)))
    assert processor.log_probs(sequences[:, :6]).shape == (3, 2)
    assert processor.log_probs(PROMPT).shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"teacher": None}, TypeError, "teacher must be a model of transformers, got NoneType"),
        ({"attention_mask": PROMPT.tolist()}, TypeError, "attention_mask must be a tensor"),
        ({"attention_mask": PROMPT[0]}, ValueError, r"\[batch, prompt\], got shape \(4,\)"),
        ({"teacher_share": 1.2}, ValueError, r"teacher_share must lie in \[0, 1\]"),
        ({"teacher_share": "a"}, TypeError, "teacher_share must be a number"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
    ],
)
def test_wrong_arguments(models, options, error, words):
    with pytest.raises(error, match=words):
        minillm.MixedSampling(**{"teacher": models[1]} | options)


def test_a_mask_of_another_prompt(models):
    with pytest.raises(
        ValueError, match=r"attention_mask must have the shape of the prompt, \(3, 4\)"
    ):
        generate(models[0], minillm.MixedSampling(models[1], ATTENTION[:, :3]))


def test_it_is_a_logits_processor_and_needs_transformers_alone_to_be_made(models):
    processor = minillm.MixedSampling(models[1])
    assert isinstance(processor, transformers.LogitsProcessor)
    assert isinstance(processor, minillm.MixedSampling)
    sampling._processor_class.cache_clear()
    with mock.patch.dict(sys.modules, {"transformers": None}):
        with pytest.raises(ImportError, match="not installed: pip install transformers"):
            minillm.MixedSampling(models[1])
