"""Requests → a folder of images: batched across subjects, shared by processes, going on where they were.

An image is written whole or not at all, and its file carries what it was made from; so that a stopped run resumes
without a record of its own, as `kosmosg generate` does. At the end of a launch the first process writes manifest.jsonl,
a line for each image with the hash of its file.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image
from rich.console import Console

from evaluation.processes import Processes, progress
from evaluation.protocols.benchmark import EvaluationError, Request, read_image
from evaluation.protocols.protocol import Sampling
from kosmosg.files import clear_leftovers, write_text
from kosmosg.generation import file_hash, read_parameters, store

MANIFEST = "manifest.jsonl"
LOCK = ".lock"
IMAGES = "images"


class GenerationError(EvaluationError):
    """A folder that images must not or cannot be made into."""


@dataclass(frozen=True)
class Batch:
    """What a system is asked at once: for each image its prompt, input images and seed."""

    prompts: list[str]
    images: list[list[Image.Image]]
    seeds: list[int]


Generate = Callable[[Batch, Sampling], list[Image.Image]]
"""One image per prompt, in order, depending on nothing but the batch and the sampling."""


@dataclass(frozen=True)
class System:
    """A named way to make images.

    Args:
        name: as in the tables.
        load: reads the weights; called only when an image is missing.
        model: hash of the weights and of all else that images depend on besides prompt, seed and sampling.
        reads_images: whether it is fed `Request.prompt` with its inputs, or `Request.text` alone.
        experiment, stage, seed: of a training run among several. All seeds share the experiment, an ablation or the
            stage itself; the stage is alignment where the MLLM was frozen, whatever the loss.
    """

    name: str
    load: Callable[[], Generate]
    model: str
    reads_images: bool
    experiment: str | None = None
    stage: str | None = None
    seed: int | None = None


def generate(
    system: System,
    requests: Sequence[Request],
    sampling: Sampling,
    folder: Path,
    *,
    inputs_folder: Path,
    batch_size: int,
    label: str = "",
    processes: Processes | None = None,
    console: Console | None = None,
) -> dict[int, Path]:
    """Make every image that `folder` lacks, together with the other processes; the files by index.

    Batches are cut by index alone, whoever makes them, and each goes as a whole to the next process that is free. One
    that was interrupted is computed as a whole again, though only its missing images are stored: results of matrix
    products depend on the batch in their last bits, and any number of processes, however often killed, is to give the
    very images of one uninterrupted run.

    Args:
        label: stands before the bar; the system's name if empty.

    Raises:
        GenerationError: another launch is at it.
        ProcessError: another process failed.
        DataSetError: an input image is unreadable.
        ValueError: the system gave another number of images.
    """
    processes = processes or Processes()
    console = (console or Console()) if processes.first else Console(quiet=True)
    suffix = "jpg" if sampling.storage == "jpeg" else "png"  # memory's bytes are kept as PNG, which loses nothing
    wanted = {request.index: parameters_of(system, request, sampling) for request in requests}
    names = {index: f"{IMAGES}/{index:06d}.{suffix}" for index in wanted}
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    with locked(folder, processes):
        there = processes.share(lambda: made(folder, wanted, names))
        batches = [batch for batch in batches if any(request.index not in there for request in batch)]
        done, make = processes.counter(), None
        with progress(label or system.name, len(requests), len(there), console) as show:
            for number in processes.take(len(batches)):
                make = make or system.load()
                images = make(assemble(system, batches[number], inputs_folder), sampling)
                if len(images) != len(batches[number]):
                    raise ValueError(
                        f"system '{system.name}' gave {len(images)} images for {len(batches[number])} prompts."
                    )
                for request, image in zip(batches[number], images, strict=True):
                    if request.index not in there:
                        store(image, folder / names[request.index], wanted[request.index])
                        show(done(1))
            processes.wait()
        if processes.first:
            write_manifest(folder, wanted, names, there)
    return {index: folder / name for index, name in names.items()}


def parameters_of(system: System, request: Request, sampling: Sampling) -> dict[str, Any]:
    """What an image is made from, as its file and the manifest tell it."""
    return {
        "index": request.index,
        "prompt": request.prompt if system.reads_images else request.text,
        "inputs": list(request.inputs) if system.reads_images else [],
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
        prompts=[request.prompt if system.reads_images else request.text for request in requests],
        images=[[opened[name] for name in request.inputs] if system.reads_images else [] for request in requests],
        seeds=[request.seed for request in requests],
    )


def made(folder: Path, wanted: Mapping[int, dict[str, Any]], names: Mapping[int, str]) -> dict[int, str]:
    """The hashes, by index, of the images that were made as is wanted: those of the manifest whose file is unchanged;
    those that it does not know and that say it themselves."""
    file, told, found = folder / MANIFEST, {}, {}
    try:
        rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line] if file.is_file() else []
        told = {row["index"]: (row.pop("sha256"), row) for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # damaged from outside; it is written anew
    # Listed, not looked for: a network file system may remember for a while that a file is not there.
    there = {f"{IMAGES}/{image.name}" for image in (folder / IMAGES).glob("*")}
    for index, parameters in wanted.items():
        if (name := names[index]) in there:
            sha256 = file_hash(folder / name)
            known, row = told.get(index, (sha256, None))
            row = {**(read_parameters(folder / name) or {}), "file": name} if row is None else row
            if known == sha256 and row == {**parameters, "file": name}:
                found[index] = sha256
    return found


def write_manifest(
    folder: Path, wanted: Mapping[int, dict[str, Any]], names: Mapping[int, str], known: Mapping[int, str]
) -> None:
    """A JSON line for each image. Raises GenerationError: one is not there."""
    try:
        hashes = {index: known.get(index) or file_hash(folder / names[index]) for index in wanted}
    except FileNotFoundError as error:
        raise GenerationError(
            f"'{error.filename}' is missing, though it was made: are all processes given the same folder? Start the "
            "same command again, and it is made anew."
        ) from error
    rows = ({**parameters, "file": names[i], "sha256": hashes[i]} for i, parameters in wanted.items())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_text(encoding="utf-8") != text:
        write_text(folder / MANIFEST, text)


@contextmanager
def locked(folder: Path, processes: Processes) -> Iterator[None]:
    """Keep other launches from writing to `folder` while the processes of this one do.

    Raises:
        GenerationError: another launch is at it, or a process that a killed launch has left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as lock:
        if processes.first:
            # Alone for a moment, so that nobody of an earlier launch can be left; then one among its own.
            take(lock, fcntl.LOCK_EX)
            for place in (folder, folder / IMAGES):
                clear_leftovers(place)
            take(lock, fcntl.LOCK_SH)
        processes.wait()
        take(lock, fcntl.LOCK_SH)
        yield
        processes.wait()


def take(lock: IO[str], kind: int) -> None:
    folder = Path(lock.name).parent
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise GenerationError(f"another process is generating into '{folder}'; let it finish.") from error
    except OSError as error:
        raise GenerationError(
            f"'{folder}' lies on a file system without locks ({error}), so that two launches would disturb each other; "
            "have it mounted with them (flock), or choose another output folder."
        ) from error
