"""Benchmarks of speed and memory: `python -m benchmarks`, see `__main__`. Sizes are in benchmarks/sizes/.

Compared variants are run alternately in one process with the same weights and batch, so that a change of the machine's
speed affects all of them. Ratios are medians over repetitions, with 95 % bootstrap intervals.
"""
