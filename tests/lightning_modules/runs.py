"""Runs of the miniature stages on one or several ranks, and what they left behind."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from lightning_modules.checkpointing import read_shapes
from lightning_modules.run_folder import RunFolder
from tests.lightning_modules import miniature
from tests.lightning_modules.processes import run_together

TRACKED = {
    "language_modelling": ("train/loss", "grad_norm", "val/caption_loss", "val/caption_loss_mismatched_images"),
    "alignment": ("train/loss", "grad_norm", "val/mse_loss", "val/mse_loss"),
    "instruction_tuning": ("train/loss", "grad_norm", "val/diffusion_loss", "val/diffusion_loss_mismatched_images"),
}
FOUR_ROWS = ["trainer.global_batch_size=4", "data.validation_samples=8", "model.mllm.dropout=0"]


def run(file: Path, *arguments: object) -> int:
    """The exit status of `train.py` in this process."""
    return train.main([str(file), *map(str, arguments)])


def training(file: Path, run: Path, *arguments: str) -> Callable[[], int]:
    return lambda: train.main([str(file), f"run={run}", *FOUR_ROWS, *arguments])


def finish(ranks: int, file: Path, run: Path, *arguments: str) -> None:
    """Train to the end."""
    rows = [f"data.micro_batch_size={4 // ranks}", f"trainer.devices={ranks}"]
    statuses = run_together(ranks, training(file, run, *rows, *arguments), run.with_suffix(".log"))
    assert statuses == [0] * ranks, output(run)


def output(run: Path) -> str:
    return "".join(log.read_text()[-3000:] for log in sorted(run.parent.glob(f"{run.name}.log.*")))


def numbers(run: Path, stage: str) -> list[tuple[float, ...]]:
    rows = miniature.losses(run, TRACKED[stage])
    return [tuple(float(value) if value else 0.0 for value in row) for row in rows]


def exported(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "model").rglob("*.safetensors"))
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_training(one: Path, other: Path, stage: str, rel: float = 1e-4) -> None:
    """Losses, gradients and the exported model to rounding. Images are mismatched within each micro-batch, so that the
    last loss is left out."""
    rows, others = numbers(one, stage), numbers(other, stage)
    assert rows
    for row, theirs in zip(rows, others, strict=True):
        assert theirs[:-1] == pytest.approx(row[:-1], rel=rel), other.name
    tensors = exported(other)
    for name, tensor in exported(one).items():
        assert torch.allclose(tensors[name], tensor, atol=1e-3), (other.name, name)


def weights(run: Path) -> dict[str, bytes]:
    """The exported safetensors, byte for byte."""
    return {str(f.relative_to(run)): f.read_bytes() for f in sorted((run / "model").rglob("*.safetensors"))}


def part(run: Path, name: str, model: str = "model") -> dict[str, torch.Tensor]:
    """Tensors of one network of a model folder."""
    return load_file(next((run / model / name).glob("*.safetensors")))


def trainable_names(run: Path) -> list[str]:
    """Names of the model's tensors in the last checkpoint."""
    names = read_shapes(RunFolder(run).latest_checkpoint())
    assert {name.split(".")[0] for name in names} == {"model", "optimizer"}
    return [name.removeprefix("model.") for name in names if name.startswith("model.")]


def samples(run: Path) -> list[list[str]]:
    """Samples of each step, in the order of the global batch, from what `record_samples` wrote."""
    parts: dict[tuple[int, int], dict[int, list[str]]] = {}
    for file in run.glob("samples.*.jsonl"):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            parts.setdefault((entry["step"], entry["micro_batch"]), {})[int(file.suffixes[0][1:])] = entry["samples"]
    steps: dict[int, list[str]] = {}
    for (step, _), of_rank in sorted(parts.items()):
        steps.setdefault(step, []).extend(name for rank in sorted(of_rank) for name in of_rank[rank])
    return [steps[step] for step in sorted(steps)]


def back_to(run: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of `step`."""
    (run / "finished.json").unlink()
    shutil.rmtree(run / "model")
    for later in (run / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    for file in run.glob("samples.*.jsonl"):
        file.write_text("".join(line for line in file.open() if json.loads(line)["step"] < step))


def wait_for_rows(run: Path, count: int) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if (run / "metrics.csv").is_file() and len((run / "metrics.csv").read_text().splitlines()) > count:
            return
        time.sleep(0.005)
    raise AssertionError(output(run))
