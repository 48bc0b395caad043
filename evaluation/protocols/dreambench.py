"""DreamBench: subjects × templates, read from the folder that google/dreambooth publishes.

`<folder>/<subject>/NN.jpg` (or .png); `<folder>/<subject>/others/`, where there is one, shows other individuals of the
same kind. Which subjects, classes, templates and kept images there are is the protocol's
data, or a JSON file of the same structure in the folder.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from evaluation.protocols.benchmark import COPY_OF_INPUT, REAL_IMAGES, Benchmark
from evaluation.protocols.protocol import DreamBenchProtocol, Pairs, Subject, Templates
from evaluation.protocols.requests import (
    DataSetError,
    EvaluationError,
    Item,
    Request,
    Slot,
    image_seed,
    named_problems,
    spread,
)
from kosmosg.prompt import PLACEHOLDER

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LOOKS = ("kind", "colour", "pattern")
"""Label groups of subjects; each has a column."""
NEAR_COPY = 0.95
"""DINO cosine with the input image from which on an image counts as a near copy of it. One for all protocols and not to
be configured, so that the rate means one thing; how many photos of a subject reach it tells the row of real images."""


class DreamBench(Benchmark):
    """The data set under a protocol.

    Args:
        folder: holds one folder for each subject.

    Raises:
        DataSetError: subjects or files are missing; all are named (the first ten, then a count).
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
        self._first_prompt, prompts = {}, 0
        for name in self.subjects:
            self._first_prompt[name] = prompts
            prompts += len(self.templates(name))
        self._first_pair = prompts

    def check(self) -> None:
        """See the class for what is raised."""
        problems = []
        if not self.folder.is_dir():
            raise DataSetError(f"there is no DreamBench at '{self.folder}'; set data.dreambench to its folder.")
        for name, subject in self.subjects.items():
            if subject.kind not in self.protocol.prompts:
                kinds = ", ".join(sorted(self.protocol.prompts))
                problems.append(f"subject '{name}' is of kind '{subject.kind}', but there are prompts for: {kinds}")
            problems += [
                f"subject '{name}' has a label of '{group}', but labels of subjects are of: {', '.join(LOOKS)}"
                for group in subject.labels
                if group not in LOOKS
            ]
            if not (self.folder / name).is_dir():
                problems.append(f"subject '{name}' has no folder")
            elif not (self.folder / name / subject.kept_image).is_file():
                there = ", ".join(path.name for path in self.real_images(name)) or "none"
                problems.append(f"subject '{name}' lacks its kept image {subject.kept_image} (there: {there})")
        for pair in self.protocol.pairs.subjects if self.protocol.pairs is not None else []:
            kinds = [self.protocol.subjects[name].labels.get("kind") for name in pair if name in self.protocol.subjects]
            if len(set(kinds) - {None}) != 2:
                problems.append(f"the pair {' + '.join(pair)} is not of two subjects with labels of two kinds")
        if problems:
            raise DataSetError(f"DreamBench at '{self.folder}': {named_problems(problems)}")

    def kept_image(self, subject: str) -> Path:
        """The one image that a model is given."""
        return self.folder / subject / self.subjects[subject].kept_image

    def real_images(self, subject: str) -> list[Path]:
        """Every photo of the subject, by name."""
        return sorted(path for path in (self.folder / subject).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)

    def others(self, subject: str) -> tuple[Path, ...]:
        """Portraits of other individuals of the same kind, by name; empty where there are none."""
        return tuple(sorted((self.folder / subject / "others").glob("*.png")))

    def references_of(self, subject: str) -> tuple[Path, ...]:
        """What an image of the subject is compared with, by the protocol."""
        return (
            (self.kept_image(subject),)
            if self.protocol.references == "kept_image"
            else tuple(self.real_images(subject))
        )

    def templates(self, subject: str) -> list[tuple[str, str, dict[str, str]]]:
        """(original, modified, labels) of the templates of the subject's kind."""
        prompts = self.protocol.prompts[self.subjects[subject].kind]
        return spread(prompts.rows(), self.protocol.max_templates)

    def pairs(self) -> list[list[str]]:
        """The pairs that are drawn: those of the taken subjects, where there is a judge."""
        pairs = self.protocol.pairs.subjects if self.protocol.pairs is not None and self.protocol.judge else []
        return [pair for pair in pairs if self.subjects.keys() >= set(pair)]

    def requests(self) -> list[Request]:
        """Subject by subject, template by template, repeat by repeat; then the pairs."""
        asked = [
            ([name], original, modified) for name in self.subjects for original, modified, _ in self.templates(name)
        ]
        if (pairs := self.protocol.pairs) is not None:
            asked += [(names, pairs.original, pairs.modified) for names in self.pairs()]
        return [
            self._request(number, repeat, *prompt)
            for number, prompt in enumerate(asked)
            for repeat in range(self.protocol.images_per_prompt)
        ]

    def _request(self, number: int, repeat: int, names: list[str], original: str, modified: str) -> Request:
        nouns = [self.subjects[name].class_noun for name in names]
        shown = [PLACEHOLDER if self.protocol.fed == "image" else f"{noun} {PLACEHOLDER}" for noun in nouns]
        sampling = self.protocol.sampling
        return Request(
            index=number * self.protocol.images_per_prompt + repeat,
            prompt=modified.format(*shown),
            text=original.format(*nouns),
            inputs=tuple(str(self.kept_image(name).relative_to(self.folder)) for name in names),
            seed=image_seed(sampling.seed, number, repeat, sampling.noise_period),
            unit=" + ".join(names),
        )

    def item(self, request: Request, file: Path) -> Item:
        """A made image with what it is compared with; one of two subjects is for the judge alone."""
        number = request.index // self.protocol.images_per_prompt
        if number >= self._first_pair:
            names = self.pairs()[number - self._first_pair]
            slots = [Slot(self.subjects[n].labels["kind"], self.kept_image(n), self.others(n)) for n in names]
            return Item(file, request.unit, "", slots=tuple(slots))
        templates = self.templates(request.unit)
        place = number - self._first_prompt[request.unit]
        template, _, words = templates[place]
        return Item(
            file,
            request.unit,
            request.text,
            self.references_of(request.unit),
            group=template,
            given=self.kept_image(request.unit),
            others=self.others(request.unit),
            labels=self.subjects[request.unit].labels | words,
            words=words,
        )

    def baselines(self) -> dict[str, list[Item]]:
        """Real photos; and the input repeated whatever the prompt: how much of a score is mere copying."""
        single = self.requests()[: self._first_pair * self.protocol.images_per_prompt]
        copies = [self.item(request, self.folder / request.inputs[0]) for request in single]
        return {REAL_IMAGES: self.other_real_images(), COPY_OF_INPUT: copies}

    def other_real_images(self) -> list[Item]:
        """Real photos of each subject against its references, never a photo against itself."""
        images = []
        for name in self.subjects:
            for file in self.real_images(name):
                others = tuple(reference for reference in self.references_of(name) if reference != file)
                kept = self.kept_image(name)
                if others:
                    given = None if file == kept else kept
                    judged = {"others": self.others(name), "labels": self.subjects[name].labels}
                    images.append(Item(file, name, "", others, given=given, **judged))
        return images

    def files(self) -> list[Path]:
        """Every file that a number depends on."""
        return [path for name in self.subjects for path in (*self.real_images(name), *self.others(name))]

    def parts(self, unit: str, group: str) -> dict[str, tuple[str, str]]:
        """By kind of subject, subject, template, and by the label groups that the words ask for (`colour + dress`)."""
        if not group:
            return {}
        kind = self.subjects[unit].kind
        asked = next(labels for original, _, labels in self.protocol.prompts[kind].rows() if original == group)
        found = {"kind": (kind, unit), "subject": (unit, group), "template": (group, unit)}
        return found | ({"words": (" + ".join(asked), unit)} if asked else {})

    def check_networks(self, networks: Mapping[str, Any]) -> None:
        """Labels must be known to the judge."""
        if (judge := networks.get("judge")) is None:
            return
        told: list[tuple[str, Mapping[str, str]]] = [(f"subject '{n}'", s.labels) for n, s in self.subjects.items()]
        for prompts in self.protocol.prompts.values():
            told += [(f"template '{template}'", labels) for template, _, labels in prompts.rows()]
        groups = judge.groups()
        for owner, labels in told:
            for group, name in labels.items():
                if name not in groups.get(group, []):
                    allowed: Iterable[str] = groups.get(group, groups)
                    raise EvaluationError(
                        f"{owner} has the label '{group}: {name}', which the judge does not know; allowed "
                        f"{'groups' if group not in groups else f'names of {group}'}: {', '.join(allowed)}."
                    )

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """What is compared with what; how far to trust the judge, and what chance gives."""
        against = "the input image" if self.protocol.references == "kept_image" else "all real images"
        notes = [
            f"Subjects: {len(self.subjects)}, compared with {against}, so that a mere copy of the input is the upper "
            f"end of DINO and CLIP-I. Intervals: {bootstrap.replicates} bootstrap draws of subjects.",
            f"Near copies: the share of images whose DINO cosine with the input image is at least {NEAR_COPY}, under "
            "every protocol. The row of real images tells how many other photos of a subject reach that.",
        ]
        measured = {score.metric for score in scores}
        if not measured & {*LOOKS, "identity", "words"}:
            return notes
        notes.append(
            "Kind, colour, pattern: the share of images in which the judge, a network that no model looks through, "
            "sees the subject's own, or what the words change it to. Words: all that the template asks for is seen."
        )
        judged = (*LOOKS, "identity")
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
        if pairs := self.pairs():
            notes.append(
                f"Two subjects: {len(pairs)} pairs, each slot's kind and identity in its half of the image. Swapped: "
                "both halves show the other's kind; missing: a kind that neither half shows."
            )
        return notes


def resolve_facts(protocol: DreamBenchProtocol, folder: Path) -> DreamBenchProtocol:
    """The protocol with its subjects and prompts in it, read from `facts` where it names a file.

    Raises:
        DataSetError: the file is missing or not of the structure.
    """
    if protocol.facts is None:
        return protocol
    file = folder / protocol.facts
    if not file.is_file():
        raise DataSetError(
            f"'{file}' does not exist; it tells DreamBench's subjects and prompts. Build the data set first, or set "
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
            f"'{file}' is not of DreamBench's structure (subjects: class, kind, kept_image; prompts by kind: original, "
            f"modified): {type(error).__name__}: {error}"
        ) from error
    return replace(protocol, facts=None, subjects=subjects, prompts=prompts, pairs=pairs)
