"""The judge: a classifier of its own that says what is in an image, and whether it is this individual.

Its classes are label groups: `id2label` reads `group: name`, and within a group the largest logit is its answer.
Shapes: `N` images, `L` logits, `F` features.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.protocols.requests import Item, read_image
from evaluation.scores.metric import Metric, Row

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

    def look(self, items: Sequence[Item]) -> None:
        """At all that will be asked of these images at once; what follows asks for a few at a time."""
        known = [file for item in items for file in (item.given, *item.others) if file is not None]
        self.encode([*(item.file for item in items), *known])


class Judged(Metric):
    """A share of images, by what the judge says of them."""

    decimals, needs, optional = 2, ("judge",), True

    def single(self, items: Sequence[Item]) -> tuple[Judge, list[Item]]:
        """The judge, having looked at the images of one subject; and these."""
        judge, items = self.context.networks["judge"], [item for item in items if not item.slots]
        if items:
            judge.look(items)
        return judge, items


class Kind(Judged):
    """The judge sees the subject's own label, or what the words change it to."""

    name, title, headline = "kind", "Kind", False

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images that have such a label."""
        judge, items = self.single(items)
        shown = [item for item in items if self.name in item.labels]
        answers = judge.answers([item.file for item in shown]) if shown else []
        return [
            Row(item, item.labels[self.name], answer[self.name] == item.labels[self.name])
            for item, answer in zip(shown, answers, strict=True)
        ]


class Colour(Kind):
    name, title = "colour", "Colour"


class Pattern(Kind):
    name, title = "pattern", "Pattern"


class Identity(Judged):
    """It is this individual and none of the others of its kind."""

    name, title = "identity", "Identity"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images whose input and other individuals are known."""
        judge, items = self.single(items)
        return [
            Row(item, str(item.given), judge.is_it(item.file, item.given, item.others))
            for item in items
            if item.given is not None and item.others
        ]


class Words(Judged):
    """All that the template's words ask for is seen."""

    name, title = "words", "Words"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images whose words ask for something."""
        judge, items = self.single(items)
        asked = [item for item in items if item.words]
        answers = judge.answers([item.file for item in asked]) if asked else []
        return [
            Row(
                item,
                ", ".join(f"{group}: {name}" for group, name in item.words.items()),
                all(answer[group] == name for group, name in item.words.items()),
            )
            for item, answer in zip(asked, answers, strict=True)
        ]


class PairKind(Judged):
    """Of images of two subjects: each slot's kind is seen in its half."""

    name, title, headline = "pair_kind", "Kind", False

    def seen(self, items: Sequence[Item]) -> list[tuple[Item, list[str], list[str]]]:
        """Each image with the kinds that were asked for and those that its halves show."""
        paired = [item for item in items if item.slots]
        if not paired:
            return []
        halves = [half(item.file, slot) for item in paired for slot in (0, 1)]
        kinds = [answer["kind"] for answer in self.context.networks["judge"].answers(halves)]
        return [
            (item, [slot.kind for slot in item.slots], kinds[2 * number : 2 * number + 2])
            for number, item in enumerate(paired)
        ]

    def score(self, items: Sequence[Item]) -> list[Row]:
        """A row for each slot."""
        return [
            Row(item, kind, there == kind)
            for item, asked, seen in self.seen(items)
            for kind, there in zip(asked, seen, strict=True)
        ]


class PairIdentity(Judged):
    """Of images of two subjects: each slot's individual is in its half."""

    name, title = "pair_identity", "Identity"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """A row for each slot."""
        judge = self.context.networks["judge"]
        return [
            Row(item, str(slot.given), judge.is_it(half(item.file, i), slot.given, slot.others))
            for item in items
            for i, slot in enumerate(item.slots)
        ]


class Swapped(PairKind):
    """Each half shows the other's kind."""

    name, title, better = "swapped", "Swapped", "↓"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """A row for each image."""
        return [Row(item, " + ".join(asked), seen == asked[::-1]) for item, asked, seen in self.seen(items)]


class Missing(PairKind):
    """A kind that neither half shows."""

    name, title, better = "missing", "Missing", "↓"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """A row for each image."""
        return [Row(item, " + ".join(asked), not set(asked) <= set(seen)) for item, asked, seen in self.seen(items)]
