"""Requests → images in a manifest: batched across subjects, one seed per image, going on where it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evaluation.manifest import Manifest
from evaluation.protocol import Sampling
from evaluation.requests import Request, read_image


@dataclass(frozen=True)
class Batch:
    """What a system is asked at once: for each image its prompt, input images and seed."""

    prompts: list[str]
    images: list[list[Image.Image]]
    seeds: list[int]


Generate = Callable[[Batch, Sampling], list[Image.Image]]
"""One image per prompt, in order, depending on nothing but the batch and the sampling."""


@dataclass(frozen=True)
class Variant:
    """Which run of an experiment a system is.

    Args:
        experiment: what all seeds share: an ablation, or the stage itself.
        stage: alignment where the MLLM was frozen, whatever the loss; else instruction_tuning.
    """

    experiment: str
    stage: str
    seed: int

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.experiment}, seed {self.seed}"


@dataclass(frozen=True)
class System:
    """A named way to make images.

    Args:
        name: as in the tables.
        load: reads the weights; called only when an image is missing.
        model: hash of the weights and of all else that images depend on besides prompt, seed and sampling.
        reads_images: whether it is fed `Request.prompt` with its inputs, or `Request.text` alone.
        variant: None for the rows that every evaluation has.
    """

    name: str
    load: Callable[[], Generate]
    model: str
    reads_images: bool
    variant: Variant | None = None


def generate(
    system: System,
    requests: Sequence[Request],
    sampling: Sampling,
    manifest: Manifest,
    *,
    inputs_folder: Path,
    batch_size: int,
    label: str = "",
) -> None:
    """Make every image that the manifest lacks; `label` stands before the bar, the system's name if empty.

    Batches are cut by index alone. One that was interrupted is computed as a whole again, though only its missing
    images are stored: results of matrix products depend on the batch in their last bits, and a resumed run is to give
    the very images of an uninterrupted one.

    Raises:
        ManifestError: another process is at it.
        DataSetError: an input image is unreadable.
        ValueError: the system gave another number of images.
    """
    make: Generate | None = None
    done = sum(request.index in manifest.rows for request in requests)
    with manifest.locked(), progress_bar() as progress:
        task = progress.add_task(label or system.name, total=len(requests), completed=done)
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            missing = [request for request in batch if request.index not in manifest.rows]
            if not missing:
                continue
            make = make or system.load()
            images = make(assemble(system, batch, inputs_folder), sampling)
            if len(images) != len(batch):
                raise ValueError(f"system '{system.name}' gave {len(images)} images for {len(batch)} prompts.")
            for request, image in zip(batch, images, strict=True):
                if request.index in manifest.rows:
                    continue
                manifest.store(
                    image,
                    sampling.storage,
                    index=request.index,
                    prompt=fed_prompt(system, request),
                    inputs=request.inputs if system.reads_images else (),
                    seed=request.seed,
                    sampler=sampling.sampler,
                    steps=sampling.steps,
                    guidance_scale=sampling.guidance_scale,
                    model=system.model,
                )
                progress.advance(task)
        manifest.finish()


def assemble(system: System, requests: Sequence[Request], inputs_folder: Path) -> Batch:
    """The requests as the system reads them; each input file is opened once."""
    opened: dict[str, Image.Image] = {}
    for name in {name for request in requests for name in request.inputs if system.reads_images}:
        opened[name] = read_image(inputs_folder / name)
    return Batch(
        prompts=[fed_prompt(system, request) for request in requests],
        images=[[opened[name] for name in request.inputs] if system.reads_images else [] for request in requests],
        seeds=[request.seed for request in requests],
    )


def fed_prompt(system: System, request: Request) -> str:
    """What stands in the manifest as the image's prompt."""
    return request.prompt if system.reads_images else request.text


def progress_bar() -> Progress:
    """A bar with the count, the time gone and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
