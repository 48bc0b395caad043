"""Prompts of a file → PNG files that know how they were made.

A job is one image: prompt, input images, seed. Its file carries the job's parameters in its metadata, so that a stopped
run resumes without a record of its own: what exists with the same parameters is done. All that the jobs need is tried
before anything is drawn.
"""

import codecs
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from kosmosg.files import replaced
from kosmosg.image_processing import ClipImageTransform, read_image
from kosmosg.prompt import PLACEHOLDER, check_negative_prompt, parse_prompt
from kosmosg.sampling import LARGEST_SEED, check_numbers, scheduler_class

METADATA_KEY = "kosmosg"
JPEG_QUALITY = 95
LONGEST_NAME = 240  # bytes; a file system takes 255, and a temporary name is a little longer
MOST_IMAGES = 1_000_000  # of one prompt; each is planned before any is drawn
NAMED = 80  # characters of a value in a message
PROBE_BYTES = 1 << 20  # weights are known by their files' sizes, first and last MiB; reading all would take a minute


class GenerationError(ValueError):
    """A request that cannot be drawn, or a file in its place that was drawn otherwise."""


@dataclass(frozen=True)
class Request:
    """One line of a manifest. `count` images are drawn, with seeds `seed`, `seed + 1`, …"""

    prompt: str
    images: tuple[str, ...] = ()
    negative_prompt: str = ""
    seed: int = 0
    count: int = 1
    image_weights: tuple[float, ...] = ()
    """How much each image counts; none: 1 each."""
    name: str = ""
    place: str = "the prompt"
    """Where it was read, for messages."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise GenerationError("prompt is empty; give text, a placeholder <i> or both")
        if (placeholders := self.prompt.count(PLACEHOLDER)) != len(self.images):
            raise GenerationError(
                f"the prompt has {placeholders} placeholders {PLACEHOLDER} but {len(self.images)} images"
            )
        if self.image_weights and len(self.image_weights) != len(self.images):
            raise GenerationError(
                f"{len(self.image_weights)} image weights for {len(self.images)} images; give one each"
            )
        if wrong := [weight for weight in self.image_weights if not 0 <= weight < math.inf]:
            raise GenerationError(f"the image weight {wrong[0]} is not allowed; allowed: 0 or more")
        check_negative_prompt(self.negative_prompt)
        for name in ("prompt", "negative_prompt"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError as error:  # JSON can write one half of a surrogate pair
                raise GenerationError(f"{name} is no text: it has {error.object[error.start]!r}") from error
        if not 1 <= self.count <= MOST_IMAGES or self.seed < 0 or self.seed + self.count - 1 > LARGEST_SEED:
            raise GenerationError(
                f"count={self.count} and seed={self.seed}; allowed: count in 1 … {MOST_IMAGES:,}, seeds in 0 … 2^64 - 1"
            )
        longest = f"{self.name}-{self.seed + self.count - 1}.png"
        if Path(self.name).name != self.name or not self.name.isprintable() or len(longest.encode()) > LONGEST_NAME:
            raise GenerationError(
                f"name={self.name[:NAMED]!r} is not a plain file name of at most {LONGEST_NAME} bytes with the seed"
            )


@dataclass(frozen=True)
class Settings:
    """What all images of a run share; None is the model's own."""

    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    sampler: str | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self.num_inference_steps, self.guidance_scale)
        if self.sampler is not None:
            scheduler_class(self.sampler)
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise GenerationError(f"{name}={side} is not allowed; allowed: pixels, 1 or more")


@dataclass(frozen=True)
class Job:
    """One image."""

    request: Request
    seed: int
    file: Path
    parameters: dict[str, Any]
    """All that the image depends on, as in its metadata."""


def read_manifest(file: Path) -> tuple[list[Request], list[str]]:
    """The requests of a JSONL file, and what is wrong with the other lines; blank lines are skipped.

    Paths of images are relative to the file's folder. A request without a name is called by its line number.

    Raises:
        GenerationError: the file does not exist.
    """
    if not file.is_file():
        raise GenerationError(f"the manifest '{file}' does not exist")
    requests, wrong = [], []
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            place = f"{file}, line {number}"
            request = read_request(json.loads(line.decode("utf-8")), f"{number:06d}", file.parent, place)
            check_images(request)
            requests.append(request)
        except (ValueError, TypeError, RecursionError) as error:  # too deeply nested
            wrong.append(f"{file}, line {number}: {error}")
    names = [request.name for request in requests]
    wrong += [f"{file}: the name '{name}' is given twice" for name in sorted({n for n in names if names.count(n) > 1})]
    return requests, wrong


def read_request(values: Any, default_name: str, folder: Path, place: str) -> Request:
    """One line's object as a request.

    Raises:
        GenerationError: an unknown key, or a value that is not allowed.
    """
    if not isinstance(values, dict):
        raise GenerationError(f'a line is {type(values).__name__}; allowed: an object, as {{"prompt": "a dog"}}')
    allowed = [field.name for field in fields(Request) if field.name != "place"]
    if unknown := sorted(set(values) - set(allowed)):
        raise GenerationError(f"unknown keys {unknown}; allowed: {', '.join(allowed)}")
    if "prompt" not in values:
        raise GenerationError("the key 'prompt' is missing")
    images = values.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise GenerationError(f"images={images!r}; allowed: a list of paths")
    weights = values.get("image_weights", [])
    if not isinstance(weights, list) or not all(type(weight) in (int, float) for weight in weights):
        raise GenerationError(f"image_weights={weights!r}; allowed: a list of numbers")
    for name, kind in (("prompt", str), ("negative_prompt", str), ("name", str), ("seed", int), ("count", int)):
        if name in values and type(values[name]) is not kind:
            raise GenerationError(f"{name}={values[name]!r}; allowed: {kind.__name__}")
    paths = tuple(str(folder / image) for image in images)
    own = {"images": paths, "image_weights": tuple(weights), "place": place}
    return Request(**{"name": default_name, **values, **own})


def check_images(request: Request) -> None:
    """Raises ValueError: an image that cannot be read or resized; names it."""
    for name in request.images:
        try:
            ClipImageTransform(1)(read_image(name))
        except ValueError as error:
            raise GenerationError(str(error) if name in str(error) else f"the image '{name}': {error}") from error


def check_lengths(pipeline: Any, requests: Iterable[Request]) -> list[str]:
    """What is wrong with prompts that are too long for the model, by place."""
    encoder, wrong = pipeline.encoder, []
    for request in requests:
        for name, text, images in (
            ("prompt", request.prompt, [encoder.stand_in(file) for file in request.images]),
            ("negative_prompt", request.negative_prompt, []),
        ):
            try:
                encoder(parse_prompt(text, images))
            except ValueError as error:
                wrong.append(f"{request.place}: {name}: {error}")
    return wrong


def plan(requests: Sequence[Request], settings: Settings, output: Path, identity: dict[str, str]) -> list[Job]:
    """One job for each image, in order.

    Args:
        identity: what else the images depend on: the weights and their precision.
    """
    hashes = {name: file_hash(Path(name)) for request in requests for name in request.images}
    jobs = []
    for request in requests:
        # A file's name may be bytes that are no text, which metadata cannot hold.
        inputs = [
            {"file": os.fsencode(Path(name).name).decode(errors="replace"), "sha256": hashes[name]}
            for name in request.images
        ]
        shared = {"prompt": request.prompt, "images": inputs, "negative_prompt": request.negative_prompt}
        if request.image_weights:
            shared["image_weights"] = list(request.image_weights)
        for seed in range(request.seed, request.seed + request.count):
            parameters = {**shared, "seed": seed, **asdict(settings), **identity}
            jobs.append(Job(request, seed, output / f"{request.name}-{seed}.png", parameters))
    return jobs


def outstanding(jobs: Sequence[Job], overwrite: bool = False) -> list[Job]:
    """The jobs whose file is not there yet.

    Raises:
        GenerationError: a file in the place of one was made with other parameters, and is not to be overwritten; names
            the first parameter that differs. Or a place that no file can be written to.
    """
    for folder in dict.fromkeys(job.file.parent for job in jobs):
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise GenerationError(
                f"--output '{folder}' cannot be written: '{there}' is no folder that can be written to"
            )
    left = []
    for job in jobs:
        if os.path.lexists(job.file) and not job.file.is_file():
            raise GenerationError(f"'{job.file}' exists and is no file; remove it, or give another --output")
        found = read_parameters(job.file) if job.file.is_file() else None
        if job.file.is_file() and found != job.parameters and not overwrite:
            raise GenerationError(
                f"'{job.file}' exists, but {difference(found, job.parameters)}; --overwrite replaces it"
            )
        if found != job.parameters:
            left.append(job)
    return left


def difference(found: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    if found is None:
        return "was not made by this command"
    name = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
    return f"its {name} is {found.get(name)!r} instead of {wanted.get(name)!r}"


def generate(pipeline: Any, jobs: Sequence[Job], settings: Settings, batch_size: int) -> Iterator[Job]:
    """Draw and store the jobs, batched across requests; yields each when its file is there.

    Args:
        pipeline: a KosmosGPipeline.
    """
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        opened = {name: read_image(name) for name in {name for job in batch for name in job.request.images}}
        drawn = pipeline(
            [job.request.prompt for job in batch],
            images=[[opened[name] for name in job.request.images] for job in batch],
            negative_prompt=[job.request.negative_prompt for job in batch],
            image_weights=[job.request.image_weights or (1.0,) * len(job.request.images) for job in batch],
            seeds=[job.seed for job in batch],
            **asdict(settings),
        ).images
        for job, image in zip(batch, drawn, strict=True):
            store(image, job.file, job.parameters)
            yield job


def store(image: Image.Image, file: Path, parameters: dict[str, Any]) -> None:
    """Write an image with its parameters in its metadata, whole or not at all: a .jpg at quality 95, else a PNG."""
    text = json.dumps(parameters, ensure_ascii=False)
    with replaced(file) as temporary:
        if file.suffix == ".jpg":
            image.save(temporary, format="jpeg", quality=JPEG_QUALITY, comment=text.encode())
        else:
            metadata = PngImagePlugin.PngInfo()
            metadata.add_itxt(METADATA_KEY, text)
            image.save(temporary, format="png", pnginfo=metadata)


def read_parameters(file: Path) -> dict[str, Any] | None:
    """The parameters in an image's metadata; None where there are none."""
    try:
        with Image.open(file) as image:
            return json.loads(image.info["comment" if image.format == "JPEG" else METADATA_KEY])
    except (OSError, SyntaxError, KeyError, ValueError):
        return None


def fingerprint(folder: Path) -> str:
    """Of all weights files in a folder: their names, sizes, first and last MiB."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{file.relative_to(folder)} {size}\n".encode())
            for start in sorted({0, max(0, size - PROBE_BYTES)}):
                stream.seek(start)
                digest.update(stream.read(PROBE_BYTES))
    return digest.hexdigest()[:16]


def file_hash(file: Path) -> str:
    """SHA-256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
