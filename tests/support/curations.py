"""What the tests of System 2 share: methods, models that answer, remember or fail, records and a tokenizer."""

from distill_ops.methods.system2 import Method, Record, Step

DIRECT = Method("direct", (Step("text", "{question}"),))
TWO_STEPS = Method("two", (Step("first", "{question}"), Step("second", "2: {question}")))


def echo(prompts):
    return [f"The answer is {prompt}" for prompt in prompts]


def facts(records):
    return [(record.index, record.target, record.reason) for record in records]


class Recorded:
    """A ``sample_fn`` that remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        return [self.answer(prompt) for prompt in prompts]


class Flaky:
    """A ``sample_fn`` that raises where it is said to."""

    def __init__(self, fails):
        self.fails, self.calls = fails, []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        if self.fails(len(self.calls), prompts):
            raise ConnectionError("gone")
        return echo(prompts)


END = 2
HOW = {"eos_token_id": END, "pad_token_id": 0}


def record(asked, target, agreement=1.0, index=0):
    kept = target is not None
    return Record(index, asked, target, agreement, kept, "kept" if kept else "tie", "")


def codes(text):
    """A tokenizer that is a function: a lower-case letter is its place in the alphabet, from 10."""
    return [10 + ord(x) - ord("a") for x in text]
