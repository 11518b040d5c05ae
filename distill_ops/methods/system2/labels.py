"""Records to tensors: ids, shifted labels, weights, and what keeps records apart in one row."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from ...scalars import flag, integer, number, one_of, shown
from .messages import Prompt, part_of, prompt_of, to_messages
from .records import Record
from .tokenization import AUTO, Texts

IGNORED = -100
NO_ANSWER, SPECIAL, NO_PROMPT = "no answer", "special token in the text", "no prompt"
MARK = "\ue000"  # of a private use: in no text
LONG_PROMPT, LONG_TARGET = "prompt longer than the window", "target longer than the window"


class Labels(NamedTuple):
    """What :func:`to_labels` returns: B rows of S tokens.

    Example:
        >>> from distill_ops.methods.system2 import Record, to_labels
        >>> record = Record(0, "ab", "c", 1.0, True, "kept", "")
        >>> batch = to_labels([record], lambda text: [ord(x) for x in text], eos_token_id=0)
        >>> batch.ids.tolist(), batch.labels.tolist()
        ([[97, 98, 99, 0]], [[-100, 99, 0, -100]])
    """

    ids: torch.Tensor  #: ``[B, S]``, int64: the model's input
    labels: (
        torch.Tensor
    )  #: ``[B, S]``, int64: ``labels[:, t]`` is ``ids[:, t + 1]`` of targets, else -100
    weights: torch.Tensor  #: ``[B, S]``, float32: ``loss_mask=``, 0 where the label is -100
    attention_mask: torch.Tensor  #: ``[B, S]``, int64: 0 for padding
    position_ids: torch.Tensor  #: ``[B, S]``, int64: from 0 in each record, and in padding
    segment_ids: torch.Tensor  #: ``[B, S]``, int64: 1, 2... by record within a row, 0 for padding
    cu_seqlens: (
        torch.Tensor
    )  #: int32: where the runs of ``ids.flatten()`` begin, padding's too, and the end
    records: list[list[int]]  #: of each row, which of the records are in it, by their place
    skipped: list[tuple[int, str]]  #: places of records that gave no labels, and why

    def block_mask(self, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """``[B, 1, S, S]``: whether t sees s: of its own record, not later; a token of padding sees its run.

        True (of a float dtype: 0, and its lowest number elsewhere, to be added to scores) as
        ``scaled_dot_product_attention`` and ``transformers`` take it.
        """
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        seen = same.tril()[:, None]
        if dtype == torch.bool:
            return seen
        zeros = torch.zeros((), dtype=dtype, device=seen.device)
        return torch.where(seen, zeros, torch.finfo(dtype).min)


def to_labels(
    records: Iterable[Any],
    tokenizer: Any,
    *,
    prompt: Prompt = "{question}",
    chat: bool = False,
    system: str | None = None,
    max_length: int | None = None,
    truncate: str = "skip",
    pack: bool = False,
    padding_side: str = "right",
    pad_to_multiple_of: int = 1,
    weighting: str | Callable[[Any], float] = "token",
    special_tokens: str = "skip",
    eos_token_id: int | str | None = AUTO,
    pad_token_id: int | None = None,
) -> Labels:
    """Curated records as a batch for the fused hard-label loss: answers at once, without the reasoning.

    ``labels[t] = ids[t + 1]`` where that is of a target or its end, else -100: logits are used whole, unshifted.
    Records go in, such as a data loader's batch; :class:`Labels` comes out, tensors of B rows of S tokens.

    Example:
        >>> import torch
        >>> from distill_ops import distillation_loss
        >>> from distill_ops.methods.system2 import Record, to_labels
        >>> records = [Record(0, "1+1=", "2", 1.0, True, "kept", ""), Record(1, "?", None, 0.5, False, "tie", "")]
        >>> batch = to_labels(records, lambda text: [ord(x) for x in text], eos_token_id=0)
        >>> batch.skipped
        [(1, 'no answer')]
        >>> logits = torch.zeros(*batch.ids.shape, 128)  # model(batch.ids, attention_mask=...)
        >>> loss = distillation_loss(
        ...     logits, None, labels=batch.labels, loss_mask=batch.weights, hard_label_weight=1.0
        ... )
        >>> round(loss.item(), 3)  # log(128)
        4.852

    Prompt and target are tokenized apart, as a model continues a prompt: end the prompt with what
    stands between them. The target is followed by the end token. Records without a target, and those
    below, are left out and named in ``skipped``.

    Args:
        records: :class:`Record`, or rows of their JSONL or data set: mappings with input and target.
        tokenizer: of ``transformers``, ``tokenizers`` or ``tiktoken`` (an ``Encoding``), or a function of a text
            to its ids.
        prompt: as in :func:`to_messages`.
        chat: whether the tokenizer's chat template makes the text, of :func:`to_messages` with ``system``; it
            ends the target itself.
        max_length: the model's window, in tokens; None for none.
        truncate: of a record that is longer: "skip" it, or "left": cut the prompt's beginning, but for
            a special token that opens it; with ``chat`` the beginning of what the user says, so that roles
            and system message stay. A target is never cut.
        pack: whether records share rows of ``max_length`` tokens, in their order: pass ``position_ids`` and
            ``block_mask()`` to the model, or ``cu_seqlens`` and ``cu_seqlens.diff().max()`` to FlashAttention's varlen functions.
        padding_side: "right" or "left", of rows that are not packed.
        pad_to_multiple_of: of S, where rows are not packed.
        weighting: of each label: "token" (1: a mean over tokens), "record" (1 / the record's labels: long
            answers count no more), "agreement" (the record's), or a function of the record.
        special_tokens: of a text that spells one, as "</s>", which would end the answer: "skip" or "keep".
            A ``system`` that does is refused, unless kept.
        eos_token_id: ends each target; by default the tokenizer's; None for none. Not with ``chat``.
        pad_token_id: by default the tokenizer's, else the end token, else 0: padding is masked, and no label
            is ever of it.

    Returns:
        :class:`Labels`, on the CPU. The last position of a record has no label: nothing follows it.
        Where every record is skipped, as may be in a data loader's batch, one row of padding without
        labels, its first token attended to, with a warning: its loss is 0, and so is the gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected; also of no records, and of
            a text on which the tokenizer fails.
    """
    if isinstance(records, Record | Mapping | str) or not hasattr(records, "__iter__"):
        raise TypeError(f"records must be an iterable of records, got {shown(records)}")
    for name, value in (("chat", chat), ("pack", pack)):
        flag(name, value)
    one_of("truncate", truncate, ("skip", "left"), {"right": "a target is never cut"})
    one_of("padding_side", padding_side, ("right", "left"))
    one_of("special_tokens", special_tokens, ("skip", "keep"))
    integer("pad_to_multiple_of", pad_to_multiple_of, 1)
    if not callable(weighting):
        one_of("weighting", weighting, ("token", "record", "agreement"))
    if max_length is not None:
        integer("max_length", max_length, 2)
    if pack and (max_length is None or pad_to_multiple_of != 1 or padding_side != "right"):
        raise ValueError(
            f"pack=True makes rows of max_length tokens, padded on the right: pass max_length alone, got "
            f"max_length={max_length}, pad_to_multiple_of={pad_to_multiple_of}, padding_side={padding_side!r}"
        )
    if chat and eos_token_id not in (AUTO, None):
        raise ValueError(f"eos_token_id is the chat template's with chat=True, got {eos_token_id}")
    if system is not None and not chat:
        raise ValueError("system needs chat=True: put it into prompt")
    texts = Texts(tokenizer, None if chat else eos_token_id, pad_token_id)
    if system is not None and special_tokens == "skip" and texts.holds_special(system):
        raise ValueError(
            f"system spells a special token of the tokenizer, got {shown(system)}: take it out, or pass "
            f"special_tokens='keep'"
        )
    pieces, places, skipped = [], [], []
    for place, record in enumerate(records):
        found = _ids(record, texts, prompt, system, chat, special_tokens == "keep")
        if not isinstance(found, str):
            found = _fitted(*found, max_length, truncate == "left", texts.special)
        if isinstance(found, str):
            skipped.append((place, found))
            continue
        pieces.append((*found, _weight(record, weighting, len(found[1]))))
        places.append(place)
    if not pieces and not skipped:
        raise ValueError("records must hold at least one, got none")
    if not pieces:
        why = ", ".join(sorted({reason for _, reason in skipped}))
        warnings.warn(
            f"none of the {len(skipped)} records gives labels ({why}): one row of padding, whose loss is 0",
            stacklevel=2,
        )
        pieces, places = [([texts.pad], [], 0.0)], [None]
    rows, records_of = _rows(pieces, places, max_length if pack else None)
    longest = max(sum(len(p) + len(t) for p, t, _ in row) for row in rows)
    width = max_length if pack else -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    records_of = [[place for place in row if place is not None] for row in records_of]
    return _filled(rows, width, padding_side == "left", texts.pad, records_of, skipped)


def _ids(record, texts: Texts, prompt, system, chat: bool, keep: bool):
    """Ids of prompt and target, and how the prompt can be cut; or why there are none."""
    target = part_of(record, "target")
    if target is not None and not isinstance(target, str):
        raise TypeError(f"target of a record must be a str or None, got {shown(target)}")
    if not target or not part_of(record, "kept", True):
        return NO_ANSWER
    asked = prompt_of(record, prompt)
    if not keep and (texts.holds_special(asked) or texts.holds_special(target)):
        return SPECIAL
    if not chat:
        end = [] if texts.eos is None else [texts.eos]
        before, after = texts.prompt_ids(asked), texts.ids(target, False) + end
        opening = before[:1] if before and before[0] in texts.special else []
        return (
            (before, after, lambda: (opening, before[len(opening) :], [])) if before else NO_PROMPT
        )
    messages = to_messages(record, prompt=prompt, system=system)
    opened = texts.template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = texts.template(messages, tokenize=False)
    if not whole.startswith(opened):
        raise ValueError(
            "tokenizer's chat template does not begin a chat with its generation prompt: write prompt= "
            f"out, with chat=False; the prompt is {shown(opened)}"
        )
    before, after = texts.ids(opened, False), texts.ids(whole[len(opened) :], False)
    cut = partial(_around, messages, opened, asked, texts)
    return (before, after, cut) if before else NO_PROMPT


def _around(messages, opened: str, asked: str, texts: Texts):
    """Ids of what a chat has before the last user's text, of that text with what follows, of what follows.

    None where the template changes the text.
    """
    marked = [*messages[:-2], messages[-2] | {"content": MARK}]
    parts = texts.template(marked, tokenize=False, add_generation_prompt=True).split(MARK)
    if len(parts) != 2 or asked.join(parts) != opened:
        return None
    head, tail = parts
    return [texts.ids(text, False) for text in (head, asked + tail, tail)]


def _fitted(before: list[int], after: list[int], cut, max_length, left: bool, special):
    """Within the window: cut or refused."""
    if max_length is None or len(before) + len(after) <= max_length:
        return before, after
    room = max_length - len(after)
    if room < (2 if before[0] in special else 1):
        return LONG_TARGET
    parts = cut() if left else None
    if parts is None or room <= len(parts[0]) + len(parts[2]):
        return LONG_PROMPT
    head, rest, _ = parts
    return head + rest[max(0, len(rest) + len(head) - room) :], after


def _weight(record, weighting, n_labels: int) -> float:
    if weighting == "token":
        return 1.0
    if weighting == "record":
        return 1.0 / n_labels
    value = part_of(record, "agreement") if weighting == "agreement" else weighting(record)
    value = number(f"weighting={weighting!r} of a record", value, "a number")
    if not 0 <= value < float("inf"):
        raise ValueError(f"weighting={weighting!r} must be finite and not negative, got {value}")
    return value


def _rows(pieces, places, width: int | None):
    """One piece a row, or as many of them, in order, as fit."""
    rows, records_of, used = [], [], 0
    for piece, place in zip(pieces, places, strict=True):
        length = len(piece[0]) + len(piece[1])
        if width is None or not rows or used + length > width:
            rows.append([])
            records_of.append([])
            used = 0
        rows[-1].append(piece)
        records_of[-1].append(place)
        used += length
    return rows, records_of


def _filled(rows, width: int, left: bool, pad: int, records_of, skipped) -> Labels:
    shape = len(rows), width
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    weights, segments = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    positions, starts = torch.arange(width).repeat(len(rows), 1), []
    for i, row in enumerate(rows):
        n_used = sum(len(before) + len(after) for before, after, _ in row)
        at = width - n_used if left else 0
        starts += [i * width] if at else []
        for segment, (before, after, weight) in enumerate(row, 1):
            end = at + len(before) + len(after)
            ids[i, at:end] = torch.tensor(before + after)
            of_target = slice(at + len(before) - 1, end - 1)
            labels[i, of_target] = torch.tensor(after)
            weights[i, of_target] = weight
            segments[i, at:end] = segment
            positions[i, at:] = torch.arange(width - at)
            starts.append(i * width + at)
            at = end
        if at < width:
            positions[i, at:] = torch.arange(width - at)
            starts.append(i * width + at)
    cu_seqlens = torch.tensor([*starts, len(rows) * width], dtype=torch.int32)
    mask = (segments > 0).long()
    return Labels(ids, labels, weights, mask, positions, segments, cu_seqlens, records_of, skipped)
