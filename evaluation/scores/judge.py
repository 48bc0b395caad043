"""The judge: a classifier of its own that says what is in an image, and whether it is this individual.

Its classes are label groups: `id2label` reads `group: name`, and within a group the largest logit is its answer.
Shapes: `N` images, `L` logits, `F` features.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.protocols.benchmark import Crop, Item
from evaluation.scores.metric import Metric, Row


@dataclass(frozen=True)
class Judge:
    """What the judge says of images.

    Args:
        encode: N images or parts of them → N×(L+F), logits before features.
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

    def answers(self, files: Sequence[Path | Crop]) -> list[dict[str, str]]:
        """Its answer in every label group, for each image."""
        logits = self.encode(files)[:, : len(self.labels)]
        answers: list[dict[str, str]] = [{} for _ in files]
        for group, names in self.groups().items():
            columns = [i for i, (of, _) in enumerate(self.labels) if of == group]
            for answer, best in zip(answers, logits[:, columns].argmax(-1).tolist(), strict=True):
                answer[group] = names[best]
        return answers

    def features(self, files: Iterable[Path | Crop]) -> dict[Path | Crop, Tensor]:
        """The feature, F of length 1, of each."""
        asked = list(dict.fromkeys(files))
        found = normalize(self.encode(asked)[:, len(self.labels) :].double(), dim=-1) if asked else []
        return dict(zip(asked, found, strict=True))


class Judged(Metric):
    """A share of images, by what the judge says of them."""

    decimals, needs, optional = 2, ("judge",), True

    def answers(self, files: Sequence[Path | Crop]) -> list[dict[str, str]]:
        """See Judge."""
        return self.context.networks["judge"].answers(files) if files else []

    def are_they(self, asked: Sequence[tuple[Item, Path | Crop, Path, Sequence[Path]]]) -> list[Row]:
        """Of (item, what is looked at, its own individual, others): whether it is nearer (cosine) to its own than to
        every other one."""
        shown = (file for _, seen, own, others in asked for file in (seen, own, *others))
        features = self.context.networks["judge"].features(shown)
        rows = []
        for item, seen, own, others in asked:
            cosines = torch.stack([features[file] for file in (own, *others)]) @ features[seen]
            rows.append(Row(item, str(own), bool((cosines[0] > cosines[1:]).all())))
        return rows


class Kind(Judged):
    """The judge sees the subject's own label, or what the words change it to."""

    name, title, headline = "kind", "Kind", False

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images that have such a label."""
        shown = [(item, item.labels[self.name]) for item in items if self.name in item.labels]
        answers = self.answers([item.file for item, _ in shown])
        return [Row(item, own, seen[self.name] == own) for (item, own), seen in zip(shown, answers, strict=True)]


class Colour(Kind):
    name, title = "colour", "Colour"


class Pattern(Kind):
    name, title = "pattern", "Pattern"


class Identity(Judged):
    """It is this individual and none of the others of its kind."""

    name, title = "identity", "Identity"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images whose input and other individuals are known."""
        return self.are_they(
            [(item, item.file, item.given, item.others) for item in items if item.given and item.others]
        )


class Words(Judged):
    """All that the template's words ask for is seen."""

    name, title = "words", "Words"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images whose words ask for something."""
        asked = [item for item in items if item.words]
        answers = self.answers([item.file for item in asked])
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
        """Each image with the kinds that were asked for and those that its slots show."""
        slots = [(item, slot) for item in items for slot in item.slots]
        kinds = iter([answer["kind"] for answer in self.answers([Crop(item.file, slot.box) for item, slot in slots])])
        return [(i, [slot.kind for slot in i.slots], [next(kinds) for _ in i.slots]) for i in items if i.slots]

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
        slots = [(item, slot) for item in items for slot in item.slots]
        return self.are_they([(item, Crop(item.file, slot.box), slot.given, slot.others) for item, slot in slots])


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
