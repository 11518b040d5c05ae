"""check_same_tokenizer: added tokens of one alone or found by other rules, begins and ends, random cuts."""

from unittest import mock

import pytest

from distill_ops.methods.tokenizer_side import Side
from tests.methods.tokenizer_pairs import BASE, N, check, fast, row, train, with_added
from tests.support import optional

tokenizers = optional("tokenizers")
from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)


def with_rules(normalizer=None, **rules) -> Tokenizer:
    tokenizer = with_added()
    tokenizer.add_special_tokens([AddedToken("<x>", special=True, **rules)])
    tokenizer.normalizer = normalizer
    return tokenizer


def test_begin_and_end_where_spaces_are_dropped():
    words = {"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    # nothing is left of the shortest, and the next is an end itself
    report = check(tokenizer, tokenizer, texts=["  ", "<s>", "a a a"])
    assert row(report, "an input")[1:] == ("<s> ... </s>", "<s> ... </s>", "equal")
    report = check(tokenizer, tokenizer, texts=["  "])
    assert row(report, "an input")[1:] == ("not known", "not known", "not known")
    assert report.usable


def test_an_input_that_is_changed_is_shown():
    side = Side("student", BASE, None)
    side._encode = lambda text, special: [0, 1] if special else [1, 0]
    assert side.wrapped({"any": "text"}) == "changed: <s> </s>"


def test_roles_that_one_side_does_not_tell():
    found = row(check(fast(BASE), BASE), "special tokens")
    assert found[1:] == ("bos <s>, eos </s>", "not known", "not known")


def test_an_end_that_no_loss_teaches():
    student = fast(with_added("<e>"), eos_token="<e>")
    assert check(student, fast(BASE)).to_do[-1] == (
        f"ends differ ('<e>', '</s>'): the student's (id {N}) is past vocab_size, and no loss teaches it: "
        "end targets, and stop, with another, such as '</s>' (id 1)"
    )
    no_end = optional("transformers").PreTrainedTokenizerFast(tokenizer_object=BASE)
    assert check(student, no_end).to_do[-1].endswith("and stop, with another")
    assert check(fast(BASE), student).to_do[-1].endswith("end targets as the student is to stop")


def test_tokens_without_a_column_are_named():
    student = fast(with_added("<pad>", "<think>", "</think>"), pad_token="<pad>")
    report = check(student, student, student_columns=N)
    (reason,) = report.reasons
    assert "without a column are '<think>', '</think>'; resize" in reason  # and <pad> is masked
    unused = ["<pad>", "</think>"]
    report = check(student, student, student_columns=N, unused=unused)
    assert "without a column is '<think>'; resize" in report.reasons[0]
    assert "have 1 columns" in check(student, student, student_columns=1).reasons[0]


def test_texts_with_an_added_token_of_one_alone():
    teacher = with_added("[INST]", "<other>")
    texts = {"plain": "a cat", "markup": "a cat</s> [INST] b", "more": "[INST]"}
    (reason,) = check(BASE, teacher, texts=texts).reasons
    assert "different cuts of 2 texts of 4 (first 'markup'" in reason
    assert "added token of one alone: '[INST]' of the teacher; if they never occur" in reason
    assert "<other>" not in reason
    report = check(BASE, teacher, texts=texts, unused=["[INST]"])  # the text around it is compared
    assert (report.usable, report.vocab_size) == (True, N)
    # not the cause, or not the only one
    teacher.normalizer = normalizers.Replace("cat", "mat")
    (reason,) = check(BASE, teacher, texts=texts).reasons
    assert "[INST]" not in reason.split("the teacher", 1)[1]
    (reason,) = check(BASE, teacher, texts=texts, unused=["[INST]"]).reasons
    assert "different cuts of 2 texts of 4 (first 'plain'" in reason
    assert not check(teacher, BASE, texts=texts).usable


@pytest.mark.parametrize("kind", [Tokenizer, fast], ids=["tokenizers", "transformers"])
def test_a_rule_that_parts_the_cuts_is_named(kind):
    def pair(a, b):
        return [tokenizer if kind is Tokenizer else fast(tokenizer) for tokenizer in (a, b)]

    (reason,) = check(*pair(with_rules(single_word=True), with_rules())).reasons
    assert "first 'added tokens'" in reason
    assert reason.endswith(": '<x>' has single_word set by the student alone")
    lower = normalizers.Lowercase()
    students, teachers = (
        with_rules(lower, normalized=of_student, rstrip=not of_student)
        for of_student in (True, False)
    )
    (reason,) = check(*pair(students, teachers)).reasons
    assert reason.endswith(
        "'<x>' has rstrip set by the teacher alone and normalized set by the student alone"
    )
    # <X> is <x> to one of them
    assert not check(*pair(*(with_rules(lower, normalized=on) for on in (True, False)))).usable


def test_a_rule_that_does_not_part_the_cuts():
    report = check(*(with_rules(normalizers.NFC(), normalized=on) for on in (True, False)))
    assert report.usable
    assert report.to_do[-1] == (
        "tokenize with one of the two, for both models: added tokens are found in text by other rules "
        "('<x>' has normalized set by the student alone)"
    )
    assert row(report, "added tokens").found == "look"
    # without a normalizer it is none
    report = check(*(with_rules(normalized=on) for on in (True, False)))
    assert (row(report, "added tokens").found, len(report.to_do)) == ("equal", 1)


def test_a_rule_is_not_blamed_for_other_cuts_nor_where_it_is_unused():
    student, teacher = with_rules(single_word=True), with_rules(normalizers.Replace("c", "m"))
    assert "<x>" not in check(student, teacher).reasons[0]
    teacher.normalizer = None
    report = check(student, teacher, texts=["a<x>b"], unused=["<x>"])
    assert (report.usable, len(report.to_do)) == (True, 1)  # of columns, not known


def test_an_added_token_right_after_a_word():
    """A word ends at the token where it is added, and goes on into it where it is plain vocabulary."""
    plain = Tokenizer(models.WordLevel({"x": 0, "y": 1, "z": 2, "<im>": 3, "[UNK]": 4}, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("<im>"), behavior="merged_with_previous"),
        ]
    )
    added = Tokenizer.from_str(plain.to_str())
    added.add_special_tokens(["<im>"])
    (reason,) = check(plain, added, texts=["x y"]).reasons
    assert reason.endswith("'<im>' is an added token of the teacher alone")


def test_padding_alone_differs():
    student, teacher = (fast(with_added(name), pad_token=name) for name in ("<pad>", "<fill>"))
    report = check(student, teacher, student_columns=N + 1, teacher_columns=N + 1)
    assert (report.usable, report.vocab_size) == (True, N)
    assert report.tokenize_with == ("student", "teacher")
    assert ["'<pad>'" in text for text in report.to_do[1:3]] == [True, False]
    assert ["'<fill>'" in text for text in report.to_do[1:]] == [False, True]


@pytest.mark.parametrize("columns", [(N, N + 50), (N + 50, N), (N + 50, N + 50)])
def test_heads_of_which_one_is_padded_or_both_alike(columns):
    report = check(BASE, BASE, student_columns=columns[0], teacher_columns=columns[1])
    assert row(report, "columns").found == "look"
    (advice,) = report.to_do
    assert advice.startswith(f"pass vocab_size={N} to the loss: the student's logits have")


def test_random_cuts():
    dropping = with_added()
    dropping.model.dropout = 0.25
    with pytest.raises(
        ValueError, match=r"teacher: .* the same way .* BPE dropout of 0\.25.*\.model"
    ):
        check(BASE, dropping)
    with pytest.raises(
        ValueError, match=r"student: .*tokenizer\.backend_tokenizer\.model\.dropout"
    ):
        check(fast(dropping), BASE)
    dropping.model.dropout = 0.0
    assert check(BASE, dropping).usable

    calls = iter(range(100))
    sampling = mock.Mock(wraps=BASE, spec=BASE)  # as of a Unigram model that samples
    sampling.truncation = sampling.padding = None
    sampling.encode = lambda text, **_: mock.Mock(ids=[next(calls)])
    with pytest.raises(
        ValueError, match="student: .* the same way .* two cuts of the text 'plain'"
    ):
        check(sampling, BASE)


def test_transformers_tokenizers_are_left_as_they_were():
    made = with_added("<x>")
    made.enable_truncation(3, stride=1, direction="left")
    made.enable_padding(direction="left", pad_id=N, pad_token="<x>", length=9)
    pair = fast(made), fast(made)
    before = [tokenizer.backend_tokenizer.to_str() for tokenizer in pair]
    assert check(*pair).usable
    assert [tokenizer.backend_tokenizer.to_str() for tokenizer in pair] == before
    assert len(pair[0].backend_tokenizer.encode("a").ids) == 9


def test_padding_that_is_advised_is_a_token_to_both():
    student, teacher = (
        with_added(pad, of=train((name, "<s>")))
        for name, pad in (("<renamed>", "<pad>"), ("<reserved>", "<fill>"))
    )
    student.enable_padding(pad_id=student.token_to_id("<pad>"), pad_token="<pad>")
    (*_, advice) = check(student, teacher, unused=["<renamed>", "<reserved>", "<fill>"]).to_do
    assert advice.endswith("any that they do, such as '<s>' (id 1), masked")


@pytest.mark.parametrize(
    ("templates", "cells"),
    [
        (("a", "a"), ("yes", "yes", "equal")),
        (("a", "b"), ("yes", "another", "look")),
        (("a", None), ("yes", "none", "look")),
    ],
)
def test_chat_templates(templates, cells):
    report = check(*(fast(BASE, chat_template=template) for template in templates))
    assert row(report, "chat template")[1:] == cells
    assert any("one template" in text for text in report.to_do) == (cells[-1] == "look")


def test_a_cut_that_ends_before_the_other():
    teacher = with_added()
    teacher.normalizer = normalizers.Strip(left=False)
    (reason,) = check(BASE, teacher, texts=["a "]).reasons
    assert "at token 1: the student has 'Ġ', the teacher no more)" in reason
