"""Whether student and teacher share a tokenizer, which every loss here needs: column j is one token to both.

A loss compares column j of the student's logits with column j of the teacher's, at the same positions of
the same ids. Where j is another token to the teacher, nothing fails and the number means nothing.
"""

from collections.abc import Iterable, Mapping

from .tokenizer_parts import (
    compare_columns,
    compare_cuts,
    compare_habits,
    compare_ids,
    first_of,
    only_with,
    other_rules,
    pad_with,
    tokens_beyond,
    too_narrow,
)
from .tokenizer_report import TokenizerReport
from .tokenizer_sample import sample_texts
from .tokenizer_side import Side

__all__ = ["TokenizerReport", "check_same_tokenizer", "sample_texts"]


def check_same_tokenizer(
    student,
    teacher,
    *,
    student_columns: int | None = None,
    teacher_columns: int | None = None,
    texts: Mapping[str, str] | Iterable[str] | None = None,
    unused: Iterable[str] = (),
) -> TokenizerReport:
    """Whether a student can learn from a teacher's probabilities over tokens, and with which ``vocab_size=``.

    Every id below ``vocab_size`` must be the same token to both, ``student[i] == teacher[i]``, and texts cut alike.
    Two tokenizers (of tokenizers or transformers) go in, and the widths of logits; a :class:`TokenizerReport` comes out.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from distill_ops.methods.tokenizers import check_same_tokenizer
        >>> words = {"<unk>": 0, "a": 1, "b": 2}
        >>> student = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        >>> teacher = Tokenizer(models.WordLevel({**words, "<think>": 3}, unk_token="<unk>"))
        >>> report = check_same_tokenizer(student, teacher, student_columns=8, teacher_columns=16)
        >>> report.usable, report.vocab_size, report.tokenize_with
        (True, 3, ('student',))
        >>> report.raise_if_unusable().vocab_size  # for distillation_loss(..., vocab_size=...)
        3
        >>> print("\\n".join(report.to_do))
        pass vocab_size=3 to the loss: the student's logits have 8 columns, the teacher's 16
        tokenize with the student's tokenizer alone: the other has 1 token more, '<think>'

    What is compared, and what becomes of a difference:

    | | where it differs |
    |---|---|
    | the token of each id, added and special ones included | ``vocab_size`` ends before the first that differs. It is usable where one of the tokenizers, its padding aside, has no token from there on: tokenize with that one |
    | the columns of the logits, padded to some multiple (Qwen2.5: 151936 and 152064, of 151665 tokens) | ``vocab_size`` is the number of tokens. A tokenizer with more ids than its model has columns is not usable |
    | how ``texts`` are cut, and text with all common added tokens in it | not usable: the teacher never saw such ids in training. Where an added token of one alone is the cause, it is named, and ``unused=`` takes it out |
    | how common added tokens are found in a text: ``AddedToken``'s ``single_word``, ``lstrip``, ``rstrip``, and ``normalized`` where there is a normalizer | usable where that text is cut alike: tokenize with one of the two for both models |
    | padding that the other does not have, past all that they share | usable with another padding token |
    | beginning and end of a text, chat templates | usable: both models must be given the same ids. Where the student's own end is past ``vocab_size`` it cannot learn to stop with it |

    Columns from ``vocab_size`` on get no gradient. A student that was not trained before may sample them:
    mask them there, or cut its head to ``vocab_size`` rows.

    Args:
        student, teacher: ``tokenizers.Tokenizer``, or a tokenizer of transformers, slow or fast. They are left
            as they were, truncation and padding included (transformers' are set back after each text, so
            that another thread should not use them meanwhile); nothing is loaded.
        student_columns, teacher_columns: the last dimension of the model's logits, ``model.config.vocab_size``
            (not ``len(tokenizer)``); None: not known, and not checked.
        texts: ``{name: text}`` or texts, to be cut by both in place of :func:`sample_texts`. Give some of your
            data where the tokenizers were made for a domain.
        unused: tokens that never occur in your data nor are sampled. An id may be another token to the
            teacher where both are named here: a reserved one, and what a fine-tuning renamed it to. Added
            ones are taken out of the texts before these are cut.

    Returns:
        A :class:`TokenizerReport`: ``usable``, ``vocab_size``, ``tokenize_with``, ``reasons``, ``to_do``, ``rows``.

    Raises:
        TypeError: an argument of another kind, such as a model's name.
        ValueError: columns below 1, no text, an unused token that neither has or that begins or ends texts, a
            tokenizer without tokens, one that fails on a text, or one that cuts at random (BPE dropout).
            A pair that does not fit is no error: ``report.raise_if_unusable()``.
    """
    sides = (
        Side("student", student, _columns("student_columns", student_columns)),
        Side("teacher", teacher, _columns("teacher_columns", teacher_columns)),
    )
    texts = _texts(texts)
    skipped = _skipped(sides, unused)

    vocab_size, rows, reasons = compare_ids(sides, skipped)
    if _readers(sides, vocab_size, skipped):
        vocab_size = min([vocab_size, *(side.columns for side in sides if side.columns)])
        reasons = too_narrow(sides, vocab_size, skipped)
    readers = _readers(sides, vocab_size, skipped)
    columns_row, to_do = compare_columns(sides, vocab_size)
    apart = other_rules(sides, skipped)
    cuts_row, of_cuts = compare_cuts(sides, texts, skipped, apart)
    habits, of_habits = compare_habits(sides, texts, vocab_size)
    rows = (*rows, columns_row, cuts_row, *habits)
    reasons = (*(() if readers else reasons), *of_cuts)
    if reasons:
        return TokenizerReport(False, None, (), reasons, (), rows)

    if len(readers) == 1:
        (other,) = set(sides) - set(readers)
        to_do.append(only_with(readers[0], tokens_beyond(other, vocab_size, skipped)))
    if apart:
        rules = first_of([*apart.values()])
        to_do.append(
            f"tokenize with one of the two, for both models: added tokens are found in text by other rules "
            f"({rules})"
        )
    for side, other in (sides, sides[::-1]):
        if side in readers:
            to_do += pad_with(side, other, vocab_size)
    names = tuple(side.name for side in readers)
    return TokenizerReport(True, vocab_size, names, (), (*to_do, *of_habits), rows)


def _readers(sides: tuple[Side, Side], vocab_size: int, skipped: set[int]) -> list[Side]:
    """Those all of whose tokens, padding aside, are among the first ``vocab_size``."""
    return [side for side in sides if not tokens_beyond(side, vocab_size, skipped)]


def _columns(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _texts(texts: Mapping[str, str] | Iterable[str] | None) -> dict[str, str]:
    """By name."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable | None):
        raise TypeError(f"texts: expected a dict or texts, got {type(texts).__name__}")
    if texts is None:
        texts = sample_texts()
    elif not isinstance(texts, Mapping):
        texts = {f"text {i}": text for i, text in enumerate(texts)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__} at {name!r}")
    if not any(texts.values()):
        raise ValueError("texts: expected at least one that is not empty, got none")
    return dict(texts)


def _skipped(sides: tuple[Side, Side], unused: Iterable[str]) -> set[int]:
    """The ids that are unused tokens to both, or to one and nothing to the other: they may differ."""
    if isinstance(unused, str | bytes) or not isinstance(unused, Iterable):
        raise TypeError(f"unused: expected tokens, got {type(unused).__name__}")
    unused = list(unused)
    for token in unused:
        if not isinstance(token, str):
            raise TypeError(f"unused: expected strings, got {type(token).__name__} {token!r}")
    unused = set(unused)
    strange = unused - sides[0].ids.keys() - sides[1].ids.keys()
    if strange:
        named = min(map(repr, strange))
        raise ValueError(f"unused: expected tokens that one of the tokenizers has, got {named}")
    for side in sides:
        for role, token in (side.roles or {}).items():
            if role in ("bos", "eos") and token in unused:
                raise ValueError(
                    f"unused: expected tokens that never occur, got {token!r}, the {side.name}'s {role}_token"
                )
    ids = {side.ids[token] for token in unused for side in sides if token in side.ids}
    named = (({side.tokens.get(i) for side in sides} - {None}, i) for i in ids)
    return {i for tokens, i in named if tokens <= unused}
