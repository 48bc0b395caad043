"""Write Toyland: python -m datamodules.toyland [more.yaml | key=value …]

Starts from configs/toyland/data.yaml; every argument is a YAML file or key=value; later wins. Parts that stand are
reused, an interrupted one is drawn again.

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
from datamodules.folder_lock import held
from datamodules.toyland.config import ToylandData
from datamodules.toyland.drawing import drawing
from datamodules.toyland.parts import all_parts
from kosmosg.config import CONFIGS, ConfigError, describe_schema, load_config
from kosmosg.files import clear_leftovers, replaced

DEFAULTS = str(CONFIGS / "toyland" / "data.yaml")


def build(config: ToylandData, console: Console) -> None:
    """Build every part that does not stand yet.

    Raises:
        DataError: a folder was built from other settings, another process builds here, or see `drawing`.
    """
    output = Path(config.output)
    with held(output):
        # All are looked at first: a part that cannot be built is told before minutes of drawing.
        missing = [part for part in all_parts(config) if not part.stands(output)]
        if not missing:
            console.print(f"Toyland stands in '{output}'.", highlight=False, soft_wrap=True)
            return
        with drawing(config.processes) as draw, progress(console) as bars:
            for part in missing:
                begin, total = time.monotonic(), sum(part.splits.values())
                bar = bars.add_task(part.name, total=total)
                clear_leftovers((output / part.path).parent)
                with replaced(output / part.path) as temporary:
                    temporary.mkdir()
                    for drawn in part.write(temporary, draw):
                        bars.advance(bar, drawn)
                bars.remove_task(bar)
                told = f"{part.name}: {total:,} samples in {time.monotonic() - begin:.0f} s"
                console.print(told, highlight=False)
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
        print("Interrupted. The same command goes on with the part that is not finished.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started it in the background
    sys.exit(main(sys.argv[1:]))
