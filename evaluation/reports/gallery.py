"""Pictures that show by eye what a score cannot: the same prompt with another input image, in each slot."""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.config import Gallery
from evaluation.protocols.benchmark import Benchmark
from evaluation.protocols.requests import Request, image_seed, spread

GALLERY_SEED_OFFSET = 1_000_000_000  # no data set has so many prompts: a gallery's noise is its own


@dataclass(frozen=True)
class SwapGrid:
    """Requests of `prompts` × `subjects`; a row shares its prompt and its noise."""

    prompts: list[str]
    subjects: list[str]
    rows: list[list[Request]]


@dataclass(frozen=True)
class PairGrid:
    """Requests of `subjects` × `subjects`; row in the first slot, column in the second; all share their noise."""

    prompt: str
    subjects: list[str]
    rows: list[list[Request]]


def shown_subjects(dataset: Benchmark, count: int) -> list[str]:
    """Subjects for pictures, spread over the data set."""
    return spread(list(dataset.subjects), count)


def shown_requests(dataset: Benchmark, requests: Sequence[Request], subject: str, templates: int) -> list[Request]:
    """The first image of some of the subject's prompts, spread over its list."""
    own = [request for request in requests if request.unit == subject]
    return spread(own[:: getattr(dataset.protocol, "images_per_prompt", 1)], templates)


def common_requests(
    dataset: Benchmark, requests: Sequence[Request], subjects: Sequence[str], templates: int
) -> tuple[list[str], dict[str, list[Request]]]:
    """Fed prompts that all of `subjects` share, spread over the list, and each subject's requests for them."""
    first = {
        subject: {request.prompt: request for request in shown_requests(dataset, requests, subject, len(requests))}
        for subject in subjects
    }
    if (
        getattr(dataset.protocol, "fed", "image") == "class_and_image"
    ):  # then prompts hold the class word, and only kinds share them
        words = {subject: dataset.subjects[subject].class_noun for subject in subjects}
        first = {s: {p.replace(words[s], "…", 1): r for p, r in found.items()} for s, found in first.items()}
    shared = [prompt for prompt in first[subjects[0]] if all(prompt in found for found in first.values())]
    prompts = spread(shared, templates)
    return prompts, {subject: [found[prompt] for prompt in prompts] for subject, found in first.items()}


def swap_grid(dataset: Benchmark, gallery: Gallery, start: int = 0) -> SwapGrid:
    """Each of `swap_prompts` for each shown subject; indices count from `start`."""
    subjects = shown_subjects(dataset, gallery.subjects)
    rows = []
    for number, prompt in enumerate(gallery.swap_prompts):
        first = start + number * len(subjects)
        rows.append([_request(dataset, first + i, prompt, (name,), number) for i, name in enumerate(subjects)])
    return SwapGrid(list(gallery.swap_prompts), subjects, rows)


def pair_grid(dataset: Benchmark, gallery: Gallery, start: int = 0) -> PairGrid | None:
    """`pair_prompt` for each ordered pair of subjects; None where there is no such prompt."""
    if gallery.pair_prompt is None:
        return None
    subjects = shown_subjects(dataset, gallery.pair_subjects)
    noise = len(gallery.swap_prompts)
    rows = [
        [
            _request(dataset, start + row * len(subjects) + column, gallery.pair_prompt, (first, second), noise)
            for column, second in enumerate(subjects)
        ]
        for row, first in enumerate(subjects)
    ]
    return PairGrid(gallery.pair_prompt, subjects, rows)


def _request(dataset: Benchmark, index: int, prompt: str, subjects: tuple[str, ...], noise: int) -> Request:
    text = prompt
    for subject in subjects:
        text = text.replace("<i>", f"a {dataset.subjects[subject].class_noun}", 1)
    return Request(
        index=index,
        prompt=prompt,
        text=text,
        inputs=tuple(str(dataset.kept_image(subject).relative_to(dataset.folder)) for subject in subjects),
        seed=image_seed(dataset.protocol.sampling.seed, GALLERY_SEED_OFFSET + noise),
        unit=subjects[0],
    )
