"""Turn the page's inputs into requests, draw them with previews, and give the command that reproduces the images."""

import base64
import hashlib
import html
import io
import queue
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from kosmosg import generation
from kosmosg.drawing import draw as draw_jobs
from kosmosg.drawing import scale_loras
from kosmosg.image_processing import read_image, to_images
from kosmosg.looking import similarities
from kosmosg.prompt import PLACEHOLDER
from kosmosg.steering import hints, masked

MAX_PIXELS = 25_000_000
MAX_IMAGES = 8
NUMBER = re.compile(r"<(\d+)>")
RESTORED = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed", "sampler")
BRUSH_SIDE = 512  # longer side of the image in the brush; small images are enlarged so that they can be painted on
PAINT = "#ff4040"


@dataclass(frozen=True)
class Served:
    """A loaded model and its options on the page.

    Attributes:
        arguments: arguments of `kosmosg generate` that load the model, its name first.
        identity: the model's entries in image metadata.
        examples: pairs of a prompt and an image file.
        beside: models to compare, which draw the same prompts with the same seeds.
        segmenter: (image, words) → mask; None if masks can only be painted or loaded.
        controlnet: its name and the network.
        loras: LoRA files loaded into the pipeline.
        scores: networks for `similarities`, by argument name; empty for no scores.
    """

    pipeline: Any
    arguments: list[str]
    identity: dict[str, Any]
    guidance_scale: float = 6.0
    steps: int = 50
    examples: Sequence[tuple[str, str]] = ()
    beside: Sequence["Served"] = ()
    segmenter: Callable[[Image.Image, str], Image.Image] | None = None
    controlnet: tuple[str, Any] | None = None
    loras: Sequence[str] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)


def parse_numbers(prompt: str, files: Sequence[str | None]) -> tuple[str, list[int]]:
    """Replace numbers such as `<2>` by placeholders; returns the prompt and the indices of its images, from 0.

    Raises:
        ValueError: the prompt is empty, has placeholders already, or a number without an image.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty; enter text, image numbers such as <1>, or both.")
    if PLACEHOLDER in prompt:
        raise ValueError(f"The prompt has {PLACEHOLDER}; refer to images by number, such as <1>.")
    indices = [int(number) - 1 for number in NUMBER.findall(prompt)]
    if missing := [index + 1 for index in indices if not (0 <= index < len(files) and files[index])]:
        raise ValueError(f"The prompt has <{missing[0]}>, but there is no image {missing[0]}.")
    return NUMBER.sub(PLACEHOLDER, prompt), indices


def check_size(file: str) -> None:
    """Raise ValueError if the file is not a readable image or has too many pixels."""
    name = Path(file).name
    try:
        with Image.open(file) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"'{name}' is not a readable image.") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"'{name}' has {width}×{height} pixels; at most {MAX_PIXELS:,} are allowed.")


def prompt_html(prompt: str, *files: str | None) -> str:
    """Return HTML of the prompt with thumbnails in place of image numbers, followed by hints."""
    shown, notes, indices = "", [], list(range(len(files)))
    try:
        for file in filter(None, files):
            check_size(file)
        if prompt.strip():
            text, indices = parse_numbers(prompt, files)
            images = [thumbnail(str(files[index])) for index in indices]
            remaining = iter(indices)
            notes = [
                re.sub(PLACEHOLDER, lambda _: f"<{next(remaining) + 1}>", hint)
                for hint in hints(text, [size for size, _ in images], [index + 1 for index in indices])
            ]
            pieces = [html.escape(piece) for piece in NUMBER.split(prompt)]
            pieces[1::2] = [
                f'<img src="{url}" alt="image {index + 1}">' for index, (_, url) in zip(indices, images, strict=True)
            ]
            shown = f"<p>{''.join(pieces)}</p>" if indices else ""
    except ValueError as error:
        notes = [without_folders(error)]
    unused = [index + 1 for index, file in enumerate(files) if file and index not in indices]
    notes += [f"Image {number} is not used; put <{number}> into the prompt to use it." for number in unused]
    return f"{shown}<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>" if shown or notes else ""


@lru_cache(64)
def thumbnail(file: str) -> tuple[tuple[int, int], str]:
    """Return an image's size and a small copy as a data URL. Raises ValueError if it cannot be read."""
    image = read_image(file)
    size = image.size
    image.thumbnail((64, 64))
    return size, data_url(image)


def unique_copy(files: Sequence[str | None], index: int, folder: str) -> str | None:
    """Copy a file into `folder` under another name if a different file has the same name, as pasted images do.

    Otherwise the command could not distinguish them. Returns the copy, or None if the name is unique.
    """
    file = Path(files[index] or "")
    if file.name not in {Path(other).name for other in files if other and other != files[index]}:
        return None
    return shutil.copy(file, f"{folder}/{file.stem[:40]}-{generation.file_hash(file)[:8]}{file.suffix}")


def build_request(
    prompt: str, files: Sequence[str | None], weights: Sequence[float], masks: Sequence[str | None], **options: Any
) -> generation.Request:
    """Build a request from a prompt with image numbers.

    Args:
        files, weights, masks: one for each image on the page; None where there is none.
        options: other fields of the request.

    Raises:
        ValueError: an input is missing, unreadable, too large or not allowed.
    """
    for file in filter(None, (*files, *masks, options.get("control_image"), options.get("init_image"))):
        check_size(file)
    text, indices = parse_numbers(prompt, files)
    used_weights = tuple(float(weights[index]) for index in indices)
    used_masks = tuple(masks[index] or None for index in indices)
    if options.get("count", 1) > MAX_IMAGES:
        raise ValueError(f"{options['count']} images requested; at most {MAX_IMAGES} are allowed.")
    request = generation.Request(
        text,
        images=tuple(str(files[index]) for index in indices),
        image_weights=() if all(weight == 1 for weight in used_weights) else used_weights,
        image_masks=used_masks if any(used_masks) else (),
        name="image",
        **options,
    )
    generation.check_images(request)
    return request


def command(
    served: Served, request: generation.Request, settings: generation.Settings, lora_scales: Sequence[float] = ()
) -> str:
    """Return the command that generates the same images from input files in the working directory."""
    words = served.arguments[1:]
    if request.images:
        words += ["--images", *map(relative_name, request.images)]
    if request.image_weights:
        words += ["--image-weights", *(f"{weight:g}" for weight in request.image_weights)]
    if request.image_masks:
        words += ["--image-masks", *(relative_name(mask) if mask else "-" for mask in request.image_masks)]
    if request.control_image and served.controlnet:
        words += ["--controlnet", served.controlnet[0], "--control-image", relative_name(request.control_image)]
        words += ["--control-scale", f"{request.control_scale:g}"]
    if request.init_image:
        words += ["--init-image", relative_name(request.init_image), "--strength", f"{request.strength:g}"]
    if served.loras:
        words += ["--lora", *served.loras, "--lora-scales", *(f"{scale:g}" for scale in lora_scales)]
    if request.negative_prompt:
        words += [f"--negative-prompt={request.negative_prompt}"]
    words += ["--seed", str(request.seed), "--count", str(request.count)]
    words += ["--steps", str(settings.num_inference_steps), "--guidance", f"{settings.guidance_scale:g}"]
    for name in ("sampler", "height", "width"):
        if (value := getattr(settings, name)) is not None:
            words += [f"--{name}", str(value)]
    positional = [served.arguments[0], request.prompt]
    words = [*words, "--", *positional] if request.prompt.startswith("-") else [*positional, *words]
    return shlex.join(["kosmosg", "generate", *words])


def relative_name(file: str) -> str:
    """Return the file's name, with `./` if it could be read as an option."""
    name = Path(file).name
    return f"./{name}" if name.startswith("-") else name


def without_folders(error: Exception) -> str:
    """Return an error's message without the server's folders."""
    return re.sub(r"'/[^']*/([^/']+)'", r"'\1'", str(error))


def draw(
    served: Served,
    request: generation.Request,
    settings: generation.Settings,
    folder: Path,
    lora_scales: Sequence[float] = (),
) -> Iterator[tuple[float, list[Any]]]:
    """Draw a request; yields the progress from 0 to 1 with previews at some steps, and at last the files in `folder`.

    Raises:
        ValueError: the pipeline does not accept the request.
    """
    identity = served.identity
    if served.loras:
        scaled = zip(served.identity["loras"], lora_scales, strict=True)
        identity = identity | {"loras": [{**lora, "scale": scale} for lora, scale in scaled]}
    jobs = generation.plan([request], settings, folder, identity)
    events: queue.Queue[Any] = queue.Queue()
    decoder, steps = served.pipeline.image_decoder, settings.num_inference_steps
    if request.init_image:
        steps = int(steps * request.strength)
    interval = max(1, steps // 4)  # a preview costs about as much as a step
    controlnet = served.controlnet[1] if served.controlnet else None

    def report_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        preview = step % interval == interval - 1 and step + 1 < steps
        events.put(((step + 1) / steps, to_images(decoder.decode(tensors["latents"])) if preview else []))
        return tensors

    def work() -> None:
        try:
            with served.lock:  # the request of a visitor who left may still be running
                scale_loras(served.pipeline, lora_scales)
                options = {"controlnet": controlnet, "callback_on_step_end": report_step}
                images = draw_jobs(served.pipeline, jobs, settings, **options)
            for image, job in zip(images, jobs, strict=True):
                generation.store(image, job.file, job.parameters)
            events.put((1.0, [str(job.file) for job in jobs]))
        except Exception as error:
            events.put(error)
        events.put(None)

    threading.Thread(target=work, daemon=True).start()
    for event in iter(events.get, None):
        if isinstance(event, Exception):
            raise event
        yield event


def score_table(served: Served, request: generation.Request, outputs: Mapping[str, Sequence[str]]) -> str:
    """Return a Markdown table of mean similarities to the masked input images and to the text of the prompt.

    Args:
        outputs: files of each model's images; each model is a row.
    """
    masks = request.image_masks or (None,) * len(request.images)
    images = [read_image(image) for image in request.images]
    inputs = [
        image if mask is None else masked(image, read_image(mask)) for image, mask in zip(images, masks, strict=True)
    ]
    text = " ".join(request.prompt.replace(PLACEHOLDER, "").split())
    names, rows = [], []
    for model, files in outputs.items():
        scores = [similarities(read_image(file), inputs, text, **served.scores) for file in files]
        names, row = list(scores[0]), [model.replace("|", "/")]
        for name in names:
            columns = zip(*(score[name] for score in scores), strict=True)
            row.append(", ".join(f"{sum(column) / len(files):.2f}" for column in columns))
        rows.append(row)
    if not names:
        return ""
    lines = [["", *names], ["---"] * (1 + len(names)), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\nMean cosine similarity to each input image (DINO, CLIP) and to the text (CLIP)."


def read_settings(file: str, identity: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the settings in an image's metadata, and a message about what was restored.

    Raises:
        ValueError: the image has no settings, or `kosmosg generate` did not write them.
    """
    check_size(file)
    name = Path(file).name
    stored = generation.read_parameters(Path(file))
    if stored is None:
        raise ValueError(f"'{name}' contains no settings; only images of this page or of kosmosg generate do.")
    try:
        numbers = iter(range(1, len(stored["images"]) + 1))
        settings = {key: stored[key] for key in RESTORED} | {
            "prompt": re.sub(PLACEHOLDER, lambda _: f"<{next(numbers)}>", stored["prompt"]),
            "image_weights": stored.get("image_weights", []),
            "lora_scales": [lora["scale"] for lora in stored.get("loras", [])],
        }
        files = [f"image {number}: {image['file']}" for number, image in enumerate(stored["images"], 1)]
        masks = enumerate(stored.get("image_masks", []), 1)
        files += [f"mask of image {number}: {mask['file']}" for number, mask in masks if mask]
        if control := stored.get("control_image"):
            settings["control_scale"] = control["scale"]
            files.append(f"control image: {control['file']}")
        if initial := stored.get("init_image"):
            settings["strength"] = initial["strength"]
            files.append(f"initial image: {initial['file']}")
    except (KeyError, TypeError, StopIteration) as error:  # anyone can write metadata
        raise ValueError(f"'{name}' contains settings that kosmosg generate did not write.") from error
    message = "Settings restored."
    if files:
        message += f" Add these files again: {', '.join(files)}."
    loras = [[lora["sha256"] for lora in loaded.get("loras", [])] for loaded in (stored, identity)]
    if loras[0] != loras[1] or any(stored.get(key) != identity[key] for key in ("model", "dtype")):
        message += " The image was generated by another model or with other LoRA files."
    return settings, message


def brush_layers(file: str, mask: str | None) -> dict[str, str]:
    """Return an image and the painted mask for the brush, as data URLs. Raises ValueError if the file is refused."""
    check_size(file)
    image = read_image(file)
    size = [max(1, round(BRUSH_SIDE * side / max(image.size))) for side in image.size]
    layers = {"image": data_url(image.resize(size, Image.Resampling.NEAREST)), "mask": ""}
    if mask:
        paint = Image.new("RGBA", size, PAINT)
        paint.putalpha(read_image(mask).convert("L").resize(size, Image.Resampling.NEAREST))
        layers["mask"] = data_url(paint)
    return layers


def data_url(image: Image.Image) -> str:
    """Encode an image as a PNG data URL."""
    image.save(content := io.BytesIO(), "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def painted_mask(url: str, size: tuple[int, int]) -> Image.Image | None:
    """Return a mask of `size` from the brush's data URL, None if nothing is painted. Raises ValueError if too large."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG"]) as image:
        if max(image.size) > BRUSH_SIDE:  # the page never sends this
            raise ValueError(f"The mask has {image.width}×{image.height} pixels; at most {BRUSH_SIDE} a side.")
        alpha = image.convert("RGBA").getchannel("A").resize(size, Image.Resampling.BOX)
    mask = alpha.point([255 * (value > 127) for value in range(256)])
    return mask if mask.getbbox() else None


def save_mask(mask: Image.Image, folder: str) -> str:
    """Save a mask under a name made from its content; returns the file."""
    name = hashlib.sha256(mask.tobytes()).hexdigest()[:8]
    mask.save(file := f"{folder}/mask-{name}.png")
    return file
