"""Mutations of check_same_tokenizer: ids, columns, cuts, added tokens, begins and ends, what is left alone."""

from tests.support import sources
from tests.support.mutants import Mutation

TESTS = "tests/methods/test_tokenizers.py::test_"
ADDED = "tests/methods/test_tokenizers_added.py::test_"
ERRORS = "tests/methods/test_tokenizers_errors.py::test_"
PADDED = f"{ADDED}heads_of_which_one_is_padded_or_both_alike"


def mutation(name: str, file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(f"tokenizers: {name}", file, old, new, test)


TOKENIZERS = [
    mutation(
        "ids beyond the first that differs count",
        sources.METHODS_TOKENIZER_PARTS,
        "not counted or i < counted[0]",
        "True",
        f"{TESTS}a_gap_in_the_ids_of_one",
    ),
    mutation(
        "heads that are padded alike are not cut",
        sources.METHODS_TOKENIZER_PARTS,
        "if columns == {vocab_size}:",
        "if len(columns) == 1:",
        f"{PADDED}[columns2]",
    ),
    mutation(
        "one head without padding is enough",
        sources.METHODS_TOKENIZER_PARTS,
        "if columns == {vocab_size}:",
        "if vocab_size in columns:",
        f"{PADDED}[columns0]",
    ),
    mutation(
        "a narrow head is not noticed",
        sources.METHODS_TOKENIZERS,
        "min([vocab_size, *(side.columns for side in sides if side.columns)])",
        "vocab_size",
        f"{TESTS}a_head_with_too_few_columns[student]",
    ),
    mutation(
        "padding is a token as others",
        sources.METHODS_TOKENIZER_PARTS,
        " and i != side.pad",
        "",
        f"{ADDED}padding_alone_differs",
    ),
    mutation(
        "padding that is an end is padding alone",
        sources.METHODS_TOKENIZER_SIDE,
        " and pad not in ends",
        "",
        f"{TESTS}padding_that_is_the_end_is_no_padding_alone",
    ),
    mutation(
        "added tokens are not written right after a word",
        sources.METHODS_TOKENIZER_PARTS,
        " y{t}z",
        " {t}z",
        f"{ADDED}an_added_token_right_after_a_word",
    ),
    mutation(
        "added tokens are not written right before a word",
        sources.METHODS_TOKENIZER_PARTS,
        " y{t}z",
        " y{t} z",
        f"{TESTS}a_space_that_follows_an_added_token_or_not",
    ),
    mutation(
        "added tokens are not written in the other case",
        sources.METHODS_TOKENIZER_PARTS,
        "probe + in_other_case",
        "probe",
        f"{ADDED}a_rule_that_parts_the_cuts_is_named[tokenizers]",
    ),
    mutation(
        "added tokens of transformers are not known",
        sources.METHODS_TOKENIZER_SIDE,
        "added = tokenizer.added_tokens_decoder",
        "added = {}",
        f"{ADDED}a_rule_that_parts_the_cuts_is_named[transformers]",
    ),
    mutation(
        "flags that change nothing are reported",
        sources.METHODS_TOKENIZER_SIDE,
        'flags.discard("normalized")',
        "pass",
        f"{ADDED}a_rule_that_does_not_part_the_cuts",
    ),
    mutation(
        "an added token of one alone is blamed for every cut",
        sources.METHODS_TOKENIZER_PARTS,
        "elif all(",
        "elif held or all(",
        f"{ADDED}texts_with_an_added_token_of_one_alone",
    ),
    mutation(
        "unused tokens stay in the texts",
        sources.METHODS_TOKENIZER_SIDE,
        "if without:",
        "if False:",
        f"{ADDED}texts_with_an_added_token_of_one_alone",
    ),
    mutation(
        "begin and end are read off a text of which nothing is left",
        sources.METHODS_TOKENIZER_SIDE,
        "if len(starts) == 1:",
        "if starts:",
        f"{ADDED}begin_and_end_where_spaces_are_dropped",
    ),
    mutation(
        "an end past vocab_size is advised",
        sources.METHODS_TOKENIZER_PARTS,
        "if end >= vocab_size:",
        "if False:",
        f"{ADDED}an_end_that_no_loss_teaches",
    ),
    mutation(
        "transformers' truncation is lost",
        sources.METHODS_TOKENIZER_SIDE,
        "backend.enable_truncation(**truncation)",
        "pass",
        f"{ADDED}transformers_tokenizers_are_left_as_they_were",
    ),
    mutation(
        "truncation hides what follows",
        sources.METHODS_TOKENIZER_SIDE,
        "tokenizer.no_truncation()",
        "pass",
        f"{TESTS}truncation_and_padding_hide_nothing",
    ),
    mutation(
        "dropout is not noticed",
        sources.METHODS_TOKENIZER_SIDE,
        "isinstance(dropout, float) and dropout > 0",
        "False",
        f"{ADDED}random_cuts",
    ),
    mutation(
        "an end of text may be unused",
        sources.METHODS_TOKENIZERS,
        'if role in ("bos", "eos") and',
        "if False and",
        f"{TESTS}an_end_of_text_is_used",
    ),
    mutation(
        "unused by one name is unused",
        sources.METHODS_TOKENIZERS,
        "if tokens <= unused}",
        "if tokens & unused}",
        f"{TESTS}renamed_reserved_tokens_are_usable_if_both_names_are_unused",
    ),
]
