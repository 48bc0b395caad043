"""Evaluate: python evaluate.py evaluation.yaml [more.yaml | key=value …]

Every argument is a YAML file or key=value; later wins. Protocols are extended from configs/protocols/, and any of their
values may be changed, which gives the protocol another fingerprint. A finished evaluation is reused, an interrupted
one goes on where it was.

    python evaluate.py configs/toyland/evaluation.yaml
    python evaluate.py configs/toyland/evaluation.yaml configs/toyland/evaluation_short.yaml
    torchrun --nproc-per-node 8 evaluate.py configs/evaluation.yaml …       # the same images, to the byte
    python evaluate.py configs/toyland/evaluation.yaml dreambench.sampling.guidance_scale=5 output=runs/guidance-5
    python evaluate.py compare runs/toyland/evaluation runs/guidance-5      # refused: another protocol; force=true
    python evaluate.py tables runs/toyland/evaluation output=tables         # the paper's Tables 1 and 2
    python evaluate.py requests configs/toyland/evaluation.yaml             # what a rival draws: models.external
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the libraries load ends quietly: nothing has begun
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import; our loaders report weights themselves

import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import transformers

from evaluation.config import EvaluationConfig
from evaluation.images.external import write_requests
from evaluation.parallel.processes import ProcessError
from evaluation.plan import datasets
from evaluation.protocols.requests import EvaluationError
from evaluation.reports.compare import compare
from evaluation.reports.tables import write_tables
from evaluation.run import evaluate
from kosmosg.config import ConfigError, describe_schema, load_config, split_options

INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 finished, 2 something missing or mistaken, 130 interrupted."""
    given = [argument for argument in arguments if argument not in ("-h", "--help")]
    if not given:
        print((__doc__ or "") + "\nWith --help and a file, all keys are listed.")
        return 0 if arguments else 2
    if len(given) < len(arguments):
        print(describe_schema(EvaluationConfig))
        return 0
    quiet_libraries()
    try:
        if given[0] in COMMANDS:
            COMMANDS[given[0]](given[1:])
            return 0
        evaluate(load_config(given, EvaluationConfig))
    except (ConfigError, EvaluationError, FileNotFoundError) as error:
        tell(error)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    return 0


def tell(error: Exception) -> None:
    """A mistake, once: of several processes, the first tells what all run into, each what befell itself."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or not isinstance(error, (ConfigError, ProcessError)):
        print(f"evaluate.py{f', process {rank}' if rank else ''}: {error}", file=sys.stderr)


def compare_command(arguments: Sequence[str]) -> None:
    """compare FOLDER FOLDER … [force=true]"""
    paths, options = split_options(arguments, {"force": "false"})
    if options["force"] not in ("true", "false"):
        raise ConfigError(f"force={options['force']} is not allowed; it is true or false.")
    print(compare(paths, force=options["force"] == "true"), end="")


def tables_command(arguments: Sequence[str]) -> None:
    """tables FOLDER … [output=tables]"""
    paths, options = split_options(arguments, {"output": "tables"})
    for file in write_tables(paths, Path(options["output"])):
        print(file)


def requests_command(arguments: Sequence[str]) -> None:
    """requests evaluation.yaml [more.yaml | key=value …]: what rivals are asked to draw, into <output>/requests/"""
    config = load_config(arguments, EvaluationConfig)
    for table, dataset in datasets(config):
        print(write_requests(table, dataset.requests(), Path(config.output) / "requests"))


COMMANDS = {"compare": compare_command, "tables": tables_command, "requests": requests_command}


def quiet_libraries() -> None:
    """No loading bars between our own; a classifier's head that FID's network leaves out is no news."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
