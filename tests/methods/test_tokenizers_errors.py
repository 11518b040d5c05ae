"""check_same_tokenizer: what is printed of a pair, and wrong arguments."""

import io
import sys
from dataclasses import replace
from unittest import mock

import pytest

from distill_ops.methods.tokenizer_report import Row
from distill_ops.methods.tokenizers import check_same_tokenizer
from tests.methods.tokenizer_pairs import BASE, TEXTS, N, check, permuted, with_added
from tests.support import optional

PreTokenizer = optional("tokenizers").pre_tokenizers.PreTokenizer


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

    console = optional("rich.console").Console(file=io.StringIO(), width=300)
    unusable = check(BASE, permuted(BASE, "a", "b"))
    unusable.print(console)
    assert "not usable" in console.file.getvalue()
    assert unusable.reasons[0] in console.file.getvalue()
    replace(report, rows=(Row("[i]", "[/b]", "[red]", "equal"),)).print(console)
    assert all(cell in console.file.getvalue() for cell in ("[i]", "[/b]", "[red]"))
    with (
        mock.patch.dict(sys.modules, {"rich.console": None}),
        pytest.raises(ImportError, match="pip install rich"),
    ):
        report.print()


WRONG = {
    "a name": ({"student": "gpt2"}, TypeError, r"student: expected .* got str: nothing is loaded"),
    "nothing": ({"teacher": None}, TypeError, "teacher: expected .* got NoneType$"),
    "a class": ({"teacher": type(BASE)}, TypeError, "teacher: expected .* got type"),
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
    "no list": ({"unused": None}, TypeError, "unused: expected tokens, got NoneType"),
    "bytes": ({"unused": b"<s>"}, TypeError, "unused: expected tokens, got bytes"),
    "ids of tokens": ({"unused": [1]}, TypeError, "unused: expected strings, got int 1"),
    "lists of tokens": ({"unused": [["<s>"]]}, TypeError, "unused: expected strings, got list"),
    "strange": ({"unused": ["<no>"]}, ValueError, "unused: .* got '<no>'"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(wrong, kind, message):
    arguments = {"student": BASE, "teacher": BASE, "texts": TEXTS, **wrong}
    with pytest.raises(kind, match=message):
        check_same_tokenizer(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_a_class_of_transformers_is_no_tokenizer():
    kind = optional("transformers").PreTrainedTokenizerFast
    with pytest.raises(TypeError, match="student: expected a .*, got "):
        check(kind, BASE)


def test_a_tokenizer_that_cannot_be_copied_is_not_changed():
    class Python:
        def pre_tokenize(self, text):
            pass

    own = with_added()
    own.pre_tokenizer = PreTokenizer.custom(Python())
    assert check(own, own).usable
    own.enable_truncation(4)
    with pytest.raises(ValueError, match=r"teacher: .* cannot be copied .* no_truncation\(\)"):
        check(BASE, own)
    assert own.truncation["max_length"] == 4


def test_a_tokenizer_that_fails_on_a_text_is_named():
    broken = mock.Mock(wraps=BASE, spec=BASE)
    broken.truncation = broken.padding = None
    broken.encode = mock.Mock(side_effect=Exception("no unk"))
    with pytest.raises(
        ValueError, match=r"teacher: its tokenizer fails on the text 'plain' \(no unk"
    ):
        check(BASE, broken)
