"""Show a training run from the files in its folder: sample grids by step, losses, and the evaluation report."""

import html
from itertools import cycle
from pathlib import Path
from typing import Any

import gradio as gr
import pandas
from PIL import Image

METRICS, GRIDS, REPORT = "metrics.csv", "step-*.png", "evaluation/report.html"
MAX_POINTS = 1000  # per curve
COLOURS = ("#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#9d755d")


def grids(run: Path) -> dict[int, Path]:
    """Return the sample grids of a run by step, in order."""
    return {int(file.stem.removeprefix("step-")): file for file in sorted((run / "grids").glob(GRIDS))}


def losses(run: Path) -> pandas.DataFrame:
    """Return the loss curves as columns `step`, `loss` and `name`, thinned to `MAX_POINTS` per name; may be empty."""
    file = run / METRICS
    table: Any = pandas.read_csv(file) if file.is_file() else pandas.DataFrame({"step": []})
    curves = [pandas.DataFrame({"step": [], "loss": [], "name": []})]
    for name in (column for column in table.columns if "loss" in column):
        rows = table[table[name].notna()].iloc[:: 1 + int(table[name].count()) // MAX_POINTS]
        curves.append(pandas.DataFrame({"step": rows["step"], "loss": rows[name], "name": name}))
    return pandas.concat([curve for curve in curves if len(curve)] or curves)


def report(run: Path) -> Path | None:
    """Return the evaluation report in the run folder or in its parent, where the miniature has it."""
    return next((file for file in (run / REPORT, run.parent / REPORT) if file.is_file()), None)


def check_run(run: Path) -> None:
    """Raise ValueError if the folder has neither metrics nor grids."""
    if not ((run / METRICS).is_file() or grids(run)):
        raise ValueError(f"--run '{run}' is not a training run: it has neither {METRICS} nor grids/{GRIDS}.")


def build_run(run: Path, page: gr.Blocks) -> None:
    """Add the view of a run to the page; its files are read whenever a browser opens the page."""
    gr.Markdown(f"## {run.name}")
    slider = gr.Slider(1, 2, 1, step=1, label="Grid", elem_id="grid-step")
    grid = gr.Image(interactive=False, format="png", buttons=["download", "fullscreen"], elem_id="grid")
    plot = gr.LinePlot(x="step", y="loss", color="name", colors_in_legend=[], height=350, elem_id="losses")
    legend = gr.HTML(elem_id="legend")  # the plot's own legend is cut off in a narrow window
    with gr.Accordion("Evaluation report", open=False, visible=report(run) is not None) as accordion:
        frame = gr.HTML(elem_id="report")

    def show(number: int) -> Any:
        steps = list(grids(run).items())
        step, file = steps[min(int(number), len(steps)) - 1]
        with Image.open(file) as image:
            image.load()
        return gr.update(value=image, label=f"Step {step:,}")

    def read() -> list[Any]:
        last = len(grids(run))
        steps = gr.update(maximum=max(2, last), value=max(1, last), visible=last > 1)
        table = losses(run)
        colours = dict(zip(table["name"].unique(), cycle(COLOURS), strict=False))
        names = [f'<span><b style="color: {c}">●</b> {html.escape(name)}</span>' for name, c in colours.items()]
        curves = gr.update(value=table, color_map=colours)
        return [steps, show(last) if last else gr.update(visible=False), curves, " ".join(names)]

    def read_report() -> str:
        file = report(run)
        text = html.escape(file.read_text(encoding="utf-8")) if file else ""
        # The sandbox keeps scripts in the report from running and from reading the page.
        return f'<iframe sandbox srcdoc="{text}" style="width: 100%; height: 80vh; border: 0"></iframe>'

    page.load(read, None, [slider, grid, plot, legend])
    slider.input(show, slider, grid, show_progress="hidden", trigger_mode="always_last")
    accordion.expand(read_report, None, frame)
