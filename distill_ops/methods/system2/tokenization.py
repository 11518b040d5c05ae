"""A user's tokenizer: texts to ids, its special tokens, and the ids that end and pad."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

from ...scalars import integer, shown

AUTO = "auto"
END = "<|endoftext|>"  # as tiktoken calls it


class Texts:
    """A tokenizer of ``transformers``, ``tokenizers`` or ``tiktoken``, or a function of a text to its ids."""

    def __init__(self, tokenizer: Any, eos_token_id, pad_token_id):
        self._tokenizer = tokenizer
        is_one = callable(tokenizer) or hasattr(tokenizer, "encode")
        if not is_one or isinstance(tokenizer, str | bytes | type):
            raise TypeError(
                f"tokenizer must be one of transformers, tokenizers or tiktoken, or a function of a text to "
                f"its ids, got {shown(tokenizer)}"
            )
        for name in ("truncation", "padding"):  # of tokenizers, which then cuts and pads any text
            if isinstance(getattr(tokenizer, name, None), dict):
                raise ValueError(f"tokenizer has {name} switched on: call its no_{name}()")
        self._encode = _encoder(tokenizer)
        self.special = _special_ids(tokenizer)
        self.eos = self._end(eos_token_id)
        self.pad = self._padding(pad_token_id)

    def _end(self, given) -> int | None:
        if given == AUTO:
            given = getattr(self._tokenizer, "eos_token_id", None)
            if _is_of_tiktoken(self._tokenizer) and END in self._tokenizer.special_tokens_set:
                given = self._tokenizer.eot_token
            if given is None:
                raise ValueError(
                    "tokenizer has no eos_token_id: pass eos_token_id=, so that the model learns to stop, or "
                    "None where the target itself ends"
                )
        return None if given is None else integer("eos_token_id", given, 0)

    def _padding(self, given) -> int:
        known = [
            given,
            getattr(self._tokenizer, "pad_token_id", None),
            self.eos,
            getattr(self._tokenizer, "eos_token_id", None),
            0,
        ]
        return integer("pad_token_id", next(x for x in known if x is not None), 0)

    def ids(self, text: str, special: bool) -> list[int]:
        """With or without the special tokens that the tokenizer puts around a text."""
        try:
            found = self._encode(text, special)
        except Exception as error:  # tokenizers raises bare Exceptions
            hint = ""
            if _is_of_tiktoken(getattr(self._tokenizer, "__self__", None)):
                hint = " (pass the Encoding itself, whose special tokens are then known)"
            raise ValueError(
                f"tokenizer fails on the text {shown(text)}{hint}: {type(error).__name__}: {error}"
            ) from error
        ids = list(getattr(found, "ids", found))
        if ids and not isinstance(ids[0], Integral):
            raise TypeError(f"tokenizer must return a list of ids, got {shown(found)}")
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """As a model is asked: with the special tokens before a text, without those behind it."""
        bare, ids = self.ids(text, False), self.ids(text, True)
        if not bare:
            return ids[:1] if ids and ids[0] != self.eos else []
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return ids[: start + len(bare)]
        while ids and ids[-1] in self.special:
            ids.pop()
        return ids

    def holds_special(self, text: str) -> bool:
        """Whether a text spells a special token, which would become that token."""
        return bool(self.special) and not self.special.isdisjoint(self.ids(text, False))

    @property
    def template(self) -> Callable:
        found = getattr(self._tokenizer, "apply_chat_template", None)
        if found is None:
            raise TypeError(
                f"chat=True needs a tokenizer with apply_chat_template, got {shown(self._tokenizer)}"
            )
        return found


def _is_of_tiktoken(tokenizer: Any) -> bool:
    return all(hasattr(tokenizer, x) for x in ("encode_single_token", "special_tokens_set"))


def _encoder(tokenizer: Any) -> Callable[[str, bool], Any]:
    if not hasattr(tokenizer, "encode"):
        return lambda text, special: tokenizer(text)
    if _is_of_tiktoken(tokenizer):  # which refuses a text that spells a special token, if not told
        return lambda text, special: tokenizer.encode(text, allowed_special="all")
    return lambda text, special: tokenizer.encode(text, add_special_tokens=special)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Those that a text should not spell; what stands for unknown characters is not among them."""
    found, unknown = set(), None
    if _is_of_tiktoken(tokenizer):
        return frozenset(map(tokenizer.encode_single_token, tokenizer.special_tokens_set))
    if hasattr(tokenizer, "all_special_ids"):
        added = getattr(tokenizer, "added_tokens_decoder", {})
        found = set(tokenizer.all_special_ids)
        unknown = tokenizer.unk_token_id
        if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            unknown = None
    elif hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
        name = getattr(tokenizer.model, "unk_token", None)
        unknown = None if name is None else tokenizer.token_to_id(name)
    else:
        return frozenset()
    found |= {i for i, token in added.items() if token.special}
    return frozenset(found - {unknown})
