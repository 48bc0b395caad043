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

from evaluation.protocols.benchmark import Benchmark
from evaluation.protocols.pairs import read_lines
from evaluation.protocols.protocol import Encoder, Protocol, VisionJudge
from evaluation.protocols.requests import DataSetError, Item, Request, image_seed, inner_file, named_problems, spread
from evaluation.scores.vision_judge import Question
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

    def questions(self, text: str, inputs: Sequence[Path], file: Path) -> dict[str, Question]:
        """What is asked about a made image, by metric."""
        asked = {name: getattr(self, name).replace("{prompt}", text) for name in ("preservation", "following")}
        return {
            "preservation": Question(asked["preservation"], (*inputs, file)),
            "following": Question(asked["following"], (file,)),
        }


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


@dataclass(frozen=True)
class Concept:
    """One image, what it is called, and its prompts."""

    class_noun: str
    kind: str
    image: str
    captions: tuple[str, ...]


class DreamBenchPlus(Benchmark):
    """See the module."""

    tables: ClassVar = {"dreambench_plus": "Concepts (DreamBench++)"}
    protocol_type = DreamBenchPlusProtocol

    def __init__(self, protocol: DreamBenchPlusProtocol, folder: Path):
        super().__init__(protocol, folder)
        captions = sorted((folder / "captions").rglob("*.txt"))
        problems: list[str] = []
        self.subjects: dict[str, Concept] = {}
        for file in captions:
            name = file.relative_to(folder / "captions").with_suffix("")
            images = [folder / "images" / name.with_suffix(suffix) for suffix in IMAGE_SUFFIXES]
            image = next((path for path in images if path.is_file()), None)
            lines = [line.strip() for line in decode_text(file.read_bytes()).split("\n") if line.strip()]
            if image is None:
                problems.append(f"images/{name}.jpg is missing")
            elif len(lines) < 2:
                problems.append(f"captions/{name}.txt has no prompts after the subject's name")
            else:
                told = str(image.relative_to(folder))
                self.subjects[str(name)] = Concept(lines[0], name.parent.name, told, tuple(lines[1:]))
        if problems or not captions:
            raise DataSetError(
                f"DreamBench++ at '{folder}': {named_problems(problems) if problems else 'captions/ holds no .txt.'}"
            )

    def requests(self) -> list[Request]:
        """Concept by concept, prompt by prompt, repeat by repeat."""
        count, sampling = self.protocol.images_per_prompt, self.protocol.sampling
        asked = [(name, caption) for name, concept in self.subjects.items() for caption in concept.captions]
        return [
            Request(
                number * count + repeat,
                self._fed(self.subjects[name].class_noun, caption),
                caption,
                (self.subjects[name].image,),
                image_seed(sampling.seed, number, repeat, sampling.noise_period),
                name,
            )
            for number, (name, caption) in enumerate(spread(asked, self.protocol.max_prompts))
            for repeat in range(count)
        ]

    def _fed(self, noun: str, caption: str) -> str:
        told = PLACEHOLDER if self.protocol.fed == "image" else f"{noun} {PLACEHOLDER}"
        fed, found = re.subn(rf"\b(?:an? )?{re.escape(noun)}\b", told, caption, count=1, flags=re.IGNORECASE)
        return fed if found else f"{PLACEHOLDER} {caption}"

    def item(self, request: Request, file: Path) -> Item:
        """A made image with its concept's, and what the judge is asked."""
        given, style = self.folder / request.inputs[0], self.subjects[request.unit].kind == "style"
        asked = self.protocol.questions(request.text, [given], file)
        if style:
            asked["preservation"] = Question(
                self.protocol.style_preservation.replace("{prompt}", request.text), asked["preservation"].images
            )
        group = self.subjects[request.unit].kind
        return Item(file, request.unit, request.text, (given,), group=group, given=given, asked=asked)

    def kept_image(self, subject: str) -> Path:
        """The concept's image."""
        return self.folder / self.subjects[subject].image

    def files(self) -> list[Path]:
        """Images and captions."""
        images = [self.folder / concept.image for concept in self.subjects.values()]
        return [*images, *(self.folder / "captions" / f"{name}.txt" for name in self.subjects)]

    def parts(self, unit: str, group: str) -> dict[str, tuple[str, str]]:
        """By category."""
        return {"category": (group, unit)} if group else {}

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """Who judged."""
        return judged_notes(self, f"{len(self.subjects)} concepts", bootstrap)


@dataclass
class OmniContextProtocol(JudgedProtocol):
    list: str = "omnicontext.jsonl"
    """The tasks, in the data set's folder."""


class OmniContext(Benchmark):
    """See the module."""

    tables: ClassVar = {"omnicontext": "Subjects in context (OmniContext)"}
    protocol_type = OmniContextProtocol

    def __init__(self, protocol: OmniContextProtocol, folder: Path):
        super().__init__(protocol, folder)
        problems: list[str] = []
        self.tasks: list[tuple[str, str, str, tuple[str, ...]]] = []
        for number, row in enumerate(spread(read_lines(folder / protocol.list), protocol.max_prompts), 1):
            try:
                files = [inner_file(folder, name) for name in row["input_images"]]
                if not files:
                    raise ValueError("no input_images")
                names = tuple(str(file.relative_to(folder)) for file in files)
                self.tasks.append((str(row["key"]), row["task_type"], row["instruction"], names))
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"task {number}: {error}")
        if problems:
            raise DataSetError(f"'{folder / protocol.list}': {named_problems(problems)}")

    def requests(self) -> list[Request]:
        """One image a task; the input images stand before the instruction, in their order."""
        sampling = self.protocol.sampling
        return [
            Request(
                number,
                " ".join([*[PLACEHOLDER] * len(inputs), instruction]),
                instruction,
                inputs,
                image_seed(sampling.seed, number, period=sampling.noise_period),
                key,
            )
            for number, (key, _, instruction, inputs) in enumerate(self.tasks)
        ]

    def item(self, request: Request, file: Path) -> Item:
        """A made image, and what the judge is asked."""
        inputs = [self.folder / name for name in request.inputs]
        asked = self.protocol.questions(request.text, inputs, file)
        return Item(file, request.unit, request.text, group=self.tasks[request.index][1], asked=asked)

    def files(self) -> list[Path]:
        """The list and its images."""
        inputs = {self.folder / name for _, _, _, names in self.tasks for name in names}
        return [self.folder / self.protocol.list, *sorted(inputs)]

    def parts(self, unit: str, group: str) -> dict[str, tuple[str, str]]:
        """By kind of task."""
        return {"task": (group, unit)} if group else {}

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """Who judged."""
        return judged_notes(self, f"{len(self.tasks)} tasks", bootstrap)


def judged_notes(benchmark: Benchmark, what: str, bootstrap: Any) -> list[str]:
    judge = benchmark.protocol.vlm
    return [
        f"{next(iter(benchmark.tables.values()))}: {what}, judged by {judge.weights}"
        f"{f' at {judge.revision}' if judge.revision else ''}, from 0 to 1. Numbers of other judges or instructions, "
        f"as those published with GPT-4o, do not compare. Intervals: {bootstrap.replicates} bootstrap draws."
    ]
