"""Drills: a run meets one fault after another at random moments, and must end as the run that met none.

Two of them meet one fault in every run of the slow tests; all of them, as many as wanted:

    pytest --slow --drills 20 tests/lightning_modules/test_drills.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.lightning_modules.processes import start, wait
from tests.lightning_modules.runs import FOUR_ROWS, exported, finish, numbers, output, samples, training

pytestmark = pytest.mark.slow
UPDATES_OF_A_LIFE = 8  # so many are planned for each fault, for the run must outlast them all
LIMIT_SECONDS = 100  # a run that was asked to stop and still stands then hangs; it takes a few on two free cores
FINISHED, STOPPED = 0, 128 + signal.SIGTERM


def rows(run: Path) -> int:
    file = run / "metrics.csv"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def live_a_little(run: Path, source: random.Random, is_over) -> None:
    """Wait until the run has logged up to three more rows, and a moment longer."""
    wanted, until = rows(run) + source.randint(1, 3), time.monotonic() + 120
    while rows(run) < wanted and not is_over():
        assert time.monotonic() < until, output(run)
        time.sleep(0.002)
    time.sleep(source.uniform(0, 0.1))


def is_over(child: int) -> bool:
    """Whether the child has ended; its status is still to be fetched."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def length(faults: int) -> list[str]:
    return [f"trainer.max_steps={UPDATES_OF_A_LIFE * (faults + 1)}", "trainer.keep_checkpoints=2"]


def entries(run: Path) -> dict[tuple[str, int, int], list[str]]:
    """Samples by process, update and pass. What was read again must be what was read first."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for file in run.glob("samples.*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written
                continue
            key = (file.name, entry["update"], entry["pass"])
            assert found.setdefault(key, entry["samples"]) == entry["samples"]
    return found


def assert_same(run: Path, whole: Path, stage: str) -> None:
    """Every logged number, every sample and every exported bit."""
    assert numbers(run, stage) == numbers(whole, stage)
    assert entries(run) == entries(whole)
    tensors = exported(run)
    for name, tensor in exported(whole).items():
        assert torch.equal(tensors[name], tensor), name


def last_step(run: Path) -> int:
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def forget_after(step: int, run: Path) -> None:
    """Drop what was read after the checkpoint of `step`: another number of processes reads it again in other shares."""
    for file in run.glob("samples.*.jsonl"):
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        file.write_text("".join(line for line in lines if json.loads(line)["update"] < step))


@pytest.mark.parametrize(
    ("stage", "processes"),
    [
        ("language_modelling", 1),
        ("language_modelling", 2),
        ("alignment", 1),
        ("alignment", 2),
        ("instruction_tuning", 1),
        pytest.param("instruction_tuning", 2, marks=pytest.mark.rehearsed),
    ],
)
def test_killed_at_random_moments(
    stage: str, processes: int, faults: int, configs: dict[str, Path], tmp_path: Path, record_samples: None
) -> None:
    """kill -9 of every process, the first of them at random."""
    source, whole, killed = random.Random(f"{stage}{processes}"), tmp_path / "whole", tmp_path / "killed"
    finish(processes, configs[stage], whole, *length(faults))
    arguments = [f"data.batch_size={4 // processes}", f"trainer.devices={processes}", *length(faults)]
    for _ in range(faults):
        children = start(processes, training(configs[stage], killed, *arguments), killed.with_suffix(".log"))
        live_a_little(killed, source, lambda children=children: is_over(children[0]))
        for child in source.sample(children, len(children)):
            os.kill(child, signal.SIGKILL)
        assert wait(children) == [-signal.SIGKILL] * processes, output(killed)
    finish(processes, configs[stage], killed, *length(faults))
    assert_same(killed, whole, stage)


@pytest.mark.parametrize("told", [0, 1])
def test_told_to_stop_at_random_moments(
    told: int, faults: int, configs: dict[str, Path], tmp_path: Path, record_samples: None
) -> None:
    """SIGTERM to one of two sharded processes: both save and stop, and no update is done twice."""
    stage, source, whole, stopped = "alignment", random.Random(told), tmp_path / "whole", tmp_path / "stopped"
    finish(2, configs[stage], whole, *length(faults))
    arguments = ["data.batch_size=2", "trainer.devices=2", *length(faults)]
    for _ in range(faults):
        children = start(2, training(configs[stage], stopped, *arguments), stopped.with_suffix(".log"))
        live_a_little(stopped, source, lambda children=children: is_over(children[0]))
        os.kill(children[told], signal.SIGTERM)
        assert wait(children, kill_after=LIMIT_SECONDS) == [STOPPED] * 2, output(stopped)
    finish(2, configs[stage], stopped, *length(faults))
    assert_same(stopped, whole, stage)
    updates = [json.loads(line)["update"] for line in (stopped / "samples.0.jsonl").open()]
    assert updates == list(range(UPDATES_OF_A_LIFE * (faults + 1)))


def test_launcher_told_to_stop_at_random_moments(faults: int, configs: dict[str, Path], tmp_path: Path) -> None:
    """SIGTERM to the process that started the other one for trainer.devices=2."""
    stage, source, whole, stopped = "alignment", random.Random(2), tmp_path / "whole", tmp_path / "stopped"
    finish(2, configs[stage], whole, *length(faults))
    arguments = [f"run={stopped}", *FOUR_ROWS, "data.batch_size=2", "trainer.devices=2", *length(faults)]
    command = [sys.executable, "train.py", str(configs[stage]), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for fault in range(faults + 1):
        with (tmp_path / f"stopped.log.{fault}").open("w") as log:
            launcher = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
            if fault < faults:
                live_a_little(stopped, source, lambda launcher=launcher: launcher.poll() is not None)
                launcher.send_signal(signal.SIGTERM)
            status = launcher.wait(timeout=LIMIT_SECONDS if fault < faults else 300)
        assert status == (STOPPED if fault < faults else FINISHED), output(stopped)
    assert numbers(stopped, stage) == numbers(whole, stage)


@pytest.mark.rehearsed
def test_processes_and_workers_change(
    faults: int, configs: dict[str, Path], tmp_path: Path, record_samples: None
) -> None:
    """1 → 2 → 1 … sharded processes and 0 → 2 → 0 … workers, after each kill -9."""
    stage, source, whole, changed = "language_modelling", random.Random(3), tmp_path / "whole", tmp_path / "changed"
    # The rate keeps rounding, which differs with the number of processes, from growing over the updates.
    options = [*length(faults), "optimizer.lr=1e-4"]
    finish(1, configs[stage], whole, *options)
    for life in range(faults + 1):
        processes = 1 + life % 2
        workers = [f"data.num_workers={2 * (life // 2 % 2)}"]
        rest = [f"data.batch_size={4 // processes}", f"trainer.devices={processes}", *options, *workers]
        children = start(processes, training(configs[stage], changed, *rest), changed.with_suffix(".log"))
        if life < faults:
            live_a_little(changed, source, lambda children=children: is_over(children[0]))
            for child in children:
                os.kill(child, signal.SIGKILL)
        statuses = wait(children)
        forget_after(last_step(changed), changed)
        assert life < faults or statuses == [FINISHED] * processes, output(changed)
    assert samples(changed) == samples(whole)
    for row, other in zip(numbers(whole, stage), numbers(changed, stage), strict=True):
        assert other[:2] == pytest.approx(row[:2], abs=1e-5)
