"""Distil a student whose output head is split across ranks, and check that nothing else changes.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

The student of ``distill_text.py`` and its teacher, each with a head of its own, of which every rank
holds a slice of the vocabulary (PyTorch's ``parallelize_module``): their logits are DTensors, and
``distill_ops.distillation_loss`` takes them as they are. Beside it the same student with a whole head
learns from the same batches. Their losses must agree within 1e-5 at every step, or the program fails.
Printed: the bytes that the loss exchanges a step, beside those of gathering the logits. Written to
``tensor_parallel.json`` under ``--out``. Needs transformers, tokenizers, matplotlib and rich.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from statistics import median

import torch
import torch.distributed as dist
from corpus import Batch, load_corpus
from models import make_model, next_factor
from report import console, relative_differences, surroundings
from rich.progress import track
from tensor_parallel_report import show
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from training import Config, check_tokenizers, config_from, options_of, train_teacher
from transformers import LlamaForCausalLM

import distill_ops
from distill_ops.groups import counted

TOLERANCE = 1e-5  # largest relative difference of the two losses at any step
OPTIONS = {"divergence": "forward_kl", "hard_label_weight": 0.5}


def split_head(model: LlamaForCausalLM, mesh: DeviceMesh) -> LlamaForCausalLM:
    """The head's rows over the ranks of the mesh; its logits stay where they are made."""
    plan = {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    return parallelize_module(model, mesh, plan)


def logits_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """``[batch, length, vocab]``; of a split head a DTensor."""
    return model(input_ids=batch.input_ids, use_cache=False).logits


def clip(parameters: list[torch.nn.Parameter], limit: float) -> None:
    """``clip_grad_norm_``, which does not take DTensors beside other tensors."""
    squares = [p.grad.square().sum() for p in parameters]
    norm = sum(x.full_tensor() if isinstance(x, DTensor) else x for x in squares).sqrt()
    for p in parameters:
        p.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0).item())


class Student:
    """In training, with its losses (nats a token), times, and what its loss exchanged at a step."""

    def __init__(self, model: LlamaForCausalLM, teacher: LlamaForCausalLM, config: Config):
        self.model, self.teacher, self.config = model, teacher, config
        self.parameters = list(model.parameters())
        # one by one: AdamW's fused step does not take DTensors beside other tensors
        self.adamw = torch.optim.AdamW(
            self.parameters, config.student_learning_rate, betas=(0.9, 0.95), foreach=False
        )
        self.losses: list[float] = []
        self.loss_ms: list[float] = []
        self.exchanged = None

    def step(self, batch: Batch) -> None:
        with torch.no_grad():
            of_teacher = logits_of(self.teacher, batch)
        logits = logits_of(self.model, batch)
        start = time.perf_counter()
        with counted() as self.exchanged:
            loss = distill_ops.distillation_loss(
                logits, of_teacher, loss_mask=batch.loss_mask, labels=batch.labels, **OPTIONS
            )
        self.loss_ms.append((time.perf_counter() - start) * 1e3)
        loss.backward()
        clip(self.parameters, 1.0)
        factor = next_factor(len(self.losses), self.config.steps)
        for group in self.adamw.param_groups:
            group["lr"] = self.config.student_learning_rate * factor
        self.adamw.step()
        self.adamw.zero_grad()
        self.losses.append(loss.item())


def whole_model(config: Config, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A model whose head is not its embedding: only the head is split."""
    return make_model(config.vocab_size, hidden, layers, seed, tied=False)


def distil(config: Config, mesh: DeviceMesh) -> dict:
    """All that ``tensor_parallel.json`` holds."""
    record = surroundings()
    started = f"python -m torch.distributed.run --nproc-per-node {mesh.size()}"
    record["command"] = record["command"].replace("python", started, 1)
    corpus = load_corpus(config.vocab_size, config.length, config.seed)
    check_tokenizers(corpus, config)
    teacher = whole_model(config, config.teacher_hidden, config.teacher_layers, config.seed)
    if mesh.get_rank() == 0:
        teacher, _ = train_teacher(corpus, config, tied=False)
    teacher.requires_grad_(False)
    for weight in teacher.parameters():
        dist.broadcast(weight, 0)

    def student(teacher: LlamaForCausalLM, split: bool) -> Student:
        model = whole_model(config, config.student_hidden, config.student_layers, config.seed + 1)
        return Student(split_head(model, mesh) if split else model, teacher, config)

    whole = student(teacher, split=False)
    of_whole = whole_model(config, config.teacher_hidden, config.teacher_layers, config.seed)
    of_whole.load_state_dict(teacher.state_dict())
    split = student(split_head(of_whole.requires_grad_(False), mesh), split=True)
    batches = corpus.batches(config.steps, config.batch_size, config.seed + 1)
    for batch in track(batches, "students", console=console, disable=mesh.get_rank() > 0):
        whole.step(batch)
        split.step(batch)

    differences = relative_differences(whole.losses, split.losses)
    n_tokens = config.batch_size * config.length
    bytes_a_step = {
        "the loss": split.exchanged.bytes,
        "gathering both models' logits": 2 * n_tokens * config.vocab_size * 4 // mesh.size(),
    }
    return record | {
        "config": asdict(config),
        "ranks": mesh.size(),
        "tokens_a_step": n_tokens,
        "collectives_a_step": split.exchanged.collectives,
        "bytes_sent_a_step_and_rank": bytes_a_step,
        "median_loss_ms": {"whole": median(whole.loss_ms), "split": median(split.loss_ms)},
        "largest_relative_difference": max(differences),
        "tolerance": TOLERANCE,
        "losses": {"whole": whole.losses, "split": split.losses},
    }


def main() -> None:
    options = options_of(__doc__, "tensor_parallel", teacher_steps=60, steps=100)
    if "RANK" not in os.environ:
        sys.exit("start it by torchrun: torchrun --nproc-per-node 2 examples/tensor_parallel.py")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("tp",))
    console.quiet = mesh.get_rank() > 0
    record = distil(config_from(options), mesh)
    dist.destroy_process_group()
    if "0" == os.environ["RANK"]:
        (options.out / "tensor_parallel.json").write_text(json.dumps(record, indent=1) + "\n")
        show(record)
        console.print(f"written to {options.out}")
    if record["largest_relative_difference"] > TOLERANCE:
        sys.exit(
            f"FAILED: the losses differ by {record['largest_relative_difference']:.1e} relative, "
            f"{TOLERANCE:.0e} is allowed"
        )


if __name__ == "__main__":
    main()
