"""Every check of a user's arguments, before any kernel runs.

Checks that would wait for the GPU (values of labels) run on CPU tensors, and on the GPU only
under ``set_debug(True)``.
"""

import math

import torch

from .divergences import Divergence, Domain, as_divergence

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
INFINITIES = ("drop", "propagate")
GRADIENTS = ("auto", "forward", "backward")
BACKENDS = ("auto", "triton", "torch")
TAILS = ("bucket", "renormalize", "ignore")
MOST_SLOTS = 1024  # of a top-k teacher: a vector of the kernel holds them and the rest

_debug = False


def set_debug(enabled: bool) -> None:
    """Switch the checks that wait for the GPU on or off.

    ``True``: calls read ids, labels and parameters on the GPU and refuse those out of range.
    A bool goes in; without it (the default) no call waits for a GPU to look at values.

    Example:
        >>> import distill_ops
        >>> distill_ops.set_debug(True)
        >>> distill_ops.set_debug(False)
    """
    global _debug
    _debug = bool(enabled)


def _readable(*tensors: torch.Tensor | None) -> bool:
    """Whether values of all of them may be checked: where that waits for no GPU, or in debug mode;
    not of a batch under vmap, on which no branch can depend."""
    if torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if any(torch._C._functorch.is_batchedtensor(tensor) for tensor in given):
        return False
    return _debug or all(tensor.device.type == "cpu" for tensor in given)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _number(name: str, value: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return float(value)


def _logits(name: str, logits: torch.Tensor) -> None:
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [..., vocab], got {type(logits).__name__}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64 logits, got {logits.dtype}"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} must be [..., vocab] with at least one column, got shape {tuple(logits.shape)}"
        )


def _constant(name: str, tensor: torch.Tensor, advice: str) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient here: {advice}")


def _of_teacher(name: str, tensor: torch.Tensor) -> None:
    """What a teacher's forward gave, which is a constant; where no graph is made it may require grad."""
    if torch.is_grad_enabled():
        _constant(name, tensor, "detach it, or run the teacher under torch.no_grad()")


def _leading_shape(name: str, leading, rows: torch.Tensor, of: str = "student_logits") -> None:
    if leading != rows.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading shape of {of}, "
            f"{tuple(rows.shape[:-1])}, got {tuple(leading)}"
        )


def _per_token(
    name: str, tensor: torch.Tensor, rows: torch.Tensor, of: str = "student_logits"
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [...], got {type(tensor).__name__}")
    _leading_shape(name, tensor.shape, rows, of)
    _same_device(name, tensor, rows, of)


def _same_device(
    name: str, tensor: torch.Tensor, other: torch.Tensor, of: str = "student_logits"
) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but {of} on {other.device}: move one of them"
        )


def _pair(student_logits: torch.Tensor, teacher_logits: torch.Tensor, vocab_size) -> None:
    _logits("teacher_logits", teacher_logits)
    _same_device("teacher_logits", teacher_logits, student_logits)
    _of_teacher("teacher_logits", teacher_logits)
    _leading_shape("teacher_logits", teacher_logits.shape[:-1], student_logits)
    if vocab_size is None and teacher_logits.shape[-1] != student_logits.shape[-1]:
        raise ValueError(
            f"student_logits have {student_logits.shape[-1]} columns and teacher_logits "
            f"{teacher_logits.shape[-1]}: pass vocab_size= to use the first columns of both "
            f"(heads padded to different widths)"
        )


def _vocabulary(student_logits, teacher_logits, vocab_size) -> int:
    widest = student_logits.shape[-1]
    if teacher_logits is not None:
        widest = min(widest, teacher_logits.shape[-1])
    if vocab_size is None:
        return widest
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size must be an int or None, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= widest:
        raise ValueError(f"vocab_size must lie in [1, {widest}], got {vocab_size}")
    return vocab_size


def _label_values(labels, loss_mask, ignore_index: int, n_cols: int, name: str = "labels") -> None:
    """Labels of tokens that count; what a masked token is labelled does not matter."""
    if not _readable(labels, loss_mask):
        return
    outside = (labels < 0) | (labels >= n_cols)
    outside &= _kept(labels, loss_mask, labels, ignore_index)
    if outside.any():
        raise ValueError(
            f"{name} must lie in [0, {n_cols}) or equal ignore_index={ignore_index}, "
            f"got {labels[outside].flatten()[0].item()}"
        )


def _ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def _ids(name: str, ids: torch.Tensor, rows: torch.Tensor, of: str = "student_logits") -> None:
    _per_token(name, ids, rows, of)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 token ids, got {ids.dtype}")


def _parameters(
    divergence: Divergence,
    student_logits,
    loss_mask,
    labels,
    ignore_index: int,
    of: str = "student_logits",
) -> None:
    """Parameters given as tensors; of a token that does not count any value will do."""
    for name, value in zip(divergence.__match_args__, divergence.parameters, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        title = f"{name} of {divergence.name}"
        if value.dim():
            _per_token(title, value, student_logits, of)
        _same_device(title, value, student_logits, of)
        if not _readable(value, loss_mask, labels):
            continue
        domain = divergence.domain(name)
        outside = _outside(value, domain)
        if value.dim():
            outside &= _kept(outside, loss_mask, labels, ignore_index)
        if outside.any():
            raise ValueError(
                f"{title}, a tensor, must hold values {domain.text(domain.tensor_ends)}, "
                f"got {value[outside].flatten()[0].item()}"
            )


def _outside(value: torch.Tensor, domain: Domain) -> torch.Tensor:
    if domain.tensor_ends:
        return ~((value >= domain.low) & (value <= domain.high))
    return ~((value > domain.low) & (value < domain.high))


def check_normalizer(
    normalizer, reduction: str, student_logits: torch.Tensor, of: str = "student_logits"
) -> None:
    if reduction != "mean":
        raise ValueError(
            f"normalizer replaces the token count of reduction='mean', got reduction={reduction!r}"
        )
    if isinstance(normalizer, torch.Tensor):
        _constant("normalizer", normalizer, "detach it")
        _same_device("normalizer", normalizer, student_logits, of)
        if normalizer.dim() != 0 or normalizer.is_complex() or normalizer.dtype == torch.bool:
            raise ValueError(
                f"normalizer must be a number or a real 0-d tensor, "
                f"got {normalizer.dtype} of shape {tuple(normalizer.shape)}"
            )
    elif not 0 <= _number("normalizer", normalizer, "a number or a 0-d tensor") < math.inf:
        raise ValueError(f"normalizer must be finite and not negative, got {normalizer}")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes that a tensor spans: from, to."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_inplace(student_logits: torch.Tensor, teacher_logits: torch.Tensor | None) -> None:
    """Whether the gradient may overwrite the student's logits, which require grad.

    Raises:
        ValueError: they are a leaf, share memory with themselves or the teacher's.
    """
    base = student_logits._base
    if student_logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True would overwrite student_logits, a leaf that requires grad (a parameter), or "
            "a view of one: pass the output of the model, or inplace=False"
        )
    if torch.compiler.is_compiling() or student_logits.numel() == 0:
        return
    if any(
        s == 0 and n > 1 for n, s in zip(student_logits.shape, student_logits.stride(), strict=True)
    ):
        raise ValueError(
            f"inplace=True needs student_logits without repeated memory, got strides "
            f"{student_logits.stride()} (expanded): pass .contiguous(), or inplace=False"
        )
    if teacher_logits is None or type(student_logits) is not torch.Tensor:
        return
    (start, end), (other_start, other_end) = _extent(student_logits), _extent(teacher_logits)
    if start < other_end and other_start < end:
        raise ValueError(
            "inplace=True would overwrite teacher_logits, which share memory with student_logits: "
            "pass teacher_logits.clone(), or inplace=False"
        )


def check_temperature(temperature: float) -> float:
    temperature = _number("temperature", temperature, "a positive number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 1e-18 <= temperature <= 1e18:  # its square and inverse must be float32 numbers
        raise ValueError(f"temperature must lie in [1e-18, 1e18], got {temperature}")
    return temperature


def check_pair(student_logits, teacher_logits, vocab_size: int | None) -> int:
    """Check two rows of logits; returns the number of columns used."""
    _logits("student_logits", student_logits)
    _pair(student_logits, teacher_logits, vocab_size)
    return _vocabulary(student_logits, teacher_logits, vocab_size)


def check_integer(name: str, value: int, low: int, high: int | None = None) -> int:
    expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {expected}, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def check_teacher_logits(logits: torch.Tensor, vocab_size: int | None) -> int:
    """Check a teacher's logits that stand alone; returns the number of columns used."""
    _logits("logits", logits)
    _of_teacher("logits", logits)
    return _vocabulary(logits, None, vocab_size)


def check_sampled_log_probs(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Check the two models' log-probabilities of the same sampled tokens."""
    for name, tensor in (("student_log_prob", student), ("teacher_log_prob", teacher)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [...], got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_log_prob must have the shape of student_log_prob, {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    _same_device("teacher_log_prob", teacher, student, "student_log_prob")
    _of_teacher("teacher_log_prob", teacher)


def check_arguments(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    divergence: Divergence | str,
    loss_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    ignore_index: int,
    hard_label_weight: float,
    temperature: float,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    infinities: str,
    vocab_size: int | None,
) -> tuple[Divergence, int]:
    """Check the arguments of the dense loss.

    Returns:
        The divergence, routed to the one it is at an end point, and the number of columns used.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    _logits("student_logits", student_logits)
    one_of("infinities", infinities, INFINITIES)
    if teacher_logits is not None:
        _pair(student_logits, teacher_logits, vocab_size)
    n_cols = _vocabulary(student_logits, teacher_logits, vocab_size)
    divergence = check_options(
        student_logits, n_cols, divergence, loss_mask, labels, ignore_index, hard_label_weight,
        temperature, reduction, normalizer,
    )  # fmt: skip
    _teacher_needed("teacher_logits", teacher_logits, hard_label_weight)
    return divergence, n_cols


def _teacher_needed(name: str, teacher: torch.Tensor | None, hard_label_weight: float) -> None:
    if teacher is None and hard_label_weight < 1:
        raise ValueError(
            f"{name} is None, which needs hard_label_weight=1, got {hard_label_weight}"
        )


def check_options(
    student_logits: torch.Tensor,
    n_cols: int,
    divergence: Divergence | str,
    loss_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    ignore_index: int,
    hard_label_weight: float,
    temperature: float,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    of: str = "student_logits",
) -> Divergence:
    """Check the options that every form of the loss takes; returns the routed divergence.

    ``student_logits`` may be another tensor whose rows are the tokens, which the user calls
    ``of``."""
    one_of("reduction", reduction, REDUCTIONS)
    divergence = as_divergence(divergence)
    check_temperature(temperature)
    weight = _number("hard_label_weight", hard_label_weight, "a number in [0, 1]")
    if not 0 <= weight <= 1:
        raise ValueError(f"hard_label_weight must lie in [0, 1], got {hard_label_weight}")
    if loss_mask is not None:
        _per_token("loss_mask", loss_mask, student_logits, of)
        _constant("loss_mask", loss_mask, "detach it")
        if loss_mask.is_complex():
            raise TypeError(f"loss_mask must be bool, int or float, got {loss_mask.dtype}")
    _ignore_index(ignore_index)
    if labels is not None:
        _ids("labels", labels, student_logits, of)
        _label_values(labels, loss_mask, ignore_index, n_cols)
    elif weight > 0:
        raise ValueError(f"hard_label_weight={hard_label_weight} needs labels, got None")
    if weight < 1:
        _parameters(divergence, student_logits, loss_mask, labels, ignore_index, of)
    if normalizer is not None:
        check_normalizer(normalizer, reduction, student_logits, of)
    return divergence


def check_topk(
    student_logits: torch.Tensor,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    tail: str,
    divergence: Divergence | str,
    loss_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    ignore_index: int,
    hard_label_weight: float,
    temperature: float,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    vocab_size: int | None,
) -> tuple[Divergence, int]:
    """Check the arguments of the loss against a top-k teacher; returns as check_arguments does."""
    _logits("student_logits", student_logits)
    n_cols = _vocabulary(student_logits, None, vocab_size)
    divergence = check_options(
        student_logits, n_cols, divergence, loss_mask, labels, ignore_index, hard_label_weight,
        temperature, reduction, normalizer,
    )  # fmt: skip
    check_slots(
        student_logits, "student_logits", n_cols, teacher_log_probs, teacher_ids, tail, loss_mask,
        labels, ignore_index, hard_label_weight,
    )  # fmt: skip
    return divergence, n_cols


def check_slots(
    rows: torch.Tensor,
    of: str,
    n_cols: int,
    teacher_log_probs: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    tail: str,
    loss_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    ignore_index: int,
    hard_label_weight: float,
) -> None:
    """Check a top-k teacher for the tokens that are the rows of a tensor, which the user calls
    ``of``; the options passed :func:`check_options`."""
    one_of("tail", tail, TAILS)
    for name, tensor in (("teacher_log_probs", teacher_log_probs), ("teacher_ids", teacher_ids)):
        _teacher_needed(name, tensor, hard_label_weight)
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [..., K], got {type(tensor).__name__}")
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must be [..., K] with at least one slot, got shape {tuple(tensor.shape)}"
            )
        _leading_shape(name, tensor.shape[:-1], rows, of)
        _same_device(name, tensor, rows, of)
    if teacher_log_probs is None or teacher_ids is None:
        return
    if teacher_log_probs.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"teacher_log_probs must be float32, bfloat16, float16 or float64, "
            f"got {teacher_log_probs.dtype}"
        )
    if teacher_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"teacher_ids must be int64 or int32 token ids, got {teacher_ids.dtype}")
    if teacher_ids.shape != teacher_log_probs.shape:
        raise ValueError(
            f"teacher_ids must have the shape of teacher_log_probs, "
            f"{tuple(teacher_log_probs.shape)}, got {tuple(teacher_ids.shape)}"
        )
    _of_teacher("teacher_log_probs", teacher_log_probs)
    if hard_label_weight < 1:
        check_integer("the number of slots K", teacher_ids.shape[-1], 1, MOST_SLOTS)
    if hard_label_weight < 1 and _readable(teacher_ids, teacher_log_probs, loss_mask, labels):
        kept = _kept(teacher_ids[..., 0], loss_mask, labels, ignore_index)
        _slot_values(teacher_log_probs, teacher_ids, kept[..., None], n_cols)


def _kept(like: torch.Tensor, loss_mask, labels, ignore_index: int) -> torch.Tensor:
    """Which tokens count, in the shape of ``like``."""
    kept = torch.ones_like(like, dtype=torch.bool)
    if loss_mask is not None:
        kept &= loss_mask != 0
    if labels is not None:
        kept &= labels != ignore_index
    return kept


def _slot_values(log_probs, ids, kept, n_cols: int) -> None:
    """Ids and log-probabilities of tokens that count; unused slots hold an id of -1."""
    outside = ((ids < -1) | (ids >= n_cols)) & kept
    if outside.any():
        raise ValueError(
            f"teacher_ids must lie in [0, {n_cols}), or be -1 in unused slots, "
            f"got {ids[outside][0].item()}"
        )
    in_order = ids.sort(-1).values
    twice = (in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0) & kept
    if twice.any():
        raise ValueError(
            f"teacher_ids must be unique within a token, got {in_order[..., 1:][twice][0].item()} twice"
        )
    # logits instead of log-probabilities, not the rounding of a subtraction
    positive = (log_probs > 1e-2) & log_probs.isfinite() & (ids >= 0) & kept
    if positive.any():
        raise ValueError(
            f"teacher_log_probs must be logarithms of probabilities, at most 0, got "
            f"{log_probs[positive][0].item():g}: take log_softmax before choosing the K"
        )


def _whole(name: str, tensor: torch.Tensor, advice: str) -> None:
    if hasattr(tensor, "full_tensor"):  # a DTensor, without the import of torch.distributed
        raise TypeError(f"{name} is a DTensor, but must be whole: {advice}")


def check_head(
    side: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    constant: bool = False,
) -> None:
    """Check hidden states and the head that makes logits of them; ``side`` begins their names.

    Hidden states that get no gradient (``constant``) may require one only while gradients are
    disabled; a head's weight and bias may (any unfrozen model's do), and are the caller's to detach."""
    tensors = {f"{side}hidden": hidden, f"{side}weight": weight}
    if bias is not None:
        tensors[f"{side}bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if constant:
            _whole(name, tensor, f"pass {name}.full_tensor()")
        elif tensor is hidden:
            _whole(name, tensor, "pass this rank's tokens as a plain tensor")
        else:
            _whole(
                name, tensor,
                f"under FSDP2, read it inside the forward of the fully_shard module that holds it, or "
                f"after lm_head.unshard(), or pass {name}.full_tensor(grad_placements="
                f"[Partial('avg')]); plain full_tensor() leaves its gradient unreduced over the ranks "
                f"(docs/linear.md)",
            )  # fmt: skip
        if tensor.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        _same_device(name, tensor, hidden, f"{side}hidden")
    if constant:
        _of_teacher(f"{side}hidden", hidden)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{side}weight must be [vocab, dim], got shape {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}hidden must be [..., {weight.shape[1]}] for {side}weight of shape "
            f"{tuple(weight.shape)}, got shape {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    for name, value in ((f"{side}logit_scale", logit_scale), (f"{side}softcap", softcap)):
        if value is not None and not 0 < _number(name, value, "a positive number") < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_linear(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    hard_label_weight: float,
    loss_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    vocab_size: int | None,
) -> int:
    """Check what two heads must share, each having passed :func:`check_head`; returns the number
    of columns used."""
    of = "student_hidden"
    for name, tensor in (("loss_mask", loss_mask), ("labels", labels)):
        if tensor is not None:
            _per_token(name, tensor, student_hidden, of)
    weight = _number("hard_label_weight", hard_label_weight, "a number in [0, 1]")
    for name, tensor in (("teacher_hidden", teacher_hidden), ("teacher_weight", teacher_weight)):
        _teacher_needed(name, tensor, weight)
    if teacher_hidden is None or teacher_weight is None:
        return head_vocabulary(student_weight, vocab_size)
    _leading_shape("teacher_hidden", teacher_hidden.shape[:-1], student_hidden, of)
    _same_device("teacher_hidden", teacher_hidden, student_hidden, of)
    widths = student_weight.shape[0], teacher_weight.shape[0]
    if vocab_size is None and widths[0] != widths[1]:
        raise ValueError(
            f"student_weight has {widths[0]} rows and teacher_weight {widths[1]}: pass vocab_size= "
            f"to use the first rows of both (heads padded to different widths)"
        )
    return _vocabulary(student_weight.t(), teacher_weight.t(), vocab_size)


def head_vocabulary(weight: torch.Tensor, vocab_size: int | None) -> int:
    """The number of columns used of a head's logits."""
    return _vocabulary(weight.t(), None, vocab_size)


def check_linear_options(
    student_hidden: torch.Tensor,
    loss_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    ignore_index: int,
    logits_dtype: torch.dtype,
    memory_budget: int | None,
    kept_tokens: int | None,
) -> None:
    """Check the options that only the linear form has."""
    if logits_dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"logits_dtype must be torch.float32, bfloat16, float16 or float64, got {logits_dtype}"
        )
    if memory_budget is not None:
        check_integer("memory_budget", memory_budget, 1)
    if kept_tokens is None:
        return
    check_integer("kept_tokens", kept_tokens, 1)
    given = labels if loss_mask is None else loss_mask
    if given is None or not _readable(loss_mask, labels):
        return
    kept = _kept(given, loss_mask, labels, ignore_index)
    if kept.sum() > kept_tokens:
        raise ValueError(
            f"kept_tokens={kept_tokens} must bound the number of tokens of nonzero weight, "
            f"got {kept.sum().item()} of them"
        )


def check_token_ids(
    token_ids: torch.Tensor, rows: torch.Tensor, n_cols: int, ignore_index: int, of: str
) -> None:
    """Check one id a row of ``rows``, the tensor that the user calls ``of``."""
    _ignore_index(ignore_index)
    _ids("token_ids", token_ids, rows, of)
    _label_values(token_ids, None, ignore_index, n_cols, "token_ids")


def check_token_log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, ignore_index: int
) -> None:
    _logits("logits", logits)
    check_temperature(temperature)
    check_token_ids(token_ids, logits, logits.shape[-1], ignore_index, "logits")


def check_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    divergence: Divergence | str,
    temperature: float,
    ignore_index: int,
) -> Divergence:
    """Check the arguments of ``distillation_statistics``; returns the routed divergence."""
    n_cols = check_pair(student_logits, teacher_logits, None)
    check_temperature(temperature)
    check_token_ids(token_ids, student_logits, n_cols, ignore_index, "student_logits")
    divergence = as_divergence(divergence)
    _parameters(divergence, student_logits, None, token_ids, ignore_index)
    return divergence


def check_mixture(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_weight: float | torch.Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    """Check the arguments of ``mixture_token_log_probs``."""
    n_cols = check_pair(student_logits, teacher_logits, None)
    check_temperature(temperature)
    check_token_ids(token_ids, student_logits, n_cols, ignore_index, "student_logits")
    if not isinstance(teacher_weight, torch.Tensor):
        weight = _number("teacher_weight", teacher_weight, "a number in [0, 1] or a tensor of them")
        if not 0 <= weight <= 1:
            raise ValueError(f"teacher_weight must lie in [0, 1], got {teacher_weight}")
        return
    _constant("teacher_weight", teacher_weight, "detach it")
    if not teacher_weight.is_floating_point():
        raise TypeError(f"teacher_weight must be floating-point, got {teacher_weight.dtype}")
    if teacher_weight.dim():
        _per_token("teacher_weight", teacher_weight, student_logits)
    _same_device("teacher_weight", teacher_weight, student_logits)
    if not _readable(teacher_weight, token_ids):
        return
    outside = ~((teacher_weight >= 0) & (teacher_weight <= 1))
    if teacher_weight.dim():
        outside &= token_ids != ignore_index
    if outside.any():
        raise ValueError(
            f"teacher_weight must lie in [0, 1], got {teacher_weight[outside][0].item()}"
        )
