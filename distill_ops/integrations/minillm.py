"""Drop-in for the distillation loss of MiniLLM's ``finetune.py`` (LMOps, arXiv:2306.08543).

Replace ``get_distil_loss`` there by the one here. It runs the teacher and returns the same number,
without a probability tensor of the vocabulary's size.
"""

import importlib
from typing import Any

import torch

from ..api.dense import distillation_loss
from ..checks.values import check_share
from ..results import LossComponents

IGNORE_INDEX = -100  # MiniLLM's label of prompt and padding tokens


def teacher_logits(teacher_model: torch.nn.Module, model_batch: dict) -> torch.Tensor:
    """Logits of the teacher, in eval mode, without gradient or cache.

    ``teacher_model(**model_batch, use_cache=False).logits``
    A model and its keyword arguments go in, ``[batch, seq, vocab]`` comes out, detached.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from distill_ops.integrations.minillm import teacher_logits
        >>> teacher = torch.nn.Linear(2, 4)
        >>> teacher.forward = lambda hidden, use_cache: SimpleNamespace(
        ...     logits=torch.nn.functional.linear(hidden, teacher.weight)
        ... )
        >>> logits = teacher_logits(teacher, {"hidden": torch.zeros(1, 3, 2)})
        >>> logits.shape, logits.requires_grad, teacher.training
        (torch.Size([1, 3, 4]), False, False)
    """
    teacher_model.eval()
    with torch.no_grad():
        return teacher_model(**model_batch, use_cache=False).logits


def _split_group(args: Any, group: Any) -> Any:
    """The ranks that split the vocabulary: as given, or those of the model-parallel utilities in MiniLLM's
    own transformers."""
    if not getattr(args, "model_parallel", False):
        if group is not None:
            raise ValueError(
                "group is given, but args.model_parallel is false: leave one of them out"
            )
        return None
    if group is not None:
        return group
    try:
        mpu = importlib.import_module("transformers.mpu")
    except ImportError as error:
        raise ValueError(
            "args.model_parallel is true, and transformers has no mpu (MiniLLM's own version has): pass "
            "group=, the process group that splits the vocabulary"
        ) from error
    return mpu.get_model_parallel_group()


def get_distil_loss(
    args: Any, tokenizer: Any, model: Any, teacher_model: torch.nn.Module, model_batch: dict,
    no_model_batch: dict, logits: torch.Tensor, *, group: Any = None,
) -> torch.Tensor:  # fmt: skip
    """MiniLLM's distillation loss, with the signature of its ``finetune.py``.

    ``-sum(softmax(t) * log_softmax(s))``, averaged over the tokens with a label; in nats.
    Logits ``[batch, seq, vocab]``, the teacher and its batch go in, a 0-d loss comes out.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from distill_ops.integrations.minillm import get_distil_loss
        >>> teacher = torch.nn.Module()
        >>> teacher.forward = lambda **batch: SimpleNamespace(logits=torch.zeros(1, 2, 4))
        >>> logits = torch.zeros(1, 2, 4, requires_grad=True)
        >>> batch, labels = {"input_ids": torch.tensor([[1, 2]])}, torch.tensor([[3, -100]])
        >>> loss = get_distil_loss(
        ...     SimpleNamespace(model_parallel=False), None, None, teacher, batch,
        ...     {"label": labels}, logits,
        ... )
        >>> round(loss.item(), 4)  # log(4)
        1.3863

    Terms where the student's logit is infinite are dropped. No shift happens here, nor there:
    MiniLLM's data set has shifted ``no_model_batch["label"]`` already. With Hugging Face labels call
    :func:`distill_ops.distillation_loss` of ``logits[:, :-1]`` and ``labels[:, 1:]``.

    Args:
        args: MiniLLM's arguments; only ``model_parallel`` is read: whether each rank has its columns of
            both models' logits. The original loses its mask of infinite logits then; here their terms are
            dropped all the same.
        tokenizer, model: not used, as in the original.
        teacher_model: returns an object with ``.logits`` ``[batch, seq, vocab]``.
        model_batch: keyword arguments of the models.
        no_model_batch: ``"label"`` ``[batch, seq]`` int64, aligned with the logits; tokens of label
            -100 do not count.
        logits: the student's, ``[batch, seq, vocab]``.
        group: under ``args.model_parallel``, the process group that splits the vocabulary, by default
            ``mpu.get_model_parallel_group()`` of MiniLLM's transformers.

    Returns:
        0-d float32 loss in nats; 0 where no token has a label.

    Raises:
        ValueError: the two vocabularies differ, or ``args.model_parallel`` without a group.
    """
    group = _split_group(args, group)
    mask = no_model_batch["label"] != IGNORE_INDEX
    teacher = teacher_logits(teacher_model, model_batch)
    return distillation_loss(logits, teacher, loss_mask=mask, group=group)


def get_mixed_loss(
    args: Any, teacher_model: torch.nn.Module, model_batch: dict, no_model_batch: dict,
    logits: torch.Tensor, *, group: Any = None,
) -> LossComponents:  # fmt: skip
    """MiniLLM's loss of ``finetune.py``, cross-entropy and distillation in one pass.

    ``(1 - kd_ratio) * lm_loss + kd_ratio * distil_loss``, over the tokens with a label; in nats.
    Logits ``[batch, seq, vocab]``, the teacher and its batch go in, a loss and its parts come out.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from distill_ops.integrations.minillm import get_mixed_loss
        >>> logits, labels = torch.zeros(1, 2, 4, requires_grad=True), torch.tensor([[3, -100]])
        >>> teacher = torch.nn.Module()
        >>> teacher.forward = lambda use_cache: SimpleNamespace(logits=torch.zeros(1, 2, 4))
        >>> args = SimpleNamespace(kd_ratio=0.5)
        >>> losses = get_mixed_loss(args, teacher, {}, {"label": labels}, logits)
        >>> losses.loss.backward()
        >>> round(losses.hard_label.item(), 4)
        1.3863

    Args:
        args: ``kd_ratio``, a number in [0, 1]; ``model_parallel`` as in :func:`get_distil_loss`.
        teacher_model, model_batch, no_model_batch, logits, group: as there. At ``kd_ratio`` 0 the
            teacher does not run.

    Returns:
        ``LossComponents(loss, divergence, hard_label)``: the mixed loss, to call ``backward`` on,
        and its two parts for logging.

    Raises:
        ValueError: as :func:`get_distil_loss`, or ``kd_ratio`` outside [0, 1].
    """
    group = _split_group(args, group)
    kd_ratio = check_share("args.kd_ratio", args.kd_ratio)
    teacher = teacher_logits(teacher_model, model_batch) if kd_ratio > 0 else None
    return distillation_loss(
        logits,
        teacher,
        labels=no_model_batch["label"],
        ignore_index=IGNORE_INDEX,
        hard_label_weight=1 - kd_ratio,
        return_components=True,
        group=group,
    )
