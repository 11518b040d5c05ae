"""What is compared of two tokenizers, part by part: ids, columns, cuts, padding, and their habits."""

from collections.abc import Iterable
from itertools import takewhile

from .tokenizer_report import DIFFERS, EQUAL, LOOK, UNKNOWN, Row
from .tokenizer_side import FLAGS, Side, random_cuts

SHOWN = 3  # examples of what differs


def compare_ids(sides: tuple[Side, Side], skipped: set[int]) -> tuple[int, list[Row], list[str]]:
    """How many ids, from 0 on, are the same tokens to both; rows; what ends them."""
    student, teacher = sides
    ids = sorted(student.tokens.keys() | teacher.tokens.keys())
    different = {i for i in ids if student.tokens.get(i) != teacher.tokens.get(i)}
    counted = sorted(different - skipped)
    before = takewhile(lambda i: not counted or i < counted[0], ids)
    vocab_size = 1 + max((i for i in before if i not in different), default=-1)

    clash = [i for i in counted if i in student.tokens and i in teacher.tokens]
    shared = student.ids.keys() & teacher.ids.keys()
    moved = sorted((t for t in shared if student.ids[t] != teacher.ids[t]), key=student.ids.get)
    counts = (f"{len(side.ids):,}" for side in sides)
    of_shared = f"{len(shared) - len(moved):,} of {len(shared):,}"
    added = (f"{len(side.added):,}, {len(side.special):,} special" for side in sides)
    rows = [
        Row("tokens", *counts, DIFFERS if clash else LOOK if different else EQUAL),
        Row("added tokens", *added, EQUAL if _added(student) == _added(teacher) else LOOK),
        Row("shared tokens of equal id", of_shared, of_shared, DIFFERS if moved else EQUAL),
    ]
    if clash:
        shown = (f"{i} is {student.tokens[i]!r} and {teacher.tokens[i]!r}" for i in clash[:SHOWN])
        reserved = (
            student.special.intersection(clash) == teacher.special.intersection(clash) == set(clash)
            and not any(side.tokens[i] in moved for side in sides for i in clash)  # in use by both
        )
        hint = "; if they never occur, name them in unused=" if reserved else ""
        reason = f"different tokens at {count(clash, 'id')} ({listed(shown, clash)}{hint})"
    elif moved:
        shown = (f"{t!r} is {student.ids[t]} and {teacher.ids[t]}" for t in moved[:SHOWN])
        reason = f"different ids of {count(moved, 'token')} ({listed(shown, moved)})"
    else:
        reason = (
            f"tokens of one alone at {count(counted, 'id')} ({_one_sided(sides, counted)}; if they never "
            "occur, name them in unused=)"
        )
    return vocab_size, rows, [reason]


def _added(side: Side) -> dict[int, tuple[str, set[str]]]:
    return {i: (token, side.flags[i]) for i, token in side.added.items()}


def other_rules(sides: tuple[Side, Side], skipped: set[int]) -> dict[str, str]:
    """Common added tokens that are found in text by other rules, each with what differs."""
    apart = {}
    for token in common_added(sides, skipped):
        flags = [side.flags.get(side.ids[token]) for side in sides]
        if None in flags:
            (only,) = (
                side.name for side, found in zip(sides, flags, strict=True) if found is not None
            )
            apart[token] = f"{token!r} is an added token of the {only} alone"
        elif flags[0] != flags[1]:
            of_one = (
                f"{flag} set by the {sides[flag in flags[1]].name} alone"
                for flag in FLAGS
                if flag in flags[0] ^ flags[1]
            )
            apart[token] = f"{token!r} has {' and '.join(of_one)}"
    return apart


def common_added(sides: tuple[Side, Side], skipped: set[int]) -> list[str]:
    """Tokens of both that are added ones of at least one."""
    student, teacher = sides
    added = student.added | teacher.added  # plain vocabulary to the other: it cuts them
    return sorted(
        token
        for i, token in added.items()
        if i not in skipped and student.tokens.get(i) == teacher.tokens.get(i) == token
    )


def _one_sided(sides: tuple[Side, Side], ids: list[int]) -> str:
    own = {side.name: [side.tokens[i] for i in ids if i in side.tokens] for side in sides}
    return "; ".join(f"the {name} {_quoted(tokens)}" for name, tokens in own.items() if tokens)


def tokens_beyond(side: Side, vocab_size: int, skipped: set[int]) -> list[str]:
    """What a loss of so many columns cannot take, in the order of ids; padding, which is masked, it may not."""
    ids = sorted(i for i in side.tokens if i >= vocab_size and i not in skipped and i != side.pad)
    return [side.tokens[i] for i in ids]


def too_narrow(sides: tuple[Side, Side], vocab_size: int, skipped: set[int]) -> list[str]:
    """The heads with fewer columns than their tokenizers have ids, and the tokens that have none."""
    return [
        f"the {side.name}'s logits have {side.columns} columns, too few for its tokenizer's ids up to "
        f"{max(side.tokens)}: without a column {'is' if len(beyond) == 1 else 'are'} {_quoted(beyond)}; resize "
        "the model's embeddings, or name tokens that never occur in unused="
        for side in sides
        if side.columns == vocab_size and (beyond := tokens_beyond(side, vocab_size, skipped))
    ]


def compare_columns(sides: tuple[Side, Side], vocab_size: int) -> tuple[Row, list[str]]:
    cells = ["not given" if side.columns is None else f"{side.columns:,}" for side in sides]
    columns = {side.columns for side in sides}
    if None in columns:
        return Row("columns of logits", *cells, UNKNOWN), [
            f"pass vocab_size={vocab_size} to the loss if either model's logits have more columns "
            "(model.config.vocab_size: student_columns=, teacher_columns=)"
        ]
    if columns == {vocab_size}:
        return Row("columns of logits", *cells, EQUAL), []
    return Row("columns of logits", *cells, LOOK), [
        f"pass vocab_size={vocab_size} to the loss: the student's logits have {cells[0]} columns, the "
        f"teacher's {cells[1]}"
    ]


def compare_cuts(
    sides: tuple[Side, Side], texts: dict[str, str], skipped: set[int], apart: dict[str, str]
) -> tuple[Row, list[str]]:
    """Whether the texts become the same tokens, and where the first that does not parts.

    Added tokens of ``skipped`` are taken out of the texts; ``apart`` is of :func:`other_rules`.
    """
    compared = f"{len(texts):,} texts, {sum(map(len, texts.values())):,} characters"
    pairs = list(texts.items())
    common = common_added(sides, skipped)
    if common:  # with and without spaces around
        probe = "".join(f" x {t} y{t}z" for t in common)
        in_other_case = "".join(f" {t.swapcase()}" for t in apart)  # alike after some normalizers
        pairs.append(("added tokens", probe + in_other_case))
    of_one, unused = (_added_to_one(sides, skipped, unused=unused) for unused in (False, True))
    different = []
    for name, text in pairs:
        cuts = [side.cut(name, text, unused) for side in sides]
        if cuts[0] == cuts[1]:
            continue
        for side, cut in zip(sides, cuts, strict=True):
            if side.cut(name, text, unused) != cut:
                got = f"two cuts of the text {name!r}"
                raise ValueError(
                    random_cuts(side.name, got, "dropout, or sampling of segmentations")
                )
        different.append((name, text, cuts))
    if not different:
        return Row(compared, "cut alike", "cut alike", EQUAL), []
    name, text, cuts = different[0]
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(*cuts, strict=False))
    at = sum(1 for _ in alike)
    parts = [" ".join(map(repr, cut[at : at + SHOWN])) or "no more" for cut in cuts]
    reason = (
        f"different cuts of {count(different, 'text')} of {len(pairs):,} (first {name!r}, at token {at}: "
        f"the student has {parts[0]}, the teacher {parts[1]})"
    )
    held = [token for token in of_one if any(token in text for _, text, _ in different)]
    if rules := [apart[token] for token in apart if token in text]:
        reason += f": {first_of(rules)}"
    elif all(_alike(sides, text, {*unused, *held}) for _, text, _ in different):
        named = first_of([f"{token!r} of the {of_one[token]}" for token in held])
        reason += (
            f", for an added token of one alone: {named}; if they never occur, name them in unused=, or "
            "leave them out of texts="
        )
    return Row(compared, *parts, DIFFERS), [reason]


def _alike(sides: tuple[Side, Side], text: str, without: set[str]) -> bool:
    student, teacher = (side.cut(text, text, without) for side in sides)
    return student == teacher


def _added_to_one(sides: tuple[Side, Side], skipped: set[int], unused: bool) -> dict[str, str]:
    """Added tokens that are nothing to the other, unused or not, and whose they are."""
    return {
        token: side.name
        for side, other in (sides, sides[::-1])
        for i, token in side.added.items()
        if (i in skipped) == unused and (unused or other.tokens.get(i) != token)
    }


def only_with(reader: Side, more: list[str]) -> str:
    return (
        f"tokenize with the {reader.name}'s tokenizer alone: the other has {count(more, 'token')} more, "
        f"{_quoted(more)}"
    )


def pad_with(side: Side, other: Side, vocab_size: int) -> list[str]:
    """What to pad with, where the other has no such token, or a model no such column."""
    pad = side.pad
    if pad is None or (pad < vocab_size and side.tokens[pad] == other.tokens.get(pad)):
        return []
    eos = (side.roles or {}).get("eos")
    such_as = _such_as(side, other, vocab_size, [side.ids.get(eos), *sorted(side.special)])
    return [
        f"pad with another token than the {side.name}'s {side.tokens[pad]!r} (id {pad}), which not both "
        f"models have: any that they do{such_as}, masked"
    ]


def _such_as(side: Side, other: Side, vocab_size: int, ids: list[int | None]) -> str:
    """The first that both have a column of."""
    known = (i for i in ids if i is not None and i < vocab_size)
    shared = [i for i in known if side.tokens[i] == other.tokens.get(i)]
    return f", such as {side.tokens[shared[0]]!r} (id {shared[0]})" if shared else ""


def _ends(sides: tuple[Side, Side], vocab_size: int) -> str:
    """What to do where texts end differently."""
    student, teacher = sides
    ends = [side.roles["eos"] for side in sides]
    if ends[0] == ends[1]:
        return ""
    advice = "end targets as the student is to stop"
    end = student.ids.get(ends[0], -1)
    if end >= vocab_size:
        such_as = _such_as(student, teacher, vocab_size, [student.ids.get(ends[1])])
        advice = (
            f"the student's (id {end}) is past vocab_size, and no loss teaches it: end targets, and stop, "
            f"with another{such_as}"
        )
    return f"ends differ ({ends[0]!r}, {ends[1]!r}): {advice}"


def compare_habits(
    sides: tuple[Side, Side], texts: dict[str, str], vocab_size: int
) -> tuple[list[Row], list[str]]:
    """Special tokens by their roles, what a text is begun and ended with, chat templates."""
    student, teacher = sides
    rows, to_do = [], []

    def compare(what: str, of_student: str, of_teacher: str, advice: str) -> None:
        same = of_student == of_teacher
        rows.append(Row(what, of_student, of_teacher, EQUAL if same else LOOK))
        if not same and advice:
            to_do.append(advice)

    roles = [side.roles for side in sides]
    if None in roles:
        cells = ("not known" if side.roles is None else _roles(side) for side in sides)
        rows.append(Row("special tokens", *cells, UNKNOWN))
    else:
        compare("special tokens", *map(_roles, sides), _ends(sides, vocab_size))
    wrapped = [side.wrapped(texts) for side in sides]
    if None in wrapped:
        rows.append(Row("an input", *(around or "not known" for around in wrapped), UNKNOWN))
    else:
        advice = "give both models the same ids: the tokenizers begin or end an input differently"
        compare("an input", *wrapped, advice)
    if student.chat_template or teacher.chat_template:
        advice = "render chats with one template for both models: the tokenizers' own differ"
        templates = ["yes" if side.chat_template else "none" for side in sides]
        if student.chat_template != teacher.chat_template and templates[0] == templates[1]:
            templates = ["yes", "another"]
        compare("chat template", *templates, advice)
    return rows, to_do


def _roles(side: Side) -> str:
    return ", ".join(f"{role} {token}" for role, token in side.roles.items() if token is not None)


def count(things: list, what: str) -> str:
    return f"{len(things):,} {what}{'' if len(things) == 1 else 's'}"


def listed(shown: Iterable[str], of: list) -> str:
    return ", ".join(shown) + (", ..." if len(of) > SHOWN else "")


def first_of(texts: list[str]) -> str:
    return listed(texts[:SHOWN], texts)


def _quoted(tokens: list[str]) -> str:
    return first_of([*map(repr, tokens)])
