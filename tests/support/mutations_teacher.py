"""Mutations of the teacher's stores: what is whole, who may write, what is noticed."""

from tests.support import sources
from tests.support.mutants import Mutation

MALFORMED = "tests/teacher/test_malformed.py::test_malformed"
RESUMING = "tests/teacher/test_resuming.py::test_"
WRITING = "tests/teacher/test_writing.py::test_"
KILLS = "tests/teacher/test_kills.py::test_killed_writers"
STORE = "tests/teacher/test_store.py::test_"
SAMPLER = "tests/teacher/test_sampler.py::test_"

TEACHER_STORES = [
    Mutation(
        "store: bytes are written under the file's own name", sources.TEACHER_FILES,
        'with self.temporary.open("wb") as written:',
        'with (self.temporary.touch() or file.open("wb")) as written:',
        f"{KILLS}[one file-6]",
    ),
    Mutation(
        "store: a name before the bytes are safe", sources.TEACHER_FILES,
        "                    os.fsync(written.fileno())\n", "",
        f"{WRITING}all_is_on_the_disk_before_it_has_its_name",
    ),
    Mutation(
        "store: no claim", sources.TEACHER_FILES,
        "flock(descriptor, LOCK_EX | LOCK_NB)", "pass",
        f"{WRITING}one_writer_at_a_time[file]",
    ),
    Mutation(
        "store: children keep a dead writer's claim", sources.TEACHER_FILES,
        "        os.close(descriptor)\n    _held.clear()", "        pass",
        f"{WRITING}a_dead_writer_loses_its_claim_at_once",
    ),
    Mutation(
        "store: a link is replaced", sources.TEACHER_STORE,
        "path = Path(os.path.realpath(check_path(path)))", "path = check_path(path)",
        f"{WRITING}symbolic_links_are_written_through[file]",
    ),
    Mutation(
        "store: a resumed store takes any settings", sources.TEACHER_STORE,
        "read_shard(path / shard_name(0)).settings.check(path, asked)", "pass",
        f"{RESUMING}only_the_same_store_resumes[change1-temperature must be 2.0, which .*store records, got 1.0]",
    ),
    Mutation(
        "store: a shorter last shard counts as finished", sources.TEACHER_CONTENTS,
        "if shard.rows == size:", "if shard.rows:",
        f"{RESUMING}a_last_shard_without_an_index_is_written_again",
    ),
    Mutation(
        "store: a shard too many is not noticed", sources.TEACHER_CONTENTS,
        "for name in sorted(names - {file.name for file in files}):", "for name in ():",
        f"{MALFORMED}[one more]",
    ),
    Mutation(
        "store: checksums are not compared when a store is opened", sources.TEACHER_FORMAT,
        '            "checksum": self.checksum,\n        }',
        '            "checksum": "0" * 64,\n        }',
        f"{MALFORMED}[of another store]",
    ),
    Mutation(
        "store: a store id that is not its settings'", sources.TEACHER_METADATA,
        'if values["store"] != settings.store:', "if False:",
        f"{MALFORMED}[a temperature changed by hand]",
    ),
    Mutation(
        "store: ids beyond the vocabulary open", sources.TEACHER_FORMAT,
        "if shard.largest_id >= settings.vocab_size:", "if False:",
        f"{MALFORMED}[a vocabulary below an id]",
    ),
    Mutation(
        "store: tensors of another shape open", sources.TEACHER_FORMAT,
        "if layout != shard.layout():", "if layout.keys() != shard.layout().keys():",
        f"{MALFORMED}[another shape]",
    ),
    Mutation(
        "store: a file replaced meanwhile is read", sources.TEACHER_FORMAT,
        "shard.check_place(file, expected)", "pass",
        "tests/teacher/test_dataset.py::test_a_file_replaced_meanwhile_is_noticed[file]",
    ),
    Mutation(
        "store: verify() looks at no value", sources.TEACHER_DATASET,
        "check_stored(str(file), some, settings.vocab_size, i * self._size + start)", "pass",
        f"{MALFORMED}[probabilities of 4]",
    ),
    Mutation(
        "store: rounding of bfloat16 is an error", sources.CHECKS_CONTENTS,
        "LARGEST_SUM = 1.25", "LARGEST_SUM = 1.0001",
        f"{STORE}rounding_of_a_dtype_is_no_error[4.0-torch.bfloat16]",
    ),
    Mutation(
        "store: replicas read the same blocks", sources.TEACHER_SAMPLER,
        "self.rank + i * self.num_replicas", "i",
        f"{SAMPLER}replicas[False-5-2-False]",
    ),
]  # fmt: skip
