"""Mutations of System 2 distillation: votes, perturbations, failures, the file of records, labels."""

from tests.support import sources
from tests.support.mutants import Mutation

VOTES = "tests/methods/test_system2_votes.py::test_"
CURATE = "tests/methods/test_system2_curate.py::test_"
ERRORS = "tests/methods/test_system2_errors.py::test_"
RESUME = "tests/methods/test_system2_resume.py::test_"
LABELS = "tests/methods/test_system2_labels.py::test_"
FAILS = f"{CURATE}an_input_that_fails_is_a_reason_and_the_others_are_kept"
GONE = f"{CURATE}a_server_that_is_gone_stops_the_run_and_loses_nothing[2]"


def mutation(name: str, file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(f"system 2: {name}", file, old, new, test)


SYSTEM2 = [
    mutation(
        "a tie is the first in the alphabet",
        sources.METHODS_SYSTEM2_VOTES,
        "if others and others[0][1] == most:",
        "if False:",
        f"{VOTES}a_tie_is_no_answer",
    ),
    mutation(
        "unparsable answers do not count below the line",
        sources.METHODS_SYSTEM2_VOTES,
        "agreement = most / n_answers",
        "agreement = most / sum(counts.values())",
        f"{VOTES}unparsable_answers_count",
    ),
    mutation(
        "the spelling is whichever came first",
        sources.METHODS_SYSTEM2_VOTES,
        "min(spellings[first].items(), key=lambda item: (-item[1], item[0]))[0]",
        "next(iter(spellings[first]))",
        f"{VOTES}the_spelling_does_not_depend_on_the_order",
    ),
    mutation(
        "answers are not undone",
        sources.METHODS_SYSTEM2_VOTES,
        "back = undo(answer)",
        "back = answer",
        f"{CURATE}a_judge_that_prefers_the_first_is_found_out",
    ),
    mutation(
        "a version without an answer is overlooked",
        sources.METHODS_SYSTEM2_VOTES,
        "if needed == 1 and any(answer is None for answer in undone):",
        "if False:",
        f"{VOTES}what_cannot_be_undone_is_unparsable",
    ),
    mutation(
        "a shuffle may leave the order",
        sources.METHODS_SYSTEM2_VOTES,
        "if order == sorted(order):",
        "if False:",
        f"{VOTES}shuffled_options_are_undone[2]",
    ),
    mutation(
        "a shuffle is undone the other way round",
        sources.METHODS_SYSTEM2_VOTES,
        "{chr(65 + new): chr(65 + old)",
        "{chr(65 + old): chr(65 + new)",
        f"{VOTES}shuffled_options_are_undone[26]",
    ),
    mutation(
        "compatible characters are one answer",
        sources.METHODS_SYSTEM2_ANSWERS,
        'unicodedata.normalize("NFC", unicodedata.normalize("NFC", answer).lower())',
        'unicodedata.normalize("NFKC", answer).lower()',
        f"{VOTES}normalized_answers",
    ),
    mutation(
        "the first stated answer",
        sources.METHODS_SYSTEM2_ANSWERS,
        "text[stated[-1].end() :]",
        "text[stated[0].end() :]",
        f"{VOTES}the_last_stated_answer",
    ),
    mutation(
        "items beyond the most are asked",
        sources.METHODS_SYSTEM2_PROMPTS,
        "one_each = items[step.each][: step.most]",
        "one_each = items[step.each]",
        f"{CURATE}branch_solve_merge",
    ),
    mutation(
        "a method starts over at a text that is missing",
        sources.METHODS_SYSTEM2_PROMPTS,
        "if text is None:",
        "if False:",
        f"{CURATE}reasons_and_their_summary",
    ),
    mutation(
        "calls are not bounded",
        sources.METHODS_SYSTEM2_WINDOWS,
        "chunk = prompts[start : start + self.options.batch_size]",
        "chunk = prompts[start:]",
        f"{CURATE}calls_are_shared_by_inputs_and_bounded",
    ),
    mutation(
        "waits do not grow",
        sources.METHODS_SYSTEM2_WINDOWS,
        "* 2 ** (attempt - 1)",
        "",
        f"{CURATE}retries_wait_longer_each_time",
    ),
    mutation(
        "an input that fails takes its window along",
        sources.METHODS_SYSTEM2_WINDOWS,
        "if len(groups) > 1 and index not in failed:",
        "if False:",
        FAILS,
    ),
    mutation(
        "failures are never in a row",
        sources.METHODS_SYSTEM2_WINDOWS,
        "self.failures_in_a_row += 1",
        "self.failures_in_a_row = 1",
        GONE,
    ),
    mutation(
        "failures of a server that is gone are written",
        sources.METHODS_SYSTEM2_CURATION,
        "if record.reason != FAILED or not windows.failures_in_a_row:",
        "if True:",
        GONE,
    ),
    mutation(
        "what failed last is lost",
        sources.METHODS_SYSTEM2_CURATION,
        "\n        yield from written(held)\n",
        "\n",
        f"{CURATE}all_inputs_fail",
    ),
    mutation(
        "a new loop for each call",
        sources.METHODS_SYSTEM2_SAMPLING,
        "loop = loop or _new_loop(texts)",
        "loop = _new_loop(texts)",
        f"{CURATE}with_and_without_an_event_loop[object]",
    ),
    mutation(
        "the number of texts is not looked at",
        sources.METHODS_SYSTEM2_SAMPLING,
        "if len(texts) != n_prompts:",
        "if False:",
        f"{ERRORS}too_few_texts_are_refused",
    ),
    mutation(
        "a torn line stays",
        sources.METHODS_SYSTEM2_JOURNAL,
        "self._file.truncate(_end_of_whole_lines(self._file))",
        "pass",
        f"{RESUME}a_torn_last_line_is_made_again",
    ),
    mutation(
        "any file is cut",
        sources.METHODS_SYSTEM2_JOURNAL,
        "if found != BEGINNING[: len(found)]:",
        "if False:",
        f"{RESUME}a_file_without_an_end_of_a_line_is_left_alone",
    ),
    mutation(
        "lines wait in a buffer",
        sources.METHODS_SYSTEM2_JOURNAL,
        "self._file.flush()",
        "pass",
        f"{RESUME}a_record_is_on_file_when_it_is_given",
    ),
    mutation(
        "other settings are not noticed",
        sources.METHODS_SYSTEM2_JOURNAL,
        "if of_settings != self.settings:",
        "if False:",
        f"{RESUME}other_settings_are_refused[n]",
    ),
    mutation(
        "other inputs are not noticed",
        sources.METHODS_SYSTEM2_JOURNAL,
        'or of_input != expected.partition("-")[0]',
        "",
        f"{RESUME}inputs_in_another_order_are_refused",
    ),
    mutation(
        "the first input that is new is skipped",
        sources.METHODS_SYSTEM2_CURATION,
        "inputs = chain([(index, value)], inputs)",
        "pass",
        f"{RESUME}more_inputs_are_appended",
    ),
    mutation(
        "records are held",
        sources.METHODS_SYSTEM2_CURATION,
        "summary.add(record)",
        "summary.add(record); summary.__dict__.setdefault('all', []).append(record)",
        f"{RESUME}memory_is_constant",
    ),
    mutation(
        "an iterator keeps itself alive",
        sources.METHODS_SYSTEM2_CURATION,
        "self.summary = Summary()",
        "self.summary = Summary(); self.summary.of = self",
        f"{RESUME}an_iterator_that_is_dropped_frees_its_file_at_once",
    ),
    mutation(
        "labels are not shifted",
        sources.METHODS_SYSTEM2_LABELS,
        "slice(at + len(before) - 1, end - 1)",
        "slice(at + len(before), end)",
        f"{LABELS}packed",
    ),
    mutation(
        "records of a row see each other",
        sources.METHODS_SYSTEM2_LABELS,
        "seen = same.tril()[:, None]",
        "seen = torch.ones_like(same).tril()[:, None]",
        f"{LABELS}packed",
    ),
    mutation(
        "positions go on in the next record",
        sources.METHODS_SYSTEM2_LABELS,
        "            positions[i, at:] = torch.arange(width - at)\n            starts.append(i * width + at)\n            at = end",
        "            starts.append(i * width + at)\n            at = end",
        f"{LABELS}packed",
    ),
    mutation(
        "the end of a prompt is that of a text",
        sources.METHODS_SYSTEM2_TOKENIZATION,
        "return ids[: start + len(bare)]",
        "return ids",
        f"{LABELS}tokenizers[fast_tokenizer]",
    ),
    mutation(
        "unknown words are special tokens",
        sources.METHODS_SYSTEM2_TOKENIZATION,
        "frozenset(found - {unknown})",
        "frozenset(found)",
        f"{LABELS}tokenizers[word_tokenizer]",
    ),
    mutation(
        "special tokens in texts are not noticed",
        sources.METHODS_SYSTEM2_LABELS,
        "if not keep and (",
        "if False and (",
        f"{LABELS}tokenizers[fast_tokenizer]",
    ),
]
