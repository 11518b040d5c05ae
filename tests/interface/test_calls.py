"""How users call: the published signatures, and how few calls lie between a function and its kernel."""

import inspect
import json
import sys
from typing import get_type_hints

import pytest

import distill_ops
from distill_ops.operators import transforms
from tests.support import ROOT
from tests.support.forms import CALLED, FORMS, LOSSES, function_of, tensors_of

MOST_HOPS = {
    "distillation_loss": 6, "topk_distillation_loss": 6, "linear_distillation_loss": 7,
    "linear_topk_distillation_loss": 7, "token_log_probs": 6, "linear_token_log_probs": 8,
    "distillation_statistics": 6, "distillation_metrics": 6, "support_distillation_loss": 6,
    "linear_support_distillation_loss": 8, "gather_log_probs": 5, "linear_gather_log_probs": 8,
    "linear_distillation_statistics": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", MOST_HOPS)
def test_hops_to_the_launch(name, monkeypatch):
    """Frames of the package between a public function and its kernel's launch."""
    pytest.importorskip("triton")
    from distill_ops.analysis import aot
    from distill_ops.api import choices

    found = []
    original = aot._Recorder.__getitem__

    def recorded(recorder, grid):
        names, frame = [], sys._getframe(1)
        while frame is not None and frame.f_code.co_name != name:
            if (
                "/distill_ops/" in frame.f_code.co_filename
                or "/kernels/" in frame.f_code.co_filename
            ):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        if not recorder.kernel.__name__.startswith(("weights", "total")):
            found.append(names[::-1])
        return original(recorder, grid)

    monkeypatch.setattr(aot._Recorder, "__getitem__", recorded)
    monkeypatch.setattr(choices, "INTERPRETED", True)  # the Triton path without a GPU
    monkeypatch.setattr(transforms, "dispatches", lambda *_: False)
    form = CALLED[name]
    tensors = {key: x.to("meta") for key, x in tensors_of(name).items() if key in form.positional}
    for key in set(form.students) & set(tensors):
        tensors[key].requires_grad_()
    call = lambda: form(tensors, backend="triton")
    aot.record(call, aot.TARGETS["sm_90"].facts)
    assert found
    assert all(0 < len(hops) <= MOST_HOPS[name] for hops in found), found


@pytest.mark.parametrize(
    "name",
    [name for name in LOSSES if name != "distillation_loss"],
)
def test_options_that_a_function_goes_without_are_refused(name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected .* 'infinities'"):
        FORMS[name](tensors_of(name), infinities="propagate")


def test_signatures():
    """Names, kinds and defaults of what users call, as they were published."""

    def described(function):
        return [
            [p.name, p.kind.name, None if p.default is p.empty else repr(p.default)]
            for p in inspect.signature(function).parameters.values()
        ]

    published = json.loads((ROOT / "tests/interface/signatures.json").read_text())
    for module, names in published.items():
        module = distill_ops if module == "distill_ops" else distill_ops.reference
        assert {n for n in module.__all__ if n != "reference"} == set(names)
        for name, parameters in names.items():
            if parameters is not None:
                assert described(getattr(module, name)) == parameters, name


def test_annotations_list_what_signatures_list():
    for name in map(function_of, CALLED):
        function = getattr(distill_ops, name)
        listed = [*inspect.signature(function).parameters, "return"]
        assert list(get_type_hints(function)) == listed
