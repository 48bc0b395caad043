"""Two subjects of DreamBench in one image, by a list as UNO publishes it (`datasets/dreambench_multiip.json`).

The list is JSON, `[{"prompt": "a cat and a backpack in the jungle", "image_paths": ["…/cat/04.jpg",
"…/backpack/02.jpg"]}, …]`; paths are relative to its folder and end with the subject's folder and file. Other keys are
not read.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from evaluation.protocols.benchmark import Benchmark
from evaluation.protocols.protocol import Encoder, Protocol
from evaluation.protocols.requests import (
    DataSetError,
    Item,
    Request,
    image_seed,
    inner_file,
    named_problems,
    spread,
)
from kosmosg.files import decode_text
from kosmosg.prompt import PLACEHOLDER


@dataclass
class PairListProtocol(Protocol):
    list: str = "dreambench_multiip.json"
    """JSON of prompts and their images, in the data set's folder."""
    class_nouns: dict[str, str] = field(default_factory=dict)
    """The word that a prompt names a subject by, by its folder's name."""
    fed: Literal["image", "class_and_image"] = "image"
    """What stands for "a cat" in the fed prompt: `<i>`, or the class word before it."""
    images_per_prompt: int = 4
    """Each with a seed of its own."""
    max_prompts: int | None = None
    """Only this many, spread evenly over the list; for trials."""
    dino: Encoder | None = None
    """CLS output; the mean of cosines with both input images, clamped at 0 after averaging."""

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(f"dreambench_pairs.images_per_prompt={self.images_per_prompt} is not allowed; at least 1.")


class DreamBenchPairs(Benchmark):
    """See the module."""

    tables: ClassVar = {"dreambench_pairs": "Two subjects (DreamBench)"}
    protocol_type = PairListProtocol

    def __init__(self, protocol: PairListProtocol, folder: Path):
        super().__init__(protocol, folder)
        rows = read_list(folder / protocol.list)
        problems: list[str] = []
        self.asked = []
        for number, row in enumerate(spread(rows, protocol.max_prompts)):
            try:
                self.asked.append(self._asked(row))
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"entry {number}: {error}")
        if problems:
            raise DataSetError(f"'{folder / protocol.list}': {named_problems(problems)}")

    def _asked(self, row: dict[str, Any]) -> tuple[str, str, tuple[str, ...], str]:
        """(fed prompt, text, input files, pair of subjects)"""
        text, files = row["prompt"], [inner_file(self.folder, name) for name in row["image_paths"]]
        if len(files) != 2:
            raise ValueError(f"{len(files)} images; a pair has two")
        prompt = text
        for file in files:
            subject = file.parent.name
            if subject not in self.protocol.class_nouns:
                raise ValueError(f"dreambench_pairs.class_nouns has no '{subject}'")
            noun = self.protocol.class_nouns[subject]
            told = PLACEHOLDER if self.protocol.fed == "image" else f"{noun} {PLACEHOLDER}"
            prompt, found = re.subn(rf"\b(?:an? )?{re.escape(noun)}\b(?! {PLACEHOLDER})", told, prompt, count=1)
            if not found:
                raise ValueError(f"the prompt {text!r} does not name '{subject}' as {noun!r}")
        names = tuple(str(file.relative_to(self.folder)) for file in files)
        return prompt, text, names, " + ".join(file.parent.name for file in files)

    def requests(self) -> list[Request]:
        """Prompt by prompt, repeat by repeat; a pair of subjects is a unit."""
        count, sampling = self.protocol.images_per_prompt, self.protocol.sampling
        return [
            Request(
                number * count + repeat,
                prompt,
                text,
                inputs,
                image_seed(sampling.seed, number, repeat, sampling.noise_period),
                unit,
            )
            for number, (prompt, text, inputs, unit) in enumerate(self.asked)
            for repeat in range(count)
        ]

    def item(self, request: Request, file: Path) -> Item:
        """A made image with both of its inputs."""
        return Item(file, request.unit, request.text, tuple(self.folder / name for name in request.inputs))

    def files(self) -> list[Path]:
        """The list and its images."""
        inputs = {self.folder / name for _, _, names, _ in self.asked for name in names}
        return [self.folder / self.protocol.list, *sorted(inputs)]

    def notes(self, bootstrap: Any, scores: Any) -> list[str]:
        """What DINO and CLIP-I are."""
        return [
            f"Two subjects: {len(self.asked)} prompts; DINO and CLIP-I are the mean of the whole image's cosines with "
            f"both input images. Intervals: {bootstrap.replicates} bootstrap draws of pairs."
        ]


def read_list(file: Path) -> list[dict[str, Any]]:
    """A JSON list of objects. Raises DataSetError."""
    if not file.is_file():
        raise DataSetError(f"'{file}' does not exist; see docs/evaluation.md for the layout that is expected.")
    try:
        rows = json.loads(decode_text(file.read_bytes()))
    except ValueError as error:
        raise DataSetError(f"'{file}' is no JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataSetError(f"'{file}' is no JSON list of objects.")
    return rows


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line. Raises DataSetError."""
    if not file.is_file():
        raise DataSetError(f"'{file}' does not exist; see docs/evaluation.md for the layout that is expected.")
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):  # lines end at "\n" alone
        if line.strip():
            try:
                rows.append(json.loads(decode_text(line)))
            except ValueError as error:
                raise DataSetError(f"'{file}', line {number} is no JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise DataSetError(f"'{file}', line {number} is no JSON object.")
    if not rows:
        raise DataSetError(f"'{file}' is empty.")
    return rows
