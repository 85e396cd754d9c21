"""Small logs with one planted law each, and what every model learns of it: `python -m benchmarks.laws`."""
