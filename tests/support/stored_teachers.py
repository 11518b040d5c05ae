"""What the tests of the teacher store share."""

import os
import traceback
from collections.abc import Callable
from functools import partial

import torch

from distill_ops import TeacherTopK, save_teacher_topk, teacher_topk
from tests.support.helpers import make_logits

FACTS = {"vocab_size": 50, "temperature": 2.0, "teacher": "a teacher"}


def make_topk(n_rows, k=8, seed=0, scale=4.0):
    logits, _ = make_logits((n_rows, 50), seed=seed, scale=scale)
    return teacher_topk(logits, k, temperature=2.0)


TOPK = make_topk(23)
SHARDS = {**FACTS, "rows_per_shard": 4}
save = partial(save_teacher_topk, **SHARDS)


def rows(start, stop=23):
    return TeacherTopK(*(x[start:stop] for x in TOPK))


def allowed_error(log_probs):
    """What the docstring of save_teacher_topk allows, for finite log-probabilities."""
    difference = log_probs.max(-1, keepdim=True).values - log_probs
    mean = (log_probs.softmax(-1) * difference).sum(-1, keepdim=True)
    return 2**-11 * (difference + mean) + 2**-24 + 2**-23 * log_probs.abs()


def assert_same(ours, expected):
    """Two top-k sets, one of which has been stored."""
    assert torch.equal(ours.ids, expected.ids)
    error = (ours.log_probs - expected.log_probs).abs()
    assert (error <= allowed_error(expected.log_probs)).all()


def snapshot(folder):
    """All that lies in a folder."""
    return {p.relative_to(folder): p.is_dir() or p.read_bytes() for p in folder.rglob("*")}


def in_child(work: Callable[[], object]) -> int:
    """A process of its own, forked, that does this and ends; its exit status is 1 after an error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    """Its exit status, once it has ended; less than 0: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
