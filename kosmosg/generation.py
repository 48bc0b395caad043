"""Plan image generation from a file of prompts, and store each image with its parameters.

A job is one image: prompt, input images, seed. The parameters are stored in the metadata of the image file, so an
interrupted run resumes by skipping files that exist with the same parameters. All inputs are checked before anything is
drawn.
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
LONGEST_NAME = 240  # bytes; file systems allow 255, and temporary names are slightly longer
MOST_IMAGES = 1_000_000  # per prompt, because all jobs are planned before any is drawn
MESSAGE_CHARACTERS = 80  # of a value in a message
PROBE_BYTES = 1 << 20  # fingerprints read the first and last MiB of each file; reading all would take a minute


class GenerationError(ValueError):
    """A request cannot be drawn, or its output file exists with other parameters."""


@dataclass(frozen=True)
class Request:
    """One line of a manifest: `count` images with the seeds `seed`, `seed + 1`, …"""

    prompt: str
    images: tuple[str, ...] = ()
    negative_prompt: str = ""
    seed: int = 0
    count: int = 1
    image_weights: tuple[float, ...] = ()
    """Factor on each image's contribution; empty for 1 each."""
    image_masks: tuple[str | None, ...] = ()
    """File of each image's mask, white on the subject; None for the whole image."""
    control_image: str = ""
    """File of the ControlNet's input, such as edges; empty for no ControlNet."""
    control_scale: float = 1.0
    init_image: str = ""
    """File of an initial image; empty to start from noise."""
    strength: float = 0.7
    """How much the initial image is changed, up to 1 for a new image."""
    name: str = ""
    place: str = "the prompt"
    """Origin of the request, for messages."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise GenerationError("prompt is empty; give text, a placeholder <i> or both")
        if (placeholders := self.prompt.count(PLACEHOLDER)) != len(self.images):
            raise GenerationError(
                f"the prompt has {placeholders} placeholders {PLACEHOLDER} but {len(self.images)} images"
            )
        for kind, values in (("weights", self.image_weights), ("masks", self.image_masks)):
            if values and len(values) != len(self.images):
                raise GenerationError(f"{len(values)} image {kind} for {len(self.images)} images; give one each")
        if wrong := [weight for weight in self.image_weights if not 0 <= weight < math.inf]:
            raise GenerationError(f"the image weight {wrong[0]} is not allowed; allowed: 0 or more")
        if not 0 <= self.control_scale < math.inf:
            raise GenerationError(f"control_scale={self.control_scale} is not allowed; allowed: 0 or more")
        if not 0 < self.strength <= 1:
            raise GenerationError(f"strength={self.strength} is not allowed; allowed: above 0, at most 1")
        check_negative_prompt(self.negative_prompt)
        for name in ("prompt", "negative_prompt"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError as error:  # JSON may contain half of a surrogate pair
                raise GenerationError(f"{name} is not valid text: it has {error.object[error.start]!r}") from error
        if not 1 <= self.count <= MOST_IMAGES or self.seed < 0 or self.seed + self.count - 1 > LARGEST_SEED:
            raise GenerationError(
                f"count={self.count} and seed={self.seed}; allowed: count in 1 … {MOST_IMAGES:,}, seeds in 0 … 2^64 - 1"
            )
        longest = f"{self.name}-{self.seed + self.count - 1}.png"
        if Path(self.name).name != self.name or not self.name.isprintable() or len(longest.encode()) > LONGEST_NAME:
            raise GenerationError(
                f"name={self.name[:MESSAGE_CHARACTERS]!r} is not allowed; allowed: a plain file name of at most "
                f"{LONGEST_NAME} bytes including the seed"
            )


@dataclass(frozen=True)
class Settings:
    """Sampling settings of all images of a run; None for the model's default."""

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
                raise GenerationError(f"{name}={side} is not allowed; allowed: at least 1 pixel")


@dataclass(frozen=True)
class Job:
    """One image to draw."""

    request: Request
    seed: int
    file: Path
    parameters: dict[str, Any]
    """Everything that the image depends on, as stored in its metadata."""


def read_manifest(file: Path) -> tuple[list[Request], list[str]]:
    """Read the requests of a JSONL file, and return the errors of invalid lines; blank lines are skipped.

    Image paths are relative to the file's folder. The default name of a request is its line number.

    Raises:
        GenerationError: the file does not exist.
    """
    if not file.is_file():
        raise GenerationError(f"the manifest '{file}' does not exist")
    requests, errors = [], []
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            place = f"{file}, line {number}"
            request = read_request(json.loads(line.decode("utf-8")), f"{number:06d}", file.parent, place)
            check_images(request)
            requests.append(request)
        except (ValueError, TypeError, RecursionError) as error:  # RecursionError: too deeply nested
            errors.append(f"{file}, line {number}: {error}")
    names = [request.name for request in requests]
    errors += [f"{file}: the name '{name}' is given twice" for name in sorted({n for n in names if names.count(n) > 1})]
    return requests, errors


def read_request(values: Any, default_name: str, folder: Path, place: str) -> Request:
    """Convert the JSON object of a line to a request.

    Raises:
        GenerationError: a key is unknown, or a value is not allowed.
    """
    if not isinstance(values, dict):
        raise GenerationError(f'a line is {type(values).__name__}; allowed: an object, such as {{"prompt": "a dog"}}')
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
    converted = {"images": paths, "image_weights": tuple(weights), "image_masks": mask_paths, "place": place}
    converted |= {name: str(folder / values[name]) for name in ("control_image", "init_image") if values.get(name)}
    return Request(**{"name": default_name, **values, **converted})


def check_images(request: Request) -> None:
    """Check that the images and masks of a request can be read and used.

    Raises:
        GenerationError: names the first image that cannot.
    """
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
    """Return an error for each prompt that is too long for the model."""
    encoder, errors = pipeline.encoder, []
    for request in requests:
        for name, text, images in (
            ("prompt", request.prompt, [encoder.blank_image(file) for file in request.images]),
            ("negative_prompt", request.negative_prompt, []),
        ):
            try:
                encoder(parse_prompt(text, images))
            except ValueError as error:
                errors.append(f"{request.place}: {name}: {error}")
    return errors


def plan(requests: Sequence[Request], settings: Settings, output: Path, identity: dict[str, Any]) -> list[Job]:
    """Return one job per image, in order.

    Args:
        identity: everything else that the images depend on: weights, dtype, and "controlnet" if one is loaded.

    Raises:
        GenerationError: there is a control image but no ControlNet, or the strength leaves no sampling step.
    """
    record = cache(file_record)
    jobs = []
    for request in requests:
        if request.control_image and "controlnet" not in identity:
            raise GenerationError(f"{request.place}: a control image needs --controlnet")
        if request.init_image and int(settings.num_inference_steps * request.strength) < 1:
            raise GenerationError(
                f"{request.place}: strength={request.strength} of {settings.num_inference_steps} steps is less than "
                "one step"
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
        networks = {name: value for name, value in identity.items() if name != "controlnet" or request.control_image}
        for seed in range(request.seed, request.seed + request.count):
            parameters = {**shared, "seed": seed, **asdict(settings), **networks}
            jobs.append(Job(request, seed, output / f"{request.name}-{seed}.png", parameters))
    return jobs


def outstanding(jobs: Sequence[Job], overwrite: bool = False) -> list[Job]:
    """Return the jobs whose file does not exist yet.

    Raises:
        GenerationError: a file cannot be written, or exists with other parameters while `overwrite` is off; names the
            first parameter that differs.
    """
    for folder in dict.fromkeys(job.file.parent for job in jobs):
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise GenerationError(f"--output '{folder}' cannot be written: '{existing}' is not a writable folder")
    remaining = []
    for job in jobs:
        if os.path.lexists(job.file) and not job.file.is_file():
            raise GenerationError(f"'{job.file}' exists and is not a file; remove it, or give another --output")
        stored = read_parameters(job.file) if job.file.is_file() else None
        if job.file.is_file() and stored != job.parameters and not overwrite:
            raise GenerationError(
                f"'{job.file}' exists, but {difference(stored, job.parameters)}; --overwrite replaces it"
            )
        if stored != job.parameters:
            remaining.append(job)
    return remaining


def difference(stored: dict[str, Any] | None, expected: dict[str, Any]) -> str:
    """Describe the first parameter that differs."""
    if stored is None:
        return "was not made by this command"
    name = next(name for name in {**expected, **stored} if stored.get(name) != expected.get(name))
    return f"its {name} is {stored.get(name)!r} instead of {expected.get(name)!r}"


def store(image: Image.Image, file: Path, parameters: dict[str, Any]) -> None:
    """Write an image atomically with its parameters as metadata: a .jpg at quality 95, otherwise a PNG."""
    text = json.dumps(parameters, ensure_ascii=False)
    with replaced(file) as temporary:
        if file.suffix == ".jpg":
            image.save(temporary, format="jpeg", quality=JPEG_QUALITY, comment=text.encode())
        else:
            metadata = PngImagePlugin.PngInfo()
            metadata.add_itxt(METADATA_KEY, text)
            image.save(temporary, format="png", pnginfo=metadata)


def read_parameters(file: Path) -> dict[str, Any] | None:
    """Read the parameters in an image's metadata; None if there are none."""
    try:
        with Image.open(file) as image:
            return json.loads(image.info["comment" if image.format == "JPEG" else METADATA_KEY])
    except (OSError, SyntaxError, KeyError, ValueError):
        return None


def fingerprint(folder: Path) -> str:
    """Return a hash of all safetensors files in a folder: names, sizes, first and last MiB."""
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
    """Describe a file for the metadata, by its name and hash."""
    # File names may be bytes that are not valid text, which metadata cannot hold.
    return {"file": os.fsencode(Path(name).name).decode(errors="replace"), "sha256": file_hash(Path(name))}


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
