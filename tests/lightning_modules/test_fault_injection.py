"""Fault injection: a run meets one fault after another at random moments, and must end as the run that met none.

One kill and one full disk are in every run of the slow tests; all of them, as many as wanted:

    pytest --slow --faults 5 tests/lightning_modules/test_fault_injection.py
"""

import contextlib
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

from callbacks.checkpoint import StepCheckpoint
from lightning_modules.checkpointing import checkpoints, verify
from tests.conftest import REPOSITORY
from tests.lightning_modules.processes import start, wait
from tests.lightning_modules.runs import (
    FOUR_ROWS,
    exported,
    finish,
    numbers,
    output,
    samples,
    training,
)

pytestmark = pytest.mark.slow
STEPS_PER_FAULT = 8  # so many are planned for each fault, which takes about half: the run must outlast them all
LIMIT_SECONDS = 100  # a run that was asked to stop and has not by then hangs; it takes a few on two free cores
FINISHED, STOPPED = 0, 128 + signal.SIGTERM  # of the first rank, whose exit status is the run's


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
    return [f"trainer.max_steps={STEPS_PER_FAULT * faults}", "trainer.keep_checkpoints=2"]


def entries(run: Path) -> dict[tuple[str, int, int], list[str]]:
    """Samples by rank, step and micro-batch. What was read again must be what was read first."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for file in run.glob("samples.*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written
                continue
            key = (file.name, entry["step"], entry["micro_batch"])
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
    """Drop what was read after the checkpoint of `step`: another number of ranks reads it again in other shares."""
    for file in run.glob("samples.*.jsonl"):
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        file.write_text("".join(line for line in lines if json.loads(line)["step"] < step))


@pytest.mark.parametrize(
    ("stage", "ranks", "told"),
    [
        ("language_modelling", 2, None),
        pytest.param("alignment", 1, None, marks=pytest.mark.one_fault),
        ("instruction_tuning", 2, None),
        ("alignment", 2, 0),
        ("alignment", 2, 1),
    ],
)
def test_killed_or_told_to_stop_at_random_moments(
    stage: str,
    ranks: int,
    told: int | None,
    faults: int,
    configs: dict[str, Path],
    tmp_path: Path,
    record_samples: None,
) -> None:
    """kill -9 of every rank in any order; or SIGTERM to one of two: both save and stop, and no step is done twice."""
    source, whole, cut = random.Random(f"{stage}{ranks}{told}"), tmp_path / "whole", tmp_path / "cut"
    finish(ranks, configs[stage], whole, *length(faults))
    arguments = [f"data.micro_batch_size={4 // ranks}", f"trainer.devices={ranks}", *length(faults)]
    for _ in range(faults):
        children = start(ranks, training(configs[stage], cut, *arguments), cut.with_suffix(".log"))
        live_a_little(cut, source, lambda children=children: is_over(children[0]))
        for child in source.sample(children, len(children)) if told is None else [children[told]]:
            os.kill(child, signal.SIGKILL if told is None else signal.SIGTERM)
        ended = [-signal.SIGKILL] * ranks if told is None else [STOPPED, FINISHED]
        assert wait(children, kill_after=LIMIT_SECONDS) == ended, output(cut)
    finish(ranks, configs[stage], cut, *length(faults))
    assert_same(cut, whole, stage)
    if told is not None:
        steps = [json.loads(line)["step"] for line in (cut / "samples.0.jsonl").open()]
        assert steps == list(range(STEPS_PER_FAULT * faults))


def test_launcher_told_to_stop_at_random_moments(faults: int, configs: dict[str, Path], tmp_path: Path) -> None:
    """SIGTERM to the process that started the other rank for trainer.devices=2."""
    stage, source, whole, stopped = "alignment", random.Random(2), tmp_path / "whole", tmp_path / "stopped"
    finish(2, configs[stage], whole, *length(faults))
    arguments = [f"run={stopped}", *FOUR_ROWS, "data.micro_batch_size=2", "trainer.devices=2", *length(faults)]
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


def test_ranks_and_workers_change(faults: int, configs: dict[str, Path], tmp_path: Path, record_samples: None) -> None:
    """1 → 2 → 1 … sharded ranks and 0 → 2 → 0 … workers, after each kill -9."""
    stage, source, whole, changed = "language_modelling", random.Random(3), tmp_path / "whole", tmp_path / "changed"
    # The rate keeps rounding, which differs with the number of ranks, from growing over the steps.
    options = [*length(faults), "optimizer.lr=1e-4"]
    finish(1, configs[stage], whole, *options)
    for life in range(faults + 1):
        ranks = 1 + life % 2
        workers = [f"data.num_workers={2 * (life // 2 % 2)}"]
        rest = [f"data.micro_batch_size={4 // ranks}", f"trainer.devices={ranks}", *options, *workers]
        children = start(ranks, training(configs[stage], changed, *rest), changed.with_suffix(".log"))
        if life < faults:
            live_a_little(changed, source, lambda children=children: is_over(children[0]))
            for child in children:
                os.kill(child, signal.SIGKILL)
        statuses = wait(children)
        forget_after(last_step(changed), changed)
        assert life < faults or statuses == [FINISHED] * ranks, output(changed)
    assert samples(changed) == samples(whole)
    for row, other in zip(numbers(whole, stage), numbers(changed, stage), strict=True):
        assert other[:2] == pytest.approx(row[:2], abs=1e-5)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("freed", [True, pytest.param(False, marks=pytest.mark.one_fault)])
def test_file_system_that_is_really_full(
    freed: bool,
    faults: int,
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The disk fills after step 3, and is freed after step 7 or when the run has ended: loud, nothing half-written, the
    same numbers."""
    stage, whole, mount = "alignment", tmp_path / "whole", tmp_path / "small"
    finish(1, configs[stage], whole, "trainer.max_steps=8")
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    run, filler = mount / "run", mount / "filler"
    ended = StepCheckpoint.on_train_batch_end

    def fill(self: StepCheckpoint, trainer, *given) -> None:
        if trainer.global_step == 3:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        elif trainer.global_step == 7 and freed:
            filler.unlink()
        ended(self, trainer, *given)

    again = training(configs[stage], run, "data.micro_batch_size=4", "trainer.max_steps=8")
    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", fill)
    try:
        assert again() == (FINISHED if freed else 2)
        assert "NO CHECKPOINT of step 4" in caplog.text and "No space left on device" in caplog.text
        assert "metrics.csv' could not be written" in caplog.text
        monkeypatch.undo()
        filler.unlink(missing_ok=True)
        assert again() == FINISHED
        assert numbers(run, stage) == numbers(whole, stage)
        tensors = exported(run)
        for name, tensor in exported(whole).items():
            assert torch.equal(tensors[name], tensor), name
        for checkpoint in checkpoints(run / "checkpoints"):
            verify(checkpoint)
        assert not list((run / "checkpoints").glob(".step-*"))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
