"""Metrics of the judge, a separate classifier that labels images and tells individuals apart.

Its classes form label groups: `id2label` has `group: name`, and the largest logit of a group is the answer.
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
    """Labels and features of images.

    Args:
        encode: N images or crops → N×(L+F), logits before features.
        labels: (group, name) of each logit.
    """

    encode: Callable[[Sequence], Tensor]
    labels: tuple[tuple[str, str], ...]

    def groups(self) -> dict[str, list[str]]:
        """Return the names of each label group, in the order of their logits."""
        groups = defaultdict(list)
        for group, name in self.labels:
            groups[group].append(name)
        return dict(groups)

    def answers(self, files: Sequence[Path | Crop]) -> list[dict[str, str]]:
        """Return, for each image, the name with the largest logit in each label group."""
        logits = self.encode(files)[:, : len(self.labels)]
        answers: list[dict[str, str]] = [{} for _ in files]
        for group, names in self.groups().items():
            columns = [i for i, (of, _) in enumerate(self.labels) if of == group]
            for answer, best in zip(answers, logits[:, columns].argmax(-1).tolist(), strict=True):
                answer[group] = names[best]
        return answers

    def features(self, files: Iterable[Path | Crop]) -> dict[Path | Crop, Tensor]:
        """Return the normalized feature, F, of each image."""
        unique = list(dict.fromkeys(files))
        features = normalize(self.encode(unique)[:, len(self.labels) :].double(), dim=-1) if unique else []
        return dict(zip(unique, features, strict=True))


class JudgeMetric(Metric):
    """Share of images that pass a test by the judge."""

    decimals, needs, optional = 2, ("judge",), True

    def answers(self, files: Sequence[Path | Crop]) -> list[dict[str, str]]:
        """See `Judge.answers`."""
        return self.context.networks["judge"].answers(files) if files else []

    def match_individuals(self, compared: Sequence[tuple[Item, Path | Crop, Path, Sequence[Path]]]) -> list[Row]:
        """For (item, image, own individual, others): whether the image is closer (cosine) to its own individual than to
        all others."""
        files = (file for _, image, own, others in compared for file in (image, own, *others))
        features = self.context.networks["judge"].features(files)
        rows = []
        for item, image, own, others in compared:
            cosines = torch.stack([features[file] for file in (own, *others)]) @ features[image]
            rows.append(Row(item, str(own), bool((cosines[0] > cosines[1:]).all())))
        return rows


class Kind(JudgeMetric):
    """The image shows the subject's kind, or the kind that the prompt changes it to."""

    name, title, headline = "kind", "Kind", False

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score the images with a label of this group."""
        labelled = [(item, item.labels[self.name]) for item in items if self.name in item.labels]
        answers = self.answers([item.file for item, _ in labelled])
        return [Row(item, own, seen[self.name] == own) for (item, own), seen in zip(labelled, answers, strict=True)]


class Colour(Kind):
    name, title = "colour", "Colour"


class Pattern(Kind):
    name, title = "pattern", "Pattern"


class Identity(JudgeMetric):
    """The image shows this individual rather than another of its kind."""

    name, title = "identity", "Identity"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score the images with an input image and other individuals."""
        compared = [(item, item.file, item.given, item.others) for item in items if item.given and item.others]
        return self.match_individuals(compared)


class Words(JudgeMetric):
    """The image shows everything that the template asks for."""

    name, title = "words", "Words"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score the images whose template asks for something."""
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


class PairKind(JudgeMetric):
    """Each half of an image of two subjects shows its slot's kind."""

    name, title, headline = "pair_kind", "Kind", False

    def seen(self, items: Sequence[Item]) -> list[tuple[Item, list[str], list[str]]]:
        """Return each image with the requested kinds and the kinds that its halves show."""
        slots = [(item, slot) for item in items for slot in item.slots]
        kinds = iter([answer["kind"] for answer in self.answers([Crop(item.file, slot.box) for item, slot in slots])])
        return [(i, [slot.kind for slot in i.slots], [next(kinds) for _ in i.slots]) for i in items if i.slots]

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score each half."""
        seen = self.seen(items)
        return [Row(i, kind, shown == kind) for i, *kinds in seen for kind, shown in zip(*kinds, strict=True)]


class PairIdentity(JudgeMetric):
    """Each half of an image of two subjects shows its slot's individual."""

    name, title = "pair_identity", "Identity"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score each half."""
        slots = [(item, slot) for item in items for slot in item.slots]
        return self.match_individuals(
            [(item, Crop(item.file, slot.box), slot.given, slot.others) for item, slot in slots]
        )


class Swapped(PairKind):
    """Each half shows the kind of the other slot."""

    name, title, better = "swapped", "Swapped", "↓"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score each image."""
        return [Row(item, " + ".join(asked), seen == asked[::-1]) for item, asked, seen in self.seen(items)]


class Missing(PairKind):
    """Neither half shows one of the kinds."""

    name, title, better = "missing", "Missing", "↓"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score each image."""
        return [Row(item, " + ".join(asked), not set(asked) <= set(seen)) for item, asked, seen in self.seen(items)]
