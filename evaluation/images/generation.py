"""Requests → images in a manifest: batched across subjects, shared by processes, going on where they were."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from evaluation.images.manifest import Manifest, ManifestError
from evaluation.parallel.processes import Processes
from evaluation.parallel.progress import progress
from evaluation.protocols.protocol import Sampling
from evaluation.protocols.requests import Request, read_image


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
    processes: Processes | None = None,
    console: Console | None = None,
) -> None:
    """Make every image that the manifest lacks, together with the other processes; the first one shows the progress.

    Batches are cut by index alone, whoever makes them, and each goes as a whole to the next process that is free. One
    that was interrupted is computed as a whole again, though only its missing images are stored: results of matrix
    products depend on the batch in their last bits, and any number of processes, however often killed, is to give the
    very images of one uninterrupted run.

    Args:
        label: stands before the bar; the system's name if empty.

    Raises:
        ManifestError: another launch is at it.
        ProcessError: another process failed.
        DataSetError: an input image is unreadable.
        ValueError: the system gave another number of images.
    """
    processes = processes or Processes()
    console = (console or Console()) if processes.first else Console(quiet=True)
    made, taken = processes.counter(), processes.counter()
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    with manifest.locked(processes) as there:
        batches = [batch for batch in batches if any(request.index not in there for request in batch)]
        missing = sum(request.index not in there for request in requests)
        with progress(label or system.name, len(requests), len(requests) - missing, console) as show:
            make = None
            while (number := taken.take()) < len(batches):
                make = make or system.load()
                images = make(assemble(system, batches[number], inputs_folder), sampling)
                if len(images) != len(batches[number]):
                    raise ValueError(
                        f"system '{system.name}' gave {len(images)} images for {len(batches[number])} prompts."
                    )
                for request, image in zip(batches[number], images, strict=True):
                    if request.index not in there:
                        manifest.store(image, sampling.storage, **row_of(system, request, sampling))
                        show(made.add(1))
            processes.wait()
    if processes.first and (lost := [request.index for request in requests if request.index not in manifest.rows]):
        raise ManifestError(
            f"'{manifest.file}' lacks {len(lost)} of {len(requests)} images, as {lost[0]}, though all were made: are "
            "all processes given the same folder? Start the same command again, and they are made anew."
        )


def row_of(system: System, request: Request, sampling: Sampling) -> dict[str, Any]:
    """What the manifest tells of an image, but for its file."""
    return {
        "index": request.index,
        "prompt": fed_prompt(system, request),
        "inputs": request.inputs if system.reads_images else (),
        "seed": request.seed,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "model": system.model,
    }


def assemble(system: System, requests: Sequence[Request], inputs_folder: Path) -> Batch:
    """The requests as the system reads them; each input file is opened once."""
    opened: dict[str, Image.Image] = {}
    for name in {name for request in requests for name in request.inputs if system.reads_images}:
        opened[name] = read_image(inputs_folder / name, upright=True)  # as every prompt's images
    return Batch(
        prompts=[fed_prompt(system, request) for request in requests],
        images=[[opened[name] for name in request.inputs] if system.reads_images else [] for request in requests],
        seeds=[request.seed for request in requests],
    )


def fed_prompt(system: System, request: Request) -> str:
    """What stands in the manifest as the image's prompt."""
    return request.prompt if system.reads_images else request.text
