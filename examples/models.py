"""Small Llama-style models: making, optimizing and evaluating them."""

import math

import torch
import torch.nn.functional as F
from corpus import IGNORE, Batch
from transformers import LlamaConfig, LlamaForCausalLM


def make_model(vocab_size: int, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Untrained, with heads of 32 and the input embedding as output head."""
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
            tie_word_embeddings=True,
        )
    )


def logits_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """``[batch, length, vocab]``."""
    # no attention mask: padding comes last, and causal attention never looks ahead
    return model(input_ids=batch.input_ids, use_cache=False).logits


class Optimizer:
    """AdamW with a clipped gradient, a linear warm-up and a cosine decay to zero."""

    def __init__(self, model: torch.nn.Module, learning_rate: float, n_steps: int):
        self.parameters = list(model.parameters())
        self.adamw = torch.optim.AdamW(self.parameters, learning_rate, betas=(0.9, 0.95))
        warm_up = max(1, n_steps // 10)

        def factor(step: int) -> float:
            return min((step + 1) / warm_up, (1 + math.cos(math.pi * step / n_steps)) / 2)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, factor)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """Cross-entropy on text never trained on, in nats a token."""
    total = n_tokens = 0
    for batch in batches:
        logits, labels = logits_of(model, batch).flatten(0, 1), batch.labels.flatten()
        total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
        n_tokens += int(batch.loss_mask.sum())
    return total / n_tokens
