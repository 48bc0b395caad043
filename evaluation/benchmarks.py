"""The benchmarks and the metrics that there are: everything else iterates over these two tables."""

from collections.abc import Iterator
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
from evaluation.scores.judge import (
    Colour,
    Identity,
    Kind,
    Missing,
    PairIdentity,
    PairKind,
    Pattern,
    Swapped,
    Words,
)
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
"""By the configuration's key of the protocol, which is the folder of protocols in configs/protocols/."""

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
"""The columns of each table, in order."""

GUIDANCE = "guidance"
"""The table of points over guidance scales, with the columns of DreamBench."""

Protocols = make_dataclass("Protocols", [(name, kind.protocol_type | None, None) for name, kind in BENCHMARKS.items()])
"""The protocol of each benchmark; null leaves it out."""


def columns_of(table: str) -> tuple[type[Metric], ...]:
    """The metrics of a table."""
    return METRICS["dreambench" if table == GUIDANCE else table]


def metric(name: str) -> type[Metric]:
    """The metric of a score. Raises KeyError: there is none of that name."""
    for metrics in METRICS.values():
        for found in metrics:
            if found.name == name:
                return found
    raise KeyError(f"there is no metric {name!r}; it is not in METRICS (evaluation/benchmarks.py).")


def titles() -> dict[str, str]:
    """The tables that a page can have, in their order."""
    return {table: title for benchmark in BENCHMARKS.values() for table, title in benchmark.tables.items()}


def benchmark_of(table: str) -> str:
    """The benchmark whose table it is."""
    return next((name for name, kind in BENCHMARKS.items() if table in kind.tables), "dreambench")


def tables_of(benchmark: str) -> Iterator[tuple[str, tuple[type[Metric], ...]]]:
    """Each table of a benchmark with its columns."""
    for table in BENCHMARKS[benchmark].tables:
        yield table, METRICS[table]
