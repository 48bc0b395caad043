"""Write Toyland: python -m datamodules.toyland [more.yaml | key=value …]

Arguments are YAML files or key=value; later ones override earlier ones and configs/toyland/data.yaml. Finished data
sets are skipped; an interrupted one is drawn again.

    python -m datamodules.toyland
    python -m datamodules.toyland output=data/other coco.images=100 processes=1
"""

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.errors import DataError
from datamodules.folder_lock import folder_lock
from datamodules.processes import ordered_map
from datamodules.toyland.config import ToylandData
from datamodules.toyland.data_sets import data_sets, draw_chunk
from kosmosg.config import CONFIGS, ConfigError, describe_schema, load_config
from kosmosg.files import clear_leftovers, replaced

DEFAULTS = str(CONFIGS / "toyland" / "data.yaml")


def build(config: ToylandData, console: Console) -> None:
    """Write every data set that does not exist yet.

    Raises:
        DataError: a folder was built from other settings, another process is writing here, or a process was killed.
    """
    output = Path(config.output)
    with folder_lock(output):
        # All data sets are checked first, to report errors before minutes of drawing.
        missing = [data_set for data_set in data_sets(config) if not data_set.exists(output)]
        if not missing:
            console.print(f"Toyland is complete in '{output}'.", highlight=False, soft_wrap=True)
            return
        tasks = (chunk for data_set in missing for split in data_set.splits for chunk in data_set.chunks(split))
        with closing(ordered_map(draw_chunk, tasks, config.processes)) as drawn, progress(console) as bars:
            for data_set in missing:
                begin, total = time.monotonic(), sum(data_set.splits.values())
                bar = bars.add_task(data_set.name, total=total)
                clear_leftovers((output / data_set.path).parent)
                with replaced(output / data_set.path) as temporary:
                    temporary.mkdir()
                    for count in data_set.write(temporary, drawn):
                        bars.advance(bar, count)
                bars.remove_task(bar)
                seconds = time.monotonic() - begin
                console.print(f"{data_set.name}: {total:,} samples in {seconds:.0f} s", highlight=False)
        console.print(f"Toyland is in '{output}'.", highlight=False, soft_wrap=True)


def progress(console: Console) -> Progress:
    """Return progress bars with the remaining time, disabled if the output is not a terminal."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def main(arguments: Sequence[str]) -> int:
    """Return the exit status: 0 finished, 2 invalid arguments or folders, 130 after Ctrl-C, 143 after SIGTERM."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        print(describe_schema(ToylandData))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which ends the drawing processes
    try:
        build(load_config([DEFAULTS, *arguments], ToylandData), Console())
    except (ConfigError, DataError) as error:
        print(f"datamodules.toyland: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command continues with the data set that is not finished.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore SIGINT in background jobs
    sys.exit(main(sys.argv[1:]))
