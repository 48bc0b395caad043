"""Evaluate: python evaluate.py evaluation.yaml [more.yaml | key=value …]

Each argument is a YAML file or key=value; later arguments override earlier ones. Protocols are in configs/protocols/.
Changing any of their values changes the protocol's fingerprint. A finished evaluation is reused; to continue an
interrupted one, run the same command again.

    python evaluate.py configs/toyland/evaluation.yaml
    python evaluate.py configs/toyland/evaluation.yaml configs/toyland/evaluation_short.yaml
    torchrun --nproc-per-node 8 evaluate.py configs/evaluation.yaml …       # byte-identical images
    python evaluate.py configs/toyland/evaluation.yaml dreambench.sampling.guidance_scale=5 output=runs/guidance-5
    python evaluate.py compare runs/toyland/evaluation runs/guidance-5      # protocols differ: needs force=true
    python evaluate.py tables runs/toyland/evaluation output=tables         # the paper's Tables 1 and 2

Score the images of another model; needs no KOSMOS-G weights. BENCHMARK is a file of configs/protocols/:

    python evaluate.py requests dreambench/kosmosg data=dreambooth/dataset output=runs/theirs   # images to generate
    python evaluate.py score dreambench/kosmosg images=theirs data=dreambooth/dataset output=runs/theirs
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during imports exits without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import; our loaders report missing weights

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import transformers

from evaluation.config import EvaluationConfig
from evaluation.images.external import write_requests
from evaluation.plan import benchmarks
from evaluation.processes import ProcessError
from evaluation.protocols.benchmark import EvaluationError
from evaluation.reports.compare import compare
from evaluation.reports.tables import write_tables
from evaluation.run import evaluate
from kosmosg.config import CONFIGS, ConfigError, describe_schema, load_config, split_options

INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status: 0 finished, 2 invalid or missing input, 130 interrupted."""
    words = [argument for argument in arguments if argument not in ("-h", "--help")]
    if not words:
        print((__doc__ or "") + "\nAdd --help to a file to list all keys.")
        return 0 if arguments else 2
    if len(words) < len(arguments):
        print(describe_schema(EvaluationConfig))
        return 0
    configure_logging()
    try:
        if words[0] in COMMANDS:
            COMMANDS[words[0]](words[1:])
        else:
            evaluate(load_config(words, EvaluationConfig))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`… | head`) has exited; discard what Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, EvaluationError, FileNotFoundError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to continue.", file=sys.stderr)
        return INTERRUPTED
    return 0


def print_error(error: Exception) -> None:
    """Print an error to stderr once: errors that all ranks share are printed by rank 0 alone."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or not isinstance(error, (ConfigError, ProcessError)):
        print(f"evaluate.py{f', process {rank}' if rank else ''}: {error}", file=sys.stderr)


def compare_command(arguments: Sequence[str]) -> None:
    """compare FOLDER FOLDER … [force=true]: print finished evaluations side by side."""
    paths, options = split_options(arguments, {"force": "false"})
    if options["force"] not in ("true", "false"):
        raise ConfigError(f"force={options['force']} is not allowed; it must be true or false.")
    print(compare(paths, force=options["force"] == "true"), end="")


def tables_command(arguments: Sequence[str]) -> None:
    """tables FOLDER … [output=tables]: write the paper's tables."""
    paths, options = split_options(arguments, {"output": "tables"})
    for file in write_tables(paths, Path(options["output"])):
        print(file)


def requests_command(arguments: Sequence[str]) -> None:
    """requests BENCHMARK data=FOLDER output=FOLDER, or requests evaluation.yaml [more.yaml | key=value …]: write the
    image requests for other models to <output>/requests/."""
    if arguments and not arguments[0].endswith(".yaml"):
        arguments, _ = benchmark_arguments("requests", arguments)
    config = load_config(arguments, EvaluationConfig)
    for name, benchmark in benchmarks(config).items():
        print(write_requests(name, benchmark.requests(), Path(config.output) / "requests", benchmark.folder))


def score_command(arguments: Sequence[str]) -> None:
    """score BENCHMARK images=FOLDER data=FOLDER output=FOLDER [name=NAME] [key=value …]: score a folder of images."""
    config, options = benchmark_arguments("score", arguments, "images")
    name = options["name"] or Path(options["images"]).resolve().name
    evaluate(load_config([*config, f"models.external={json.dumps({name: options['images']})}"], EvaluationConfig))


def benchmark_arguments(command: str, arguments: Sequence[str], *required: str) -> tuple[list[str], dict[str, str]]:
    """Translate `BENCHMARK key=value …` into arguments of `load_config`, and return the command's own options.

    Raises:
        ConfigError: the benchmark is unknown, or an option is missing.
    """
    benchmark, *rest = arguments or [""]
    protocols = CONFIGS / "protocols"
    file = protocols / f"{benchmark}.yaml"
    if not file.is_file():
        known = sorted(str(path.relative_to(protocols).with_suffix("")) for path in protocols.rglob("*.yaml"))
        raise ConfigError(f"{command}: there is no benchmark {benchmark!r}; allowed: {', '.join(known)}.")
    options, overrides = dict.fromkeys((*required, "data", "output", "name"), ""), []
    for argument in rest:
        key, _, value = argument.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(argument)
    if missing := [f"{key}=FOLDER" for key in (*required, "data", "output") if not options[key]]:
        raise ConfigError(f"{command} {benchmark} needs {', '.join(missing)}.")
    table = benchmark.partition("/")[0]
    return [str(file), f"data.{table}={options['data']}", f"output={options['output']}", *overrides], options


COMMANDS = {"compare": compare_command, "tables": tables_command, "requests": requests_command, "score": score_command}


def configure_logging() -> None:
    """Silence progress bars and warnings of libraries, such as those on missing fonts or unused classifier heads."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
