"""Two subjects of DreamBench in one image, from a list as published by UNO (`datasets/dreambench_multiip.json`).

The list is JSON, `[{"prompt": "a cat and a backpack in the jungle", "image_paths": ["…/cat/04.jpg",
"…/backpack/02.jpg"]}, …]`. Paths are relative to its folder and end with the subject's folder and file; other keys are
ignored.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from evaluation.protocols.benchmark import Benchmark, Item, Prompt, inner_file, parse_rows, read_rows, spread
from evaluation.protocols.protocol import Encoder, Protocol, require_at_least
from kosmosg.prompt import PLACEHOLDER


@dataclass
class PairListProtocol(Protocol):
    list: str = "dreambench_multiip.json"
    """JSON of prompts and their images, in the data set's folder."""
    class_nouns: dict[str, str] = field(default_factory=dict)
    """Word for each subject in the prompts, by the subject's folder."""
    fed: Literal["image", "class_and_image"] = "image"
    """Replacement of "a cat" in the prompt: `<i>`, or the class word and `<i>`."""
    images_per_prompt: int = 4
    """Images per prompt, each with its own seed."""
    max_prompts: int | None = None
    """Maximum number of prompts, evenly spaced in the list; for trials."""
    dino: Encoder | None = None
    """Encoder of DINO (CLS output): the mean cosine with both input images, clamped at 0 after averaging."""

    def __post_init__(self) -> None:
        require_at_least(self, "dreambench_pairs", 1, "images_per_prompt", "max_prompts")


class DreamBenchPairs(Benchmark):
    """Pairs of DreamBench subjects under a protocol; see the module."""

    tables: ClassVar = {"dreambench_pairs": "Two subjects (DreamBench)"}
    protocol_type = PairListProtocol

    def __init__(self, protocol: PairListProtocol, folder: Path):
        super().__init__(protocol, folder)
        self.list_file = folder / protocol.list
        rows = spread(read_rows(self.list_file, lines=False), protocol.max_prompts)
        self.prompts = parse_rows(rows, self._prompt, f"'{self.list_file}'", "entry")

    def _prompt(self, row: dict[str, Any]) -> Prompt:
        """Return the prompt of an entry; the pair of subjects is its unit."""
        text, files = row["prompt"], [inner_file(self.folder, name) for name in row["image_paths"]]
        if len(files) != 2:
            raise ValueError(f"{len(files)} images; a pair must have two")
        prompt = text
        for file in files:
            subject = file.parent.name
            if subject not in self.protocol.class_nouns:
                raise ValueError(f"dreambench_pairs.class_nouns has no '{subject}'")
            noun = self.protocol.class_nouns[subject]
            slot = PLACEHOLDER if self.protocol.fed == "image" else f"{noun} {PLACEHOLDER}"
            prompt, replaced = re.subn(rf"\b(?:an? )?{re.escape(noun)}\b(?! {PLACEHOLDER})", slot, prompt, count=1)
            if not replaced:
                raise ValueError(f"the prompt {text!r} does not name '{subject}' as {noun!r}")
        names = tuple(str(file.relative_to(self.folder)) for file in files)
        unit = " + ".join(file.parent.name for file in files)
        return Prompt(prompt, text, names, Item(Path(), unit, text, tuple(files)))

    def notes(self, bootstrap: Any, scores: Any) -> list[str]:
        """Return a note on DINO and CLIP-I."""
        return [
            f"Two subjects: {len(self.prompts)} prompts; DINO and CLIP-I are the mean of the whole image's cosines "
            f"with both input images. Intervals: {bootstrap.replicates} bootstrap draws of pairs."
        ]
