"""Benchmarks whose images a vision-language model judges: DreamBench++ and OmniContext, in layouts like the published.

DreamBench++: `images/**/NN.jpg` (or .png) and, under the same name, `captions/**/NN.txt`: the subject's name in the
first line, then a prompt a line; the folder's name is the category, `style` for styles.

OmniContext: `omnicontext.jsonl`, a line for each task with the published fields, `{"key": "…", "task_type": "…",
"instruction": "…", "input_images": ["images/0.png", …]}`; images are files beside it.
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
    read_all,
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
    """The judge. Its name and revision are part of the number."""
    highest: float = 10
    """The best score that the instructions speak of; results are shares of it."""
    preservation: str = MISSING
    """Asked with the input images and the made one, in this order; `{prompt}` is the prompt."""
    following: str = MISSING
    """Asked with the made image alone; `{prompt}` is the prompt."""
    max_prompts: int | None = None
    """Only this many, spread evenly; for trials."""


@dataclass
class DreamBenchPlusProtocol(JudgedProtocol):
    style_preservation: str = MISSING
    """In place of `preservation` where the input image stands for a style."""
    fed: Literal["image", "class_and_image"] = "image"
    """What stands for the subject's name in the fed prompt: `<i>`, or the name before it. A prompt that does not name
    the subject is fed after the image."""
    images_per_prompt: int = 1
    """Each with a seed of its own."""
    dino: Encoder | None = None
    """CLS output; the mean cosine with the input image, clamped at 0 after averaging."""

    def __post_init__(self) -> None:
        require_at_least(self, "dreambench_plus", 1, "images_per_prompt", "max_prompts")


@dataclass
class OmniContextProtocol(JudgedProtocol):
    list: str = "omnicontext.jsonl"
    """The tasks, in the data set's folder."""

    def __post_init__(self) -> None:
        require_at_least(self, "omnicontext", 1, "max_prompts")


Asked = tuple[str, tuple[Path, ...]]
"""Words, and the images that are shown before the made one."""


class Judged(Benchmark):
    """What both have: questions about every image, and who judged."""

    what: str
    """Is counted, for the notes."""

    def questions(
        self, text: str, inputs: Sequence[Path], style: bool = False
    ) -> dict[str, tuple[str, tuple[Path, ...]]]:
        """What is asked about a made image, by metric."""
        stated = self.protocol.style_preservation if style else self.protocol.preservation
        preservation, following = (words.replace("{prompt}", text) for words in (stated, self.protocol.following))
        return {"preservation": (preservation, tuple(inputs)), "following": (following, ())}

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """Who judged."""
        judge = self.protocol.vlm
        return [
            f"{next(iter(self.tables.values()))}: {self.what}, judged by {judge.weights}"
            f"{f' at {judge.revision}' if judge.revision else ''}, from 0 to 1. Numbers of other judges or "
            "instructions, as those published with GPT-4o, do not compare. "
            f"Intervals: {bootstrap.replicates} bootstrap draws."
        ]


@dataclass(frozen=True)
class Concept:
    """One image, what it is called, and its prompts."""

    class_noun: str
    kind: str
    image: Path
    captions: tuple[str, ...]


class DreamBenchPlus(Judged):
    """See the module."""

    tables: ClassVar = {"dreambench_plus": "Concepts (DreamBench++)"}
    protocol_type = DreamBenchPlusProtocol

    def __init__(self, protocol: DreamBenchPlusProtocol, folder: Path):
        super().__init__(protocol, folder)
        captions = sorted((folder / "captions").rglob("*.txt"))
        if not captions:
            raise DataSetError(f"DreamBench++ at '{folder}': captions/ holds no .txt.")
        names = [str(file.relative_to(folder / "captions").with_suffix("")) for file in captions]
        concepts = read_all(names, self._concept, f"DreamBench++ at '{folder}'", "concept")
        self.subjects: dict[str, Concept] = dict(zip(names, concepts, strict=True))
        self.what = f"{len(self.subjects)} concepts"
        asked = [(name, caption) for name, concept in self.subjects.items() for caption in concept.captions]
        self.prompts = [self._prompt(name, caption) for name, caption in spread(asked, protocol.max_prompts)]

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
        told = PLACEHOLDER if self.protocol.fed == "image" else f"{concept.class_noun} {PLACEHOLDER}"
        noun = rf"\b(?:an? )?{re.escape(concept.class_noun)}\b"
        fed, found = re.subn(noun, told, caption, count=1, flags=re.IGNORECASE)
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
        given = (str(concept.image.relative_to(self.folder)),)
        return Prompt(fed if found else f"{PLACEHOLDER} {caption}", caption, given, item)

    def kept_image(self, subject: str) -> Path:
        """The concept's image."""
        return self.subjects[subject].image

    def files(self) -> list[Path]:
        """Images and captions."""
        images = [concept.image for concept in self.subjects.values()]
        return [*images, *(self.folder / "captions" / f"{name}.txt" for name in self.subjects)]


class OmniContext(Judged):
    """See the module."""

    tables: ClassVar = {"omnicontext": "Subjects in context (OmniContext)"}
    protocol_type = OmniContextProtocol

    def __init__(self, protocol: OmniContextProtocol, folder: Path):
        super().__init__(protocol, folder)
        file = folder / protocol.list
        rows = spread(read_rows(file, lines=True), protocol.max_prompts)
        self.prompts = read_all(rows, self._prompt, f"'{file}'", "task")
        self.what = f"{len(self.prompts)} tasks"

    def _prompt(self, row: dict[str, Any]) -> Prompt:
        """The input images stand before the instruction, in their order."""
        files = [inner_file(self.folder, name) for name in row["input_images"]]
        if not files:
            raise ValueError("no input_images")
        unit, kind, text = str(row["key"]), row["task_type"], row["instruction"]
        parts, asked = {"task": (kind, unit)} if kind else {}, self.questions(text, files)
        item = Item(Path(), unit, text, group=kind, parts=parts, asked=asked)
        names = tuple(str(file.relative_to(self.folder)) for file in files)
        return Prompt(" ".join([*[PLACEHOLDER] * len(files), text]), text, names, item)

    def files(self) -> list[Path]:
        """The list and its images."""
        inputs = {self.folder / name for asked in self.prompts for name in asked.inputs}
        return [self.folder / self.protocol.list, *sorted(inputs)]
