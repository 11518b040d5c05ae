"""One of the two tokenizers that are compared, whatever library it is of: its ids, and how it cuts text."""

from collections.abc import Callable

ROLES = ("bos", "eos", "unk", "pad")


class Side:
    """``tokenizers.Tokenizer``, or a tokenizer of transformers, slow or fast; neither is imported here."""

    def __init__(self, name: str, tokenizer, columns: int | None):
        self.name = name  # "student" or "teacher"
        self.columns = columns  # of its model's logits, where known
        if _is_of_tokenizers(tokenizer):
            self._encode = _encoder(name, tokenizer)
            added = tokenizer.get_added_tokens_decoder()
            self.roles: dict[str, str | None] | None = None  # it does not know them, but this:
            pad = tokenizer.padding["pad_token"] if tokenizer.padding else None
            self.chat_template = None
        elif _is_of_transformers(tokenizer):
            self._encode = lambda text, special: tokenizer(
                text, add_special_tokens=special, padding=False, truncation=False, verbose=False
            )["input_ids"]
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

    def cut(self, label: str, text: str) -> list[str]:
        """The tokens of a text."""
        return [self.token(i) for i in self.encode(label, text)]

    def wrapped(self, text: str) -> str:
        """What the tokenizer puts before and after a text."""
        bare, whole = (self.encode(text, text, special) for special in (False, True))
        starts = range(len(whole) - len(bare) + 1)
        start = next((i for i in starts if whole[i : i + len(bare)] == bare), None)
        if start is None:
            return "changed"
        around = whole[:start], whole[start + len(bare) :]
        return " ".join([*map(self.token, around[0]), "...", *map(self.token, around[1])])

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


def _not_a_tokenizer(name: str, tokenizer) -> str:
    hint = ""
    if isinstance(tokenizer, str):
        hint = ": nothing is loaded here, pass AutoTokenizer.from_pretrained(...)"
    elif hasattr(tokenizer, "tokenizer"):
        hint = f": pass the tokenizer that it has, {name}.tokenizer"
    what = "a tokenizers.Tokenizer or a tokenizer of transformers"
    return f"{name}: expected {what}, got {type(tokenizer).__name__}{hint}"
