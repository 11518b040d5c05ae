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

_debug = False


def set_debug(enabled: bool) -> None:
    """Switch the checks that wait for the GPU on or off (off by default).

    Example:
        >>> import distill_ops
        >>> distill_ops.set_debug(True)
        >>> distill_ops.set_debug(False)
    """
    global _debug
    _debug = bool(enabled)


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


def _per_token(name: str, tensor: torch.Tensor, student_logits: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [...], got {type(tensor).__name__}")
    if tensor.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading shape of student_logits, "
            f"{tuple(student_logits.shape[:-1])}, got {tuple(tensor.shape)}"
        )
    _same_device(name, tensor, student_logits)


def _same_device(name: str, tensor: torch.Tensor, student_logits: torch.Tensor) -> None:
    if tensor.device != student_logits.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but student_logits on {student_logits.device}: "
            f"move one of them"
        )


def _pair(student_logits: torch.Tensor, teacher_logits: torch.Tensor, vocab_size) -> None:
    _logits("teacher_logits", teacher_logits)
    _same_device("teacher_logits", teacher_logits, student_logits)
    _constant(
        "teacher_logits", teacher_logits, "detach it, or run the teacher under torch.no_grad()"
    )
    if teacher_logits.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"teacher_logits must have the leading shape of student_logits, "
            f"{tuple(student_logits.shape[:-1])}, got {tuple(teacher_logits.shape[:-1])}"
        )
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


def _label_values(labels, loss_mask, ignore_index: int, n_cols: int) -> None:
    """Labels of tokens that count; what a masked token is labelled does not matter."""
    if torch.compiler.is_compiling() or not (labels.device.type == "cpu" or _debug):
        return
    outside = ((labels < 0) | (labels >= n_cols)) & (labels != ignore_index)
    if loss_mask is not None:
        outside &= loss_mask != 0
    if outside.any():
        raise ValueError(
            f"labels must lie in [0, {n_cols}) or equal ignore_index={ignore_index}, "
            f"got {labels[outside].flatten()[0].item()}"
        )


def _parameters(divergence: Divergence, student_logits, loss_mask) -> None:
    """Parameters given as tensors; what a masked token's value is does not matter."""
    for name, value in zip(divergence.__match_args__, divergence.parameters, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        title = f"{name} of {divergence.name}"
        if value.dim():
            _per_token(title, value, student_logits)
        _same_device(title, value, student_logits)
        if torch.compiler.is_compiling() or not (value.device.type == "cpu" or _debug):
            continue
        domain = divergence.domain(name)
        outside = _outside(value, domain)
        if loss_mask is not None and value.dim():
            outside &= loss_mask != 0
        if outside.any():
            raise ValueError(
                f"{title}, a tensor, must hold values {domain.text(domain.tensor_ends)}, "
                f"got {value[outside].flatten()[0].item()}"
            )


def _outside(value: torch.Tensor, domain: Domain) -> torch.Tensor:
    if domain.tensor_ends:
        return ~((value >= domain.low) & (value <= domain.high))
    return ~((value > domain.low) & (value < domain.high))


def check_normalizer(normalizer, reduction: str, student_logits: torch.Tensor) -> None:
    if reduction != "mean":
        raise ValueError(
            f"normalizer replaces the token count of reduction='mean', got reduction={reduction!r}"
        )
    if isinstance(normalizer, torch.Tensor):
        _constant("normalizer", normalizer, "detach it")
        _same_device("normalizer", normalizer, student_logits)
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
    if student_logits.is_leaf:
        raise ValueError(
            "inplace=True would overwrite student_logits, a leaf that requires grad (a parameter): "
            "pass the output of the model, or inplace=False"
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
    _constant("logits", logits, "detach them, or run the teacher under torch.no_grad()")
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
    if teacher.device != student.device:
        raise ValueError(
            f"teacher_log_prob is on {teacher.device}, but student_log_prob on {student.device}: "
            f"move one of them"
        )
    _constant("teacher_log_prob", teacher, "detach it")


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
    """Check the arguments that every form of the loss takes.

    Returns:
        The divergence, routed to the one it is at an end point, and the number of columns used.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    _logits("student_logits", student_logits)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("infinities", infinities, INFINITIES)
    divergence = as_divergence(divergence)
    check_temperature(temperature)
    weight = _number("hard_label_weight", hard_label_weight, "a number in [0, 1]")
    if not 0 <= weight <= 1:
        raise ValueError(f"hard_label_weight must lie in [0, 1], got {hard_label_weight}")
    if teacher_logits is not None:
        _pair(student_logits, teacher_logits, vocab_size)
    elif weight < 1:
        raise ValueError(
            f"teacher_logits is None, which needs hard_label_weight=1, got {hard_label_weight}"
        )
    n_cols = _vocabulary(student_logits, teacher_logits, vocab_size)
    if loss_mask is not None:
        _per_token("loss_mask", loss_mask, student_logits)
        _constant("loss_mask", loss_mask, "detach it")
        if loss_mask.is_complex():
            raise TypeError(f"loss_mask must be bool, int or float, got {loss_mask.dtype}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if weight < 1:
        _parameters(divergence, student_logits, loss_mask)
    if labels is not None:
        _per_token("labels", labels, student_logits)
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64 token ids, got {labels.dtype}")
        _label_values(labels, loss_mask, ignore_index, n_cols)
    elif weight > 0:
        raise ValueError(f"hard_label_weight={hard_label_weight} needs labels, got None")
    if normalizer is not None:
        check_normalizer(normalizer, reduction, student_logits)
    return divergence, n_cols
