"""A page to try a model: prompts with images in them, drawn, steered and repeated in a browser (gradio).

One request is drawn at a time, the others wait in a queue. Each picture is a PNG as `kosmosg generate` writes it: its
metadata say how it was made, the page gives the command that makes it again, and dropped into the page it restores its
settings. Images are numbered; `<2>` in a prompt is the second.
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read at import

import queue
import re
import shlex
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from kosmosg import generation
from kosmosg.image_processing import read_image, to_images
from kosmosg.prompt import PLACEHOLDER
from kosmosg.sampling import SAMPLERS
from kosmosg.steering import hints

SLOTS = 4
MOST_PIXELS = 25_000_000
MOST_PICTURES = 8
LARGEST_FILE = "20mb"
WAITING = 32  # requests; more are refused
OWN_SAMPLER = "the model's own"
NUMBER = re.compile(r"<(\d+)>")
RESTORED = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed", "sampler")
FONT = ["system-ui", "sans-serif"]  # gradio's own would be loaded from elsewhere
KEPT_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Served:
    """What a page draws with.

    Attributes:
        arguments: of `kosmosg generate`, the model's name and what loads it.
        identity: as in the pictures' metadata.
        examples: pairs of a prompt and an image's file.
        beside: other models that draw the same prompt from the same noise.
    """

    pipeline: Any
    arguments: list[str]
    identity: dict[str, str]
    guidance_scale: float = 6.0
    steps: int = 50
    examples: Sequence[tuple[str, str]] = ()
    beside: Sequence["Served"] = ()
    lock: Any = field(default_factory=threading.Lock)


def named_images(prompt: str, files: Sequence[str | None]) -> tuple[str, list[int]]:
    """`"<2> in the suit of <1>"` → the prompt with placeholders, and the numbers of the images in it, from 0.

    Raises:
        ValueError: a number without an image.
    """
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
    """Hints about what is typed, as Markdown."""
    try:
        for file in filter(None, files):
            check_size(file)
        text, numbers = named_images(prompt, files)
        found = hints(text, [read_image(str(files[number])) for number in numbers])
    except ValueError as error:
        found, numbers = [str(error)], list(range(len(files)))
    unnamed = [n + 1 for n, file in enumerate(files) if file and n not in numbers]
    found += [f"No <{number}> in the prompt names image {number}." for number in unnamed]
    return "\n".join(f"- {hint}" for hint in found).replace("<", "&lt;")


def build_request(prompt: str, negative: str | None, seed: int, count: int, files: Sequence, weights: Sequence) -> Any:
    """What the page asks for. Raises ValueError."""
    for file in filter(None, files):
        check_size(file)
    text, numbers = named_images(prompt, files)
    chosen = tuple(float(weights[number]) for number in numbers)
    if count > MOST_PICTURES:
        raise ValueError(f"{count} pictures are asked for; allowed: at most {MOST_PICTURES}.")
    request = generation.Request(
        text,
        images=tuple(str(files[number]) for number in numbers),
        negative_prompt=negative or "",
        seed=int(seed or 0),
        count=int(count),
        image_weights=() if all(weight == 1 for weight in chosen) else chosen,
        name="image",
    )
    generation.check_images(request)
    return request


def command(served: Served, request: Any, settings: generation.Settings) -> str:
    """The command line that draws the same pictures, of files beside it."""
    words = ["kosmosg", "generate", *served.arguments, request.prompt]
    if request.images:
        words += ["--images", *(Path(file).name for file in request.images)]
    if request.image_weights:
        words += ["--image-weights", *(f"{weight:g}" for weight in request.image_weights)]
    if request.negative_prompt:
        words += ["--negative-prompt", request.negative_prompt]
    words += ["--seed", str(request.seed), "--count", str(request.count)]
    words += ["--steps", str(settings.num_inference_steps), "--guidance", f"{settings.guidance_scale:g}"]
    for name in ("sampler", "height", "width"):
        if (value := getattr(settings, name)) is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def draw(served: Served, request: Any, settings: generation.Settings, folder: Path) -> Iterator[tuple[int, list[Any]]]:
    """Steps done, with previews of the pictures now and then; at last the pictures' files in `folder`.

    Raises:
        ValueError: as the pipeline does.
    """
    jobs = generation.plan([request], settings, folder, served.identity)
    made: queue.Queue[Any] = queue.Queue()
    decoder, steps = served.pipeline.image_decoder, settings.num_inference_steps
    every = max(1, steps // 4)  # a preview costs about as much as a step

    def follow(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shown = to_images(decoder.decode(tensors["latents"])) if step % every == every - 1 and step + 1 < steps else []
        made.put((step + 1, shown))
        return tensors

    def work() -> None:
        try:
            with served.lock:  # a visitor who left may still be drawn for
                pictures = served.pipeline(
                    request.prompt,
                    images=[read_image(file) for file in request.images],
                    image_weights=list(request.image_weights or (1.0,) * len(request.images)),
                    negative_prompt=request.negative_prompt,
                    num_images_per_prompt=request.count,
                    seeds=[job.seed for job in jobs],
                    callback_on_step_end=follow,
                    **asdict(settings),
                ).images
            for picture, job in zip(pictures, jobs, strict=True):
                generation.store(picture, job.file, job.parameters)
            made.put((steps, [str(job.file) for job in jobs]))
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


def restored(file: str, identity: dict[str, str]) -> tuple[dict[str, Any], str]:
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
        own = {name: found[name] for name in RESTORED}
    except (KeyError, TypeError, StopIteration) as error:  # anyone can write metadata
        raise ValueError(f"'{Path(file).name}' holds settings that kosmosg generate did not write.") from error
    if any(found.get(name) != value for name, value in identity.items()):
        notes.append("It was drawn by another model.")
    own |= {"prompt": prompt, "image_weights": found.get("image_weights", [])}
    return own, " ".join(["Settings restored.", *notes])


def picked(event: gr.SelectData) -> int:
    """Place of the picture that was clicked."""
    return event.index


def build(served: Served) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="kosmosg", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as page:
        gr.Markdown("# Images as words\nPut images in, and name them in the prompt: `<1> on the beach`.")
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    "", label="Prompt", placeholder="<1> in the suit of <2>", max_length=2000, elem_id="prompt"
                )
                notes = gr.Markdown(elem_id="hints")
                slots, weights = [], []
                with gr.Row():
                    for number in range(1, SLOTS + 1):
                        with gr.Column(min_width=120):
                            slots.append(
                                gr.Image(
                                    label=f"<{number}>", type="filepath", image_mode=None, height=150,
                                    sources=["upload", "clipboard"], elem_id=f"image-{number}",
                                )
                            )  # fmt: skip
                            weights.append(gr.Slider(0, 2, 1, step=0.05, label="weight", elem_id=f"weight-{number}"))
                with gr.Accordion("Settings", open=False):
                    negative = gr.Textbox("", label="Steer away from", max_length=2000)
                    with gr.Row():
                        steps = gr.Slider(1, 100, served.steps, step=1, label="Steps")
                        guidance = gr.Slider(1, 15, served.guidance_scale, step=0.5, label="Guidance")
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                        count = gr.Slider(1, MOST_PICTURES, 1, step=1, label="Pictures")
                        sampler = gr.Dropdown([OWN_SAMPLER, *SAMPLERS], value=OWN_SAMPLER, label="Sampler")
                start = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=2):
                pictures = gr.Gallery(
                    label="Pictures", columns=2, object_fit="contain", interactive=False, elem_id="pictures"
                )
                chosen = gr.State(0)
                again = gr.Button("Use the picture as an image", size="sm")
                line = gr.Textbox(label="Command", interactive=False, buttons=["copy"], elem_id="command")
                dropped = gr.File(
                    label="Restore settings: drop a picture", file_types=[".png"], height=150, elem_id="restore"
                )
        if served.examples:
            gr.Examples([list(pair) for pair in served.examples], [prompt, slots[0]], label="Examples")

        def run(prompt, negative, steps, guidance, seed, count, sampler, *images, progress=gr.Progress()):  # noqa: B008
            try:
                chosen_sampler = None if sampler == OWN_SAMPLER else sampler
                settings = generation.Settings(int(steps), float(guidance), chosen_sampler)
                request = build_request(prompt, negative, seed, count, images[:SLOTS], images[SLOTS:])
                models, lines, kept = [served, *served.beside], [], []
                with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:  # gradio copies what it shows
                    for place, model in enumerate(models):
                        name = model.arguments[0] if served.beside else None
                        lines.append(command(model, request, settings))
                        shown: list[Any] = []
                        for done, now in draw(model, request, settings, Path(folder) / str(place)):
                            total = settings.num_inference_steps
                            progress((place * total + done, len(models) * total), unit="steps")
                            shown = [(picture, name) for picture in now]
                            if shown:
                                yield kept + shown, "\n".join(lines)
                        kept += shown
            except (ValueError, FileNotFoundError) as error:
                raise gr.Error(str(error), print_exception=False) from error

        def restore(file):
            if file is None:
                return [gr.skip()] * (8 + SLOTS)
            try:
                found, note = restored(file, served.identity)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error
            own = [*found["image_weights"], *[1] * SLOTS][:SLOTS]
            numbers = found["num_inference_steps"], found["guidance_scale"], found["seed"], 1
            sampler = found["sampler"] or OWN_SAMPLER
            return [found["prompt"], found["negative_prompt"], *numbers, sampler, *own, note]

        def use(pictures, index, *files):
            if not pictures:
                raise gr.Error("There is no picture yet.", print_exception=False)
            place = next((number for number, file in enumerate(files) if not file), SLOTS - 1)
            file = pictures[min(index, len(pictures) - 1)][0]
            return [file if number == place else gr.skip() for number in range(SLOTS)]

        inputs = [prompt, negative, steps, guidance, seed, count, sampler]
        start.click(run, [*inputs, *slots, *weights], [pictures, line])
        prompt.submit(run, [*inputs, *slots, *weights], [pictures, line])
        for component in (prompt, *slots):
            component.change(told, [prompt, *slots], notes, show_progress="hidden", queue=False)
        dropped.upload(restore, dropped, [*inputs, *weights, notes])
        pictures.select(picked, None, chosen)
        again.click(use, [pictures, chosen, *slots], slots)
    return page


def serve(served: Served, host: str, port: int | None, **options: Any) -> Any:
    """Start the page; with `prevent_thread_lock=True` it is served beside what follows."""
    page = build(served).queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    theme = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=LARGEST_FILE,
        footer_links=[],
        theme=theme,
        **options,
    )
