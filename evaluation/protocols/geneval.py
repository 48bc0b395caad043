"""GenEval: prompts with the objects, counts, colours and positions to detect.

The layout is the published one, `evaluation_metadata.jsonl` with a line for each prompt:
`{"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a photo of a red bench"}`; a
clause may have a `position`, `["left of", 0]`, and a line an `exclude`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from evaluation.protocols.benchmark import Benchmark, EvaluationError, Item, Prompt, parse_rows, read_rows, spread
from evaluation.protocols.protocol import Detector, Protocol, require_at_least
from evaluation.scores.detection import COLOURS

RELATIONS = ("left of", "right of", "above", "below")


@dataclass
class GenEvalProtocol(Protocol):
    metadata: str = "evaluation_metadata.jsonl"
    """File of the prompts and expected objects, in the data set's folder."""
    images_per_prompt: int = 4
    """Images per prompt, each with its own seed."""
    max_prompts: int | None = None
    """Maximum number of prompts, evenly spaced; for trials."""
    detector: Detector | None = None
    """Object detector; `clip` classifies the colours."""

    def __post_init__(self) -> None:
        require_at_least(self, "geneval", 1, "images_per_prompt", "max_prompts")


class GenEval(Benchmark):
    """GenEval under a protocol; see the module."""

    tables: ClassVar = {"geneval": "Objects, numbers, colours, places (GenEval)"}
    protocol_type = GenEvalProtocol

    def __init__(self, protocol: GenEvalProtocol, folder: Path):
        super().__init__(protocol, folder)
        self.list_file = folder / protocol.metadata
        self.asked = spread(read_rows(self.list_file, lines=True), protocol.max_prompts)
        parse_rows(self.asked, check_row, f"'{self.list_file}'", "prompt")
        self.prompts = [self._prompt(number, row) for number, row in enumerate(self.asked)]

    def _prompt(self, number: int, row: dict[str, Any]) -> Prompt:
        unit, tag, text = str(number), row["tag"], row["prompt"]
        item = Item(Path(), unit, text, group=tag, parts={"task": (tag, unit)}, asked=row)
        return Prompt(text, text, (), item)

    def check_networks(self, networks: Mapping[str, Any]) -> None:
        """Check that the detector knows all classes. Raises EvaluationError."""
        labels, aliases = networks["detector_names"], self.protocol.detector.aliases
        known = {*labels, *(name for name in aliases if aliases[name] in labels)}
        asked = {clause["class"] for row in self.asked for clause in clauses(row)}
        if unknown := sorted(asked - known):
            raise EvaluationError(
                f"geneval.detector does not know {len(unknown)} of {len(asked)} classes of the metadata, as "
                f"{unknown[0]!r}; it knows {', '.join(sorted(known)[:8])} …"
            )

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """Return a note on the detector and CLIP."""
        return [
            f"GenEval: {len(self.asked)} prompts; the mean over kinds of task. Objects by "
            f"{self.protocol.detector.weights}, colours by {self.protocol.clip.weights} on boxes without masks: "
            "numbers of GenEval's own detector do not compare."
        ]


def clauses(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*row.get("include", []), *row.get("exclude", [])]


def check_row(row: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError if a row has another structure or unknown colours or positions."""
    for key in ("tag", "prompt"):
        if not isinstance(row[key], str):
            raise TypeError(f"{key} must be a text, got {row[key]!r}")
    for number, clause in enumerate(row.get("include", [])):
        if clause.get("color", "red") not in COLOURS:
            raise ValueError(f"color {clause['color']!r} is not one of {', '.join(COLOURS)}")
        relation, target = clause.get("position", ("above", -1))
        if relation not in RELATIONS or not target < number:
            raise ValueError(f"position {clause['position']} is not one of {', '.join(RELATIONS)} an earlier clause")
    for clause in clauses(row):
        if not isinstance(clause["class"], str) or clause["count"] < 1:
            raise ValueError(f"{clause} needs a class and a count of at least 1")
    if not clauses(row):
        raise ValueError("nothing is included or excluded")
