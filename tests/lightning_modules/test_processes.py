"""Two processes train like one on the same global batch, whole copies or sharded; a run goes on with another number of
them, and after a stop or a step that is not finite on one of them."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from lightning_modules.base import StageModule
from tests.lightning_modules import miniature
from tests.lightning_modules.processes import run_together, start, wait
from tests.lightning_modules.runs import (
    FOUR_ROWS,
    back_to,
    exported,
    finish,
    numbers,
    output,
    samples,
    training,
    wait_for_rows,
)

pytestmark = pytest.mark.slow

# Groups of like length call a sharded network several times in one pass; the single process takes the batch whole.
# Stage 2's released loss counts padding, which each process has its own of.
BOTH = {"language_modelling": [], "alignment": ["recipe.variant=masked"], "instruction_tuning": []}
GROUPED = {"language_modelling": [], "alignment": [], "instruction_tuning": ["recipe.length_groups=2"]}


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [
        ("language_modelling", "ddp"),
        ("language_modelling", "fsdp2"),
        ("alignment", "fsdp2"),
        ("instruction_tuning", "ddp"),
        ("instruction_tuning", "fsdp2"),
    ],
)
def test_two_processes_equal_one(stage: str, strategy: str, configs: dict[str, Path], tmp_path: Path) -> None:
    """Also the average of the weights, which is what is exported; sharded, layers are recomputed."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["ema.decay=0.5", *BOTH[stage]]
    finish(1, configs[stage], one, *options)
    recompute = "selective" if strategy == "fsdp2" else "none"
    sharing = [f"trainer.strategy={strategy}", f"trainer.recompute={recompute}"]
    finish(2, configs[stage], two, *options, *GROUPED[stage], *sharing)
    # The images that are put in a wrong place are each process's own, so that one loss is left out.
    expected, found = numbers(one, stage), numbers(two, stage)
    assert len(expected) == 4
    for row, other in zip(expected, found, strict=True):
        assert other[:-1] == pytest.approx(row[:-1], rel=1e-4)
    before, tensors = exported_before(configs[stage]), exported(two)
    for name, tensor in exported(one).items():
        assert torch.allclose(tensors[name], tensor, atol=1e-3), name
        if stage == "alignment" and name.startswith("mllm."):
            assert torch.equal(tensors[name], before[name]), f"{name} is frozen but moved"


def exported_before(config: Path) -> dict[str, torch.Tensor]:
    import yaml

    start_from = yaml.safe_load(config.read_text())["init_from"]
    if start_from is None:
        return {}
    files = sorted(Path(start_from).rglob("*.safetensors"))
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_process_without_an_image_keeps_no_other_waiting(
    strategy: str, configs: dict[str, Path], tmp_path: Path, record_samples: None
) -> None:
    """Gradients and shards of the image tower are exchanged by all processes, also by one that read text alone."""
    stage, mostly_text = "language_modelling", "data.text.weight=30"
    one, two = tmp_path / "one", tmp_path / "two"
    finish(1, configs[stage], one, mostly_text)
    finish(2, configs[stage], two, mostly_text, f"trainer.strategy={strategy}")
    passes = [json.loads(line)["samples"] for file in two.glob("samples.*.jsonl") for line in file.open()]
    without = [all(Path(name).name.startswith("t") for name in names) for names in passes]  # keys t0, t1, …: text
    assert any(without) and not all(without)
    for row, other in zip(numbers(one, stage), numbers(two, stage), strict=True):
        assert other[:2] == pytest.approx(row[:2], rel=1e-4)


def test_run_goes_on_with_another_number_of_processes(
    configs: dict[str, Path], tmp_path: Path, record_samples: None
) -> None:
    """1 → 2 → 1 with passes accumulated, in stage 1, whose loss is a mean over tokens."""
    stage = "language_modelling"
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    finish(1, configs[stage], whole, "ema.decay=0.5")
    again = [str(configs[stage]), f"run={changed}", *FOUR_ROWS, "ema.decay=0.5"]
    for step, processes, rows in ((2, 1, 4), (3, 2, 2), (4, 1, 2)):
        arguments = [*again, f"data.batch_size={rows}", f"trainer.devices={processes}", "trainer.checkpoint_every=1"]
        statuses = run_together(processes, lambda given=arguments: train.main(given), changed.with_suffix(".log"))
        assert statuses == [0] * processes, output(changed)
        if step < 4:
            back_to(changed, step)
    assert len(samples(whole)) == 4
    assert samples(changed) == samples(whole)
    for row, other in zip(numbers(whole, stage), numbers(changed, stage), strict=True):
        assert other[:2] == pytest.approx(row[:2], abs=1e-5)
    tensors = exported(changed)
    for name, tensor in exported(whole).items():
        assert torch.allclose(tensors[name], tensor, atol=1e-3), name


def test_other_global_batch_is_refused(configs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(1, configs["alignment"], run)
    back_to(run, 2)
    arguments = [str(configs["alignment"]), f"run={run}", "model.mllm.dropout=0", "data.batch_size=2"]
    assert run_together(1, lambda: train.main([*arguments, "data.validation_samples=8"]), run.with_suffix(".log")) == [
        2
    ]
    assert "set trainer.global_batch_size=4" in output(run)


@pytest.mark.parametrize("told", [0, 1])
def test_sharded_run_is_stopped_by_a_signal_to_one_process_and_goes_on_bit_for_bit(
    told: int, configs: dict[str, Path], tmp_path: Path
) -> None:
    stage = "instruction_tuning"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(2, configs[stage], whole)
    rows = ["data.batch_size=2", "trainer.devices=2"]
    children = start(2, training(configs[stage], stopped, *rows), stopped.with_suffix(".log"))
    wait_for_rows(stopped, 1)
    os.kill(children[told], signal.SIGTERM)
    statuses = wait(children, kill_after=200)
    if statuses != [0, 0]:  # the signal came before the last step
        assert statuses == [128 + signal.SIGTERM] * 2, output(stopped)
        assert "Stopped and saved after step" in output(stopped)
        finish(2, configs[stage], stopped)
    assert numbers(stopped, stage) == numbers(whole, stage)
    tensors = exported(stopped)
    for name, tensor in exported(whole).items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_step_that_is_not_finite_on_one_process_is_skipped_on_all(
    what: str, configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, run = "alignment", tmp_path / "run"
    step = train.STAGES[stage].module.training_step

    def spoil(self: StageModule, batch, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        if self.trainer.global_step in (1, 2) and self.trainer.global_rank == 1:
            if what == "loss":
                return loss + float("inf")  # whose gradient is finite
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(train.STAGES[stage].module, "training_step", spoil)
    finish(2, configs[stage], run)
    rows = [float(row[1]) for row in miniature.losses(run, ["skipped_steps"])]
    assert rows == [0, 1, 2, 2]
    skipped = [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in skipped] == [2, 3]
    assert [found["loss_is_finite"] for found in skipped[0]["processes"]] == [True, what == "gradient"]
    assert all(len(found["samples"]) == 2 for found in skipped[0]["processes"])
    assert all(tensor.isfinite().all() for tensor in exported(run).values())

    aborted = tmp_path / "aborted"
    rows = ["data.batch_size=2", "trainer.devices=2", "trainer.max_skipped_steps=1"]
    statuses = run_together(2, training(configs[stage], aborted, *rows), aborted.with_suffix(".log"))
    assert statuses == [2, 2], output(aborted)
    assert "2 updates had a loss or gradient that is not finite; trainer.max_skipped_steps is 1" in output(aborted)
    assert skipped[1]["processes"][1]["samples"][0] in output(aborted)
