"""How the page looks, and what its parts do when they are used."""

import html
import tempfile
from abc import ABCMeta
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import gradio as gr

from kosmosg import generation
from kosmosg.app.requests import (
    MOST_PICTURES,
    PAINT,
    Served,
    build_request,
    check_size,
    command,
    distinct,
    draw,
    explained,
    opened,
    painted,
    restored,
    score_table,
    stored,
    told,
)
from kosmosg.app.run import gallery
from kosmosg.drawing import composed_kind
from kosmosg.image_processing import read_image
from kosmosg.sampling import SAMPLERS
from kosmosg.steering import masked

SLOTS = 4
LARGEST_FILE = "20mb"
WAITING = 32  # requests; more are refused
OWN_SAMPLER = "the model's own"
FONT = ["system-ui", "sans-serif"]  # gradio's own would be loaded from elsewhere
KEPT_SECONDS = 24 * 3600
LARGEST_SEED = 2**53 - 1  # a browser's numbers are exact up to it
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
# gradio's own editor sends three files at every move of the pointer, and needs WebGL.
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
let picture, last = null;
const read = async url => {{ const image = new Image(); image.src = url; await image.decode(); return image; }};
const show = () => {{
  pen.globalAlpha = 1; pen.drawImage(picture, 0, 0);
  pen.globalAlpha = 0.6; pen.drawImage(mask, 0, 0);
}};
const load = async () => {{
  if (!props.value.image) return;
  picture = await read(props.value.image);
  view.width = mask.width = picture.width;
  view.height = mask.height = picture.height;
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


def picked(event: gr.SelectData) -> int:
    """Place of the picture that was clicked."""
    return event.index


def refused(error: Exception | str) -> gr.Error:
    """What is shown of a mistake, as text: gradio takes it for HTML, in which `<1>` is a tag."""
    return gr.Error(html.escape(explained(error), quote=False), print_exception=False)


# gradio would open the file, and say nothing of one that is no image. A class, since components are built anew when
# they change; not by `class`, for which gradio writes a .pyi file beside this one.
FileImage = ABCMeta.__new__(
    type(gr.Image), "Image", (gr.Image,), {"preprocess": lambda self, payload: payload and payload.path}
)


def image_file(**options: Any) -> gr.Image:
    """An image whose value is its file."""
    return FileImage(type="filepath", image_mode=None, **options)


def has_initial(served: Served) -> bool:
    """Whether diffusers can start from an image with these image decoders."""
    try:
        return all(composed_kind(model.pipeline.config["family"], False, True) for model in (served, *served.beside))
    except ValueError:
        return False


def short_names(models: list[str]) -> list[str]:
    """What columns are called: the last parts of folders, if they differ."""
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else [f"{number} {name}" for number, name in enumerate(names, 1)]


def in_rows(columns: list[list[Any]]) -> list[Any]:
    """What a gallery shows row by row, so that each model has a column."""
    return [picture for row in zip_longest(*columns) for picture in row if picture is not None]


def build(served: Served | None, run: Path | None = None) -> gr.Blocks:
    """The page: to draw, the gallery of a run, or both."""
    with gr.Blocks(title="kosmosg", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as page:
        if served is not None and run is not None:
            with gr.Tab("Draw"):
                drawing(served, page)
            with gr.Tab("Run"):
                gallery(run, page)
        elif served is not None:
            drawing(served, page)
        elif run is not None:
            gallery(run, page)
    return page


def drawing(served: Served, page: gr.Blocks) -> None:
    """Builds what draws into the page."""
    gr.Markdown("# Images as words\nPut images in, and name them in the prompt: `<1> on the beach`.")
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
                                label="White is read", height=110, buttons=["download"], visible=False,
                                interactive=False, elem_id=f"masked-{number}", elem_classes="slot",
                            )
                        )  # fmt: skip
            edited = gr.State(0)
            with gr.Column(variant="panel", visible=False, elem_id="brush") as panel:
                title = gr.Markdown()
                editor = gr.HTML({}, html_template=BRUSH_HTML, css_template=BRUSH_CSS, js_on_load=BRUSH_JS)
                words = gr.Textbox(
                    label="Find the subject by words", visible=served.segmenter is not None, elem_id="words"
                )
                with gr.Row():
                    given = gr.UploadButton("From a file", file_types=[".png"], size="sm", min_width=90)
                    removed = gr.Button("Remove", size="sm", min_width=90)
                    done = gr.Button("Close", size="sm", min_width=90, elem_id="close-brush")
            start = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Accordion("Settings", open=False):
                negative = gr.Textbox("", label="Steer away from", max_length=2000)
                with gr.Row():
                    steps = gr.Slider(1, 100, served.steps, step=1, label="Steps")
                    guidance = gr.Slider(1, 15, served.guidance_scale, step=0.5, label="Guidance")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed")
                    count = gr.Slider(1, MOST_PICTURES, 1, step=1, label="Pictures")
                    sampler = gr.Dropdown([OWN_SAMPLER, *SAMPLERS], value=OWN_SAMPLER, label="Sampler")
            uploads: dict[str, Any] = {"height": 200, "sources": ["upload", "clipboard"], "elem_classes": "slot"}
            with gr.Accordion("Start from an image", open=False, visible=has_initial(served)):
                initial = image_file(label="Initial image", elem_id="initial", **uploads)
                strength = gr.Slider(0.05, 1, 0.7, step=0.05, label="Strength: how much is drawn anew", visible=False)
            with gr.Accordion("ControlNet", open=False, visible=served.controlnet is not None):
                control = image_file(label="What the ControlNet reads", elem_id="control", **uploads)
                control_scale = gr.Slider(0, 2, 1, step=0.05, label="Scale")
            with gr.Accordion("LoRA", open=False, visible=bool(served.loras)):
                loras = [gr.Slider(-2, 2, 1, step=0.05, label=Path(file).name) for file in served.loras]
        with gr.Column(scale=2):
            pictures = gr.Gallery(
                label="Pictures",
                columns=1 + len(served.beside) if served.beside else 2,
                object_fit="contain",
                buttons=["download", "download_all", "fullscreen"],
                interactive=False,
                elem_id="pictures",
            )
            scores = gr.Markdown(elem_id="scores")
            chosen = gr.State(0)
            again = gr.Button("Use the picture as an input image", size="sm")
            line = gr.Textbox(label="Command", interactive=False, buttons=["copy"], elem_id="command")
            dropped = gr.File(
                label="Restore settings: drop a picture", file_types=[".png"], height=150, elem_id="restore"
            )
            note = gr.Textbox(label="Restored", visible=False, interactive=False, elem_id="restored")
    if served.examples:
        gr.Examples([list(pair) for pair in served.examples], [prompt, slots[0]], label="Examples", elem_id="examples")

    def run(values, progress=gr.Progress()):  # noqa: B008
        def of(components):
            return [values[component] for component in components]

        try:
            chosen_sampler = None if values[sampler] == OWN_SAMPLER else values[sampler]
            settings = generation.Settings(int(values[steps]), float(values[guidance]), chosen_sampler)
            request = build_request(
                values[prompt],
                *(of(slots), of(weights), of(masks)),
                negative_prompt=values[negative] or "",
                seed=int(values[seed] or 0),
                count=int(values[count]),
                control_image=values[control] or "",
                control_scale=float(values[control_scale]),
                init_image=values[initial] or "",
                strength=float(values[strength]),
            )
            scales = list(map(float, of(loras)))
            models, lines = [served, *served.beside], []
            names = short_names([model.arguments[0] for model in models])
            columns: list[list[Any]] = [[] for _ in models]
            with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:  # gradio copies what it shows
                for place, model in enumerate(models):
                    lines.append(command(model, request, settings, scales))
                    for share, now in draw(model, request, settings, Path(folder) / str(place), scales):
                        progress((place + share) / len(models))
                        if now:
                            columns[place] = [(picture, names[place] if served.beside else None) for picture in now]
                            yield in_rows(columns), "\n".join(lines), ""
                drawn = {name: [file for file, _ in column] for name, column in zip(names, columns, strict=True)}
                yield in_rows(columns), "\n".join(lines), score_table(served, request, drawn)
        except (ValueError, FileNotFoundError) as error:
            raise refused(error) from error

    def restore(file):
        try:
            found, text = restored(file, served.identity)
        except ValueError as error:
            raise refused(error) from error
        values = {
            prompt: found["prompt"],
            negative: found["negative_prompt"],
            steps: found["num_inference_steps"],
            guidance: found["guidance_scale"],
            seed: found["seed"],
            count: 1,
            sampler: found["sampler"] or OWN_SAMPLER,
            control_scale: found.get("control_image", 1),
            strength: found.get("init_image", 0.7),
            note: gr.update(value=text, visible=True),
        }
        values |= dict(zip(weights, [*found["image_weights"], *[1] * SLOTS], strict=False))
        return values | dict(zip(loras, [*found["lora_scales"], *[1] * len(loras)], strict=False))

    def use(pictures, index, *files):
        if not pictures:
            raise refused("There is no picture yet.")
        place = next((number for number, file in enumerate(files) if not file), SLOTS - 1)
        file = pictures[min(index, len(pictures) - 1)][0]
        return [file if number == place else gr.skip() for number in range(SLOTS)]

    def edit(number):
        def show(file, mask):
            if not file:
                raise refused(f"Put in image {number + 1} first.")
            try:
                value = opened(file, mask)
            except ValueError as error:
                raise refused(error) from error
            text = f"Paint over the subject of **&lt;{number + 1}&gt;**; the rest is read as white."
            return number, text, value, gr.update(visible=True)

        return show

    def set_mask(number, mask):
        return [gr.update(value=mask, visible=bool(mask)) if n == number else gr.skip() for n in range(SLOTS)]

    def paint(event: gr.EventData, number, *files):
        mask = painted(event.mask, read_image(files[number]).size)
        with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:  # gradio copies what it shows
            yield set_mask(number, mask and stored(mask, folder))

    def find(number, words, *files):
        assert served.segmenter is not None
        mask = served.segmenter(read_image(files[number]), words)
        if not mask.getbbox():
            raise refused(f"'{words}' is not seen in image {number + 1}.")
        with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:
            yield [opened(files[number], file := stored(mask, folder)), *set_mask(number, file)]

    def take(number, file, *files):
        try:
            check_size(file)
            masked(read_image(files[number]), mask := read_image(file).convert("L"))
        except ValueError as error:
            raise refused(error) from error
        with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:
            yield [opened(files[number], file := stored(mask, folder)), *set_mask(number, file)]

    def rename(place, *files):
        with tempfile.TemporaryDirectory(prefix="kosmosg-") as folder:
            yield distinct(files, place, folder) or gr.skip()

    def change_slot(file):
        there = gr.update(visible=bool(file))
        return there, there, gr.update(value=None, visible=False), gr.update(visible=False)

    for number, button in enumerate(mask_buttons):
        shown = [edited, title, editor, panel]
        button.click(edit(number), [slots[number], masks[number]], shown, show_progress="hidden")
        slots[number].change(change_slot, slots[number], [weights[number], button, masks[number], panel], queue=False)
    files = [*slots, control, initial]
    for place, component in enumerate(files):
        component.change(partial(rename, place), files, component, show_progress="hidden", queue=False)
    editor.input(paint, [edited, *slots], masks, show_progress="hidden", trigger_mode="always_last")
    words.submit(find, [edited, words, *slots], [editor, *masks])
    given.upload(take, [edited, given, *slots], [editor, *masks])
    removed.click(
        lambda number: [gr.update(visible=False), *set_mask(number, None)], edited, [panel, *masks], queue=False
    )
    done.click(lambda: gr.update(visible=False), None, panel, queue=False)

    settings: list[Any] = [prompt, negative, steps, guidance, seed, count, sampler, control_scale, strength]
    settings += [*weights, *loras]
    asked = {*settings, *slots, *masks, control, initial}
    gr.on([start.click, prompt.submit], run, asked, [pictures, line, scores], show_progress_on=pictures)
    initial.change(lambda file: gr.update(visible=bool(file)), initial, strength, queue=False)
    for component in (prompt, *slots):
        component.change(told, [prompt, *slots], notes, show_progress="hidden", queue=False)
    dropped.upload(restore, dropped, [*settings, note])
    pictures.select(picked, None, chosen)
    again.click(use, [pictures, chosen, *slots], slots)
    # What was typed outlives the server and a reload. gradio's own key would be another after each start.
    name = f"kosmosg {served.arguments} {served.loras}"
    kept = gr.BrowserState(None, storage_key=name, secret="kosmosg")
    for component in settings:
        component.change(None, settings, kept, js="(...values) => [values]", queue=False)
    page.load(
        lambda values: values if values and len(values) == len(settings) else [gr.skip()] * len(settings),
        kept,
        settings,
        show_progress="hidden",
    )


def serve(served: Served | None, host: str, port: int | None, run: Path | None = None, **options: Any) -> Any:
    """Start the page; with `prevent_thread_lock=True` it is served beside what follows."""
    page = build(served, run).queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    theme = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=LARGEST_FILE,
        footer_links=[],
        run_history=False,
        theme=theme,
        css=CSS,
        **options,
    )
