"""check_same_tokenizer on tiny tokenizers that are trained here: what is usable, with what, and why not."""

import io
import json
import sys
from unittest import mock

import pytest

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from distill_ops.methods.tokenizers import check_same_tokenizer, sample_texts  # noqa: E402

CORPUS = ["the cat and the other cat sat on the mat, the end", "a banana band and an anagram"] * 4
TEXTS = {"plain": "the cat sat", "other": "naïve 日本  \n\tx 👍🏽"}


def train(specials=("<s>", "</s>"), corpus=CORPUS, merges=30, prefix_space=False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 256 + merges,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


BASE = train()
N = BASE.get_vocab_size()


def with_added(*tokens: str, special: bool = True, of: Tokenizer = BASE) -> Tokenizer:
    tokenizer = Tokenizer.from_str(of.to_str())
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens])
    return tokenizer


def fast(tokenizer: Tokenizer, **options):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options
    )


def check(student, teacher, **options):
    return check_same_tokenizer(student, teacher, **{"texts": TEXTS, **options})


def row(report, compared: str):
    (found,) = (row for row in report.rows if row.compared.startswith(compared))
    return found


def test_one_tokenizer_of_both_is_usable_whole():
    report = check_same_tokenizer(BASE, with_added(), student_columns=N, teacher_columns=N)
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
    assert check(BASE, more, student_columns=N, teacher_columns=N + 1).vocab_size == N


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
    both = check(with_added("<a>"), with_added("<b>"))
    assert not both.usable
    assert f"different tokens at 1 id ({N} is '<a>' and '<b>'" in (both.reasons[0])


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


def test_padding_that_is_the_end_is_no_padding_alone():
    ending = with_added("<eot>")
    student = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=ending, bos_token="<s>", eos_token="<eot>", pad_token="<eot>"
    )
    assert not check(student, with_added("<think>")).usable


def permuted(tokenizer: Tokenizer, a: str, b: str) -> Tokenizer:
    """Of the same tokens, two of which have each other's ids."""
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    return Tokenizer.from_str(json.dumps(content))


def test_equal_tokens_of_other_ids():
    report = check(BASE, permuted(BASE, "a", "b"))
    ids = BASE.get_vocab()
    assert not report.usable
    assert report.vocab_size is None
    assert report.tokenize_with == ()
    (reason,) = report.reasons  # they are cut alike: the tokens are the same
    first, second = sorted((ids["a"], ids["b"]))
    assert f"different tokens at 2 ids ({first} is 'a' and 'b', " in reason
    assert f"{second} is 'b' and 'a'" in reason
    assert row(report, "shared tokens").student == f"{N - 2} of {N}"
    with pytest.raises(ValueError, match="different tokens at 2 ids"):
        report.raise_if_unusable()


def test_renamed_reserved_tokens_are_usable_if_both_names_are_unused():
    student, teacher = (train(("<s>", name, "</s>")) for name in ("<reserved>", "<eom>"))
    assert not check(student, teacher).usable
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
    fasts = [fast(tokenizer, model_max_length=2) for tokenizer in (student, teacher)]
    assert "different cuts of" in check(*fasts, texts=texts).reasons[0]


def test_begin_end_and_templates_are_no_obstacle():
    student = fast(BASE)
    begins = with_added()
    begins.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    transformers = pytest.importorskip("transformers")
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


def slow(words: dict[str, int]):
    """A tokenizer of transformers in Python, of whole words."""
    transformers = pytest.importorskip("transformers")

    class Words(transformers.PreTrainedTokenizer):
        def __init__(self, **options):
            self.words = dict(words)
            super().__init__(**options)

        @property
        def vocab_size(self):
            return len(self.words)

        def get_vocab(self):
            return {**self.words, **self.added_tokens_encoder}

        def _tokenize(self, text, **options):
            return text.split()

        def _convert_token_to_id(self, token):
            return self.words.get(token, self.words["<unk>"])

        def _convert_id_to_token(self, index):
            return list(self.words)[index]

    return Words(unk_token="<unk>", pad_token="<pad>")


def test_slow_fast_and_bare_tokenizers_of_the_same_words():
    words = {"<unk>": 0, "<pad>": 1, "the": 2, "cat": 3}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.add_special_tokens(["<unk>", "<pad>"])
    transformers = pytest.importorskip("transformers")
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


def test_what_is_printed(capsys):
    report = check(BASE, with_added("[red]"), student_columns=N, teacher_columns=N + 1)
    text = str(report)
    assert "usable with vocab_size" in text
    assert all(row.compared in text for row in report.rows)
    assert all(f"- {line}" in text for line in report.to_do)
    report.print()
    printed = " ".join(capsys.readouterr().out.split())
    for line in (report.verdict, *report.to_do):
        assert line in printed  # "[red]" as it is, no markup
    assert report.rows[0].teacher in printed

    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=300)
    unusable = check(BASE, permuted(BASE, "a", "b"))
    unusable.print(console)
    assert "not usable" in console.file.getvalue()
    assert unusable.reasons[0] in console.file.getvalue()
    with (
        mock.patch.dict(sys.modules, {"rich.console": None}),
        pytest.raises(ImportError, match="pip install rich"),
    ):
        report.print()


WRONG = {
    "a name": ({"student": "gpt2"}, TypeError, r"student: expected .* got str: nothing is loaded"),
    "nothing": ({"teacher": None}, TypeError, "teacher: expected .* got NoneType"),
    "a class": ({"teacher": Tokenizer}, TypeError, "teacher: expected .* got type"),
    "a processor": (
        {"student": mock.Mock(spec=["tokenizer"])}, TypeError, r"pass .* student\.tokenizer",
    ),
    "columns": ({"student_columns": 0}, ValueError, "student_columns: expected at least 1, got 0"),
    "true": ({"teacher_columns": True}, TypeError, "teacher_columns: expected an int.* got bool"),
    "float": ({"teacher_columns": 9.0}, TypeError, "teacher_columns: expected an int.* got float"),
    "one text": ({"texts": "abc"}, TypeError, "texts: expected a dict or texts, got str"),
    "no texts": ({"texts": []}, ValueError, "texts: expected at least one"),
    "empty": ({"texts": ["", ""]}, ValueError, "texts: expected at least one"),
    "ids": ({"texts": ["a", 1]}, TypeError, "texts: expected strings, got int at 'text 1'"),
    "number": ({"texts": 1}, TypeError, "texts: expected a dict or texts, got int"),
    "one token": ({"unused": "<s>"}, TypeError, "unused: expected tokens, got str"),
    "strange": ({"unused": ["<no>"]}, ValueError, "unused: .* got '<no>'"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(wrong, kind, message):
    arguments = {"student": BASE, "teacher": BASE, "texts": TEXTS, **wrong}
    with pytest.raises(kind, match=message):
        check_same_tokenizer(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_a_tokenizer_that_fails_on_a_text_is_named():
    broken = mock.Mock(wraps=BASE, spec=BASE)
    broken.truncation = broken.padding = None
    broken.encode = mock.Mock(side_effect=Exception("no unk"))
    with pytest.raises(
        ValueError, match=r"teacher: its tokenizer fails on the text 'plain' \(no unk"
    ):
        check(BASE, broken)
