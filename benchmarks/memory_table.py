"""What a loss takes in memory, computed by the formulas of ``benchmarks/memory/``.

``python -m benchmarks.memory_table`` prints docs/memory.md's tables, ``--page docs/memory.md`` writes them
there; with sizes of your own (``--vocab 50257 --tokens 4096 --hidden 768``) it prints theirs.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .core.markdown import markdown_table, replace_marked
from .losses.cases import MODELS
from .memory import cpu, gpu
from .memory.sizes import EAGER, FLOAT, Bytes, Sizes, eager, stored_bytes_a_token

BEGIN, END = "<!-- memory:begin -->", "<!-- memory:end -->"
VOCABULARIES, TOKENS = (128256, 151936, 262144), (8192, 32768)
SMALL_BUDGET = 256 << 20  # of the linear form's second line
STORED_TOKENS = 100_000_000
MOST_SLOTS = 1024  # a row of a top-k teacher
KINDS = ("inputs", "gradient", "saved", "temporary", "afterwards", "at most")

GIB, MIB = 1 << 30, 1 << 20


def rows_of(sizes: Sizes, threads: int | None = None) -> list[tuple[str, Bytes]]:
    """Each form's name and bytes: on a GPU, or on a CPU with so many ``threads``."""
    of, more = (gpu, {}) if threads is None else (cpu, {"threads": threads})
    dense = partial(of.dense, sizes, **more)
    linear = partial(of.linear, **more)
    budget = Sizes(**vars(sizes) | {"memory_budget": SMALL_BUDGET})
    frozen = Sizes(**vars(sizes) | {"frozen_head": True})
    rows = [
        ("eager, float32 (MiniLLM's)", eager(sizes, FLOAT)),
        ("eager, the logits' dtype", eager(sizes, sizes.itemsize)),
        ("`distillation_loss`", dense("forward")),
        ('`distillation_loss`, `gradient="backward"`', dense("backward")),
        ("`distillation_loss`, `inplace=True`", dense("inplace")),
        (f"`topk_distillation_loss`, K = {sizes.k}", of.topk(sizes, **more)),
        ("`linear_distillation_loss`", linear(sizes)),
    ]
    if sizes.memory_budget is None:
        name = f"`linear_distillation_loss`, `memory_budget` {SMALL_BUDGET // MIB} MiB"
        rows.append((name, linear(budget)))
    return [
        *rows,
        ("`linear_distillation_loss`, frozen head", linear(frozen)),
        (f"`linear_topk_distillation_loss`, K = {sizes.k}", linear(sizes, topk=True)),
    ]


def amount(n_bytes: int) -> str:
    """In GiB, or MiB below a tenth of one."""
    if n_bytes == 0:
        return "0"
    if n_bytes < GIB / 10:
        return f"{n_bytes / MIB:.1f} MiB" if n_bytes >= 0.05 * MIB else "< 0.1 MiB"
    return f"{n_bytes / GIB:.2f} GiB"


def kinds(row: Bytes) -> list[str]:
    return [amount(n) for n in (*row, row.total)]


def model(vocab: int) -> str:
    """``128256 (llama-3)``, or the number alone."""
    return f"{vocab} ({MODELS[vocab]})" if vocab in MODELS else str(vocab)


def totals(sizes: Sequence[Sizes], threads: int | None = None) -> list[str]:
    """A line for each form, a column for each of the sizes: the most that there is at once."""
    columns = [rows_of(s, threads) for s in sizes]
    header = ["at most at once", *(f"{model(s.vocab)}, {s.tokens} tokens" for s in sizes)]
    lines = (
        [cells[0][0], *(amount(row.total) for _, row in cells)]
        for cells in zip(*columns, strict=True)
    )
    return markdown_table(header, lines)


def by_kind(sizes: Sizes, threads: int | None = None) -> list[str]:
    """A line for each form, a column for each kind."""
    header = [f"{model(sizes.vocab)}, {sizes.tokens} tokens", *KINDS]
    return markdown_table(header, ([name, *kinds(row)] for name, row in rows_of(sizes, threads)))


def by_divergence(itemsize: int = Sizes.itemsize) -> list[str]:
    """What the dense losses hold of a logit: eager PyTorch's depend on the divergence."""
    header = [
        "bytes a logit above the inputs", "eager, float32", "eager, the logits' dtype",
        "`distillation_loss`", "`inplace=True`",
    ]  # fmt: skip
    return markdown_table(
        header,
        (
            [f"`{name}`", str(row.bytes(FLOAT)), str(row.bytes(itemsize)), str(itemsize), "0"]
            for name, row in EAGER.items()
        ),
    )


def teachers(sizes: Sequence[Sizes]) -> list[str]:
    """What a token of the teacher takes: while a student trains, and kept for all epochs."""
    ones = {s.vocab: Sizes(**vars(s) | {"tokens": 1}) for s in sizes}
    one = ones[min(ones)]
    ways = [(f"logits of {model(vocab)}", ones[vocab].logits) for vocab in sorted(ones)]
    ways += [
        (f"hidden state of {one.teacher_hidden}", one.of_teacher_hidden),
        (f"{one.k} of a store, as read", one.slots),
        (f"{one.k} of a store, on disk", stored_bytes_a_token(one.k)),
    ]
    header = ["the teacher", "bytes a token", f"GB of {STORED_TOKENS // 10**6} million tokens"]
    return markdown_table(
        header, ([name, str(n), f"{n * STORED_TOKENS / 1e9:.0f}"] for name, n in ways)
    )


def markdown(sizes: Sequence[Sizes], threads: int | None = None) -> str:
    """Every table of these sizes."""
    tables = [totals(sizes, threads)] if len(sizes) > 1 else []
    tables += [by_kind(s, threads) for s in sizes]
    tables += [by_divergence(), teachers(sizes)]
    return "\n\n".join("\n".join(table) for table in tables)


def page_sizes() -> list[Sizes]:
    """Those of docs/memory.md."""
    return [Sizes(tokens, vocab) for vocab in VOCABULARIES for tokens in TOKENS]


def whole_number(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def parse(arguments: Sequence[str] | None) -> tuple[str, Path | None]:
    """The tables that are asked for, and the page to write them to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_table", description=__doc__)
    add = partial(parser.add_argument, type=whole_number, metavar="N")
    add("--vocab", nargs="+", default=VOCABULARIES, help="of both models")
    add("--tokens", nargs="+", default=TOKENS, help="of a step: batch times length")
    add("--hidden", default=Sizes.hidden, help="size of the student's hidden states")
    add("--teacher-hidden", default=Sizes.teacher_hidden, help="size of the teacher's")
    add("--k", default=Sizes.k, help="tokens a row of a top-k teacher")
    add("--memory-budget", help="bytes, of the linear forms (default: theirs)")
    add("--cpu-threads", help="the CPU path, with so many threads (default: a GPU)")
    parser.add_argument("--page", type=Path, help=f"write what lies between {BEGIN} and {END}")
    options = parser.parse_args(arguments)
    if options.k > MOST_SLOTS:
        parser.error(f"argument --k: expected at most {MOST_SLOTS}, got {options.k}")
    shared = options.hidden, options.teacher_hidden, options.k
    sizes = [
        Sizes(tokens, vocab, *shared, memory_budget=options.memory_budget)
        for vocab in options.vocab
        for tokens in options.tokens
    ]
    try:
        text = markdown(sizes, options.cpu_threads)
    except ValueError as error:  # a budget that holds no token
        parser.error(str(error))
    return text, options.page


def main(arguments: Sequence[str] | None = None) -> None:
    text, page = parse(arguments)
    if page is None:
        print(text)
    else:
        found = page.read_text(encoding="utf-8")
        page.write_text(replace_marked(found, text, BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main()
