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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from kosmosg.files import replaced
from kosmosg.image_processing import ClipImageTransform, read_image
from kosmosg.prompt import PLACEHOLDER, check_negative_prompt, parse_prompt
from kosmosg.sampling import LARGEST_SEED, check_numbers, scheduler_class
from kosmosg.steering import masked

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
    image_masks: tuple[str | None, ...] = ()
    """Files, white where the subject of each image is; None: the image is read whole."""
    control_image: str = ""
    """A file for the ControlNet, in the form it was trained on; none: it is not used."""
    control_scale: float = 1.0
    init_image: str = ""
    """A file to start from instead of noise."""
    strength: float = 0.7
    """How much of the initial image is drawn anew; 1 is all of it."""
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
        for what, given in (("weights", self.image_weights), ("masks", self.image_masks)):
            if given and len(given) != len(self.images):
                raise GenerationError(f"{len(given)} image {what} for {len(self.images)} images; give one each")
        if wrong := [weight for weight in self.image_weights if not 0 <= weight < math.inf]:
            raise GenerationError(f"the image weight {wrong[0]} is not allowed; allowed: 0 or more")
        if not 0 <= self.control_scale < math.inf:
            raise GenerationError(f"control_scale={self.control_scale} is not allowed; allowed: 0 or more")
        if not 0 < self.strength <= 1:
            raise GenerationError(f"strength={self.strength} is not allowed; allowed: above 0, up to 1")
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
    masks = values.get("image_masks", [])
    if not isinstance(masks, list) or not all(mask is None or isinstance(mask, str) for mask in masks):
        raise GenerationError(f"image_masks={masks!r}; allowed: a list of paths, or null for none")
    texts = ("prompt", "negative_prompt", "name", "control_image", "init_image")
    kinds = {**dict.fromkeys(texts, (str,)), "seed": (int,), "count": (int,)}
    kinds |= dict.fromkeys(("control_scale", "strength"), (float, int))
    for name, allowed_kinds in kinds.items():
        if name in values and type(values[name]) not in allowed_kinds:
            raise GenerationError(f"{name}={values[name]!r}; allowed: {allowed_kinds[0].__name__}")
    paths = tuple(str(folder / image) for image in images)
    mask_paths = tuple(None if mask is None else str(folder / mask) for mask in masks)
    own = {"images": paths, "image_weights": tuple(weights), "image_masks": mask_paths, "place": place}
    own |= {name: str(folder / values[name]) for name in ("control_image", "init_image") if values.get(name)}
    return Request(**{"name": default_name, **values, **own})


def check_images(request: Request) -> None:
    """Raises ValueError: an image or a mask that cannot be read or used; names it."""
    for name, mask in zip(request.images, request.image_masks or (None,) * len(request.images), strict=True):
        try:
            image = read_image(name)
            ClipImageTransform(1)(image if mask is None else masked(image, read_image(mask)))
        except ValueError as error:
            raise GenerationError(str(error) if name in str(error) else f"the image '{name}': {error}") from error
    for name in filter(None, (request.control_image, request.init_image)):
        try:
            ClipImageTransform(1)(read_image(name))
        except ValueError as error:
            raise GenerationError(str(error) if name in str(error) else f"the image '{name}': {error}") from error


def check_lengths(pipeline: Any, requests: Iterable[Request]) -> list[str]:
    """What is wrong with prompts that are too long for the model, by place."""
    encoder, wrong = pipeline.encoder, []
    for request in requests:
        for name, text, images in (
            ("prompt", request.prompt, [encoder.blank_image(file) for file in request.images]),
            ("negative_prompt", request.negative_prompt, []),
        ):
            try:
                encoder(parse_prompt(text, images))
            except ValueError as error:
                wrong.append(f"{request.place}: {name}: {error}")
    return wrong


def plan(requests: Sequence[Request], settings: Settings, output: Path, identity: dict[str, Any]) -> list[Job]:
    """One job for each image, in order.

    Args:
        identity: what else the images depend on: the weights, their precision, "controlnet" where one is loaded.

    Raises:
        GenerationError: a control image without a ControlNet, or a strength at which no step is left.
    """
    record = cache(file_record)
    jobs = []
    for request in requests:
        if request.control_image and "controlnet" not in identity:
            raise GenerationError(f"{request.place}: a control image needs --controlnet")
        if request.init_image and int(settings.num_inference_steps * request.strength) < 1:
            raise GenerationError(
                f"{request.place}: strength={request.strength} of {settings.num_inference_steps} steps is not one step"
            )
        inputs = [record(name) for name in request.images]
        shared = {"prompt": request.prompt, "images": inputs, "negative_prompt": request.negative_prompt}
        if request.image_weights:
            shared["image_weights"] = list(request.image_weights)
        if any(request.image_masks):
            shared["image_masks"] = [mask and record(mask) for mask in request.image_masks]
        if request.control_image:
            shared["control_image"] = {**record(request.control_image), "scale": request.control_scale}
        if request.init_image:
            shared["init_image"] = {**record(request.init_image), "strength": request.strength}
        own = {name: value for name, value in identity.items() if name != "controlnet" or request.control_image}
        for seed in range(request.seed, request.seed + request.count):
            parameters = {**shared, "seed": seed, **asdict(settings), **own}
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


def file_record(name: str) -> dict[str, str]:
    """A file as metadata name it."""
    # A file's name may be bytes that are no text, which metadata cannot hold.
    return {"file": os.fsencode(Path(name).name).decode(errors="replace"), "sha256": file_hash(Path(name))}


def file_hash(file: Path) -> str:
    """SHA-256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
