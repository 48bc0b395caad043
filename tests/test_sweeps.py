"""Sweeps: every shipped file gives W&B's agent commands that train.py takes; without a server the same trials run."""

import csv
import math
import os
import random
from pathlib import Path

import pytest
import yaml
from lightning_modules.runs.local_sweep import Sweep
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import train
from evaluation.config import EvaluationConfig
from evaluation.images.systems import AFTER_STAGE_3
from evaluation.protocols.protocol import identity
from evaluation.scores.results import Score
from evaluation.tracking import summary_key
from kosmosg.config import ConfigError, load_config
from tests.test_train import configs, shards  # noqa: F401, fixtures

REPOSITORY = Path(train.__file__).parent
TRIAL = REPOSITORY / "configs" / "sweeps" / "trial.yaml"
FILES = sorted(file for file in REPOSITORY.glob("configs/sweeps/**/*.yaml") if not file.stem.endswith("trial"))
SWEEPS = [file for file in FILES if file.stem != "guidance"]
EVALUATIONS = [file for file in FILES if file.stem == "guidance"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("file", SWEEPS, ids=[str(f.relative_to(TRIAL.parent)) for f in SWEEPS])
def test_the_agents_command_is_ours_and_train_takes_it(file, monkeypatch):
    sweep = Sweep.read(file)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    for settings in sweep.trials(20, seed=0):
        command = sweep.render(settings)
        agent = create_sweep_command_args({"args": {name: {"value": value} for name, value in settings.items()}})
        assert command[-len(settings) :] == agent["args_no_hyphens"]
        assert command[0] == "/usr/bin/env" and command[2] == "train.py"
        experiment = load_config(command[3:], train.stage_schema)
        assert experiment.run == "runs/sweeps/s1/r1" and experiment.wandb.group == "sweep-s1"
        for name, value in settings.items():
            found = experiment
            for part in name.split("."):
                found = getattr(found, part)
            assert found == value
    assert yaml.safe_load(file.read_text())["metric"]["name"].startswith("val/")


@pytest.mark.parametrize("file", EVALUATIONS, ids=[str(f.relative_to(TRIAL.parent)) for f in EVALUATIONS])
def test_the_agents_command_is_an_evaluation_of_its_own(file, monkeypatch):
    sweep, key = Sweep.read(file), "dreambench.sampling.guidance_scale"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    fingerprints = set()
    for number, settings in enumerate(sweep.trials(None, seed=0)):
        monkeypatch.setenv("WANDB_RUN_ID", f"r{number}")
        command = sweep.render(settings)
        agent = create_sweep_command_args({"args": {name: {"value": value} for name, value in settings.items()}})
        assert command[-1:] == agent["args_no_hyphens"] == [f"{key}={settings[key]}"]
        assert command[0] == "/usr/bin/env" and command[2] == "evaluate.py"
        config = load_config(command[3:], EvaluationConfig)
        assert config.output == f"runs/sweeps/s1/r{number}" and config.wandb.group == "sweep-s1"
        assert config.dreambench is not None and config.dreambench.sampling.guidance_scale == settings[key]
        fingerprints.add(identity(config.dreambench))
    assert len(fingerprints) == len(sweep.trials(None, seed=0)) > 3
    optimised = yaml.safe_load(file.read_text())["metric"]["name"]
    assert optimised == summary_key(Score("dreambench", AFTER_STAGE_3, "dino", 0, 0, 0, 1, "p"))


SWEEP = {
    "program": str(REPOSITORY / "train.py"),
    "method": "random",
    "metric": {"name": "val/mse_loss", "goal": "minimize"},
    "parameters": {"optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}},
}


def write(folder: Path, **changes) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(
        yaml.safe_dump({**SWEEP, "command": ["${env}", "python", "${program}", "${args_no_hyphens}"], **changes})
    )
    return file


@pytest.mark.slow
def test_trials_run_are_ranked_and_not_run_again(configs, tmp_path, monkeypatch, capfd):  # noqa: F811
    command = ["${env}", "python", "${program}", str(configs["alignment"]), str(TRIAL), "${args_no_hyphens}"]
    file = write(tmp_path, command=command)
    monkeypatch.chdir(tmp_path)
    assert train.main(["sweep", str(file), "trials=2", "trainer.max_steps=2", "trainer.val_every=1"]) == 0
    folder = tmp_path / "runs" / "sweeps" / "local-sweep"
    with (folder / "ranking.csv").open() as source:
        rows = list(csv.DictReader(source))
    values = [float(row["val/mse_loss"]) for row in rows]
    assert len(rows) == 2 and values == sorted(values) and len({row["optimizer.lr"] for row in rows}) == 2
    for number, settings in enumerate(Sweep.read(file).trials(2, seed=0)):
        run = folder / f"trial-{number:03d}"
        assert list((run / "wandb").glob(f"offline-run-*-trial-{number:03d}"))
        assert load_config([str(run)], train.stage_schema).optimizer.lr == settings["optimizer.lr"]
    finished = {run: os.stat(folder / run / "metrics.csv").st_mtime_ns for run in ("trial-000", "trial-001")}
    capfd.readouterr()
    assert train.main(["sweep", str(file), "trials=2", "trainer.max_steps=2", "trainer.val_every=1"]) == 0
    assert capfd.readouterr().out.count("is finished since") == 2
    assert finished == {run: os.stat(folder / run / "metrics.csv").st_mtime_ns for run in finished}


def test_a_grid_is_run_whole(tmp_path):
    parameters = {"optimizer.lr": {"values": [0.1, 0.2]}, "seed": {"value": 3}, "recipe.a": {"values": ["x", "y"]}}
    trials = Sweep.read(write(tmp_path, method="grid", parameters=parameters)).trials(None, seed=0)
    assert [(t["optimizer.lr"], t["seed"], t["recipe.a"]) for t in trials] == [
        (0.1, 3, "x"), (0.1, 3, "y"), (0.2, 3, "x"), (0.2, 3, "y")
    ]  # fmt: skip


def test_random_trials_are_the_same_whatever_their_number(tmp_path):
    sweep = Sweep.read(write(tmp_path))
    assert sweep.trials(8, seed=0)[:3] == sweep.trials(3, seed=0) != sweep.trials(3, seed=1)
    logs = [math.log10(trial["optimizer.lr"]) for trial in sweep.trials(400, seed=0)]
    assert -4 <= min(logs) < -3.9 and -2.1 < max(logs) <= -2 and abs(sum(logs) / len(logs) + 3) < 0.1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "bayes"}, "method 'bayes' needs W&B's server"),
        ({"metric": {"name": "x", "goal": "low"}}, "metric.goal is 'low'"),
        ({"metric": {"name": "x"}}, "'goal' is missing"),
        ({"parameters": {"a": {"distribution": "normal", "min": 0, "max": 1}}}, "parameters.a has the distribution"),
        ({"parameters": {"a": {"min": 0}}}, "parameters.a 'max'"),
        ({"method": "grid", "parameters": {"a": {"min": 0, "max": 1}}}, "parameters.a has no values"),
    ],
)
def test_files_that_are_refused(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        Sweep.read(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "sweep takes one file"),
        (["nowhere.yaml"], "there is no sweep 'nowhere.yaml'"),
        (["FILE"], "give trials=8"),
        (["FILE", "trials=x"], "trials=x is not allowed"),
        (["FILE", "trials=1"], "trial 0 of"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, told):
    file = write(tmp_path, command=["python", "-c", "raise SystemExit(2)"])
    monkeypatch.chdir(tmp_path)
    assert train.main(["sweep", *(str(file) if a == "FILE" else a for a in arguments)]) == 2
    assert told in capsys.readouterr().err


def test_uniform_and_whole_numbers():
    from lightning_modules.runs.local_sweep import draw

    source = random.Random(0)
    assert {draw({"distribution": "int_uniform", "min": 1, "max": 3}, source) for _ in range(50)} == {1, 2, 3}
    assert all(0.5 <= draw({"min": 0.5, "max": 0.6}, source) <= 0.6 for _ in range(50))
