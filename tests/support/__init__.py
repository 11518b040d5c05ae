"""What the tests share: inputs, rules, formulas, and the mutations."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
