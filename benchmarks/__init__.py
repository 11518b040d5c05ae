"""Side-by-side measurements of the dense losses: ``python -m benchmarks``, from the repo root.

``python -m benchmarks.report FILE.json`` makes the README's table out of the JSON, and
``python -m benchmarks.overhead`` prints the cost in Python of one call.
"""
