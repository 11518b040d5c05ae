"""The numeric rule over random configurations: ``python -m benchmarks.accuracy``."""
