"""Speed and memory by command: `python -m benchmarks`, see `__main__`. Sizes are in benchmarks/sizes/.

Ways that are compared take turns in one process over the same weights and batch, so that a slow minute of the machine
hits all alike; a ratio is the median over repetitions, with a 95 % bootstrap interval.
"""
