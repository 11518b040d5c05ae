"""What ``curate``, ``Step`` and ``Method`` refuse: the exception, and words of its message."""

import functools
import math
import threading
from dataclasses import dataclass

import pytest

from distill_ops.methods.system2 import Method, Step, Swapped, curate

DIRECT = Method("direct", (Step("text", "{question}"),))


def echo(prompts):
    return [f"The answer is {prompt}" for prompt in prompts]


@dataclass
class Wrong:
    error: type
    words: str
    change: dict


WRONG = [
    Wrong(
        TypeError, "inputs must be an iterable of strings or mappings, got 'abc'", {"inputs": "abc"}
    ),
    Wrong(TypeError, "inputs must be an iterable", {"inputs": {"question": "?"}}),
    Wrong(TypeError, "method must be a Method, got 'cot'", {"method": "cot"}),
    Wrong(TypeError, "sample_fn must be a function, got None", {"sample_fn": None}),
    Wrong(TypeError, "normalize must be a function, got 'lower'", {"normalize": "lower"}),
    Wrong(
        TypeError,
        r"perturbations\[1\] must be a function, got 1",
        {"perturbations": [Swapped(), 1]},
    ),
    Wrong(ValueError, "n must be at least 1, got 0", {"n": 0}),
    Wrong(TypeError, "n must be an int at least 1, got float", {"n": 8.0}),
    Wrong(ValueError, "batch_size must be at least 1, got 0", {"batch_size": 0}),
    Wrong(ValueError, "retries must be at least 0, got -1", {"retries": -1}),
    Wrong(ValueError, "max_failures must be at least 1", {"max_failures": 0}),
    Wrong(ValueError, "retry_wait_s must be finite and not negative", {"retry_wait_s": math.inf}),
    Wrong(ValueError, r"min_agreement must be in \[0, 1\], got 60", {"min_agreement": 60}),
    Wrong(TypeError, "progress must be True or False", {"progress": "yes"}),
    Wrong(ValueError, "total must be at least 0", {"total": -1}),
    Wrong(
        TypeError,
        "settings must be what a resume of path= can compare, .* a lock cannot be told from another",
        {"settings": {"client": threading.Lock()}, "path": "unused"},
    ),
    Wrong(
        TypeError,
        "normalize must be what a resume of path= can compare",
        {"normalize": functools.partial(str.strip, threading.Lock()), "path": "unused"},
    ),
    Wrong(ValueError, "retry_failed=True is of a file that is resumed", {"retry_failed": True}),
    Wrong(TypeError, "retry_failed must be True or False", {"retry_failed": "no"}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.words[:30])
def test_arguments_are_refused_before_anything_runs(wrong):
    call = {"inputs": ["1"], "method": DIRECT, "sample_fn": echo} | wrong.change
    with pytest.raises(wrong.error, match=wrong.words):
        curate(call.pop("inputs"), call.pop("method"), call.pop("sample_fn"), **call)


TWO_FIELDS = Method("two", (Step("text", "{question} {context}"),))
SPLIT_TO_A_TEXT = Method(
    "split", (Step("a", "{question}", split=str.upper), Step("b", "{a}", each="a"))
)
LATE = [
    Wrong(TypeError, "input 1 must be a str or a mapping of fields, got 3", {"inputs": ["1", 3]}),
    Wrong(TypeError, "input 0 must hold what JSON holds", {"inputs": [{"question": {1, 2}}]}),
    Wrong(ValueError, r"input 0 must have the fields \['context', 'question'\] of method 'two'", {"method": TWO_FIELDS}),
    Wrong(TypeError, "parse of method 'direct' must return a str or None, got 15 at input 0, '1'", {"method": DIRECT.parsed_by(len)}),
    Wrong(TypeError, "raised at input 0, '1': TypeError: split of step 'a' must return a list, got", {"method": SPLIT_TO_A_TEXT}),
    Wrong(TypeError, "sample_fn must return a list of texts, got 'abc'", {"sample_fn": lambda p: "abc"}),
    Wrong(TypeError, "sample_fn must return a list of texts, got None", {"sample_fn": print}),
    Wrong(TypeError, "strings, or None for no text, got 1 at 0", {"sample_fn": lambda p: [1] * len(p)}),
    Wrong(TypeError, r"perturbations\[0\] must return a mapping of fields and", {"perturbations": [dict]}),
]  # fmt: skip


@pytest.mark.parametrize("wrong", LATE, ids=lambda wrong: wrong.words[:30])
def test_inputs_and_texts_are_refused_as_they_come(wrong):
    call = {"inputs": ["1"], "method": DIRECT, "sample_fn": echo} | wrong.change
    curation = curate(call.pop("inputs"), call.pop("method"), call.pop("sample_fn"), **call)
    with pytest.raises(wrong.error, match=wrong.words):
        list(curation)


def test_too_few_texts_are_refused():
    with pytest.raises(ValueError, match="one text for each of the 8 prompts, got 1"):
        list(curate(["1"], DIRECT, lambda prompts: ["x"]))


METHODS = [
    (lambda: Step("a b", "x"), ValueError, "name of a Step must be an identifier, got 'a b'"),
    (lambda: Step("a", 3), TypeError, "prompt of step 'a' must be a str, got 3"),
    (lambda: Step("a", r"\frac{1}{2}"), ValueError, r"prompt of step 'a' has \{1...\}.*double those"),
    (lambda: Step("a", "{question:>9}"), ValueError, "a name alone may stand between braces"),
    (lambda: Step("a", "{question"), ValueError, "unmatched brace"),
    (lambda: Step("a", "x", most=0), ValueError, "most of step 'a' must be at least 1"),
    (lambda: Step("a", "x", split=2), TypeError, "split of step 'a' must be a function"),
    (lambda: Method("m", ()), TypeError, "steps of 'm' must be Step objects"),
    (lambda: Method("m", ["x"]), TypeError, "steps of 'm' must be Step objects"),
    (lambda: Method("m", DIRECT.steps, parse="x"), TypeError, "parse of 'm' must be a function"),
    (lambda: Method("m", DIRECT.steps * 2), ValueError, "two of the name 'text'"),
    (lambda: Method("m", (Step("a", "{b}"), Step("b", "x"))), ValueError, "prompt of step 'a' names 'b', which is not made"),
    (lambda: Method("m", (Step("a", "{a}"),)), ValueError, "names 'a', which is not made before it"),
    (lambda: Method("m", (Step("a", "x"), Step("b", "{a}", each="a"))), ValueError, "an earlier step with split=, got 'a'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "words"), METHODS)
def test_methods_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
