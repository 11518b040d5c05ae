"""One of the two tokenizers that are compared, whatever library it is of: its ids, and how it cuts text."""

import re
from collections.abc import Callable, Collection, Mapping

ROLES = ("bos", "eos", "unk", "pad")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # how an added token is found in text


class Side:
    """``tokenizers.Tokenizer``, or a tokenizer of transformers, slow or fast; neither is imported here."""

    def __init__(self, name: str, tokenizer, columns: int | None):
        self.name = name  # "student" or "teacher"
        self.columns = columns  # of its model's logits, where known
        if _is_of_tokenizers(tokenizer):
            backend = tokenizer
            _refuse_dropout(name, "tokenizer.model", backend)
            self._encode = _encoder(name, tokenizer)
            added = tokenizer.get_added_tokens_decoder()
            self.roles: dict[str, str | None] | None = None  # it does not know them, but this:
            pad = tokenizer.padding["pad_token"] if tokenizer.padding else None
            self.chat_template = None
        elif _is_of_transformers(tokenizer):
            backend = getattr(tokenizer, "backend_tokenizer", None)  # of a fast one
            _refuse_dropout(name, "tokenizer.backend_tokenizer.model", backend)
            self._encode = _caller(tokenizer, backend)
            added = tokenizer.added_tokens_decoder
            known = tokenizer.special_tokens_map
            self.roles = {role: known.get(f"{role}_token") for role in ROLES}
            pad = self.roles["pad"]
            self.chat_template = getattr(tokenizer, "chat_template", None)
        else:
            raise TypeError(_not_a_tokenizer(name, tokenizer))
        self.ids: dict[str, int] = tokenizer.get_vocab()
        if not self.ids:
            raise ValueError(f"{name}: expected a tokenizer with tokens, got one of none")
        self.tokens = {i: token for token, i in sorted(self.ids.items())}
        self.added = {int(i): str(token) for i, token in added.items()}
        self.special = {int(i) for i, token in added.items() if token.special}
        self.flags = {
            int(i): {flag for flag in FLAGS if getattr(token, flag)} for i, token in added.items()
        }
        slow = backend is None
        if not (getattr(tokenizer, "do_lower_case", False) if slow else backend.normalizer):
            for flags in self.flags.values():
                flags.discard("normalized")  # nothing changes a text
        # where padding is also an end, it is more than padding
        ends = {token for role, token in (self.roles or {}).items() if role != "pad"}
        self.pad = self.ids.get(str(pad)) if pad is not None and pad not in ends else None

    def encode(self, label: str, text: str, special: bool = False) -> list[int]:
        """Ids of the whole text, neither truncated nor padded."""
        try:
            return list(self._encode(text, special))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(
                f"{self.name}: its tokenizer fails on the text {label!r} ({error}); texts= takes others"
            ) from error

    def cut(self, label: str, text: str, without: Collection[str] = ()) -> list[str]:
        """The tokens of a text, or of what is left between some that are taken out."""
        pieces = [text]
        if without:  # the longest first: one may begin as another does
            pattern = "|".join(map(re.escape, sorted(without, key=len, reverse=True)))
            pieces = filter(None, re.split(pattern, text))
        return [self.token(i) for piece in pieces for i in self.encode(label, piece)]

    def wrapped(self, texts: Mapping[str, str]) -> str | None:
        """What the tokenizer puts before and after a text; None where no text tells."""
        for label, text in sorted(texts.items(), key=lambda item: len(item[1])):
            bare, whole = (self.encode(label, text, special) for special in (False, True))
            n = len(bare)
            starts = [i for i in range(len(whole) - n + 1) if whole[i : i + n] == bare]
            if not starts:
                return f"changed: {' '.join(map(self.token, whole))}"
            if len(starts) == 1:  # more where nothing is left of the text, or it is an end itself
                around = whole[: starts[0]], whole[starts[0] + n :]
                return " ".join([*map(self.token, around[0]), "...", *map(self.token, around[1])])
        return None

    def token(self, i: int) -> str:
        return self.tokens.get(i, f"id {i}")


def _is_of_tokenizers(tokenizer) -> bool:
    needed = ("get_vocab", "id_to_token", "get_added_tokens_decoder", "encode", "to_str")
    return not isinstance(tokenizer, type) and all(hasattr(tokenizer, name) for name in needed)


def _is_of_transformers(tokenizer) -> bool:
    needed = ("get_vocab", "added_tokens_decoder", "special_tokens_map")
    has_all = callable(tokenizer) and all(hasattr(tokenizer, name) for name in needed)
    return has_all and not isinstance(tokenizer, type)


def _encoder(name: str, tokenizer) -> Callable[[str, bool], list[int]]:
    """Without the truncation and padding that it may be set to."""
    if tokenizer.truncation or tokenizer.padding:
        try:
            tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        except Exception as error:  # a component written in Python
            raise ValueError(
                f"{name}: its tokenizer truncates or pads and cannot be copied ({error}); call "
                "no_truncation() and no_padding() of it first"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids


def _caller(tokenizer, backend) -> Callable[[str, bool], list[int]]:
    """Of transformers, whose fast tokenizers forget on a call how they were set to truncate and pad."""

    def encode(text: str, special: bool) -> list[int]:
        truncation, padding = (getattr(backend, what, None) for what in ("truncation", "padding"))
        try:
            return tokenizer(
                text, add_special_tokens=special, padding=False, truncation=False, verbose=False
            )["input_ids"]
        finally:
            if truncation:
                backend.enable_truncation(**truncation)
            if padding:
                backend.enable_padding(**padding)

    return encode


def _refuse_dropout(name: str, where: str, backend) -> None:
    dropout = getattr(getattr(backend, "model", None), "dropout", None)
    if isinstance(dropout, float) and dropout > 0:
        raise ValueError(
            random_cuts(name, f"BPE dropout of {dropout:.3g}", f"{where}.dropout = None")
        )


def random_cuts(name: str, got: str, remedy: str) -> str:
    """The message."""
    return (
        f"{name}: expected a tokenizer that cuts a text the same way each time, got {got}: compare without "
        f"it ({remedy})"
    )


def _not_a_tokenizer(name: str, tokenizer) -> str:
    hint = ""
    if isinstance(tokenizer, str):
        hint = ": nothing is loaded here, pass AutoTokenizer.from_pretrained(...)"
    elif hasattr(tokenizer, "tokenizer"):
        hint = f": pass the tokenizer that it has, {name}.tokenizer"
    what = "a tokenizers.Tokenizer or a tokenizer of transformers"
    return f"{name}: expected {what}, got {type(tokenizer).__name__}{hint}"
