"""A W&B sweep's file run without a server: `python train.py sweep configs/sweeps/toyland/alignment.yaml trials=8`.

Trials are drawn as the file says (`random`, by a seed; `grid`, all of it) and run one after another by the file's own
command, as W&B's agent would. A trial is a run folder: a stopped sweep goes on where it was, and a finished trial is
not run again. At the end the trials are ranked by the file's metric.
"""

import csv
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kosmosg.config import ConfigError

METHODS = ("random", "grid")
GOALS = {"minimize": min, "maximize": max}
SWEEP_ID, RUN_ID, MODE = "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_MODE"
RUNS = Path("runs/sweeps")


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says.

    Raises:
        ConfigError: a key is missing, or a method, distribution or goal that is not run here.
    """

    name: str
    program: str
    method: str
    metric: str
    goal: str
    command: list[str]
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "Sweep":
        if not file.is_file():
            raise ConfigError(f"there is no sweep '{file}'.")
        values: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        try:
            metric = values["metric"]
            sweep = cls(file.stem, values["program"], values["method"], metric["name"], metric["goal"],
                        list(values["command"]), dict(values["parameters"]))  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ConfigError(f"'{file}' is no sweep of W&B's form: {error} is missing or of another kind.") from error
        if sweep.method not in METHODS:
            raise ConfigError(f"'{file}': method {sweep.method!r} needs W&B's server; here: {', '.join(METHODS)}.")
        if sweep.goal not in GOALS:
            raise ConfigError(f"'{file}': metric.goal is {sweep.goal!r}; allowed: {', '.join(GOALS)}.")
        for name, parameter in sweep.parameters.items():
            try:
                draw(parameter, random.Random(0))
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"'{file}': parameters.{name} {error}") from error
            if sweep.method == "grid" and not {"value", "values"} & set(parameter):
                raise ConfigError(f"'{file}': parameters.{name} has no values, which a grid needs.")
        return sweep

    def trials(self, count: int | None, seed: int) -> list[dict[str, Any]]:
        """The settings of each trial; trial k is the same whatever `count`.

        Raises:
            ConfigError: random trials without a count.
        """
        if self.method == "grid":
            choices = [p.get("values", [p.get("value")]) for p in self.parameters.values()]
            grid = [dict(zip(self.parameters, values, strict=True)) for values in itertools.product(*choices)]
            return grid[:count]
        if count is None:
            raise ConfigError("random trials have no end; give trials=8 or another number.")
        sources = [random.Random(f"{seed}:{number}") for number in range(count)]
        return [{name: draw(p, source) for name, p in self.parameters.items()} for source in sources]

    def render(self, settings: Mapping[str, Any]) -> list[str]:
        """The command of a trial, as W&B's agent builds it; `python` is the one that runs this."""
        macros = {
            "${env}": ["/usr/bin/env"],
            "${program}": [self.program],
            "${interpreter}": ["python"],
            "${args_no_hyphens}": [f"{name}={value}" for name, value in settings.items()],
        }
        words = [word for part in self.command for word in macros.get(part, [part])]
        return [sys.executable if word == "python" else word for word in words]


def draw(parameter: Mapping[str, Any], source: random.Random) -> Any:
    """One value of a parameter. Raises ValueError: a distribution that is not drawn here."""
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return source.choice(list(parameter["values"]))
    distribution = parameter.get("distribution", "uniform")
    low, high = parameter["min"], parameter["max"]
    if distribution == "uniform":
        return source.uniform(low, high)
    if distribution == "log_uniform_values":
        return math.exp(source.uniform(math.log(low), math.log(high)))
    if distribution == "int_uniform":
        return source.randint(low, high)
    raise ValueError(f"has the distribution {distribution!r}; allowed: uniform, log_uniform_values, int_uniform.")


def sweep_command(arguments: Sequence[str]) -> str:
    """Run FILE [trials=N] [seed=N] [key=value … for every trial]; where the ranking is, in a sentence.

    Raises:
        ConfigError: arguments that are missing or not allowed, see also `run_sweep`.
    """
    files = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(files) != 1:
        raise ConfigError(f"sweep takes one file, but {files} was given.")
    numbers = {}
    for name, default in (("trials", None), ("seed", 0)):
        given = options.pop(name, None)
        if given is not None and not given.isdecimal():
            raise ConfigError(f"{name}={given} is not allowed; it is a whole number.")
        numbers[name] = default if given is None else int(given)
    extra = [f"{key}={value}" for key, value in options.items()]
    return f"The ranking is in '{run_sweep(Path(files[0]), numbers['trials'], numbers['seed'], extra)}'."


def run_sweep(file: Path, count: int | None, seed: int, extra: Sequence[str] = ()) -> Path:
    """Run the trials that are not finished; the ranking's file.

    Args:
        extra: key=value arguments for every trial, after the sweep's own.

    Raises:
        ConfigError: see `Sweep`; or a trial failed: what it said is above.
    """
    sweep = Sweep.read(file)
    folder = RUNS / f"local-{sweep.name}"
    trials = sweep.trials(count, seed)
    for number, settings in enumerate(trials):
        print(f"trial {number + 1} of {len(trials)}: " + " ".join(f"{k}={v}" for k, v in settings.items()), flush=True)
        environment = {MODE: "offline", **os.environ, SWEEP_ID: folder.name, RUN_ID: trial_name(number)}
        status = subprocess.run([*sweep.render(settings), *extra], env=environment, check=False).returncode
        if status in (130, -2):
            raise KeyboardInterrupt
        if status:
            raise ConfigError(
                f"trial {number} of '{file}' ended with status {status}; its run folder is in '{folder}'."
            )
    return write_ranking(sweep, folder, trials)


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


def write_ranking(sweep: Sweep, folder: Path, trials: Sequence[Mapping[str, Any]]) -> Path:
    """ranking.csv: trials by the best value of the metric, with their settings."""
    best = GOALS[sweep.goal]
    rows = []
    for number, settings in enumerate(trials):
        with (folder / trial_name(number) / "metrics.csv").open(newline="") as source:
            values = [float(row[sweep.metric]) for row in csv.DictReader(source) if row.get(sweep.metric)]
        if not values:
            raise ConfigError(
                f"trial {number} logged no {sweep.metric}, by which the sweep ranks; validate more often."
            )
        rows.append({"trial": trial_name(number), sweep.metric: best(values), **settings})
    rows.sort(key=lambda row: row[sweep.metric], reverse=sweep.goal == "maximize")
    file = folder / "ranking.csv"
    with file.open("w", newline="") as target:
        writer = csv.DictWriter(target, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{name}={v:.4g}" if isinstance(v, float) else f"{name}={v}" for name, v in row.items()))
    return file
