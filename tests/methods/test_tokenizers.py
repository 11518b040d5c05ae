"""check_same_tokenizer on tiny tokenizers that are trained here: what is usable, with what, and why not."""

from unittest import mock

import pytest

from distill_ops.methods.tokenizers import sample_texts
from tests.methods.tokenizer_pairs import (
    BASE,
    TEXTS,
    N,
    check,
    fast,
    permuted,
    row,
    slow,
    train,
    with_added,
)
from tests.support import optional

tokenizers = optional("tokenizers")
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)


def test_one_tokenizer_of_both_is_usable_whole():
    report = check(BASE, with_added(), texts=None, student_columns=N, teacher_columns=N)
    assert report.usable
    assert (report.vocab_size, report.tokenize_with) == (N, ("student", "teacher"))
    assert (report.reasons, report.to_do) == ((), ())
    assert report.raise_if_unusable() is report
    assert {row.found for row in report.rows} == {
        "equal",
        "not known",
    }  # roles, of a bare Tokenizer


def test_padded_heads():
    report = check(BASE, BASE, student_columns=N + 50, teacher_columns=N + 178)
    assert (report.usable, report.vocab_size) == (True, N)
    assert report.to_do == (
        f"pass vocab_size={N} to the loss: the student's logits have {N + 50} columns, the "
        f"teacher's {N + 178}",
    )
    assert row(report, "columns").found == "look"
    unknown = check(BASE, BASE, student_columns=N)
    assert unknown.vocab_size == N
    assert "if either model's logits have more columns" in unknown.to_do[0]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_with_too_few_columns(side):
    report = check(BASE, BASE, **{f"{side}_columns": N - 1})
    assert not report.usable
    assert f"the {side}'s logits have {N - 1} columns, too few" in report.reasons[0]
    assert f"up to {N - 1}" in report.reasons[0]
    # where the narrow side's model has no column for the other's extra tokens alone, it is
    more = with_added("<think>")
    for columns in (N, N + 1):
        assert check(BASE, more, student_columns=N, teacher_columns=columns).vocab_size == N


def test_tokens_of_one_alone_at_the_end():
    more = with_added("<think>", "</think>", special=False)
    for student, teacher, reader in ((BASE, more, "student"), (more, BASE, "teacher")):
        report = check(student, teacher, student_columns=N + 2, teacher_columns=N + 2)
        assert (report.vocab_size, report.tokenize_with) == (N, (reader,))
        assert any(
            f"{reader}'s tokenizer alone: the other has 2 tokens more, '<think>', '</think>'"
            in text
            for text in report.to_do
        )
        assert row(report, "tokens").found == "look"
        added = row(report, "added tokens")
        assert sorted(added[1:3]) == ["2, 2 special", "4, 2 special"]
    both = check(with_added("<a>"), with_added("<b>"))
    assert not both.usable
    assert f"different tokens at 1 id ({N} is '<a>' and '<b>'; if" in both.reasons[0]
    both = check(with_added("<a>", special=False), with_added("<b>"))  # which is no reserved one
    assert both.reasons[0].endswith("'<a>' and '<b>')")
    (*_, advice) = check(BASE, with_added("<a>", "<b>", "<c>", "<d>")).to_do
    assert advice.endswith("the other has 4 tokens more, '<a>', '<b>', '<c>', ...")
    assert check(BASE, with_added("<a>", "<b>", "<c>")).to_do[-1].endswith("'<b>', '<c>'")


def test_another_padding_token():
    padded = with_added("<pad>")
    other = with_added("<think>")
    # the padding id is a token to the teacher, and no token of the data of the student's
    report = check(fast(padded, pad_token="<pad>"), fast(other))
    assert (report.vocab_size, report.tokenize_with) == (N, ("student",))
    padding = [text for text in report.to_do if text.startswith("pad with another")]
    assert padding == [
        f"pad with another token than the student's '<pad>' (id {N}), which not both models have: any "
        "that they do, such as '</s>' (id 1), masked"
    ]
    # a Tokenizer says what pads where padding is on; else it has a name here
    padded.enable_padding(pad_id=N, pad_token="<pad>")
    assert check(padded, other).tokenize_with == ("student",)
    padded.no_padding()
    assert not check(padded, other).usable
    assert check(padded, other, unused=["<pad>", "<think>"]).vocab_size == N
    # in both tokenizers, in neither head
    both = fast(with_added("<pad>"), pad_token="<pad>")
    report = check(both, both, student_columns=N, teacher_columns=N)
    assert (report.usable, report.vocab_size) == (True, N)
    assert sum(text.startswith("pad with another") for text in report.to_do) == 2
    # nothing to pad with is advised that a model has no column for
    words = {"<unk>": 0, "a": 1}
    alone = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    alone.add_special_tokens(["<pad>"])
    alone.enable_padding(pad_id=2, pad_token="<pad>")
    report = check(alone, alone, student_columns=2, teacher_columns=2)
    assert all("such as" not in text for text in report.to_do)


def test_padding_where_no_advice_is_needed():
    # another padding token that both have
    both = with_added("<pad>", "<fill>")
    student, teacher = (fast(both, pad_token=token) for token in ("<pad>", "<fill>"))
    report = check(student, teacher, student_columns=N + 2, teacher_columns=N + 2)
    assert (report.usable, report.to_do) == (True, ())
    assert row(report, "special tokens").found == "look"
    assert all(row.compared != "chat template" for row in report.rows)  # neither has one
    # that of a tokenizer which is not to be used
    teacher = fast(with_added("<think>", "<pad>"), pad_token="<pad>")
    report = check(fast(BASE), teacher)
    assert report.tokenize_with == ("student",)
    assert not any(text.startswith("pad with another") for text in report.to_do)


def test_padding_that_is_the_end_is_no_padding_alone():
    ending = with_added("<eot>")
    student = optional("transformers").PreTrainedTokenizerFast(
        tokenizer_object=ending, bos_token="<s>", eos_token="<eot>", pad_token="<eot>"
    )
    assert not check(student, with_added("<think>")).usable


def test_equal_tokens_of_other_ids():
    report = check(BASE, permuted(BASE, "a", "b"))
    ids = BASE.get_vocab()
    assert not report.usable
    assert report.vocab_size is None
    assert report.tokenize_with == ()
    (reason,) = report.reasons  # they are cut alike: the tokens are the same
    first, second = sorted((ids["a"], ids["b"]))
    assert f"different tokens at 2 ids ({first} is 'a' and 'b', " in reason
    assert reason.endswith(f"{second} is 'b' and 'a')")  # words do occur: no unused=
    assert row(report, "shared tokens")[2:] == (f"{N - 2} of {N}", "differs")
    assert row(report, "tokens").found == "differs"
    with pytest.raises(ValueError, match="different tokens at 2 ids"):
        report.raise_if_unusable()


def test_renamed_reserved_tokens_are_usable_if_both_names_are_unused():
    student, teacher = (train(("<s>", name, "</s>")) for name in ("<reserved>", "<eom>"))
    assert check(student, teacher).reasons == (
        "different tokens at 1 id (1 is '<reserved>' and '<eom>'; if they never occur, name them in "
        "unused=)",
    )
    assert not check(student, teacher, unused=["<eom>"]).usable  # <reserved> may be one that occurs
    report = check(student, teacher, unused=["<eom>", "<reserved>"])
    assert (report.usable, report.vocab_size) == (True, N + 1)
    # unused by name is not unused by id: here it is a token that occurs to the other
    moved = permuted(student, "a", "b")
    assert not check(student, moved, unused=["a"]).usable


def test_a_gap_in_the_ids_of_one():
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    gap = {token: i for token, i in vocab.items() if token != "b"}
    whole, with_gap = (Tokenizer(models.WordLevel(v, unk_token="<unk>")) for v in (vocab, gap))
    report = check(whole, with_gap, texts=["a"])
    assert not report.usable
    assert report.reasons == (
        "tokens of one alone at 1 id (the student 'b'; if they never occur, name them in unused=)",
    )
    assert check(whole, with_gap, texts=["a"], unused=["b"]).vocab_size == 4


def test_a_token_of_another_id_where_the_other_has_none():
    words = {"<unk>": 0, "a": 1}
    pair = (Tokenizer(models.WordLevel({**words, "b": i}, unk_token="<unk>")) for i in (2, 4))
    (reason,) = check(*pair, texts=["a"]).reasons
    assert reason == "different ids of 1 token ('b' is 2 and 4)"


@pytest.mark.parametrize("change", ["prefix space", "normalizer", "merges"])
def test_equal_tokens_and_other_cuts(change):
    teacher = with_added()
    if change == "prefix space":
        teacher.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "normalizer":
        teacher.normalizer = normalizers.NFC()
    else:
        teacher.model = models.BPE(BASE.get_vocab(), [])
    report = check(BASE, teacher, texts=sample_texts() if change == "normalizer" else TEXTS)
    assert not report.usable
    (reason,) = report.reasons
    assert "different cuts of " in reason
    assert [row.found for row in report.rows].count("differs") == 1
    if change == "normalizer":
        assert "'accents, combining'" in reason
        assert check(BASE, teacher).usable  # whose texts it leaves alone


def test_added_tokens_that_are_read_differently():
    """Of equal content and id; one takes the space before it."""
    student, teacher = with_added(), with_added()
    student.add_special_tokens([AddedToken("<x>", lstrip=True, special=True)])
    teacher.add_special_tokens([AddedToken("<x>", special=True)])
    (reason,) = check(student, teacher).reasons
    assert "first 'added tokens'" in reason
    assert reason.endswith("'<x>' has lstrip set by the student alone")


def test_where_the_first_cut_parts():
    words = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    student = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    student.pre_tokenizer = pre_tokenizers.Whitespace()
    teacher = Tokenizer(models.BPE(words, [("a", "b")], unk_token="<unk>"))
    teacher.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    report = check(student, teacher, texts={"one": "a b", "two": "a aa b"})
    assert report.reasons == (
        "different cuts of 1 text of 2 (first 'two', at token 1: the student has '<unk>' 'b', "
        "the teacher 'a' 'a' 'b')",
    )


def test_truncation_and_padding_hide_nothing():
    student, teacher = with_added(), with_added()
    for tokenizer in (student, teacher):
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=8, pad_id=0, pad_token="<s>")
    teacher.normalizer = normalizers.Replace("mat", "cat")
    texts = ["the cat sat on the mat"]
    report = check(student, teacher, texts=texts)
    assert "different cuts of" in report.reasons[0]
    assert student.truncation["max_length"] == teacher.truncation["max_length"] == 2
    assert student.padding["length"] == 8
    assert check(student, BASE, texts=texts).usable  # of more tokens than 2, and fewer than 8
    student.no_truncation()
    assert check(student, BASE, texts=texts).usable
    fasts = [fast(tokenizer, model_max_length=2) for tokenizer in (student, teacher)]
    assert "different cuts of" in check(*fasts, texts=texts).reasons[0]


def test_begin_end_and_templates_are_no_obstacle():
    student = fast(BASE)
    begins = with_added()
    begins.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    transformers = optional("transformers")
    teacher = transformers.PreTrainedTokenizerFast(
        tokenizer_object=begins, bos_token="<s>", eos_token="<s>", chat_template="{{ messages }}"
    )
    report = check(student, teacher, student_columns=N, teacher_columns=N)
    assert (report.usable, report.vocab_size) == (True, N)
    assert [text.split(":")[0] for text in report.to_do] == [
        "ends differ ('</s>', '<s>')",
        "give both models the same ids",
        "render chats with one template for both models",
    ]
    assert row(report, "an input")[1:] == ("...", "<s> ...", "look")
    assert check(BASE, begins).usable
    assert row(check(BASE, begins), "an input")[1:] == ("...", "<s> ...", "look")


def test_slow_fast_and_bare_tokenizers_of_the_same_words():
    words = {"<unk>": 0, "<pad>": 1, "the": 2, "cat": 3}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.add_special_tokens(["<unk>", "<pad>"])
    transformers = optional("transformers")
    quick = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", pad_token="<pad>"
    )
    kinds = {"slow": slow(words), "fast": quick, "bare": bare}
    for student in kinds.values():
        for teacher in kinds.values():
            report = check(student, teacher, texts=["the cat  dog", "cat"])
            assert (report.usable, report.vocab_size) == (True, 4), str(report)
    other = slow({"<unk>": 0, "<pad>": 1, "cat": 2, "the": 3})
    for student in kinds.values():
        assert not check(student, other, texts=["the cat"]).usable
    with pytest.raises(ValueError, match="expected a tokenizer with tokens"):
        check(Tokenizer(models.BPE()), BASE)


def test_the_sample_has_what_tokenizers_differ_in():
    texts = sample_texts()
    assert len(texts) > 20
    whole = "".join(texts.values())
    assert all(c in whole for c in "é\u0301яשعहม自すｶ인😀\u200d\ufe0f\t\r\u00a0\u3000\u200b\x00")
    assert "def " in texts["Python sources"]
    with mock.patch("sysconfig.get_path", return_value="/nowhere"):
        assert texts.keys() - sample_texts().keys() == {"Python sources"}


def test_a_space_that_follows_an_added_token_or_not():
    """Metaspace that is put before every word, and before the first alone: one differs after <s>."""

    def made(scheme):
        tokenizer = Tokenizer(
            models.WordLevel({"<s>": 0, "x": 1, "▁x": 2, "▁": 3, "z": 4, "▁z": 5, "▁y": 6}, "▁")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.add_special_tokens(["<s>"])
        return tokenizer

    assert check(made("always"), made("always"), texts=["x"]).usable
    report = check(made("always"), made("first"), texts=["x"])
    assert not report.usable
    assert "added tokens" in report.reasons[0]


def test_a_token_that_is_added_to_one_and_plain_to_the_other():
    plain = Tokenizer(models.WordLevel({"x": 0, "y": 1, "<im>": 2, "[UNK]": 3}, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    added = Tokenizer.from_str(plain.to_str())
    added.add_special_tokens(["<im>"])
    assert not check(plain, added, texts=["x y"]).usable


def test_texts_of_the_name_of_our_own_are_cut_too():
    student = with_added("<a>")
    teacher = Tokenizer.from_str(student.to_str())
    teacher.normalizer = normalizers.NFKC()
    assert not check(student, teacher, texts={"added tokens": "½ ﬁ"}).usable


def test_an_end_of_text_is_used():
    student = fast(with_added("<pad>", "<e>"), pad_token="<pad>", eos_token="<e>")
    teacher = fast(with_added("<e>"), eos_token="<e>")
    (reason,) = check(student, teacher).reasons
    assert "unused" not in reason
    with pytest.raises(ValueError, match="'<e>', the student's eos_token"):
        check(student, teacher, unused=["<pad>", "<e>"])
