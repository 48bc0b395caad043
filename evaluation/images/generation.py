"""Generate the requested images into a folder, on several ranks and resumable.

Images are written atomically and their files carry the parameters they were made from, so an interrupted run resumes
without a progress file, as `kosmosg generate` does. At the end, rank 0 writes manifest.jsonl with the hash of every
image.
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


@dataclass(frozen=True)
class Batch:
    """Prompts, input images and seeds of the images to make."""

    prompts: list[str]
    images: list[list[Image.Image]]
    seeds: list[int]


Generate = Callable[[Batch, Sampling], list[Image.Image]]
"""Returns one image per prompt, in order, as a function of the batch and the sampling only."""


@dataclass(frozen=True)
class System:
    """A model that generates images.

    Args:
        name: row name in the tables.
        load: loads the weights; called only if images are missing.
        model: hash of the weights and of everything else that images depend on besides prompt, seed and sampling.
        reads_images: whether it reads `Request.prompt` with its input images, or `Request.text` only.
        experiment, stage, seed: of one of several training runs. All seeds share the experiment, which is the ablation
            or else the stage. The stage is alignment if the MLLM was frozen, whatever the loss.
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
    """Generate all images missing from `folder`, on all ranks.

    Batches depend on the request index only, and each is computed by the next free rank. An interrupted batch is
    recomputed as a whole, although only its missing images are stored: matrix products depend on the batch in their
    last bits, and the images must not depend on the number of ranks or interruptions.

    Args:
        label: shown with the progress; defaults to the system's name.

    Returns:
        Image files by request index.

    Raises:
        EvaluationError: another launch is generating into the folder.
        ProcessError: another rank failed.
        DataSetError: an input image is unreadable.
        ValueError: the system returned a wrong number of images.
    """
    processes = processes or Processes()
    console = (console or Console()) if processes.first else Console(quiet=True)
    suffix = "jpg" if sampling.storage == "jpeg" else "png"  # PNG keeps the bytes of memory without loss
    wanted = {request.index: parameters_of(system, request, sampling) for request in requests}
    names = {index: f"{IMAGES}/{index:06d}.{suffix}" for index in wanted}
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    with locked(folder, processes):
        hashes = processes.broadcast(lambda: valid_images(folder, wanted, names))
        batches = [batch for batch in batches if any(request.index not in hashes for request in batch)]
        done, make = processes.counter(), None
        with progress(label or system.name, len(requests), len(hashes), console) as show:
            for number in processes.distribute(len(batches)):
                make = make or system.load()
                images = make(assemble(system, batches[number], inputs_folder), sampling)
                if len(images) != len(batches[number]):
                    raise ValueError(
                        f"system '{system.name}' returned {len(images)} images for {len(batches[number])} prompts."
                    )
                for request, image in zip(batches[number], images, strict=True):
                    if request.index not in hashes:
                        store(image, folder / names[request.index], wanted[request.index])
                        show(done(1))
            processes.barrier()
        if processes.first:
            write_manifest(folder, wanted, names, hashes)
    return {index: folder / name for index, name in names.items()}


def parameters_of(system: System, request: Request, sampling: Sampling) -> dict[str, Any]:
    """Return the parameters of an image, as stored in its file and in the manifest."""
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
    """Build the batch of some requests; each input file is opened once."""
    opened: dict[str, Image.Image] = {}
    for name in {name for request in requests for name in request.inputs if system.reads_images}:
        opened[name] = read_image(inputs_folder / name, upright=True)  # as for any other prompt
    return Batch(
        prompts=[request.prompt if system.reads_images else request.text for request in requests],
        images=[[opened[name] for name in request.inputs] if system.reads_images else [] for request in requests],
        seeds=[request.seed for request in requests],
    )


def valid_images(folder: Path, wanted: Mapping[int, dict[str, Any]], names: Mapping[int, str]) -> dict[int, str]:
    """Return the hashes, by index, of the images made with the wanted parameters.

    The parameters are those of the manifest if the file is unchanged, else those stored in the file.
    """
    file, manifest, valid = folder / MANIFEST, {}, {}
    try:
        rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line] if file.is_file() else []
        manifest = {row["index"]: (row.pop("sha256"), row) for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # damaged; it is rewritten at the end
    # List the folder: a network file system may cache for a while that a single file does not exist.
    existing = {f"{IMAGES}/{image.name}" for image in (folder / IMAGES).glob("*")}
    for index, parameters in wanted.items():
        if (name := names[index]) in existing:
            sha256 = file_hash(folder / name)
            recorded, row = manifest.get(index, (sha256, None))
            row = {**(read_parameters(folder / name) or {}), "file": name} if row is None else row
            if recorded == sha256 and row == {**parameters, "file": name}:
                valid[index] = sha256
    return valid


def write_manifest(
    folder: Path, wanted: Mapping[int, dict[str, Any]], names: Mapping[int, str], known: Mapping[int, str]
) -> None:
    """Write a JSON line for each image. Raises EvaluationError if an image is missing."""
    try:
        hashes = {index: known.get(index) or file_hash(folder / names[index]) for index in wanted}
    except FileNotFoundError as error:
        raise EvaluationError(
            f"'{error.filename}' was generated but is missing: do all processes use the same folder? Start the same "
            "command again to regenerate it."
        ) from error
    rows = ({**parameters, "file": names[i], "sha256": hashes[i]} for i, parameters in wanted.items())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_text(encoding="utf-8") != text:
        write_text(folder / MANIFEST, text)


@contextmanager
def locked(folder: Path, processes: Processes) -> Iterator[None]:
    """Lock `folder` against other launches while the ranks of this one write to it.

    Raises:
        EvaluationError: another launch, or a rank left over from a killed one, holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as lock:
        if processes.first:
            # An exclusive lock first, to be sure that no rank of an earlier launch is left; then a shared one.
            acquire(lock, fcntl.LOCK_EX)
            for parent in (folder, folder / IMAGES):
                clear_leftovers(parent)
            acquire(lock, fcntl.LOCK_SH)
        processes.barrier()
        acquire(lock, fcntl.LOCK_SH)
        yield
        processes.barrier()


def acquire(lock: IO[str], kind: int) -> None:
    folder = Path(lock.name).parent
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EvaluationError(f"another process is generating into '{folder}'; let it finish.") from error
    except OSError as error:
        raise EvaluationError(
            f"'{folder}' is on a file system without locks ({error}), so two launches could overwrite each other; "
            "mount it with locks (flock), or choose another output folder."
        ) from error
