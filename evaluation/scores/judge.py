"""The judge: a classifier of its own that says what is in an image, and whether it is this individual.

Its classes are label groups: `id2label` reads `group: name`, and within a group the largest logit is its answer.
Shapes: `N` images, `L` logits, `F` features.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.protocols.dreambench import LOOKS, DreamBench
from evaluation.protocols.requests import EvaluationError, ScoredImage

Verdict = tuple[ScoredImage, str, bool]
"""An image, what it was judged against, and whether it is that."""


@dataclass(frozen=True)
class Judge:
    """What the judge says of images.

    Args:
        encode: N image files → N×(L+F), logits before features.
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

    def answers(self, files: Sequence[Path]) -> list[dict[str, str]]:
        """Its answer in every label group, for each image."""
        logits = self.encode(files)[:, : len(self.labels)]
        answers: list[dict[str, str]] = [{} for _ in files]
        for group, names in self.groups().items():
            columns = [i for i, (of, _) in enumerate(self.labels) if of == group]
            for answer, best in zip(answers, logits[:, columns].argmax(-1).tolist(), strict=True):
                answer[group] = names[best]
        return answers

    def features(self, files: Sequence[Path]) -> Tensor:
        """N images → N×F of length 1."""
        return normalize(self.encode(files)[:, len(self.labels) :].double(), dim=-1)

    def is_it(self, file: Path, own: Path, others: Sequence[Path]) -> bool:
        """Whether an image is nearer (cosine) to its own subject than to every other individual."""
        image, *shown = self.features([file, own, *others])
        cosines = torch.stack(shown) @ image
        return bool((cosines[0] > cosines[1:]).all())

    def verdicts(self, images: Sequence[ScoredImage]) -> dict[str, list[Verdict]]:
        """By metric, of the images that it can be told of: kind, colour and pattern where there are such labels,
        `words` where the prompt asks for something, `identity` where other individuals are known."""
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

    def require(self, dataset: DreamBench) -> None:
        """Refuse labels that it does not know.

        Raises:
            EvaluationError: names the first one, with what is allowed.
        """
        told: list[tuple[str, Mapping[str, str]]] = [
            (f"subject '{name}'", subject.labels) for name, subject in dataset.subjects.items()
        ]
        for prompts in dataset.protocol.prompts.values():
            told += [
                (f"template '{template}'", labels)
                for template, labels in zip(prompts.original, prompts.labels, strict=False)
            ]
        groups = self.groups()
        for owner, labels in told:
            for group, name in labels.items():
                allowed: Iterable[str] = groups.get(group, groups)
                if name not in groups.get(group, []):
                    raise EvaluationError(
                        f"{owner} has the label '{group}: {name}', which the judge does not know; allowed "
                        f"{'groups' if group not in groups else f'names of {group}'}: {', '.join(allowed)}."
                    )
