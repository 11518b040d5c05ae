"""What a case gives on ranks, put together, and how it is held against one process and the oracle."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from distill_ops import reference
from distill_ops.problem import working_dtype
from distill_ops.reference.linear import head_logits
from tests.losses.test_metrics import formulas
from tests.support.forms import Form
from tests.support.helpers import assert_close, condition, to_float64, topk_condition
from tests.support.linear_cases import loss_condition
from tests.support.ranks import Member
from tests.vocab_parallel.cases import SPLIT, Case, make_heads

OWN = (
    "gradient",
    "inplace",
    "backend",
    "memory_budget",
    "kept_tokens",
    "sequence_parallel",
)  # not the reference's


def flat(outputs) -> tuple[torch.Tensor, ...]:
    """What a function gives, as tensors: those of a tuple beside a loss too."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return (*outputs[:-1], *outputs[-1]) if isinstance(outputs[-1], tuple) else outputs


def results(function, form: Form, tensors, options) -> dict[str, torch.Tensor]:
    """What a function gives, by place, and the gradients of the weighted sum of it, by name."""
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in form.students}
    given = {**tensors, **leaves}
    if options.get("inplace"):  # overwrites logits that a model made
        given |= {name: leaf * 1.0 for name, leaf in leaves.items()}
    positional = [given.pop(name) for name in form.positional]
    outputs = flat(function(*positional, **given, **options))
    generator, total = torch.Generator().manual_seed(9), 0.0
    for x in outputs:
        if x.requires_grad:
            factor = torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.5
            total = total + (x.masked_fill(~x.detach().isfinite(), 0.0) * factor.to(x)).sum()
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        total.backward()
    return found | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = {4: torch.int32, 8: torch.int64}.get(a.element_size(), torch.uint8)
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def merged(case: Case, found: list[dict]) -> dict[str, torch.Tensor]:
    """The whole results of the ranks': parts of gradients side by side, of which all the rest is the
    same on every rank to the last bit."""
    whole = {}
    for name, first in found[0].items():
        shared = name.startswith("gradient") and case.sizes(name.removeprefix("gradient of "))
        if shared:
            dim, sizes = shared
            parts = [of_rank[name] for of_rank in found]
            assert [x.shape[dim] for x in parts] == sizes
            whole[name] = torch.cat(parts, dim)
        else:
            for rank, of_rank in enumerate(found):
                assert same_bits(of_rank[name], first), (
                    f"{name} of rank {rank} is not rank 0's: {of_rank[name]}, {first}"
                )
            whole[name] = first
    return whole


def run_case(member: Member, case: Case, compiled: bool = False) -> dict[str, torch.Tensor]:
    """What a rank does: its results, of a graph without a break where that is asked for."""
    tensors, options = case.part(member.rank)
    function = case.of_form.function
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    heads = case.form.startswith("linear")  # whose DTensors are FSDP's without a group
    if case.told != "placement" or heads:
        options["group"] = member.group
    if case.told != "placement":
        return results(function, case.of_form, tensors, options)
    mesh = DeviceMesh.from_group(member.group, "cpu")
    whole = case.tensors()
    for name, tensor in tensors.items():
        if name in SPLIT and (shared := case.sizes(name)):
            shape, stride = whole[name].shape, whole[name].stride()
            placed = mesh, [Shard(shared[0] % tensor.dim())]
            tensors[name] = DTensor.from_local(tensor, *placed, shape=shape, stride=stride)
        elif case.replicated and name == "teacher_logits":
            tensors[name] = DTensor.from_local(tensor, mesh, [Replicate()])
    found = results(function, case.of_form, tensors, options)
    for name, value in found.items():
        if name.startswith("gradient"):
            given = tensors[name.removeprefix("gradient of ")]
            if not isinstance(given, DTensor):
                continue
            assert value.placements == given.placements
            assert value.shape == given.shape
            found[name] = value.to_local()
        assert not isinstance(found[name], DTensor), name
    return found


def alone(case: Case) -> dict[str, torch.Tensor]:
    """The results of one process that has the whole vocabulary."""
    options = {name: x for name, x in case.options.items() if name != "sequence_parallel"}
    return results(case.of_form.function, case.of_form, case.tensors(), options)


def oracle(case: Case, double: bool) -> dict[str, torch.Tensor]:
    """The reference's: in float64, or as eager PyTorch computes it."""
    form, tensors = case.of_form, case.tensors()
    options = {name: x for name, x in case.options.items() if name not in OWN}
    if double:
        tensors = {name: to_float64(x) for name, x in tensors.items()}
        options = {name: to_float64(x) for name, x in options.items()}
        if hasattr(options.get("divergence"), "map_tensors"):
            options["divergence"] = options["divergence"].map_tensors(to_float64)
    if case.form == "distillation_metrics":
        return results(_metrics, form, tensors, options)
    if case.form == "linear_topk_distillation_loss":
        return results(_linear_topk, form, tensors, options)
    bound = getattr(form.function, "keywords", {})
    name = getattr(form.function, "func", form.function).__name__
    return results(getattr(reference, name), form, tensors, {**bound, **options})


def _metrics(student, teacher, temperature=1.0, vocab_size=None):
    student, teacher = student[..., :vocab_size], teacher[..., :vocab_size]
    agreement = student.argmax(-1) == teacher.argmax(-1)
    return *formulas(student, teacher, temperature).values(), agreement


def _linear_topk(hidden, weight, log_probs, ids, student_bias, **options):
    """The oracle of hidden states' logits."""
    dtype = working_dtype(hidden, weight, student_bias, log_probs)
    unread = torch.zeros_like(hidden[..., 0], dtype=torch.bool)
    head = options.pop("student_logit_scale", 1.0), options.pop("student_softcap", None)
    logits = head_logits(hidden, weight, student_bias, *head, unread, len(weight), dtype)
    return reference.topk_distillation_loss(logits, log_probs, ids, **options)


def condition_of(case: Case, tensors: dict) -> float:
    """How much more than a rounding one rounding costs the losses."""
    if case.form == "distillation_loss":
        return condition(tensors["student_logits"], tensors["teacher_logits"], case.options)
    slots = [tensors[x] for x in ("teacher_log_probs", "teacher_ids") if x in tensors]
    if case.form == "topk_distillation_loss":
        return topk_condition(tensors["student_logits"], *slots, case.options)
    if case.form == "linear_topk_distillation_loss":
        hidden, weight, bias = (tensors[f"student_{x}"] for x in ("hidden", "weight", "bias"))
        return topk_condition(hidden @ weight.t() + bias, *slots, case.options)
    if case.form == "linear_distillation_loss":
        return loss_condition(make_heads(sum(case.widths)), case.options)
    return 8.0


def compare(case: Case, ours: dict[str, torch.Tensor]) -> None:
    """By the numeric rule: within 1e-12 of one process in float64, within eager's error in float32."""
    if case.dtype == torch.float64:
        expected = alone(case)
        assert ours.keys() == expected.keys()
        for name, truth in expected.items():
            assert ours[name].dtype == truth.dtype
            finite = truth[truth.isfinite()].double().abs()
            torch.testing.assert_close(
                ours[name], truth, rtol=1e-12, equal_nan=True,
                atol=1e-12 * finite.max().item() if finite.numel() else 0.0,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip
        return
    eager, truth = (oracle(case, double) for double in (False, True))
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        if expected.dtype == torch.bool:
            assert torch.equal(ours[name], expected), name
            continue
        # in the product that a hidden state's gradient is, terms cancel
        units = 2.0 if name == "gradient of student_hidden" else 1.0
        if name.startswith("output"):
            units = condition_of(case, case.tensors())
        assert_close(name, ours[name], eager[name], expected, units)


def hold(ranks, case: Case) -> dict[str, torch.Tensor]:
    """Run a case on as many ranks as it has parts, and compare; returns the whole results."""
    ours = merged(case, ranks.call(len(case.widths), run_case, case))
    compare(case, ours)
    return ours
