"""What is run on a GPU: ``benchmarks.gpu.check`` (tests, compute-sanitizer) and
``benchmarks.gpu.measure`` (times, beside the static predictions). ``make test-gpu`` runs both."""
