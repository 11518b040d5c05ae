"""Teacher-mixed sampling (arXiv:2306.08543, equation 4): the mixture, and generating from it.

The mixture keeps a small student from sequences that it alone finds good. What samples from it gives the
log-probabilities that it sampled with, for the importance weights.
"""

import inspect
import math
from functools import cache

import torch

from ..checks.logits import check_pair, check_vocabulary
from ..checks.values import check_share, check_temperature

EXCLUDED = float("-inf")


def mix(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    teacher_share: float = 0.2,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probabilities of the mixture of student and teacher, from which MiniLLM samples.

    ``log((1 - a) q + a p)``, q and p the softmax at T, a the ``teacher_share``: equation 4; in nats.
    Logits ``[..., V]`` of both models go in, ``[..., V]`` comes out, not differentiable.

    Example:
        >>> import torch
        >>> from distill_ops.methods import minillm
        >>> log_b = minillm.mix(torch.zeros(1, 2), torch.tensor([[0.0, float("-inf")]]), 0.5)
        >>> token = torch.multinomial(log_b.exp(), 1)
        >>> [round(x, 4) for x in log_b.exp()[0].tolist()], log_b.gather(-1, token).shape
        ([0.75, 0.25], torch.Size([1, 1]))

    Args:
        student_logits, teacher_logits: ``[..., V]``, float32, bfloat16, float16 or float64; of the next
            token, say ``logits[:, -1]`` of both models.
        teacher_share: a above, in [0, 1]; 0.2 in MiniLLM's scripts.
        temperature: of both, positive.

    Returns:
        ``[..., V]``, float32 (float64 where an argument is). -inf where both models exclude a token. Of
        given tokens alone :func:`distill_ops.mixture_token_log_probs` makes no such tensor.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    share, temperature = (
        check_share("teacher_share", teacher_share),
        check_temperature(temperature),
    )
    with torch.no_grad():
        check_pair(student_logits, teacher_logits, None)
        wide = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
        dtype = torch.float64 if wide else torch.float32
        log_q, log_p = (
            torch.log_softmax(x.to(dtype) / temperature, -1)
            for x in (student_logits, teacher_logits)
        )
        if share == 0:  # no 0 p where a row of the teacher has no softmax
            return log_q
        if share == 1:
            return log_p
        return torch.logaddexp(log_q + math.log1p(-share), log_p + math.log(share))


class MixedSampling:
    """A transformers ``LogitsProcessor``: ``generate`` samples from the mixture of student and teacher.

    The teacher runs beside the student, with a key-value cache of its own; one instance serves one
    ``generate``. Afterwards :meth:`log_probs` gives what each token was sampled with.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from distill_ops.methods import minillm
        >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> student, teacher = (LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)) for _ in range(2))
        >>> prompt = torch.tensor([[0, 0, 5], [3, 1, 4]])
        >>> attention_mask = torch.tensor([[0, 0, 1], [1, 1, 1]])  # padded on the left
        >>> mixed = minillm.MixedSampling(teacher, attention_mask, teacher_share=0.2)
        >>> sequences = student.generate(
        ...     prompt, attention_mask=attention_mask, logits_processor=[mixed], do_sample=True,
        ...     top_k=0, top_p=1.0, max_new_tokens=4, min_new_tokens=4, pad_token_id=0,
        ... )
        >>> mixed.log_probs(sequences).shape
        torch.Size([2, 4])

    ``generate`` applies ``temperature``, ``top_k`` and ``top_p`` after this, to the mixture, and then the
    log-probabilities here are not what was sampled: pass ``top_k=0, top_p=1.0`` (its own default is
    ``top_k=50``), ``temperature=1.0`` (a model's ``generation_config`` may have others) and the
    temperature here. Processors that came before, such as a minimal length, have excluded tokens (-inf): those
    stay excluded, of the teacher too. One that changes other scores, such as a repetition penalty, changes
    the student that is mixed.

    Args:
        teacher: a causal model of transformers, of the student's vocabulary. It is put into eval mode and
            runs without gradients, on its own device.
        attention_mask: ``[batch, prompt]``, that of ``generate``; None where no prompt is padded.
        teacher_share: a of ``(1 - a) q + a p``, in [0, 1]; 0.2 in MiniLLM's scripts.
        temperature: of both models' logits, positive.
        vocab_size: use the first columns of both models, where their heads are padded to different widths.

    Raises:
        ImportError: transformers is not installed.
        ValueError, TypeError: naming the argument, what came and what was expected.
    """

    def __new__(cls, *args, **kwargs):
        """Of a class that is a LogitsProcessor too."""
        return super().__new__(_processor_class(cls))

    def __init__(
        self,
        teacher: torch.nn.Module,
        attention_mask: torch.Tensor | None = None,
        *,
        teacher_share: float = 0.2,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ):
        if not isinstance(teacher, torch.nn.Module):
            raise TypeError(
                f"teacher must be a model of transformers, got {type(teacher).__name__}"
            )
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor):
                got = type(attention_mask).__name__
                raise TypeError(f"attention_mask must be a tensor [batch, prompt], got {got}")
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask must be [batch, prompt], got shape {tuple(attention_mask.shape)}"
                )
        self.teacher = teacher
        self.teacher_share = check_share("teacher_share", teacher_share)
        self.temperature = check_temperature(temperature)
        self.vocab_size = vocab_size
        self._mask = attention_mask
        self._cache = None
        self._ids: torch.Tensor | None = None  # what both models have seen
        self._last: torch.Tensor | None = None  # log-probabilities of the next token, [batch, V]
        self._sampled: list[torch.Tensor] = []  # of each generated token, [batch]

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The mixture's log-probabilities, ``[batch, V]``, of ids ``[batch, seen]`` and student's scores."""
        if self._ids is None:
            self._start(input_ids)
            new = input_ids
        else:
            self._check_continues(input_ids, "input_ids")
            new = input_ids[:, self._ids.shape[1] :]
            if new.shape[1] != 1:
                raise ValueError(f"generate must sample one token at a time, got {new.shape[1]}")
            self._sampled.append(self._of(new))
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        self._ids = input_ids
        self._last = self._mixture(scores, self._teacher_logits(new).to(scores.device))
        return self._last

    def log_probs(self, sequences: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the generated tokens, ``[batch, generated]`` float32, in nats.

        ``sequences`` ``[batch, prompt + generated]`` are what ``generate`` returned. After the end of a
        sequence ``generate`` pads; the numbers there mean nothing, and the mask leaves them out."""
        if self._last is None:
            raise ValueError("log_probs are there after generate has run with this processor")
        self._check_continues(sequences, "sequences")
        prompt = self._ids.shape[1] - len(self._sampled)
        found, length = list(self._sampled), sequences.shape[1] - prompt
        if length > len(found) + 1:
            raise ValueError(
                f"sequences have {length} generated tokens, but {len(found) + 1} were sampled here"
            )
        if length == len(found) + 1:  # the last token, which no step followed
            found.append(self._of(sequences[:, -1:]))
        return torch.stack(found[:length], 1) if length else self._last[:, :0]

    def _start(self, input_ids: torch.Tensor) -> None:
        if self._mask is None:
            self._mask = torch.ones_like(input_ids)
        if self._mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of the prompt, {tuple(input_ids.shape)}, "
                f"got {tuple(self._mask.shape)}; of several sequences a prompt, repeat its rows"
            )
        self._mask = self._mask.to(input_ids.device).long()
        self.teacher.eval()

    def _check_continues(self, ids: torch.Tensor, name: str) -> None:
        seen = self._ids
        same = min(seen.shape[1], ids.shape[1])
        fits = ids.shape[0] == seen.shape[0] and (
            name == "sequences" or ids.shape[1] > seen.shape[1]
        )
        if not fits or not torch.equal(ids[:, :same].to(seen.device), seen[:, :same]):
            raise ValueError(
                f"{name} do not continue those that this processor has seen: an instance serves one "
                f"generate, without beams; make another"
            )

    def _of(self, ids: torch.Tensor) -> torch.Tensor:
        return self._last.gather(-1, ids.to(self._last.device)).squeeze(-1)

    def _teacher_logits(self, new: torch.Tensor) -> torch.Tensor:
        """Of the token after ``new`` ``[batch, n]``, ``[batch, V]`` float32."""
        device = next(self.teacher.parameters()).device
        takes = inspect.signature(self.teacher.forward).parameters
        cache_name = "cache" if "cache" in takes else "past_key_values"  # of older transformers
        given = {"attention_mask": self._mask.to(device), cache_name: self._cache}
        if "position_ids" in takes:
            places = (self._mask.cumsum(-1) - 1).clamp(min=0)  # padding has none
            given["position_ids"] = places[:, -new.shape[1] :].to(device)
        if "logits_to_keep" in takes:  # of a prompt the last alone
            given["logits_to_keep"] = 1
        outputs = self.teacher(input_ids=new.to(device), use_cache=True, **given)
        self._cache = outputs[cache_name]
        return outputs.logits[:, -1].float()

    def _mixture(self, scores: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        widths = scores.shape[-1], teacher.shape[-1]
        if self.vocab_size is None and widths[0] != widths[1]:
            raise ValueError(
                f"the student's scores have {widths[0]} columns and the teacher's logits {widths[1]}: "
                f"pass vocab_size= to use the first columns of both"
            )
        n_cols = check_vocabulary(self.vocab_size, *widths)
        student = scores[:, :n_cols]
        teacher = teacher[:, :n_cols].masked_fill(student == EXCLUDED, EXCLUDED)
        mixed = mix(student, teacher, self.teacher_share, temperature=self.temperature)
        beyond = widths[0] - n_cols
        return torch.nn.functional.pad(mixed, (0, beyond), value=EXCLUDED) if beyond else mixed


@cache
def _processor_class(cls: type) -> type:
    """The class as a LogitsProcessor, of transformers, which only those who generate need."""
    try:
        from transformers import LogitsProcessor
    except ImportError as error:
        raise ImportError(
            "MixedSampling is a LogitsProcessor of transformers, which is not installed: "
            "pip install transformers, or sample from minillm.mix yourself"
        ) from error
    return type(cls.__name__, (cls, LogitsProcessor), {"__doc__": cls.__doc__})
