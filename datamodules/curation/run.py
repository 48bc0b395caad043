"""One curation from its configuration to its manifest and report."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from datamodules.curation.chunks import plan
from datamodules.curation.config import Curation
from datamodules.curation.local_engine import run_local
from datamodules.curation.output import Output
from datamodules.curation.ray_engine import run_ray
from datamodules.curation.report import report
from datamodules.curation.sheet import write_sheet
from datamodules.curation.tally import Tally
from datamodules.folder_lock import held
from kosmosg.config import save_config
from kosmosg.files import write_text

ENGINES = {"local": run_local, "ray": run_ray}


def curate(config: Curation, console: Console, written: dict[str, Any] | None = None) -> None:
    """Work on every chunk that is not done; then write manifest, report and contact sheet.

    Args:
        written: the configuration as it is recorded, see `kosmosg.config.written_config`.

    Raises:
        DataError: the input or output cannot be used, a model is missing, too many images fail, nothing is left, or
            another process writes here.
    """
    output = Output(config)
    with held(output.folder):
        planned = plan(config.input, config.max_bad_share)
        output.prepare(planned)
        save_config(written or config, output.own / "config.yaml")
        tally = Tally(config.max_bad_share, config.min_bad_count)
        done = output.done()
        for number in sorted(done):
            tally.add(done[number])
        missing = [chunk for chunk in planned.chunks if chunk.number not in done]
        if not missing and output.manifest().is_file():
            console.print(f"The curation stands in '{output.folder}'.", highlight=False, soft_wrap=True)
            return
        if done and missing:
            console.print(f"{len(done):,} of {len(planned.chunks):,} chunks are done.", highlight=False)
        with _progress(console) as bar:
            task = bar.add_task("chunks", total=len(planned.chunks), completed=len(done), told=_told(tally))
            for record in ENGINES[config.engine](config, missing) if missing else ():
                tally.add(record)
                bar.update(task, advance=1, told=_told(tally))
        output.finish(tally.manifest(planned))
        _tell(config, output, tally, console)


def _tell(config: Curation, output: Output, tally: Tally, console: Console) -> None:
    text = report(config, tally)
    write_text(output.own / "report.md", text)
    if config.report.sheet:
        write_sheet(
            str(output.folder / f"{config.prefix}-*.tar"), config.report.sheet, config.seed, output.own / "sheet.png"
        )
    console.print(
        text.split("## Cost sheet")[0].split("\n", 2)[2].strip(), highlight=False, markup=False, soft_wrap=True
    )
    console.print(
        f"Shards in '{output.folder}'; cost sheet in '{output.own / 'report.md'}'.", highlight=False, soft_wrap=True
    )


def _told(tally: Tally) -> str:
    return f"{tally.written:,} of {tally.read:,} images kept, {tally.failed.total():,} failed"


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[told]}"),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
