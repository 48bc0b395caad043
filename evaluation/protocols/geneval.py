"""GenEval's layout: `evaluation_metadata.jsonl`, a line for each prompt, as the benchmark publishes it.

`{"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a photo of a red bench"}`; a
clause may have a `position`, `["left of", 0]`, and a line an `exclude`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from evaluation.protocols.benchmark import Benchmark, EvaluationError, Item, Prompt, read_all, read_rows, spread
from evaluation.protocols.protocol import Detector, Protocol, require_at_least
from evaluation.scores.detection import COLOURS

RELATIONS = ("left of", "right of", "above", "below")


@dataclass
class GenEvalProtocol(Protocol):
    metadata: str = "evaluation_metadata.jsonl"
    """The prompts and what must be seen, in the data set's folder."""
    images_per_prompt: int = 4
    """Each with a seed of its own."""
    max_prompts: int | None = None
    """Only this many, spread evenly; for trials."""
    detector: Detector | None = None
    """Finds objects by the names that the metadata use; `clip` tells their colours."""

    def __post_init__(self) -> None:
        require_at_least(self, "geneval", 1, "images_per_prompt", "max_prompts")


class GenEval(Benchmark):
    """See the module."""

    tables: ClassVar = {"geneval": "Objects, numbers, colours, places (GenEval)"}
    protocol_type = GenEvalProtocol

    def __init__(self, protocol: GenEvalProtocol, folder: Path):
        super().__init__(protocol, folder)
        file = folder / protocol.metadata
        self.asked = spread(read_rows(file, lines=True), protocol.max_prompts)
        read_all(self.asked, check_row, f"'{file}'", "prompt")
        self.prompts = [self._prompt(number, row) for number, row in enumerate(self.asked)]

    def _prompt(self, number: int, row: dict[str, Any]) -> Prompt:
        unit, tag = str(number), row["tag"]
        parts = {"task": (tag, unit)}
        return Prompt(
            row["prompt"], row["prompt"], (), Item(Path(), unit, row["prompt"], group=tag, parts=parts, asked=row)
        )

    def files(self) -> list[Path]:
        """The metadata."""
        return [self.folder / self.protocol.metadata]

    def check_networks(self, networks: Mapping[str, Any]) -> None:
        """Every class must be one that the detector knows."""
        aliases = self.protocol.detector.aliases
        known = {
            *networks["detector_names"],
            *(name for name in aliases if aliases[name] in networks["detector_names"]),
        }
        asked = {clause["class"] for row in self.asked for clause in clauses(row)}
        if unknown := sorted(asked - known):
            raise EvaluationError(
                f"geneval.detector does not know {len(unknown)} of {len(asked)} classes of the metadata, as "
                f"{unknown[0]!r}; it knows {', '.join(sorted(known)[:8])} …"
            )

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """What was detected with."""
        return [
            f"GenEval: {len(self.asked)} prompts; the mean over kinds of task. Objects by "
            f"{self.protocol.detector.weights}, colours by {self.protocol.clip.weights} on boxes without masks: "
            "numbers of GenEval's own detector do not compare."
        ]


def clauses(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*row.get("include", []), *row.get("exclude", [])]


def check_row(row: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError, ValueError: not of the structure, or asks for what is not computed."""
    for key in ("tag", "prompt"):
        if not isinstance(row[key], str):
            raise TypeError(f"{key} is {row[key]!r}, which is no text")
    for number, clause in enumerate(row.get("include", [])):
        if clause.get("color", "red") not in COLOURS:
            raise ValueError(f"color {clause['color']!r} is not of {', '.join(COLOURS)}")
        relation, target = clause.get("position", ("above", -1))
        if relation not in RELATIONS or not target < number:
            raise ValueError(f"position {clause['position']} is not of {', '.join(RELATIONS)} an earlier clause")
    for clause in clauses(row):
        if not isinstance(clause["class"], str) or clause["count"] < 1:
            raise ValueError(f"{clause} has no class, or no count of at least 1")
    if not clauses(row):
        raise ValueError("nothing is included or excluded")
