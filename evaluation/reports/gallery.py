"""Pictures that show by eye what a score cannot: the same prompt with another input image, in each slot."""

from collections.abc import Sequence
from itertools import count

from evaluation.config import Gallery
from evaluation.protocols.benchmark import Benchmark
from evaluation.protocols.requests import Request, image_seed, spread

GALLERY_SEED_OFFSET = 1_000_000_000  # no data set has so many prompts: a gallery's noise is its own


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
    # Where prompts hold the class word, only kinds share them.
    if getattr(dataset.protocol, "fed", "image") == "class_and_image":
        words = {subject: dataset.subjects[subject].class_noun for subject in subjects}
        first = {s: {p.replace(words[s], "…", 1): r for p, r in found.items()} for s, found in first.items()}
    shared = [prompt for prompt in first[subjects[0]] if all(prompt in found for found in first.values())]
    prompts = spread(shared, templates)
    return prompts, {subject: [found[prompt] for prompt in prompts] for subject, found in first.items()}


def swaps_and_pairs(dataset: Benchmark, gallery: Gallery) -> tuple[list[list[Request]], list[list[Request]]]:
    """Rows of two grids. Each of `swap_prompts` for each shown subject, from a noise of the row's own; then
    `pair_prompt` for each ordered pair of subjects, row in the first slot, column in the second, from one noise."""
    subjects, sides = (shown_subjects(dataset, side) for side in (gallery.subjects, gallery.pair_subjects))
    rows = [(prompt, [(name,) for name in subjects], noise) for noise, prompt in enumerate(gallery.swap_prompts)]
    swaps = len(rows)
    if (prompt := gallery.pair_prompt) is not None:
        rows += [(prompt, [(first, second) for second in sides], swaps) for first in sides]
    numbers = count()
    found = [[_request(dataset, next(numbers), prompt, names, noise) for names in row] for prompt, row, noise in rows]
    return found[:swaps], found[swaps:]


def _request(dataset: Benchmark, index: int, prompt: str, subjects: Sequence[str], noise: int) -> Request:
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
