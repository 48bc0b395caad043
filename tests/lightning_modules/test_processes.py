"""Two processes train like one on the same global batch, whole copies or sharded, and go on after a stop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.lightning_modules import miniature

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
TRACKED = {
    "language_modelling": ("train/loss", "grad_norm", "val/caption_loss", "val/caption_loss_wrong_image"),
    "instruction_tuning": ("train/loss", "grad_norm", "val/diffusion_loss", "val/diffusion_loss_wrong_image"),
}


def train(file: Path, run: Path, *arguments: str) -> None:
    command = [sys.executable, "train.py", str(file), f"run={run}", "model.mllm.dropout=0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def numbers(run: Path, stage: str) -> list[tuple[float, ...]]:
    rows = miniature.losses(run, TRACKED[stage])
    return [tuple(float(value) if value else 0.0 for value in row) for row in rows]


def exported(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "model").rglob("*.safetensors"))
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def configs(tmp_path: Path, tiny_tokenizer: Path, tiny_stable_diffusion: Path, tiny_model: Path) -> dict[str, Path]:
    shards = miniature.write_shards(tmp_path / "shards")
    init_from = {"instruction_tuning": tiny_model}
    return miniature.write_config(tmp_path, shards, tiny_tokenizer, tiny_stable_diffusion, init_from)


# Groups of like length call a sharded network several times in one pass; the single process takes the batch whole.
GROUPED = {"language_modelling": [], "instruction_tuning": ["recipe.length_groups=2"]}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stage", TRACKED)
def test_two_processes_equal_one(stage: str, strategy: str, configs: dict[str, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # Four rows a step; validation of eight, so that both ways read the same rows.
    train(configs[stage], one, "data.batch_size=4", "data.validation_samples=8")
    halves = ["data.batch_size=2", "data.validation_samples=8", "trainer.devices=2", f"trainer.strategy={strategy}"]
    train(configs[stage], two, *halves, *GROUPED[stage])
    # The images that are put in a wrong place are each process's own, so that one loss is left out.
    expected, found = numbers(one, stage), numbers(two, stage)
    assert len(expected) == 4
    for row, other in zip(expected, found, strict=True):
        assert other[:-1] == pytest.approx(row[:-1], rel=1e-4)
    tensors = exported(two)
    for name, tensor in exported(one).items():
        assert torch.allclose(tensors[name], tensor, atol=1e-3), name


def test_sharded_run_goes_on_from_its_checkpoint(configs: dict[str, Path], tmp_path: Path) -> None:
    stage = "instruction_tuning"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sharded = ["data.batch_size=2", "trainer.devices=2", "trainer.strategy=fsdp2"]
    train(configs[stage], whole, *sharded)
    train(configs[stage], killed, *sharded)
    (killed / "checkpoints" / "step-00000004.ckpt").unlink()
    (killed / "finished.json").unlink()
    train(configs[stage], killed, *sharded)
    assert numbers(killed, stage) == numbers(whole, stage)
    tensors = exported(killed)
    for name, tensor in exported(whole).items():
        assert torch.equal(tensors[name], tensor), name
