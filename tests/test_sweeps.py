"""Sweeps are run by `wandb agent`: every shipped file gives it commands that train.py and evaluate.py take."""

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import train
from evaluation.config import EvaluationConfig
from evaluation.images.systems import AFTER_STAGE_3
from evaluation.protocols.protocol import identity
from evaluation.scores.results import Score
from evaluation.tracking import summary_key
from kosmosg.config import load_config
from tests.conftest import REPOSITORY

TRIAL = REPOSITORY / "configs" / "sweeps" / "trial.yaml"
FILES = sorted(file for file in REPOSITORY.glob("configs/sweeps/**/*.yaml") if not file.stem.endswith("trial"))
SWEEPS = [file for file in FILES if file.stem != "guidance"]
EVALUATIONS = [file for file in FILES if file.stem == "guidance"]


@pytest.fixture(autouse=True)
def agent_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield
    wandb.teardown()  # else runs of later tests in this process have the agent's id, too


def draws(parameter: dict[str, Any], source: random.Random) -> list[Any]:
    """Values of a parameter, the ends of its range among them."""
    if "values" in parameter or "value" in parameter:
        return parameter.get("values", [parameter.get("value")])
    low, high = parameter["min"], parameter["max"]
    between = {
        "uniform": lambda: source.uniform(low, high),
        "log_uniform_values": lambda: math.exp(source.uniform(math.log(low), math.log(high))),
        "int_uniform": lambda: source.randint(low, high),
    }[parameter.get("distribution", "uniform")]
    return [low, high, between(), between()]


def commands(file: Path) -> list[tuple[dict[str, Any], list[str]]]:
    """Settings of trials and the command lines that W&B's agent makes of them, from the program's name on."""
    sweep = yaml.safe_load(file.read_text())
    values = {name: draws(parameter, random.Random(0)) for name, parameter in sweep["parameters"].items()}
    count = max(map(len, values.values()))
    found = []
    for number in range(count):
        settings = {name: next(itertools.islice(itertools.cycle(of), number, None)) for name, of in values.items()}
        arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in settings.items()}})
        macros = {"${program}": [sweep["program"]], "${args_no_hyphens}": arguments["args_no_hyphens"]}
        words = [word for part in sweep["command"] for word in macros.get(part, [part])]
        assert words[:2] == ["${env}", "python"]
        found.append((settings, words[2:]))
    return found


def test_trials_of_the_agent_are_experiments() -> None:
    for file in SWEEPS:
        for settings, (program, *arguments) in commands(file):
            assert program == "train.py"
            experiment = load_config(arguments, train.stage_schema)
            assert experiment.run == "runs/sweeps/s1/r1" and experiment.wandb.group == "sweep-s1"
            for name, value in settings.items():
                found: Any = experiment
                for part in name.split("."):
                    found = getattr(found, part)
                assert found == value
        assert yaml.safe_load(file.read_text())["metric"]["name"].startswith("val/")


def test_trials_of_the_agent_are_evaluations() -> None:
    for file in EVALUATIONS:
        key, identities = "dreambench.sampling.guidance_scale", set()
        for settings, (program, *arguments) in commands(file):
            assert program == "evaluate.py"
            config = load_config(arguments, EvaluationConfig)
            assert config.output == "runs/sweeps/s1/r1" and config.wandb.group == "sweep-s1"
            assert config.dreambench is not None and config.dreambench.sampling.guidance_scale == settings[key]
            identities.add(identity(config.dreambench))
        assert len(identities) > 3
        optimised = yaml.safe_load(file.read_text())["metric"]["name"]
        assert optimised == summary_key(Score("dreambench", AFTER_STAGE_3, "dino", 0, 0, 0, 1, "p"))


def test_a_trial_runs_and_its_folder_reads_back(
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    _, (_, _, trial, *arguments) = commands(REPOSITORY / "configs" / "sweeps" / "toyland" / "alignment.yaml")[0]
    given = [
        str(configs["alignment"]),
        str(REPOSITORY / trial),
        *arguments,
        "trainer.max_steps=2",
        "trainer.val_every=1",
    ]
    assert train.main(given) == 0
    run = tmp_path / "runs" / "sweeps" / "s1" / "r1"
    assert "val/mse_loss" in (run / "metrics.csv").read_text()
    assert list((run / "wandb").glob("offline-run-*-r1"))
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_MODE"):
        monkeypatch.delenv(name)
    assert load_config([str(run)], train.stage_schema).optimizer.lr == pytest.approx(float(arguments[0].split("=")[1]))
