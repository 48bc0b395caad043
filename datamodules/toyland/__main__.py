"""Write Toyland: python -m datamodules.toyland [more.yaml | key=value …]

Starts from configs/toyland/data.yaml; every argument is a YAML file or key=value; later wins. Finished data sets are
kept, an interrupted one is drawn again.

    python -m datamodules.toyland
    python -m datamodules.toyland output=data/other coco.images=100 processes=1
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.errors import DataError
from datamodules.folder_lock import folder_lock
from datamodules.toyland.config import ToylandData
from datamodules.toyland.data_sets import data_sets, drawing
from kosmosg.config import CONFIGS, ConfigError, describe_schema, load_config
from kosmosg.files import clear_leftovers, replaced

DEFAULTS = str(CONFIGS / "toyland" / "data.yaml")


def build(config: ToylandData, console: Console) -> None:
    """Write every data set that does not exist yet.

    Raises:
        DataError: a folder was built from other settings, another process writes here, or see `drawing`.
    """
    output = Path(config.output)
    with folder_lock(output):
        # All are checked first: what cannot be written is reported before minutes of drawing.
        missing = [data_set for data_set in data_sets(config) if not data_set.exists(output)]
        if not missing:
            console.print(f"Toyland is complete in '{output}'.", highlight=False, soft_wrap=True)
            return
        with drawing(config.processes) as draw, progress(console) as bars:
            for data_set in missing:
                begin, total = time.monotonic(), sum(data_set.splits.values())
                bar = bars.add_task(data_set.name, total=total)
                clear_leftovers((output / data_set.path).parent)
                with replaced(output / data_set.path) as temporary:
                    temporary.mkdir()
                    for drawn in data_set.write(temporary, draw):
                        bars.advance(bar, drawn)
                bars.remove_task(bar)
                seconds = time.monotonic() - begin
                console.print(f"{data_set.name}: {total:,} samples in {seconds:.0f} s", highlight=False)
        console.print(f"Toyland is in '{output}'.", highlight=False, soft_wrap=True)


def progress(console: Console) -> Progress:
    """Bars with the time left; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 finished, 2 a mistake in the arguments or folders, 130 after Ctrl-C, 143 after SIGTERM."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        print(describe_schema(ToylandData))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no drawing process is left behind
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started it in the background
    sys.exit(main(sys.argv[1:]))
