"""Small Llama-style models: making, optimizing, sampling and evaluating them."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from corpus import IGNORE, Batch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)


def make_model(
    vocab_size: int, hidden: int, layers: int, seed: int, spread: float = 0.02, tied: bool = True
) -> LlamaForCausalLM:
    """Untrained weights of that spread, with attention heads of 32; ``tied``: the input embedding is the
    output head."""
    torch.manual_seed(seed)
    heads = hidden // 32
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=tied,
            eos_token_id=None,  # a text's end has no token: sampling goes on for as long as asked
            initializer_range=spread,
        )
    )


def logits_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """``[batch, length, vocab]``."""
    # no attention mask: padding comes last, and causal attention never looks ahead
    return model(input_ids=batch.input_ids, use_cache=False).logits


def next_factor(step: int, n_steps: int) -> float:
    """Of the learning rate at the next step: a linear warm-up and a cosine decay to zero."""
    warm_up = max(1, n_steps // 10)
    return min((step + 1) / warm_up, (1 + math.cos(math.pi * step / n_steps)) / 2)


class Optimizer:
    """AdamW with a clipped gradient, a linear warm-up and a cosine decay to zero."""

    def __init__(self, model: torch.nn.Module, learning_rate: float, n_steps: int):
        self.parameters, self.adamw = adamw(model, learning_rate)
        factor = lambda step: next_factor(step, n_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, factor)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


class TimedOptimizer:
    """The same over a stretch of time: ``progress`` says which share of it is over."""

    def __init__(self, model: torch.nn.Module, learning_rate: float):
        self.parameters, self.adamw = adamw(model, learning_rate)
        self.learning_rate = learning_rate
        self.progress = 0.0

    def step(self) -> None:
        warm_up = self.progress / 0.1 + 0.05  # not 0, or the first step would be lost
        factor = min(warm_up, (1 + math.cos(math.pi * self.progress)) / 2)
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate * factor
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()


def adamw(
    model: torch.nn.Module, learning_rate: float
) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    parameters = list(model.parameters())
    return parameters, torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.95))


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    prompts: torch.Tensor,
    n_tokens: int,
    seed: int,
    processors: Iterable[LogitsProcessor] = (),
) -> torch.Tensor:
    """Prompts ``[batch, prompt]`` and a continuation of each, ``[batch, prompt + n_tokens]``.

    Drawn from the model's own distribution at temperature 1, or from what the processors make of
    it, with a KV cache. The same seed draws the same; PyTorch's own generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,  # 0: of the whole vocabulary
            max_new_tokens=n_tokens,
            logits_processor=LogitsProcessorList(processors),
            use_cache=True,
        )


def continuation_logits(model: LlamaForCausalLM, ids: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """The logits ``[batch, n_tokens, vocab]`` that predict the last ``n_tokens`` of ``ids``."""
    return model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=n_tokens).logits


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """Cross-entropy on text never trained on, in nats a token."""
    total = n_tokens = 0
    for batch in batches:
        logits, labels = logits_of(model, batch).flatten(0, 1), batch.labels.flatten()
        total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
        n_tokens += int(batch.loss_mask.sum())
    return total / n_tokens
