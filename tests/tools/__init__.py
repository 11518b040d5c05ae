"""The benchmarks, the examples, the numeric rule and the suite itself."""
