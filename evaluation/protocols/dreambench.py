"""DreamBench: subjects × templates, in the layout that google/dreambooth publishes.

Photos are `<folder>/<subject>/NN.jpg` (or .png); an optional `<folder>/<subject>/others/` shows other individuals of
the same kind. Subjects, templates and input images are listed by the protocol, or by a JSON file in the folder.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from evaluation.protocols.benchmark import (
    COPY_OF_INPUT,
    REAL_IMAGES,
    Benchmark,
    DataSetError,
    EvaluationError,
    Item,
    Prompt,
    Slot,
    list_problems,
    spread,
)
from evaluation.protocols.protocol import DreamBenchProtocol, Pairs, Subject, Templates
from kosmosg.prompt import PLACEHOLDER

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_GROUPS = ("kind", "colour", "pattern")
"""Label groups of subjects, each with a column."""
NEAR_COPY = 0.95
"""Minimum DINO cosine between an image and its input image for a near copy. It is not configurable, so that the rate
is comparable across protocols; the row of real images shows how many photos of a subject reach it."""
HALF_TOP = 0.4
"""Top of the two half-squares of an image of two subjects, in units of its side."""


class DreamBench(Benchmark):
    """DreamBench under a protocol.

    Args:
        folder: folder with one folder for each subject.

    Raises:
        DataSetError: subjects or files are missing; names the first ten.
    """

    tables: ClassVar = {
        "dreambench": "Subjects (DreamBench)",
        "pairs": "Two subjects",
        "leakage": "What the input image gives",
    }
    protocol_type = DreamBenchProtocol

    def __init__(self, protocol: DreamBenchProtocol, folder: Path):
        super().__init__(resolve_facts(protocol, folder), folder)
        self.subjects = {
            name: self.protocol.subjects[name] for name in spread(list(self.protocol.subjects), protocol.max_subjects)
        }
        self.check()
        self.pairs = self._pairs()
        """Pairs of subjects, requested after all single subjects and only with a judge."""
        self.prompts = [prompt for name in self.subjects for prompt in self._prompts(name)]
        self.prompts += [self._pair_prompt(*pair) for pair in self.pairs]

    def check(self) -> None:
        """Check the subjects, their files and the pairs. Raises DataSetError."""
        problems = []
        if not self.folder.is_dir():
            raise DataSetError(f"there is no DreamBench at '{self.folder}'; set data.dreambench to its folder.")
        for name, subject in self.subjects.items():
            if subject.kind not in self.protocol.prompts:
                kinds = ", ".join(sorted(self.protocol.prompts))
                problems.append(
                    f"subject '{name}' is of kind '{subject.kind}', but there are prompts only for: {kinds}"
                )
            problems += [
                f"subject '{name}' has a label of '{group}'; allowed are: {', '.join(LABEL_GROUPS)}"
                for group in subject.labels
                if group not in LABEL_GROUPS
            ]
            if not (self.folder / name).is_dir():
                problems.append(f"subject '{name}' has no folder")
            elif not (self.folder / name / subject.kept_image).is_file():
                photos = ", ".join(path.name for path in self.real_images(name)) or "none"
                problems.append(f"subject '{name}' lacks its kept_image {subject.kept_image} (found: {photos})")
        for pair in self.protocol.pairs.subjects if self.protocol.pairs is not None else []:
            kinds = [self.protocol.subjects[name].labels.get("kind") for name in pair if name in self.protocol.subjects]
            if len(set(kinds) - {None}) != 2:
                problems.append(f"the pair {' + '.join(pair)} needs two subjects with different labels of 'kind'")
        if problems:
            raise DataSetError(f"DreamBench at '{self.folder}': {list_problems(problems)}")

    def kept_image(self, subject: str) -> Path:
        """Return the input image of a subject."""
        return self.folder / subject / self.subjects[subject].kept_image

    def real_images(self, subject: str) -> list[Path]:
        """Return all photos of a subject, sorted by name."""
        return sorted(path for path in (self.folder / subject).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)

    def others(self, subject: str) -> tuple[Path, ...]:
        """Return portraits of other individuals of the same kind, sorted by name; empty if there are none."""
        return tuple(sorted((self.folder / subject / "others").glob("*.png")))

    def references_of(self, subject: str) -> tuple[Path, ...]:
        """Return the protocol's references for images of a subject."""
        input_only = self.protocol.references == "kept_image"
        return (self.kept_image(subject),) if input_only else tuple(self.real_images(subject))

    def _pairs(self) -> list[list[str]]:
        pairs = self.protocol.pairs.subjects if self.protocol.pairs is not None and self.protocol.judge else []
        return [pair for pair in pairs if self.subjects.keys() >= set(pair)]

    def _prompts(self, name: str) -> list[Prompt]:
        """Return the prompts of a subject, from the templates of its kind."""
        subject = self.subjects[name]
        shared = {"references": self.references_of(name), "given": self.kept_image(name), "others": self.others(name)}
        prompts, templates = [], self.protocol.prompts[subject.kind].rows()
        for original, modified, words in spread(templates, self.protocol.max_templates):
            parts = {"kind": (subject.kind, name), "subject": (name, original), "template": (original, name)}
            if words:
                parts["words"] = (" + ".join(words), name)
            own = {"group": original, "parts": parts, "labels": subject.labels | words, "words": words}
            item = Item(Path(), name, original.format(subject.class_noun), **shared, **own)
            prompts.append(self._prompt([name], original, modified, item))
        return prompts

    def _pair_prompt(self, *names: str) -> Prompt:
        """Return the prompt of two subjects, which only the judge scores, each in its half of the image."""
        side = self.protocol.sampling.image_size
        half, top = side // 2, round(HALF_TOP * side)
        slots = [
            Slot((i * half, top, (i + 1) * half, top + half), self.subjects[name].labels["kind"],
                 self.kept_image(name), self.others(name))
            for i, name in enumerate(names)
        ]  # fmt: skip
        pairs = self.protocol.pairs
        return self._prompt(
            names, pairs.original, pairs.modified, Item(Path(), " + ".join(names), "", slots=tuple(slots))
        )

    def _prompt(self, names: Sequence[str], original: str, modified: str, item: Item) -> Prompt:
        nouns = [self.subjects[name].class_noun for name in names]
        shown = [PLACEHOLDER if self.protocol.fed == "image" else f"{noun} {PLACEHOLDER}" for noun in nouns]
        inputs = tuple(str(self.kept_image(name).relative_to(self.folder)) for name in names)
        return Prompt(modified.format(*shown), original.format(*nouns), inputs, item)

    def baselines(self) -> dict[str, list[Item]]:
        """Return real photos, and copies of the input image, which show how much of a score copying explains."""
        single = [request for request in self.requests() if len(request.inputs) == 1]
        copies = [self.item(request, self.folder / request.inputs[0]) for request in single]
        return {REAL_IMAGES: self.other_real_images(), COPY_OF_INPUT: copies}

    def other_real_images(self) -> list[Item]:
        """Return the real photos of each subject; no photo is compared with itself."""
        items = []
        for name in self.subjects:
            for file in self.real_images(name):
                others = tuple(reference for reference in self.references_of(name) if reference != file)
                kept = self.kept_image(name)
                if others:
                    given = None if file == kept else kept
                    judged = {"others": self.others(name), "labels": self.subjects[name].labels}
                    items.append(Item(file, name, "", others, given=given, **judged))
        return items

    def files(self) -> list[Path]:
        """Return all photos and portraits."""
        return [path for name in self.subjects for path in (*self.real_images(name), *self.others(name))]

    def check_networks(self, networks: Mapping[str, Any]) -> None:
        """Check that the judge knows all labels. Raises EvaluationError."""
        if (judge := networks.get("judge")) is None:
            return
        labelled: list[tuple[str, Mapping[str, str]]] = [(f"subject '{n}'", s.labels) for n, s in self.subjects.items()]
        for prompts in self.protocol.prompts.values():
            labelled += [(f"template '{template}'", labels) for template, _, labels in prompts.rows()]
        groups = judge.groups()
        for owner, labels in labelled:
            for group, name in labels.items():
                if name not in groups.get(group, []):
                    allowed: Iterable[str] = groups.get(group, groups)
                    raise EvaluationError(
                        f"{owner} has the label '{group}: {name}', which the judge does not know; allowed "
                        f"{'groups' if group not in groups else f'names of {group}'}: {', '.join(allowed)}."
                    )

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """Return notes on references, near copies, the judge's accuracy and chance levels."""
        against = "the input image" if self.protocol.references == "kept_image" else "all real images"
        notes = [
            f"Subjects: {len(self.subjects)}, compared with {against}, so that a mere copy of the input is the upper "
            f"end of DINO and CLIP-I. Intervals: {bootstrap.replicates} bootstrap draws of subjects.",
            f"Near copies: the share of images whose DINO cosine with the input image is at least {NEAR_COPY}, under "
            "every protocol. The row of real images tells how many other photos of a subject reach that.",
        ]
        measured = {score.metric for score in scores}
        if not measured & {*LABEL_GROUPS, "identity", "words"}:
            return notes
        notes.append(
            "Kind, colour, pattern: the share of images in which the judge, a network that no model looks through, "
            "sees the subject's own, or what the words change it to. Words: all that the template asks for is seen."
        )
        judged = (*LABEL_GROUPS, "identity")
        real = [s for s in scores if s.system == REAL_IMAGES and s.table == "dreambench" and s.metric in judged]
        if real:
            accuracy = ", ".join(f"{score.metric} {score.value:.2f}" for score in real)
            notes.append(f"The judge on {max(score.n for score in real)} real images: {accuracy}.")
        if chances := [1 / (1 + len(others)) for name in self.subjects if (others := self.others(name))]:
            notes.append(
                "Identity: the share of images that are nearer, by the judge's feature, to their own input image than "
                f"to the portraits of others of the same kind; chance is {sum(chances) / len(chances):.3g}."
            )
        if "leaked" in measured:
            notes.append(
                "What the input image gives: 1 where the output always tells it from others, as a copy does; 0 where "
                "it tells nothing. Kept is the mean of kind and look, which should show; leaked that of background and "
                "pose, which should not. The row of real images, other photos of the subject, does both right."
            )
        if self.pairs:
            notes.append(
                f"Two subjects: {len(self.pairs)} pairs, each slot's kind and identity in its half of the image. "
                "Swapped: both halves show the other's kind; missing: a kind that neither half shows."
            )
        return notes


def resolve_facts(protocol: DreamBenchProtocol, folder: Path) -> DreamBenchProtocol:
    """Return the protocol with the subjects and prompts of its `facts` file, if it names one.

    Raises:
        DataSetError: the file is missing or has another structure.
    """
    if protocol.facts is None:
        return protocol
    file = folder / protocol.facts
    if not file.is_file():
        raise DataSetError(
            f"'{file}' does not exist; it lists DreamBench's subjects and prompts. Build the data set first, or set "
            "data.dreambench to its folder."
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        subjects = {
            name: Subject(subject["class"], subject["kind"], subject["kept_image"], subject.get("labels", {}))
            for name, subject in facts["subjects"].items()
        }
        prompts = {
            kind: Templates(lists["original"], lists["modified"], lists.get("labels", []))
            for kind, lists in facts["prompts"].items()
        }
        pairs = Pairs(**facts["pairs"]) if "pairs" in facts else protocol.pairs
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataSetError(
            f"'{file}' does not have DreamBench's structure (subjects: class, kind, kept_image; prompts by kind: "
            f"original, modified): {type(error).__name__}: {error}"
        ) from error
    return replace(protocol, facts=None, subjects=subjects, prompts=prompts, pairs=pairs)
