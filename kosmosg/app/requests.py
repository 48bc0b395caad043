"""What the page does: files and words → a request → pictures, previews and the command that repeats them."""

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

MOST_PIXELS = 25_000_000
MOST_PICTURES = 8
NUMBER = re.compile(r"<(\d+)>")
RESTORED = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed", "sampler")
EDITED_SIDE = 512  # of the image that is painted on; small ones are enlarged, so that they can be
PAINT = "#ff4040"


@dataclass(frozen=True)
class Served:
    """What a page draws with.

    Attributes:
        arguments: of `kosmosg generate`, the model's name and what loads it.
        identity: as in the pictures' metadata.
        examples: pairs of a prompt and an image's file.
        beside: other models that draw the same prompt from the same noise.
        segmenter: (image, words) → mask; None: masks are painted by hand alone.
        controlnet: its name and the network, None where there is none.
        loras: files that are loaded into the pipeline.
        scores: networks of `similarities`, by name; none: pictures are shown without scores.
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


def named_images(prompt: str, files: Sequence[str | None]) -> tuple[str, list[int]]:
    """`"<2> in the suit of <1>"` → the prompt with placeholders, and the numbers of the images in it, from 0.

    Raises:
        ValueError: nothing is asked for, or a number without an image.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; allowed: text, numbers of images as <1>, or both.")
    if PLACEHOLDER in prompt:
        raise ValueError(f"the prompt has {PLACEHOLDER}; images are named by their numbers here, as <1>.")
    numbers = [int(number) - 1 for number in NUMBER.findall(prompt)]
    if missing := [number + 1 for number in numbers if not (0 <= number < len(files) and files[number])]:
        raise ValueError(f"the prompt names <{missing[0]}>, but there is no image {missing[0]}.")
    return NUMBER.sub(PLACEHOLDER, prompt), numbers


def check_size(file: str) -> None:
    """Raises ValueError: the file is no image that can be read, or has too many pixels; names it."""
    name = Path(file).name
    try:
        with Image.open(file) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"'{name}' is no image that can be read.") from error
    if width * height > MOST_PIXELS:
        raise ValueError(f"'{name}' has {width}×{height} pixels; allowed: {MOST_PIXELS:,} in all.")


def told(prompt: str, *files: str | None) -> str:
    """What is typed, with its images, and hints about it, as HTML."""
    shown, found, numbers = "", [], list(range(len(files)))
    try:
        for file in filter(None, files):
            check_size(file)
        if prompt.strip():
            text, numbers = named_images(prompt, files)
            seen = [glimpse(str(files[number])) for number in numbers]
            names = iter(numbers)
            found = [
                re.sub(PLACEHOLDER, lambda _: f"<{next(names) + 1}>", hint)
                for hint in hints(text, [size for size, _ in seen], [number + 1 for number in numbers])
            ]
            pieces = [html.escape(piece) for piece in NUMBER.split(prompt)]
            pieces[1::2] = [f'<img src="{url}" alt="image {n + 1}">' for n, (_, url) in zip(numbers, seen, strict=True)]
            shown = f"<p>{''.join(pieces)}</p>" if numbers else ""
    except ValueError as error:
        found = [explained(error)]
    unnamed = [n + 1 for n, file in enumerate(files) if file and n not in numbers]
    found += [f"No <{number}> in the prompt names image {number}." for number in unnamed]
    return f"{shown}<ul>{''.join(f'<li>{html.escape(hint)}</li>' for hint in found)}</ul>" if shown or found else ""


@lru_cache(64)
def glimpse(file: str) -> tuple[tuple[int, int], str]:
    """An image's size, and a small copy as a data URL. Raises ValueError."""
    image = read_image(file)
    size = image.size
    image.thumbnail((64, 64))
    return size, data_url(image)


def distinct(files: Sequence[str | None], place: int, folder: str) -> str | None:
    """A copy in `folder` of the file at `place` under a name of its own, if another has its name, as pasted images do.

    Else the command that draws the picture again could not tell them apart.
    """
    file = Path(files[place] or "")
    if file.name not in {Path(other).name for other in files if other and other != files[place]}:
        return None
    return shutil.copy(file, f"{folder}/{file.stem[:40]}-{generation.file_hash(file)[:8]}{file.suffix}")


def build_request(
    prompt: str, files: Sequence[str | None], weights: Sequence[float], masks: Sequence[str | None], **more: Any
) -> generation.Request:
    """What the page asks for.

    Args:
        more: of the request, as they are.

    Raises:
        ValueError: what is wrong with it.
    """
    for file in filter(None, (*files, *masks, more.get("control_image"), more.get("init_image"))):
        check_size(file)
    text, numbers = named_images(prompt, files)
    chosen = tuple(float(weights[number]) for number in numbers)
    chosen_masks = tuple(masks[number] or None for number in numbers)
    if more.get("count", 1) > MOST_PICTURES:
        raise ValueError(f"{more['count']} pictures are asked for; allowed: at most {MOST_PICTURES}.")
    request = generation.Request(
        text,
        images=tuple(str(files[number]) for number in numbers),
        image_weights=() if all(weight == 1 for weight in chosen) else chosen,
        image_masks=chosen_masks if any(chosen_masks) else (),
        name="image",
        **more,
    )
    generation.check_images(request)
    return request


def command(
    served: Served, request: generation.Request, settings: generation.Settings, lora_scales: Sequence[float] = ()
) -> str:
    """The command line that generates the same images from files in the working directory."""
    words = served.arguments[1:]
    if request.images:
        words += ["--images", *map(named, request.images)]
    if request.image_weights:
        words += ["--image-weights", *(f"{weight:g}" for weight in request.image_weights)]
    if request.image_masks:
        words += ["--image-masks", *(named(mask) if mask else "-" for mask in request.image_masks)]
    if request.control_image and served.controlnet:
        words += ["--controlnet", served.controlnet[0], "--control-image", named(request.control_image)]
        words += ["--control-scale", f"{request.control_scale:g}"]
    if request.init_image:
        words += ["--init-image", named(request.init_image), "--strength", f"{request.strength:g}"]
    if served.loras:
        words += ["--lora", *served.loras, "--lora-scales", *(f"{scale:g}" for scale in lora_scales)]
    if request.negative_prompt:
        words += [f"--negative-prompt={request.negative_prompt}"]
    words += ["--seed", str(request.seed), "--count", str(request.count)]
    words += ["--steps", str(settings.num_inference_steps), "--guidance", f"{settings.guidance_scale:g}"]
    for name in ("sampler", "height", "width"):
        if (value := getattr(settings, name)) is not None:
            words += [f"--{name}", str(value)]
    asked = [served.arguments[0], request.prompt]
    words = [*words, "--", *asked] if request.prompt.startswith("-") else [*asked, *words]
    return shlex.join(["kosmosg", "generate", *words])


def named(file: str) -> str:
    """A file in the working directory, which the command line takes for no option."""
    name = Path(file).name
    return f"./{name}" if name.startswith("-") else name


def explained(error: Exception | str) -> str:
    """A message without the server's folders."""
    return re.sub(r"'/[^']*/([^/']+)'", r"'\1'", str(error))


def draw(
    served: Served,
    request: generation.Request,
    settings: generation.Settings,
    folder: Path,
    lora_scales: Sequence[float] = (),
) -> Iterator[tuple[float, list[Any]]]:
    """The share that is done, with previews of the pictures now and then; at last the pictures' files in `folder`.

    Raises:
        ValueError: as the pipeline does.
    """
    identity = served.identity
    if served.loras:
        scaled = zip(served.identity["loras"], lora_scales, strict=True)
        identity = identity | {"loras": [{**lora, "scale": scale} for lora, scale in scaled]}
    jobs = generation.plan([request], settings, folder, identity)
    made: queue.Queue[Any] = queue.Queue()
    decoder, steps = served.pipeline.image_decoder, settings.num_inference_steps
    if request.init_image:
        steps = int(steps * request.strength)
    every = max(1, steps // 4)  # a preview costs about as much as a step
    controlnet = served.controlnet[1] if served.controlnet else None

    def follow(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shown = to_images(decoder.decode(tensors["latents"])) if step % every == every - 1 and step + 1 < steps else []
        made.put(((step + 1) / steps, shown))
        return tensors

    def work() -> None:
        try:
            with served.lock:  # a visitor who left may still be drawn for
                scale_loras(served.pipeline, lora_scales)
                options = {"controlnet": controlnet, "callback_on_step_end": follow}
                pictures = draw_jobs(served.pipeline, jobs, settings, **options)
            for picture, job in zip(pictures, jobs, strict=True):
                generation.store(picture, job.file, job.parameters)
            made.put((1.0, [str(job.file) for job in jobs]))
        except Exception as error:
            made.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        found = made.get()
        if isinstance(found, Exception):
            raise found
        yield found
        if found[1] and isinstance(found[1][0], str):
            return


def score_table(served: Served, request: generation.Request, pictures: Mapping[str, Sequence[str]]) -> str:
    """How like the images that were read pictures are, and how like the prompt without them, in Markdown.

    Args:
        pictures: of each model, whose means are a row.
    """
    if not served.scores:
        return ""
    masks = request.image_masks or (None,) * len(request.images)
    images = [read_image(image) for image in request.images]
    seen = [
        image if mask is None else masked(image, read_image(mask)) for image, mask in zip(images, masks, strict=True)
    ]
    text = " ".join(request.prompt.replace(PLACEHOLDER, "").split())
    rows = []
    for model, files in pictures.items():
        found = [similarities(read_image(file), seen, text, **served.scores) for file in files]
        means = {name: [sum(values) / len(files) for values in zip(*(one[name] for one in found), strict=True)]
                 for name in found[0]}  # fmt: skip
        rows.append([model.replace("|", "/"), *(", ".join(f"{mean:.2f}" for mean in means[name]) for name in means)])
    lines = [["", *found[0]], ["---"] * len(rows[0]), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"{table}\n\nMean cosines to each input image, by DINO and CLIP, and to the text, by CLIP." if found[0] else ""
    )


def restored(file: str, identity: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Settings from a picture's metadata, and what to say about them.

    Raises:
        ValueError: it has none.
    """
    check_size(file)
    found = generation.read_parameters(Path(file))
    if found is None:
        raise ValueError(f"'{Path(file).name}' holds no settings; pictures of this page and of kosmosg generate do.")
    try:
        numbers = iter(range(1, len(found["images"]) + 1))
        prompt = re.sub(PLACEHOLDER, lambda _: f"<{next(numbers)}>", found["prompt"])
        notes = [f"Put in as image {n}: {image['file']}." for n, image in enumerate(found["images"], 1)]
        masks = enumerate(found.get("image_masks", []), 1)
        notes += [f"Its mask: {mask['file']} for image {n}." for n, mask in masks if mask]
        own = {name: found[name] for name in RESTORED}
        for name, strength in (("control_image", "scale"), ("init_image", "strength")):
            if name in found:
                notes.append(f"Its {name.replace('_', ' ').replace('init', 'initial')}: {found[name]['file']}.")
                own[name] = found[name][strength]
        own["lora_scales"] = [lora["scale"] for lora in found.get("loras", [])]
    except (KeyError, TypeError, StopIteration) as error:  # anyone can write metadata
        raise ValueError(f"'{Path(file).name}' holds settings that kosmosg generate did not write.") from error
    loras = [[lora["sha256"] for lora in loaded.get("loras", [])] for loaded in (found, identity)]
    if loras[0] != loras[1] or any(found.get(name) != identity[name] for name in ("model", "dtype")):
        notes.append("It was drawn by another model, or with other LoRA files.")
    own |= {"prompt": prompt, "image_weights": found.get("image_weights", [])}
    return own, " ".join(["Settings restored.", *notes])


def opened(file: str, mask: str | None) -> dict[str, str]:
    """What the brush shows: an image, and what of it is masked already, as data URLs. Raises ValueError."""
    check_size(file)
    image = read_image(file)
    size = [max(1, round(EDITED_SIDE * side / max(image.size))) for side in image.size]
    shown = {"image": data_url(image.resize(size, Image.Resampling.NEAREST)), "mask": ""}
    if mask:
        paint = Image.new("RGBA", size, PAINT)
        paint.putalpha(read_image(mask).convert("L").resize(size, Image.Resampling.NEAREST))
        shown["mask"] = data_url(paint)
    return shown


def data_url(image: Image.Image) -> str:
    """An image as text that a browser shows."""
    image.save(content := io.BytesIO(), "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def painted(url: str, size: tuple[int, int]) -> Image.Image | None:
    """What the brush painted, as a mask of `size`; None where it painted nothing. Raises ValueError."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG"]) as image:
        if max(image.size) > EDITED_SIDE:  # not from the page
            raise ValueError(
                f"the mask has {image.width}×{image.height} pixels; allowed: at most {EDITED_SIDE} a side."
            )
        alpha = image.convert("RGBA").getchannel("A").resize(size, Image.Resampling.BOX)
    mask = alpha.point([255 * (value > 127) for value in range(256)])
    return mask if mask.getbbox() else None


def stored(mask: Image.Image, folder: str) -> str:
    """The file of a mask, called by its content."""
    name = hashlib.sha256(mask.tobytes()).hexdigest()[:8]
    mask.save(file := f"{folder}/mask-{name}.png")
    return file
