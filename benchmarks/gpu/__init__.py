"""Training on a GPU: correctness first, then speed, memory and peers. `python -m benchmarks.gpu --help`."""
