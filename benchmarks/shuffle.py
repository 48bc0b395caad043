"""How well the order shuffles: statistics of the seeded permutation beside those of numpy's.

    python -m benchmarks.shuffle            # table
    python -m benchmarks.shuffle --json     # the same as JSON

Both are permutations of 0 … n-1; a random one has known means, and numpy's shows by how much single ones differ.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from datamodules.order import Permutation, mix

SIZES = (1_000, 20_000)
KEYS = 30
SHARD_SAMPLES = 1_000
BATCH = 64


def statistics(p: np.ndarray) -> dict[str, float]:
    """What would show that neighbours stay together; each is near 1, or near 0 where it says correlation."""
    n = len(p)
    x = p.astype(np.float64)
    steps = np.abs(np.diff(x))
    found = {
        "correlation of neighbours": float(np.corrcoef(x[:-1], x[1:])[0, 1]),
        "correlation at distance 2": float(np.corrcoef(x[:-2], x[2:])[0, 1]),
        "correlation with the place": float(np.corrcoef(np.arange(n), x)[0, 1]),
        "mean distance of neighbours / (n/3)": float(steps.mean() / ((n + 1) / 3)),
        "mean displacement / (n/3)": float(np.abs(x - np.arange(n)).mean() / ((n * n - 1) / (3 * n))),
        "neighbours kept": float((np.diff(p) == 1).sum()),
    }
    if n >= BATCH * SHARD_SAMPLES // 10:  # enough shards for a batch to spread over
        batches = p[: n // BATCH * BATCH].reshape(-1, BATCH) // SHARD_SAMPLES
        found["shards in a batch of 64"] = float(np.mean([len(np.unique(batch)) for batch in batches]))
    return found


def feistel(n: int, key: int) -> np.ndarray:
    """Ours."""
    permutation = Permutation(n, mix(key))
    return np.fromiter((permutation(i) for i in range(n)), dtype=np.int64, count=n)


def shuffled(n: int, key: int) -> np.ndarray:
    """numpy's."""
    return np.random.default_rng(key).permutation(n)


def summary(make: Callable[[int, int], np.ndarray], n: int, keys: int) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each statistic over `keys` permutations."""
    found = [statistics(make(n, key)) for key in range(keys)]
    return {name: (float(np.mean(v)), float(np.std(v))) for name in found[0] if (v := [f[name] for f in found])}


def measure(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Both ways at each size, and how far ours is from numpy's in standard errors of the difference."""
    sizes = []
    for n in SIZES:
        ours, theirs = summary(feistel, n, KEYS), summary(shuffled, n, KEYS)
        rows = {}
        for name, (mean, deviation) in ours.items():
            other, spread = theirs[name]
            error = np.hypot(deviation, spread) / np.sqrt(KEYS)
            rows[name] = {
                "ours": mean,
                "ours_deviation": deviation,
                "numpy": other,
                "numpy_deviation": spread,
                "z": float((mean - other) / error) if error else 0.0,
            }
        sizes.append({"n": n, "statistics": rows})
    return {"benchmark": "shuffle", "keys": KEYS, "sizes": sizes}


def main(arguments: Sequence[str]) -> int:
    result = measure()
    if "--json" in arguments:
        print(json.dumps(result, indent=1))
        return 0
    for size in result["sizes"]:
        print(f"| {size['n']:,} samples, {result['keys']} keys | ours | numpy | difference in standard errors |")
        print("|---|---|---|---|")
        for name, row in size["statistics"].items():
            ours = f"{row['ours']:.4f} ± {row['ours_deviation']:.4f}"
            print(f"| {name} | {ours} | {row['numpy']:.4f} ± {row['numpy_deviation']:.4f} | {row['z']:+.1f} |")
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
