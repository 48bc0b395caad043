"""The judge: a classifier of its own that says what is in an image, and whether it is this individual.

Its classes are label groups: `id2label` reads `group: name`, and within a group the largest logit is its answer.
Shapes: `N` images, `L` logits, `F` features.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.protocols.dreambench import LOOKS, DreamBench
from evaluation.protocols.requests import EvaluationError, ScoredImage, read_image

Verdict = tuple[ScoredImage, str, bool]
"""An image, what it was judged against, and whether it is that."""
HALF = "#half="
HALF_TOP = 0.4
"""Where the half-squares of an image of two subjects begin, in units of its side: these stand low in it."""


def half(file: Path, slot: int) -> str:
    """An item for the judge: the left (0) or right (1) half-square of an image."""
    return f"{file}{HALF}{slot}"


def read_half(item: Path | str, upright: bool = False) -> Image.Image:
    """The image of a file, or its half that `half` names."""
    file, _, slot = str(item).partition(HALF)
    image = read_image(file, upright)
    if not slot:
        return image
    side = image.width // 2
    left, top = int(slot) * side, round(HALF_TOP * image.height)
    return image.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class Judge:
    """What the judge says of images.

    Args:
        encode: N items for `read_half` → N×(L+F), logits before features.
        labels: (group, name) of each logit.
    """

    encode: Callable[[Sequence], Tensor]
    labels: tuple[tuple[str, str], ...]

    def groups(self) -> dict[str, list[str]]:
        """The names of each label group, in the order of their logits."""
        found = defaultdict(list)
        for group, name in self.labels:
            found[group].append(name)
        return dict(found)

    def answers(self, files: Sequence[Path | str]) -> list[dict[str, str]]:
        """Its answer in every label group, for each image."""
        logits = self.encode(files)[:, : len(self.labels)]
        answers: list[dict[str, str]] = [{} for _ in files]
        for group, names in self.groups().items():
            columns = [i for i, (of, _) in enumerate(self.labels) if of == group]
            for answer, best in zip(answers, logits[:, columns].argmax(-1).tolist(), strict=True):
                answer[group] = names[best]
        return answers

    def features(self, files: Sequence[Path | str]) -> Tensor:
        """N images → N×F of length 1."""
        return normalize(self.encode(files)[:, len(self.labels) :].double(), dim=-1)

    def is_it(self, file: Path | str, own: Path, others: Sequence[Path]) -> bool:
        """Whether an image is nearer (cosine) to its own subject than to every other individual."""
        image, *shown = self.features([file, own, *others])
        cosines = torch.stack(shown) @ image
        return bool((cosines[0] > cosines[1:]).all())

    def verdicts(self, images: Sequence[ScoredImage]) -> dict[str, list[Verdict]]:
        """By metric, of the images that it can be told of: kind, colour and pattern where there are such labels,
        `words` where the prompt asks for something, `identity` where other individuals are known."""
        images = [image for image in images if not image.slots]
        if not images:
            return {}
        known = [file for image in images for file in (image.given, *image.others) if file is not None]
        self.encode([*(image.file for image in images), *known])  # all at once; what follows asks for a few at a time
        found: dict[str, list[Verdict]] = {metric: [] for metric in (*LOOKS, "identity", "words")}
        for image, answer in zip(images, self.answers([image.file for image in images]), strict=True):
            for group in LOOKS:
                if group in image.labels:
                    found[group].append((image, image.labels[group], answer[group] == image.labels[group]))
            if image.given is not None and image.others:
                it = self.is_it(image.file, image.given, image.others)
                found["identity"].append((image, str(image.given), it))
            if image.words:
                obeyed = all(answer[group] == name for group, name in image.words.items())
                asked = ", ".join(f"{group}: {name}" for group, name in image.words.items())
                found["words"].append((image, asked, obeyed))
        return {metric: verdicts for metric, verdicts in found.items() if verdicts}

    def pair_verdicts(self, images: Sequence[ScoredImage]) -> dict[str, list[Verdict]]:
        """Of images of two subjects: `pair_kind` and `pair_identity` of each slot by its half; `swapped`: each half
        shows the other's kind; `missing`: a kind that neither half shows. Empty where there are no such images."""
        paired = [image for image in images if image.slots]
        found: dict[str, list[Verdict]] = defaultdict(list)
        if not paired:
            return found
        kinds = [answer["kind"] for answer in self.answers([half(image.file, i) for image in paired for i in (0, 1)])]
        for number, image in enumerate(paired):
            asked, seen = [slot.kind for slot in image.slots], kinds[2 * number : 2 * number + 2]
            for i, slot in enumerate(image.slots):
                found["pair_kind"].append((image, slot.kind, seen[i] == slot.kind))
                it = self.is_it(half(image.file, i), slot.given, slot.others)
                found["pair_identity"].append((image, str(slot.given), it))
            found["swapped"].append((image, " + ".join(asked), seen == asked[::-1]))
            found["missing"].append((image, " + ".join(asked), not set(asked) <= set(seen)))
        return found

    def require(self, dataset: DreamBench) -> None:
        """Refuse labels that it does not know.

        Raises:
            EvaluationError: names the first one, with what is allowed.
        """
        told: list[tuple[str, Mapping[str, str]]] = [
            (f"subject '{name}'", subject.labels) for name, subject in dataset.subjects.items()
        ]
        for prompts in dataset.protocol.prompts.values():
            told += [(f"template '{template}'", labels) for template, _, labels in prompts.rows()]
        groups = self.groups()
        for owner, labels in told:
            for group, name in labels.items():
                allowed: Iterable[str] = groups.get(group, groups)
                if name not in groups.get(group, []):
                    raise EvaluationError(
                        f"{owner} has the label '{group}: {name}', which the judge does not know; allowed "
                        f"{'groups' if group not in groups else f'names of {group}'}: {', '.join(allowed)}."
                    )
