"""The tables of all benchmarks and metrics; the rest of the evaluation iterates over these two."""

from dataclasses import make_dataclass

from evaluation.protocols.benchmark import Benchmark
from evaluation.protocols.coco import Coco
from evaluation.protocols.dreambench import DreamBench
from evaluation.protocols.geneval import GenEval
from evaluation.protocols.judged import DreamBenchPlus, OmniContext
from evaluation.protocols.pairs import DreamBenchPairs
from evaluation.scores.cosine import ClipI, ClipT, Dino, NearCopies
from evaluation.scores.detection import Correct
from evaluation.scores.distribution import Fid, Kid
from evaluation.scores.judge import Colour, Identity, Kind, Missing, PairIdentity, PairKind, Pattern, Swapped, Words
from evaluation.scores.leakage import Kept, Leaked, ShownBackground, ShownKind, ShownLook, ShownPose
from evaluation.scores.metric import Metric
from evaluation.scores.vision_judge import Following, Overall, Preservation

BENCHMARKS: dict[str, type[Benchmark]] = {
    "dreambench": DreamBench,
    "dreambench_pairs": DreamBenchPairs,
    "dreambench_plus": DreamBenchPlus,
    "omnicontext": OmniContext,
    "geneval": GenEval,
    "coco": Coco,
}
"""Benchmarks by the configuration key of their protocol, which is also their folder in configs/protocols/."""

METRICS: dict[str, tuple[type[Metric], ...]] = {
    "dreambench": (Dino, ClipI, ClipT, NearCopies, Kind, Colour, Pattern, Identity, Words),
    "pairs": (PairKind, PairIdentity, Swapped, Missing),
    "leakage": (Kept, ShownKind, ShownLook, Leaked, ShownBackground, ShownPose),
    "dreambench_pairs": (Dino, ClipI, ClipT),
    "dreambench_plus": (Preservation, Following, Dino, ClipI, ClipT),
    "omnicontext": (Following, Preservation, Overall),
    "geneval": (Correct,),
    "coco": (Fid, Kid, ClipT),
}
"""Columns of each table, in order."""

GUIDANCE = "guidance"
"""Name of the table over guidance scales, which has the columns of DreamBench."""

Protocols = make_dataclass("Protocols", [(name, kind.protocol_type | None, None) for name, kind in BENCHMARKS.items()])
"""Protocol of each benchmark; null skips the benchmark."""


def columns_of(table: str) -> tuple[type[Metric], ...]:
    """Return the metrics of a table."""
    return METRICS["dreambench" if table == GUIDANCE else table]


def metric(name: str) -> type[Metric]:
    """Return the metric with this name. Raises KeyError."""
    for kind in (kind for metrics in METRICS.values() for kind in metrics):
        if kind.name == name:
            return kind
    raise KeyError(f"there is no metric {name!r} in METRICS (evaluation/benchmarks.py).")


def titles() -> dict[str, str]:
    """Return the titles of all tables by name, in the order of the report."""
    return {table: title for benchmark in BENCHMARKS.values() for table, title in benchmark.tables.items()}


def benchmark_of(table: str) -> str:
    """Return the name of the benchmark that a table belongs to."""
    return next((name for name, kind in BENCHMARKS.items() if table in kind.tables), "dreambench")
