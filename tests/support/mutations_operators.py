"""Mistakes in how operators are made known to PyTorch, in the options' lists, and in the layers."""

from tests.support import sources
from tests.support.mutants import Mutation

REGISTRATION = "tests/interface/test_registration.py::test_"
CALLS = "tests/interface/test_calls.py::test_"
OPERATORS = "tests/interface/test_operators.py::test_"
LAYERS = "tests/interface/test_layers.py::test_"

PACKING = [
    Mutation(
        "options: a float that is None comes back as a number", sources.OPERATORS_PACKING,
        "(value == MISSING[name] or value != value)", "value == MISSING[name]",
        f"{REGISTRATION}options_come_back",
    ),
    Mutation(
        "options: a bool comes back as its opposite", sources.OPERATORS_PACKING,
        "return bool(value)", "return not value",
        f"{REGISTRATION}options_come_back",
    ),
    Mutation(
        "options: two of the lists are swapped", sources.OPERATORS_REGISTER,
        "for source in arguments[n : n + 3])", "for source in arguments[n : n + 3][::-1])",
        f"{REGISTRATION}options_come_back",
    ),
    Mutation(
        "options: the plan is packed first", sources.OPERATORS_REGISTER,
        "pack(self.code[0], options, lists)\n        pack(self.code[1], plan, lists)",
        "pack(self.code[1], plan, lists)\n        pack(self.code[0], options, lists)",
        f"{REGISTRATION}options_come_back",
    ),
    Mutation(
        "options: one that a function goes without is taken", sources.ARGUMENTS,
        "[x for x in (*DEFAULTS, *own) if x not in without]", "(*DEFAULTS, *own)",
        f"{CALLS}options_that_a_function_goes_without_are_refused[topk_distillation_loss]",
    ),
    Mutation(
        "options: one that a function goes without is in its signature", sources.ARGUMENTS,
        "if name not in without\n", "",
        f"{CALLS}signatures",
    ),
]  # fmt: skip

DIFFERENTIATION = [
    Mutation(
        "gradients are made of what requires none", sources.OPERATORS_REGISTER,
        "[x is not None and x.requires_grad for x in students]",
        "[x is not None for x in students]",
        "tests/losses/test_linear_gradients.py::"
        "test_only_wanted_gradients_are_made[torch-('student_hidden',)]",
    ),
    Mutation(
        "the wanted gradients of the backward are ignored", sources.OPERATORS_LINEAR,
        "LinearPass(inputs, options, tokens, Wanted(*plan.wanted))",
        "LinearPass(inputs, options, tokens, Wanted(True, True, True))",
        "tests/losses/test_linear_gradients.py::"
        "test_only_wanted_gradients_are_made[torch-('student_hidden',)]",
    ),
    Mutation(
        "nothing goes through the dispatcher", sources.OPERATORS_TRANSFORMS,
        "return transformed or bool(torch._C._len_torch_dispatch_stack())",
        "return False",
        "tests/interface/test_registration.py::test_modes_see_the_operator",
    ),
    Mutation(
        "differentiable outputs are marked as constants", sources.OPERATORS_REGISTER,
        "results[n:] if x is not None", "results[1:] if x is not None",
        "tests/losses/test_tokens.py::test_one_entropy_alone_gives_its_gradient[torch]",
    ),
    Mutation(
        "differentiable outputs of an operator are marked as constants", sources.OPERATORS_REGISTER,
        "*self.constants(plan.made, output))", "*output)",
        f"{REGISTRATION}autograd[True-forward]",
    ),
    Mutation(
        "a list's tensors have no gradients", sources.OPERATORS_REGISTER,
        "found.get(name) if n is None else [None] * n", "found.get(name)",
        f"{REGISTRATION}autograd[True-forward]",
    ),
    Mutation(
        "vmap: the dimension that is mapped is ignored", sources.OPERATORS_TRANSFORMS,
        "value.select(dim, i)", "value.select(0, i)",
        f"{REGISTRATION}vmap[1]",
    ),
    Mutation(
        "vmap: every argument is mapped", sources.OPERATORS_TRANSFORMS,
        "return value if dim is None else value.select(dim, i)",
        "return value.select(dim or 0, i) if isinstance(value, torch.Tensor) else value",
        f"{REGISTRATION}vmap[0]",
    ),
    Mutation(
        "vmap: values of a batch are read", sources.CHECKS_VALUES,
        "if transform is not None:", "if False:",
        "tests/interface/test_transforms.py::test_the_reference_under_transforms",
    ),
    Mutation(
        "errors advise a reference that is not there", sources.OPERATORS_REGISTER,
        "self.references.get(plan.function, plan.function)", "plan.function",
        "tests/interface/test_transforms.py::test_derivatives_that_cannot_be[linear_topk_distillation_loss]",
    ),
]  # fmt: skip

LAYERS_OF_THE_PRODUCT = [
    Mutation(
        "layers: a check imports the Triton path", sources.CHECKS_LOGITS,
        "from .values import", "from ..gpu import on  # noqa: F401\nfrom .values import",
        f"{LAYERS}imports_go_down[distill_ops.checks.logits]",
    ),
    Mutation(
        "layers: a form imports another", sources.OPERATORS_TOPK,
        "from .logits import", "from .dense import dense_loss  # noqa: F401\nfrom .logits import",
        f"{LAYERS}imports_go_down[distill_ops.operators.topk]",
    ),
    Mutation(
        "layers: the reference imports the CPU path", sources.REFERENCE_TOPK,
        "from ..arguments import", "from ..cpu import forms  # noqa: F401\nfrom ..arguments import",
        f"{LAYERS}imports_go_down[distill_ops.reference.topk]",
    ),
    Mutation(
        "layers: another place of registration", sources.OPERATORS_DENSE,
        "from .logits import", "from torch.library import custom_op  # noqa: F401\nfrom .logits import",
        f"{LAYERS}one_registration",
    ),
    Mutation(
        "layers: a file that does not say what it holds", sources.OPERATORS_TOPK,
        '"""The operator of the loss against a top-k teacher."""', '"""Top-k."""',
        f"{LAYERS}files_say_what_they_hold[distill_ops/operators/topk.py]",
    ),
]  # fmt: skip

OPERATOR_MUTATIONS = [*PACKING, *DIFFERENTIATION, *LAYERS_OF_THE_PRODUCT]
