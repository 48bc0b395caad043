"""Two ranks train like one on the same global batch, with DDP and FSDP2; a run resumes on another number of them, and
after a stop or a step that is not finite on one of them."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import train
from lightning_modules.base import StageModule
from tests.lightning_modules import miniature
from tests.lightning_modules.miniature import STAGES
from tests.lightning_modules.processes import run_together, start, wait
from tests.lightning_modules.runs import (
    FOUR_ROWS,
    assert_same_training,
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

# Stage 1 reads mostly text: gradients and shards of the vision encoder are exchanged by all ranks, also by one without
# an image. Stage 2's released loss counts padding, of which each rank has its own.
OPTIONS = {
    "language_modelling": ["data.text.weight=30"],
    "alignment": ["recipe.variant=masked"],
    "instruction_tuning": [],
}
# Length buckets call a sharded network several times in one micro-batch; the single rank takes the batch whole.
SHARDED = {"language_modelling": [], "alignment": [], "instruction_tuning": ["recipe.length_buckets=2"]}


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one(stage: str, configs: dict[str, Path], tmp_path: Path, record_samples: None) -> None:
    """Whole copies with micro-batches of a row, and sharded with layers checkpointed: the same samples, losses,
    gradients and average of the weights, which is what is exported."""
    one, options = tmp_path / "one", ["ema.decay=0.5", "trainer.checkpoint_every=4", *OPTIONS[stage]]
    finish(1, configs[stage], one, *options)
    sharing = {
        "ddp": ["data.micro_batch_size=1"],
        "fsdp2": ["trainer.activation_checkpointing=selective", *SHARDED[stage]],
    }
    for strategy, more in sharing.items():
        two = tmp_path / strategy
        finish(2, configs[stage], two, *options, f"trainer.strategy={strategy}", *more)
        assert len(samples(one)) == 4 and samples(two) == samples(one), strategy
        assert_same_training(one, two, stage)
        if stage == "alignment":
            frozen = exported(two)
            assert all(torch.equal(frozen[name], t) for name, t in exported(one).items() if name.startswith("mllm."))
    if stage == "language_modelling":
        without: dict[int, list[bool]] = {}
        for line in (line for file in two.glob("samples.*.jsonl") for line in file.open()):
            read = json.loads(line)  # keys t0, t1, …: text
            without.setdefault(read["step"], []).append(all(Path(name).name[0] == "t" for name in read["samples"]))
        assert {sum(ranks) for ranks in without.values()} >= {1, 2}, "a step of one rank without an image, and of both"


def test_run_resumes_on_another_number_of_ranks(
    configs: dict[str, Path], tmp_path: Path, record_samples: None, capsys: pytest.CaptureFixture
) -> None:
    """1 → 2 → 1 with gradients accumulated, in stage 1, whose loss is a mean over tokens; never with another batch."""
    stage = "language_modelling"
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    finish(1, configs[stage], whole, "ema.decay=0.5")
    again = [str(configs[stage]), f"run={changed}", *FOUR_ROWS, "ema.decay=0.5"]
    for step, ranks, rows in ((2, 1, 4), (3, 2, 2), (4, 1, 2)):
        arguments = [*again, f"data.micro_batch_size={rows}", f"trainer.devices={ranks}", "trainer.checkpoint_every=1"]
        statuses = run_together(ranks, lambda given=arguments: train.main(given), changed.with_suffix(".log"))
        assert statuses == [0] * ranks, output(changed)
        if step < 4:
            back_to(changed, step)
    assert len(samples(whole)) == 4
    assert samples(changed) == samples(whole)
    for row, other in zip(numbers(whole, stage), numbers(changed, stage), strict=True):
        assert other[:2] == pytest.approx(row[:2], abs=1e-5)
    tensors = exported(changed)
    for name, tensor in exported(whole).items():
        assert torch.allclose(tensors[name], tensor, atol=1e-3), name

    back_to(changed, 3)
    refused = [argument for argument in again if "global_batch" not in argument]
    assert train.main([*refused, "data.micro_batch_size=2"]) == 2
    assert "set trainer.global_batch_size=4" in capsys.readouterr().err


def test_sharded_run_is_stopped_by_a_signal_to_one_rank_and_resumes_bit_for_bit(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    """To the second; test_fault_injection.py tells either, at random moments."""
    stage = "instruction_tuning"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ["trainer.max_steps=8", "trainer.val_every=8", "trainer.checkpoint_every=8"]
    finish(2, configs[stage], whole, *options)
    arguments = ["data.micro_batch_size=2", "trainer.devices=2", *options]
    children = start(2, training(configs[stage], stopped, *arguments), stopped.with_suffix(".log"))
    wait_for_rows(stopped, 1)
    os.kill(children[1], signal.SIGTERM)
    assert wait(children, kill_after=200) == [128 + signal.SIGTERM, 0], output(stopped)
    assert "Stopped and saved after step" in output(stopped)
    finish(2, configs[stage], stopped, *options)
    assert numbers(stopped, stage) == numbers(whole, stage)
    tensors = exported(stopped)
    for name, tensor in exported(whole).items():
        assert torch.equal(tensors[name], tensor), name


def test_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of one step, the gradient alone of the next."""
    stage, run = "alignment", tmp_path / "run"
    module = train.STAGES[stage].module
    losses_of = module.losses

    def spoil(self: StageModule, batch) -> dict[str, torch.Tensor]:
        losses = losses_of(self, batch)
        if self.training and self.trainer.global_rank == 1:
            if self.trainer.global_step == 1:
                losses["loss"] = losses["loss"] + float("inf")  # whose gradient is finite
            elif self.trainer.global_step == 2:
                losses["loss"].register_hook(lambda gradient: gradient * float("nan"))
        return losses

    monkeypatch.setattr(module, "losses", spoil)
    finish(2, configs[stage], run)
    rows = [float(row[1]) for row in miniature.losses(run, ["skipped_steps"])]
    assert rows == [0, 1, 2, 2]
    skipped = [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in skipped] == [2, 3]
    finite = [[found["loss_is_finite"] for found in entry["ranks"]] for entry in skipped]
    assert finite == [[True, False], [True, True]]
    assert all(len(found["samples"]) == 2 for entry in skipped for found in entry["ranks"])
    assert all(tensor.isfinite().all() for tensor in exported(run).values())

    aborted = tmp_path / "aborted"
    rows = ["data.micro_batch_size=2", "trainer.devices=2", "trainer.max_skipped_steps=1"]
    statuses = run_together(2, training(configs[stage], aborted, *rows), aborted.with_suffix(".log"))
    assert statuses == [2, 2], output(aborted)
    assert "2 steps had a loss or gradient that is not finite; trainer.max_skipped_steps is 1" in output(aborted)
    assert skipped[1]["ranks"][1]["samples"][0] in output(aborted)
