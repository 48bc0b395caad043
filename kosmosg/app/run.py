"""Gallery of a training run, of the files in its folder: grids by step, losses, and the report of an evaluation."""

import html
from itertools import cycle
from pathlib import Path
from typing import Any

import gradio as gr
import pandas
from PIL import Image

METRICS, GRIDS, REPORT = "metrics.csv", "step-*.png", "evaluation/report.html"
MOST_POINTS = 1000  # of one curve
COLOURS = ("#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#9d755d")


def grids(run: Path) -> dict[int, Path]:
    """Files by step, in order."""
    return {int(file.stem.removeprefix("step-")): file for file in sorted((run / "grids").glob(GRIDS))}


def losses(run: Path) -> pandas.DataFrame:
    """Columns `step`, `loss` and `name`, at most `MOST_POINTS` rows of a name; none of a run that has just begun."""
    file = run / METRICS
    table: Any = pandas.read_csv(file) if file.is_file() else pandas.DataFrame({"step": []})
    curves = [pandas.DataFrame({"step": [], "loss": [], "name": []})]
    for name in (column for column in table.columns if "loss" in column):
        rows = table[table[name].notna()].iloc[:: 1 + int(table[name].count()) // MOST_POINTS]
        curves.append(pandas.DataFrame({"step": rows["step"], "loss": rows[name], "name": name}))
    return pandas.concat([curve for curve in curves if len(curve)] or curves)


def report(run: Path) -> Path | None:
    """The report of an evaluation in the run folder, or in its parent as the miniature's."""
    return next((file for file in (run / REPORT, run.parent / REPORT) if file.is_file()), None)


def check_run(run: Path) -> None:
    """Raises ValueError: the folder holds neither metrics nor grids."""
    if not ((run / METRICS).is_file() or grids(run)):
        raise ValueError(f"--run '{run}' is no training run: it has neither {METRICS} nor grids/{GRIDS}.")


def gallery(run: Path, page: gr.Blocks) -> None:
    """Builds it into the page; what it shows is read whenever a browser opens the page."""
    gr.Markdown(f"## {run.name}")
    place = gr.Slider(1, 2, 1, step=1, label="Grid", elem_id="grid-step")
    grid = gr.Image(interactive=False, format="png", buttons=["download", "fullscreen"], elem_id="grid")
    plot = gr.LinePlot(x="step", y="loss", color="name", colors_in_legend=[], height=350, elem_id="losses")
    legend = gr.HTML(elem_id="legend")  # the plot's own is cut where the window is narrow
    with gr.Accordion("Report of the evaluation", open=False, visible=report(run) is not None) as folded:
        shown = gr.HTML(elem_id="report")

    def show(number: int) -> Any:
        steps = list(grids(run).items())
        step, file = steps[min(int(number), len(steps)) - 1]
        with Image.open(file) as image:
            image.load()
        return gr.update(value=image, label=f"Step {step:,}")

    def read() -> list[Any]:
        last = len(grids(run))
        slider = gr.update(maximum=max(2, last), value=max(1, last), visible=last > 1)
        table = losses(run)
        colours = dict(zip(table["name"].unique(), cycle(COLOURS), strict=False))
        names = [f'<span><b style="color: {c}">●</b> {html.escape(name)}</span>' for name, c in colours.items()]
        curves = gr.update(value=table, color_map=colours)
        return [slider, show(last) if last else gr.update(visible=False), curves, " ".join(names)]

    def read_report() -> str:
        file = report(run)
        text = html.escape(file.read_text(encoding="utf-8")) if file else ""
        # Nothing in it runs, and it sees nothing of the page.
        return f'<iframe sandbox srcdoc="{text}" style="width: 100%; height: 80vh; border: 0"></iframe>'

    page.load(read, None, [place, grid, plot, legend])
    place.input(show, place, grid, show_progress="hidden", trigger_mode="always_last")
    folded.expand(read_report, None, shown)
