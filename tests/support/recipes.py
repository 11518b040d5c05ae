"""What the recipes of the pages take as the reader's own: small random models, batches, an optimizer."""

from types import SimpleNamespace

import pytest
import torch

VOCAB_SIZE = 60


def causal_model(seed: int, hidden_size: int = 32) -> torch.nn.Module:
    """Untrained, two heads, one layer; nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def batch(seed: int = 0, shape: tuple[int, int] = (2, 12)) -> dict[str, torch.Tensor]:
    """As a data set gives it: labels are the ids, -100 for the prompt, and nothing is shifted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, shape, generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def tokenizers() -> dict:
    """Of a student and a teacher, which has two tokens more; both models have VOCAB_SIZE columns."""
    library = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, **{f"word{i}": i for i in range(1, VOCAB_SIZE - 4)}}
    more = {**words, "<think>": len(words), "</think>": len(words) + 1}
    student, teacher = (
        library.Tokenizer(library.models.WordLevel(vocab, unk_token="<unk>"))
        for vocab in (words, more)
    )
    return {"student_tokenizer": student, "teacher_tokenizer": teacher}


def of_the_readme() -> dict:
    student = causal_model(0)
    return {
        **batch(),
        **tokenizers(),
        "model": student,
        "teacher_model": causal_model(1),
        "tokenizer": None,
        "args": SimpleNamespace(kd_ratio=0.5),
        "student": student,
        "teacher": causal_model(1, hidden_size=48),
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "batches": [tuple(batch(seed).values()) for seed in range(2)],
    }


def of_linear() -> dict:
    return {**batch(), "student": causal_model(0), "teacher": causal_model(1, hidden_size=48)}


def of_tokens() -> dict:
    """Logits of a sequence of 7 tokens, and what a policy step has of the 6 that follow one."""
    ids = batch(shape=(2, 7))["ids"]
    student, teacher = causal_model(0), causal_model(1, hidden_size=48)
    return {
        "input_ids": ids,
        "student": student,
        "teacher": teacher,
        "student_logits": student(ids).logits,
        "teacher_logits": teacher(ids).logits.detach(),
        "advantages": torch.ones(2, 6),
        "old_log_prob": torch.full((2, 6), -4.0),
        "mask": torch.ones(2, 6, dtype=torch.bool),
    }


def of_minillm() -> dict:
    """Prompts padded on the left, plain text, and the models."""
    prompt = batch()["ids"][:, :5]
    prompt[0, :2] = 0
    student = causal_model(0)
    return {
        "student": student,
        "teacher": causal_model(1, hidden_size=48),
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.01),
        "prompt": prompt,
        "attention_mask": (prompt != 0).long(),
        "end_of_text": 2,
        "text": batch(1)["ids"],
    }


def of_when_not_to_use() -> dict:
    return {**tokenizers(), **of_linear()}


READERS_OWN = {
    "README.md": of_the_readme,
    "docs/linear.md": of_linear,
    "docs/minillm.md": of_minillm,
    "docs/tokens.md": of_tokens,
    "docs/when-not-to-use.md": of_when_not_to_use,
}
