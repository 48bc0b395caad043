"""Benchmarks scored by a vision-language model: DreamBench++ and OmniContext, in layouts close to the published ones.

DreamBench++: `images/**/NN.jpg` (or .png) and `captions/**/NN.txt` of the same name, with the subject's name in the
first line and a prompt in each other line. The folder's name is the category; `style` holds styles.

OmniContext: `omnicontext.jsonl` with a line for each task, `{"key": "…", "task_type": "…", "instruction": "…",
"input_images": ["images/0.png", …]}`; image paths are relative to its folder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from omegaconf import MISSING

from evaluation.protocols.benchmark import (
    Benchmark,
    DataSetError,
    Item,
    Prompt,
    inner_file,
    parse_rows,
    read_rows,
    spread,
)
from evaluation.protocols.protocol import Encoder, Protocol, VisionJudge, require_at_least
from kosmosg.files import decode_text
from kosmosg.prompt import PLACEHOLDER

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class JudgedProtocol(Protocol):
    vlm: VisionJudge | None = None
    """The judge; its name and revision are part of the identity."""
    highest: float = 10
    """Highest score in the instructions; results are shares of it."""
    preservation: str = MISSING
    """Question about the input images and the generated image, in this order; `{prompt}` is the prompt."""
    following: str = MISSING
    """Question about the generated image; `{prompt}` is the prompt."""
    max_prompts: int | None = None
    """Maximum number of prompts, evenly spaced; for trials."""


@dataclass
class DreamBenchPlusProtocol(JudgedProtocol):
    style_preservation: str = MISSING
    """Replaces `preservation` if the input image shows a style."""
    fed: Literal["image", "class_and_image"] = "image"
    """Replacement of the subject's name in the prompt: `<i>`, or the name and `<i>`. If the prompt does not name the
    subject, `<i>` precedes it."""
    images_per_prompt: int = 1
    """Images per prompt, each with its own seed."""
    dino: Encoder | None = None
    """Encoder of DINO (CLS output): the mean cosine with the input image, clamped at 0 after averaging."""

    def __post_init__(self) -> None:
        require_at_least(self, "dreambench_plus", 1, "images_per_prompt", "max_prompts")


@dataclass
class OmniContextProtocol(JudgedProtocol):
    list: str = "omnicontext.jsonl"
    """File of the tasks, in the data set's folder."""

    def __post_init__(self) -> None:
        require_at_least(self, "omnicontext", 1, "max_prompts")


class Judged(Benchmark):
    """Base class with the judge's questions and the notes."""

    size: str
    """Size of the benchmark, for the notes."""

    def questions(
        self, text: str, inputs: Sequence[Path], style: bool = False
    ) -> dict[str, tuple[str, tuple[Path, ...]]]:
        """Return the questions about a generated image by metric: the text, and the images shown before it."""
        preserve = self.protocol.style_preservation if style else self.protocol.preservation
        preservation, following = (
            question.replace("{prompt}", text) for question in (preserve, self.protocol.following)
        )
        return {"preservation": (preservation, tuple(inputs)), "following": (following, ())}

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """Return a note on the judge."""
        judge = self.protocol.vlm
        return [
            f"{next(iter(self.tables.values()))}: {self.size}, judged by {judge.weights}"
            f"{f' at {judge.revision}' if judge.revision else ''}, from 0 to 1. Numbers of other judges or "
            "instructions, as those published with GPT-4o, do not compare. "
            f"Intervals: {bootstrap.replicates} bootstrap draws."
        ]


@dataclass(frozen=True)
class Concept:
    """A subject or style: its name, category, image and prompts."""

    class_noun: str
    kind: str
    image: Path
    captions: tuple[str, ...]


class DreamBenchPlus(Judged):
    """DreamBench++ under a protocol; see the module."""

    tables: ClassVar = {"dreambench_plus": "Concepts (DreamBench++)"}
    protocol_type = DreamBenchPlusProtocol

    def __init__(self, protocol: DreamBenchPlusProtocol, folder: Path):
        super().__init__(protocol, folder)
        captions = sorted((folder / "captions").rglob("*.txt"))
        if not captions:
            raise DataSetError(f"DreamBench++ at '{folder}': captions/ holds no .txt.")
        names = [str(file.relative_to(folder / "captions").with_suffix("")) for file in captions]
        concepts = parse_rows(names, self._concept, f"DreamBench++ at '{folder}'", "concept")
        self.subjects: dict[str, Concept] = dict(zip(names, concepts, strict=True))
        self.size = f"{len(self.subjects)} concepts"
        pairs = [(name, caption) for name, concept in self.subjects.items() for caption in concept.captions]
        self.prompts = [self._prompt(name, caption) for name, caption in spread(pairs, protocol.max_prompts)]

    def _concept(self, name: str) -> Concept:
        images = [self.folder / "images" / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
        image = next((path for path in images if path.is_file()), None)
        text = decode_text((self.folder / "captions" / f"{name}.txt").read_bytes())
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if image is None:
            raise ValueError(f"images/{name}.jpg is missing")
        if len(lines) < 2:
            raise ValueError(f"captions/{name}.txt has no prompts after the subject's name")
        return Concept(lines[0], Path(name).parent.name, image, tuple(lines[1:]))

    def _prompt(self, name: str, caption: str) -> Prompt:
        concept = self.subjects[name]
        slot = PLACEHOLDER if self.protocol.fed == "image" else f"{concept.class_noun} {PLACEHOLDER}"
        noun = rf"\b(?:an? )?{re.escape(concept.class_noun)}\b"
        prompt, replaced = re.subn(noun, slot, caption, count=1, flags=re.IGNORECASE)
        item = Item(
            Path(),
            name,
            caption,
            (concept.image,),
            group=concept.kind,
            parts={"category": (concept.kind, name)} if concept.kind else {},
            given=concept.image,
            asked=self.questions(caption, [concept.image], style=concept.kind == "style"),
        )
        inputs = (str(concept.image.relative_to(self.folder)),)
        return Prompt(prompt if replaced else f"{PLACEHOLDER} {caption}", caption, inputs, item)

    def kept_image(self, subject: str) -> Path:
        """Return the concept's image."""
        return self.subjects[subject].image

    def files(self) -> list[Path]:
        """Return the images and captions of all concepts."""
        images = [concept.image for concept in self.subjects.values()]
        return [*images, *(self.folder / "captions" / f"{name}.txt" for name in self.subjects)]


class OmniContext(Judged):
    """OmniContext under a protocol; see the module."""

    tables: ClassVar = {"omnicontext": "Subjects in context (OmniContext)"}
    protocol_type = OmniContextProtocol

    def __init__(self, protocol: OmniContextProtocol, folder: Path):
        super().__init__(protocol, folder)
        self.list_file = folder / protocol.list
        rows = spread(read_rows(self.list_file, lines=True), protocol.max_prompts)
        self.prompts = parse_rows(rows, self._prompt, f"'{self.list_file}'", "task")
        self.size = f"{len(self.prompts)} tasks"

    def _prompt(self, row: dict[str, Any]) -> Prompt:
        """Return the prompt of a task: its input images in order, then the instruction."""
        files = [inner_file(self.folder, name) for name in row["input_images"]]
        if not files:
            raise ValueError("no input_images")
        unit, kind, text = str(row["key"]), row["task_type"], row["instruction"]
        parts, asked = {"task": (kind, unit)} if kind else {}, self.questions(text, files)
        item = Item(Path(), unit, text, group=kind, parts=parts, asked=asked)
        names = tuple(str(file.relative_to(self.folder)) for file in files)
        return Prompt(" ".join([*[PLACEHOLDER] * len(files), text]), text, names, item)
