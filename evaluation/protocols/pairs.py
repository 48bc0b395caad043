"""Two subjects of DreamBench in one image, by a list as UNO publishes it (`datasets/dreambench_multiip.json`).

The list is JSON, `[{"prompt": "a cat and a backpack in the jungle", "image_paths": ["…/cat/04.jpg",
"…/backpack/02.jpg"]}, …]`; paths are relative to its folder and end with the subject's folder and file. Other keys are
not read.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from evaluation.protocols.benchmark import Benchmark, Item, Prompt, inner_file, read_all, read_rows, spread
from evaluation.protocols.protocol import Encoder, Protocol, require_at_least
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
        require_at_least(self, "dreambench_pairs", 1, "images_per_prompt", "max_prompts")


class DreamBenchPairs(Benchmark):
    """See the module."""

    tables: ClassVar = {"dreambench_pairs": "Two subjects (DreamBench)"}
    protocol_type = PairListProtocol

    def __init__(self, protocol: PairListProtocol, folder: Path):
        super().__init__(protocol, folder)
        file = folder / protocol.list
        rows = spread(read_rows(file, lines=False), protocol.max_prompts)
        self.prompts = read_all(rows, self._prompt, f"'{file}'", "entry")

    def _prompt(self, row: dict[str, Any]) -> Prompt:
        """A pair of subjects is a unit."""
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
        unit = " + ".join(file.parent.name for file in files)
        return Prompt(prompt, text, names, Item(Path(), unit, text, tuple(files)))

    def files(self) -> list[Path]:
        """The list and its images."""
        inputs = {self.folder / name for asked in self.prompts for name in asked.inputs}
        return [self.folder / self.protocol.list, *sorted(inputs)]

    def notes(self, bootstrap: Any, scores: Any) -> list[str]:
        """What DINO and CLIP-I are."""
        return [
            f"Two subjects: {len(self.prompts)} prompts; DINO and CLIP-I are the mean of the whole image's cosines "
            f"with both input images. Intervals: {bootstrap.replicates} bootstrap draws of pairs."
        ]
