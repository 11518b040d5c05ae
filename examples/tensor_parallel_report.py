"""What ``tensor_parallel.py`` found, for the terminal and for a page.

    python examples/tensor_parallel_report.py examples/results/tensor_parallel.json --page docs/examples.md

writes the numbers between the page's marks.
"""

import argparse
import json
from pathlib import Path

from mode_report import write_into
from report import console


def lines(record: dict) -> list[str]:
    """A sentence a finding."""
    n_tokens, ranks = record["tokens_a_step"], record["ranks"]
    first, last = (record["losses"]["split"][i] for i in (0, -1))
    found = [
        f"{len(record['losses']['split'])} steps: the split student's loss goes from {first:.4f} to "
        f"{last:.4f} nats a token",
        f"largest relative difference to the whole one, at any step: "
        f"{record['largest_relative_difference']:.1e} ({record['tolerance']:.0e} allowed)",
        f"collectives of the loss a step: {record['collectives_a_step']}",
    ]
    return found + [
        f"bytes that each of {ranks} ranks sends a step for {what}: {n_bytes:,} "
        f"({n_bytes / n_tokens:,.0f} a token)"
        for what, n_bytes in record["bytes_sent_a_step_and_rank"].items()
    ]


def show(record: dict) -> None:
    for line in lines(record):
        console.print(f"{line}.")


def markdown(record: dict) -> str:
    machine, versions = record["machine"], record["versions"]
    return "\n".join(
        [
            *(f"- {line}." for line in lines(record)),
            "",
            f"({machine['torch_threads']} thread each of {machine['cpu']}, torch {versions['torch']}, "
            f"`{record['command']}`)",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="tensor_parallel.json")
    parser.add_argument("--page", type=Path, required=True, help="page to write the numbers into")
    options = parser.parse_args()
    write_into(options.page, markdown(json.loads(options.record.read_text())), "tensor_parallel")


if __name__ == "__main__":
    main()
