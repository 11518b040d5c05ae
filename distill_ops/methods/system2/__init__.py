"""System 2 distillation: what a slow method answers consistently becomes the target of a direct answer.

A method of several calls or many tokens (System 2) is sampled on inputs without labels, answers that the
samples do not agree on are dropped, and the model is trained to give the others at once (System 1):
arXiv:2407.06023. Plain Python: ``sample_fn`` and the model are the caller's.

Example::

    from distill_ops.methods.system2 import (
        BRANCH_SOLVE_MERGE, CHAIN_OF_THOUGHT, REPHRASE_AND_RESPOND, REPHRASE_THEN_RESPOND,
        SYSTEM_2_ATTENTION,
    )

    methods = (
        REPHRASE_AND_RESPOND, REPHRASE_THEN_RESPOND, SYSTEM_2_ATTENTION, CHAIN_OF_THOUGHT,
        BRANCH_SOLVE_MERGE,
    )
    assert [method.calls for method in methods] == [1, 2, 2, 1, 7]  # at most 5 aspects
    assert BRANCH_SOLVE_MERGE.fields == {"question", "response_a", "response_b"}

docs/system2.md says which tasks gain, and what the knobs do.
"""

from .answers import Choice, final_answer, normalize_answer
from .curation import Curation, curate
from .labels import Labels, to_labels
from .messages import to_messages
from .numerals import last_number
from .prompts import (
    BRANCH_SOLVE_MERGE,
    CHAIN_OF_THOUGHT,
    REPHRASE_AND_RESPOND,
    REPHRASE_THEN_RESPOND,
    SYSTEM_2_ATTENTION,
    Method,
    Step,
    listed,
)
from .records import Record, Summary, read_records
from .votes import ShuffledOptions, Swapped, Vote, majority_vote, perturbation_consistent

__all__ = [
    "BRANCH_SOLVE_MERGE",
    "CHAIN_OF_THOUGHT",
    "REPHRASE_AND_RESPOND",
    "REPHRASE_THEN_RESPOND",
    "SYSTEM_2_ATTENTION",
    "Choice",
    "Curation",
    "Labels",
    "Method",
    "Record",
    "ShuffledOptions",
    "Step",
    "Summary",
    "Swapped",
    "Vote",
    "curate",
    "final_answer",
    "last_number",
    "listed",
    "majority_vote",
    "normalize_answer",
    "perturbation_consistent",
    "read_records",
    "to_labels",
    "to_messages",
]
