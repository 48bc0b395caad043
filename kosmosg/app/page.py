"""Layout of the page, and what happens when its components are used."""

import html
import tempfile
from abc import ABCMeta
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import gradio as gr

from kosmosg import generation
from kosmosg.app.requests import (
    MAX_IMAGES,
    PAINT,
    Served,
    brush_layers,
    build_request,
    check_size,
    command,
    draw,
    painted_mask,
    prompt_html,
    read_settings,
    save_mask,
    score_table,
    unique_copy,
    without_folders,
)
from kosmosg.app.run import build_run
from kosmosg.drawing import composed_kind
from kosmosg.image_processing import read_image
from kosmosg.sampling import SAMPLERS
from kosmosg.steering import masked

SLOTS = 4
MAX_FILE_SIZE = "20mb"
QUEUE_SIZE = 32  # requests; more are refused
OWN_SAMPLER = "the model's own"
FONT = ["system-ui", "sans-serif"]  # gradio loads its default font from another host
CACHE_SECONDS = 24 * 3600
LARGEST_SEED = 2**53 - 1  # largest integer that a browser represents exactly
CSS = """
.slot .image-frame, .slot img { width: 100%; height: 100%; object-fit: contain }
.slot .prompt > * { font-size: var(--text-sm) }
.slot .prompt > :not(:first-child) { display: none }
#hints p { font-size: var(--text-lg) }
#hints img { display: inline; height: 2.2em; margin: 0 0.2em; vertical-align: middle; border-radius: 4px }
#hints ul { list-style: disc; padding-left: 1.4em }
#scores th, #scores td { padding: 0.3em 0.6em; overflow-wrap: normal }
#examples thead { display: none }
#examples tbody { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)) }
#examples tr { display: flex; flex-direction: column-reverse; justify-content: flex-end; border: 0; background: none }
#examples tr:hover { background: var(--color-accent-soft) }
#examples td { border: 0; padding: 0.3em; text-align: center }
#grid img { padding-top: 2.4em }
#legend span { display: inline-block; margin-right: 1.2em }
"""
# gradio's image editor needs WebGL and sends three files whenever the pointer moves.
BRUSH_HTML = """<canvas></canvas>
<div><label>Size <input type="range" min="8" max="160" value="48"></label>
<label><input type="checkbox"> Erase</label></div>"""
BRUSH_CSS = """
canvas { display: block; width: 100%; max-width: 512px; margin: auto; cursor: crosshair; touch-action: none }
div { display: flex; gap: 2em; justify-content: center; align-items: center; padding: 0.5em }
"""
BRUSH_JS = f"""
const [view, mask] = [element.querySelector("canvas"), document.createElement("canvas")];
const [pen, ink] = [view.getContext("2d"), mask.getContext("2d")];
const [size, erase] = element.querySelectorAll("input");
let image, last = null;
const read = async url => {{ const loaded = new Image(); loaded.src = url; await loaded.decode(); return loaded; }};
const show = () => {{
  pen.globalAlpha = 1; pen.drawImage(image, 0, 0);
  pen.globalAlpha = 0.6; pen.drawImage(mask, 0, 0);
}};
const load = async () => {{
  if (!props.value.image) return;
  image = await read(props.value.image);
  view.width = mask.width = image.width;
  view.height = mask.height = image.height;
  if (props.value.mask) ink.drawImage(await read(props.value.mask), 0, 0);
  show();
}};
const stroke = event => {{
  const box = view.getBoundingClientRect(), scale = view.width / box.width;
  const point = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  ink.globalCompositeOperation = erase.checked ? "destination-out" : "source-over";
  Object.assign(ink, {{ lineWidth: size.value, lineCap: "round", strokeStyle: "{PAINT}" }});
  ink.beginPath(); ink.moveTo(...(last ?? point)); ink.lineTo(...point); ink.stroke();
  last = point;
  show();
}};
view.onpointerdown = event => {{ view.setPointerCapture(event.pointerId); stroke(event); }};
view.onpointermove = event => last && stroke(event);
view.onpointerup = view.onpointercancel = () => {{
  if (last) trigger("input", {{ mask: mask.toDataURL() }});
  last = null;
}};
watch("value", load);
load();
"""


@contextmanager
def error_toasts() -> Iterator[None]:
    """Show the user's mistakes as toasts, escaped because gradio would read `<1>` as an HTML tag."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise gr.Error(html.escape(without_folders(error), quote=False), print_exception=False) from error


# Passes on the file's path; gradio would open the file, and ignores files that are not images. It must be a subclass
# because gradio rebuilds components, and is not made with `class` because gradio then writes a .pyi file next to this.
FileImage = ABCMeta.__new__(
    type(gr.Image), "Image", (gr.Image,), {"preprocess": lambda self, payload: payload and payload.path}
)


def image_file(**options: Any) -> gr.Image:
    """Return an image component whose value is a file."""
    return FileImage(type="filepath", image_mode=None, **options)


def supports_initial_image(served: Served) -> bool:
    """Return whether diffusers has an image-to-image pipeline for every model's image decoder."""
    try:
        return all(composed_kind(model.pipeline.config["family"], False, True) for model in (served, *served.beside))
    except ValueError:
        return False


def column_names(models: list[str]) -> list[str]:
    """Return the last part of each model's path or id, numbered if two are the same."""
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else [f"{number} {name}" for number, name in enumerate(names, 1)]


def interleave(columns: list[list[Any]]) -> list[Any]:
    """Order images by row, so that the gallery shows each model in a column."""
    return [image for row in zip_longest(*columns) for image in row if image is not None]


def build(served: Served | None, run: Path | None = None) -> gr.Blocks:
    """Build the page: generation, a training run, or both as tabs."""
    with gr.Blocks(title="kosmosg", analytics_enabled=False, delete_cache=(3600, CACHE_SECONDS)) as page:
        if served is not None:
            with gr.Tab("Generate") if run else nullcontext():
                build_generation(served, page)
        if run is not None:
            with gr.Tab("Training run") if served else nullcontext():
                build_run(run, page)
    return page


def build_generation(served: Served, page: gr.Blocks) -> None:
    """Add the components that generate images, and connect their events."""
    gr.Markdown("# Prompts with images\nAdd images and refer to them by number: `<1> on the beach`.")
    with gr.Row():
        with gr.Column(scale=3):
            prompt = gr.Textbox(
                "", label="Prompt", placeholder="<1> in the suit of <2>", max_length=2000, elem_id="prompt"
            )
            notes = gr.HTML(elem_id="hints")
            slots, weights, masks, mask_buttons = [], [], [], []
            with gr.Row():
                for number in range(1, SLOTS + 1):
                    with gr.Column(min_width=120):
                        slots.append(
                            image_file(
                                label=f"<{number}>", height=150, sources=["upload", "clipboard"],
                                elem_id=f"image-{number}", elem_classes="slot",
                            )
                        )  # fmt: skip
                        weights.append(
                            gr.Slider(0, 2, 1, step=0.05, label="Weight", visible=False, elem_id=f"weight-{number}")
                        )
                        mask_buttons.append(gr.Button("Mask", size="sm", visible=False, elem_id=f"mask-{number}"))
                        masks.append(
                            image_file(
                                label="Mask (subject in white)", height=110, buttons=["download"], visible=False,
                                interactive=False, elem_id=f"masked-{number}", elem_classes="slot",
                            )
                        )  # fmt: skip
            edited = gr.State(0)
            with gr.Column(variant="panel", visible=False, elem_id="brush") as panel:
                title = gr.Markdown()
                brush = gr.HTML({}, html_template=BRUSH_HTML, css_template=BRUSH_CSS, js_on_load=BRUSH_JS)
                subject = gr.Textbox(
                    label="Find the subject by words", visible=served.segmenter is not None, elem_id="words"
                )
                with gr.Row():
                    mask_upload = gr.UploadButton("Load mask", file_types=[".png"], size="sm", min_width=90)
                    remove = gr.Button("Remove mask", size="sm", min_width=90)
                    close = gr.Button("Close", size="sm", min_width=90, elem_id="close-brush")
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Accordion("Settings", open=False):
                negative = gr.Textbox("", label="Negative prompt", max_length=2000)
                with gr.Row():
                    steps = gr.Slider(1, 100, served.steps, step=1, label="Steps")
                    guidance = gr.Slider(1, 15, served.guidance_scale, step=0.5, label="Guidance scale")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed")
                    count = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Images")
                    sampler = gr.Dropdown([OWN_SAMPLER, *SAMPLERS], value=OWN_SAMPLER, label="Sampler")
            uploads: dict[str, Any] = {"height": 200, "sources": ["upload", "clipboard"], "elem_classes": "slot"}
            with gr.Accordion("Image-to-image", open=False, visible=supports_initial_image(served)):
                initial = image_file(label="Initial image", elem_id="initial", **uploads)
                strength = gr.Slider(0.05, 1, 0.7, step=0.05, label="Strength (1: ignore the image)", visible=False)
            with gr.Accordion("ControlNet", open=False, visible=served.controlnet is not None):
                control = image_file(label="Control image (edges, depth, …)", elem_id="control", **uploads)
                control_scale = gr.Slider(0, 2, 1, step=0.05, label="Scale")
            with gr.Accordion("LoRA", open=False, visible=bool(served.loras)):
                loras = [gr.Slider(-2, 2, 1, step=0.05, label=Path(file).name) for file in served.loras]
        with gr.Column(scale=2):
            outputs = gr.Gallery(
                label="Images",
                columns=1 + len(served.beside) if served.beside else 2,
                object_fit="contain",
                buttons=["download", "download_all", "fullscreen"],
                interactive=False,
                elem_id="outputs",
            )
            scores = gr.Markdown(elem_id="scores")
            selected = gr.State(0)
            reuse = gr.Button("Use as input image", size="sm")
            line = gr.Textbox(
                label="Command that reproduces the images", interactive=False, buttons=["copy"], elem_id="command"
            )
            dropped = gr.File(
                label="Drop a generated image here to restore its settings", file_types=[".png"], height=150,
                elem_id="restore",
            )  # fmt: skip
            restored = gr.Textbox(label="Restored", visible=False, interactive=False, elem_id="restored")
    if served.examples:
        gr.Examples([list(pair) for pair in served.examples], [prompt, slots[0]], label="Examples", elem_id="examples")

    def generate(values, progress=gr.Progress()):  # noqa: B008
        with error_toasts(), tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:  # gradio copies what it shows
            sampler_name = None if values[sampler] == OWN_SAMPLER else values[sampler]
            settings = generation.Settings(int(values[steps]), float(values[guidance]), sampler_name)
            request = build_request(
                values[prompt],
                *([values[component] for component in components] for components in (slots, weights, masks)),
                negative_prompt=values[negative] or "",
                seed=int(values[seed] or 0),
                count=int(values[count]),
                control_image=values[control] or "",
                control_scale=float(values[control_scale]),
                init_image=values[initial] or "",
                strength=float(values[strength]),
            )
            scales = [float(values[slider]) for slider in loras]
            models, lines = [served, *served.beside], []
            names = column_names([model.arguments[0] for model in models])
            columns: list[list[Any]] = [[] for _ in models]
            for index, model in enumerate(models):
                lines.append(command(model, request, settings, scales))
                for share, images in draw(model, request, settings, Path(folder) / str(index), scales):
                    progress((index + share) / len(models))
                    if images:
                        columns[index] = [(image, names[index] if served.beside else None) for image in images]
                        yield interleave(columns), "\n".join(lines), ""
            files = {name: [file for file, _ in column] for name, column in zip(names, columns, strict=True)}
            yield interleave(columns), "\n".join(lines), score_table(served, request, files)

    def restore(file):
        with error_toasts():
            settings, message = read_settings(file, served.identity)
        values = {
            prompt: settings["prompt"],
            negative: settings["negative_prompt"],
            steps: settings["num_inference_steps"],
            guidance: settings["guidance_scale"],
            seed: settings["seed"],
            count: 1,
            sampler: settings["sampler"] or OWN_SAMPLER,
            control_scale: settings.get("control_scale", 1),
            strength: settings.get("strength", 0.7),
            restored: gr.update(value=message, visible=True),
        }
        values |= dict(zip(weights, [*settings["image_weights"], *[1] * SLOTS], strict=False))
        return values | dict(zip(loras, [*settings["lora_scales"], *[1] * len(loras)], strict=False))

    def select(event: gr.SelectData):
        return event.index

    def use_as_input(images, selected, *files):
        with error_toasts():
            if not images:
                raise ValueError("There are no images yet; generate some first.")
        slot = next((index for index, file in enumerate(files) if not file), SLOTS - 1)
        file = images[min(selected, len(images) - 1)][0]
        return [file if index == slot else gr.skip() for index in range(SLOTS)]

    def open_brush(index, file, mask):
        with error_toasts():
            if not file:
                raise ValueError(f"Add image {index + 1} first.")
            layers = brush_layers(file, mask)
        text = f"Paint over the subject of **&lt;{index + 1}&gt;**; the rest becomes white."
        return index, text, layers, gr.update(visible=True)

    def set_mask(index, file):
        return [gr.update(value=file, visible=bool(file)) if n == index else gr.skip() for n in range(SLOTS)]

    def paint(event: gr.EventData, index, *files):
        with error_toasts(), tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:
            mask = painted_mask(event.mask, read_image(files[index]).size)
            yield set_mask(index, mask and save_mask(mask, folder))

    def replace_mask(index, files, mask):
        with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:
            file = save_mask(mask, folder)
            yield [brush_layers(files[index], file), *set_mask(index, file)]

    def segment(index, words, *files):
        assert served.segmenter is not None
        with error_toasts():
            mask = served.segmenter(read_image(files[index]), words)
            if not mask.getbbox():
                raise ValueError(f"Found no '{words}' in image {index + 1}.")
            yield from replace_mask(index, files, mask)

    def load_mask(index, file, *files):
        with error_toasts():
            check_size(file)
            masked(read_image(files[index]), mask := read_image(file).convert("L"))
            yield from replace_mask(index, files, mask)

    def rename_duplicate(index, *files):
        with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:
            yield unique_copy(files, index, folder) or gr.skip()

    def change_slot(file):
        shown = gr.update(visible=bool(file))
        return shown, shown, gr.update(value=None, visible=False), gr.update(visible=False)

    for index, (slot, weight, mask, button) in enumerate(zip(slots, weights, masks, mask_buttons, strict=True)):
        opened = [edited, title, brush, panel]
        button.click(partial(open_brush, index), [slot, mask], opened, show_progress="hidden")
        slot.change(change_slot, slot, [weight, button, mask, panel], queue=False)
    files = [*slots, control, initial]
    for index, component in enumerate(files):
        component.change(partial(rename_duplicate, index), files, component, show_progress="hidden", queue=False)
    brush.input(paint, [edited, *slots], masks, show_progress="hidden", trigger_mode="always_last")
    subject.submit(segment, [edited, subject, *slots], [brush, *masks])
    mask_upload.upload(load_mask, [edited, mask_upload, *slots], [brush, *masks])
    remove.click(lambda index: [gr.update(visible=False), *set_mask(index, None)], edited, [panel, *masks], queue=False)
    close.click(lambda: gr.update(visible=False), None, panel, queue=False)

    settings: list[Any] = [prompt, negative, steps, guidance, seed, count, sampler, control_scale, strength]
    settings += [*weights, *loras]
    inputs = {*settings, *slots, *masks, control, initial}
    gr.on([start.click, prompt.submit], generate, inputs, [outputs, line, scores], show_progress_on=outputs)
    initial.change(lambda file: gr.update(visible=bool(file)), initial, strength, queue=False)
    for component in (prompt, *slots):
        component.change(prompt_html, [prompt, *slots], notes, show_progress="hidden", queue=False)
    dropped.upload(restore, dropped, [*settings, restored])
    outputs.select(select, None, selected)
    reuse.click(use_as_input, [outputs, selected, *slots], slots)
    # Keep the settings over a reload or a restart of the server, for which gradio's default key would change.
    key = f"kosmosg {served.arguments} {served.loras}"
    saved = gr.BrowserState(None, storage_key=key, secret="kosmosg")
    for component in settings:
        component.change(None, settings, saved, js="(...values) => [values]", queue=False)
    page.load(
        lambda values: values if values and len(values) == len(settings) else [gr.skip()] * len(settings),
        saved,
        settings,
        show_progress="hidden",
    )


def serve(served: Served | None, host: str, port: int | None, run: Path | None = None, **options: Any) -> Any:
    """Launch the page, with `options` for gradio's `launch`; blocks unless `prevent_thread_lock=True`."""
    page = build(served, run).queue(max_size=QUEUE_SIZE, default_concurrency_limit=1, api_open=False)
    theme = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        run_history=False,
        theme=theme,
        css=CSS,
        **options,
    )
