"""The options that the losses share, as users give them: their names, defaults and types, once."""

import inspect
from collections import namedtuple
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import torch

from .divergences.base import Divergence
from .divergences.built_in import SoftCrossEntropy
from .scalars import meant

Function = TypeVar("Function", bound=Callable)


class LossOptions(TypedDict, total=False):
    """Keyword arguments of a loss; :func:`distill_ops.distillation_loss` says what each does."""

    divergence: Divergence | str
    loss_mask: torch.Tensor | None
    labels: torch.Tensor | None
    ignore_index: int
    hard_label_weight: float
    soft_weight: float | None
    temperature: float
    scale_by_temperature_squared: bool
    reduction: str
    normalizer: float | torch.Tensor | None
    infinities: str
    vocab_size: int | None
    gradient: str
    return_components: bool
    token_outputs: Sequence[str]
    token_ids: torch.Tensor | None
    backend: str
    teacher_rows: torch.Tensor | None
    group: Any
    vocab_offset: int | None


DEFAULTS = LossOptions(
    divergence=SoftCrossEntropy(), loss_mask=None, labels=None, ignore_index=-100,
    hard_label_weight=0.0, soft_weight=None, temperature=1.0, scale_by_temperature_squared=False,
    reduction="mean", normalizer=None, infinities="drop", vocab_size=None, gradient="auto",
    return_components=False, token_outputs=(), token_ids=None, backend="auto", teacher_rows=None,
    group=None, vocab_offset=None,
)  # fmt: skip


# what other packages call our options
OTHER_NAMES = {
    "alpha": "a divergence takes it: divergence=SkewForwardKL(alpha=...)",
    "attention_mask": "pass loss_mask=",
    "batch_num_items": "pass normalizer=",
    "beta": "a divergence takes it: divergence=JensenShannon(beta=...)",
    "group": "losses on a support take whole rows: gather the logits, or take another loss",
    "jsd_beta": "a divergence takes it: divergence=JensenShannon(beta=...)",
    "device_mesh": "pass group=, the mesh's dimension that splits the vocabulary",
    "dp_group": "group= is of the ranks that split the vocabulary; others need none",
    "kd_ratio": "pass hard_label_weight=1 - kd_ratio",
    "kl_type": "pass divergence=",
    "label": "pass labels=",
    "loss_type": "pass divergence=",
    "mask": "pass loss_mask=",
    "num_items_in_batch": "pass normalizer=num_items_in_batch",
    "shift_labels": "pass labels=, which are shifted",
    "skew_alpha": "a divergence takes it: divergence=SkewForwardKL(alpha=...)",
    "T": "pass temperature=",
    "tp_group": "pass group=",
    "tp_mesh": "pass group=",
    "vocab_start_index": "pass vocab_offset=",
    "process_group": "pass group=",
    "target": "pass labels=",
    "targets": "pass labels=",
    "tau": "pass temperature=",
    "teacher_rows": "topk_distillation_loss and the losses of whole teachers take it",
    "vocab_parallel": "pass group=, the ranks that split the vocabulary",
    "weight_hard_loss": "pass hard_label_weight=",
    "weight_soft_loss": "pass soft_weight=",
}


class Counted(NamedTuple):
    """What says which tokens count."""

    loss_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    ignore_index: int = -100

    def kept(self, like: torch.Tensor) -> torch.Tensor:
        """Which tokens count, in the shape of ``like``."""
        kept = torch.ones_like(like, dtype=torch.bool)
        if self.loss_mask is not None:
            kept = kept & (self.loss_mask != 0)
        if self.labels is not None:
            kept = kept & (self.labels != self.ignore_index)
        return kept


class LossArguments(namedtuple("LossArguments", DEFAULTS, defaults=DEFAULTS.values())):
    """All of the options, those that were not given at their defaults."""

    @property
    def counted(self) -> Counted:
        return Counted(self.loss_mask, self.labels, self.ignore_index)

    @property
    def share(self) -> float:
        """The divergence's weight."""
        return 1 - self.hard_label_weight if self.soft_weight is None else self.soft_weight

    @property
    def soft(self) -> bool:
        """Whether the divergence has a part in the loss."""
        return self.share != 0

    @property
    def hard(self) -> bool:
        """Whether the hard labels have."""
        return self.hard_label_weight != 0

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Mask, labels, normalizer, parameters, the ids of the tokens' log-probabilities and teacher rows, as
        operators take them: numbers are among the options."""
        normalizer = self.normalizer if isinstance(self.normalizer, torch.Tensor) else None
        tensors = self.loss_mask, self.labels, normalizer, self.divergence.tensors, self.token_ids
        return *tensors, self.teacher_rows if self.soft else None


class Tail(NamedTuple):
    """What becomes of the columns outside a top-k teacher's K; None: there is no such teacher."""

    name: str | None = None
    mass_terms: bool = False  # whether "drop" adds what makes a KL the generalised KL
    log_prob_floor: float | None = None  # of both models' log-probabilities


NO_TAIL = Tail()


def with_options(
    hints: type, defaults: Mapping[str, Any], *without: str
) -> Callable[[Function], Function]:
    """Give a function with ``**options`` the signature that lists them, those of a TypedDict, ``hints``, but
    those it goes without."""

    def sign(function: Function) -> Function:
        signature = inspect.signature(function)
        own = list(signature.parameters.values())[:-1]
        shared = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint
            )
            for name, hint in get_type_hints(hints).items()
            if name not in without
        ]
        function.__signature__ = signature.replace(parameters=own + shared)
        listed = {p.name: p.annotation for p in own + shared}
        function.__annotations__ = {**listed, "return": signature.return_annotation}
        return function

    return sign


def with_loss_options(*without: str) -> Callable[[Function], Function]:
    """:func:`with_options` of a loss."""
    return with_options(LossOptions, DEFAULTS, *without)


def check_names(
    function: str, given: Collection[str], known: Collection[str], hints: Mapping[str, str]
) -> None:
    """A TypeError for an option that a function does not have; ``hints`` say what is meant by others."""
    for name in given:
        if name not in known:
            hint = f": {hints[name]}" if name in hints else meant(name, known)
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def loss_arguments(
    function: str, options: LossOptions, *without: str, own: tuple[str, ...] = ()
) -> LossArguments:
    """The options that a function was given; a TypeError where it has no such option. Those that are its
    ``own``, and not here, are for the message."""
    check_names(function, options, [x for x in (*DEFAULTS, *own) if x not in without], OTHER_NAMES)
    return LossArguments(**options)
