"""Miniature stages that several test files train."""

import json
from pathlib import Path

import pytest

from lightning_modules.base import StageModule
from tests.lightning_modules import miniature


@pytest.fixture
def record_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = StageModule.on_train_batch_start

    def record(self: StageModule, batch, batch_idx: int) -> None:
        entry = {"update": self.trainer.global_step, "pass": self.forward_pass, "samples": batch.report.samples}
        with open(Path(self.trainer.default_root_dir) / f"samples.{self.trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        begun(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "on_train_batch_start", record)


@pytest.fixture
def configs(tmp_path: Path, tiny_tokenizer: Path, tiny_stable_diffusion: Path, tiny_model: Path) -> dict[str, Path]:
    shards = miniature.write_shards(tmp_path / "shards")
    init_from = {"alignment": tiny_model, "instruction_tuning": tiny_model}
    return miniature.write_config(tmp_path, shards, tiny_tokenizer, tiny_stable_diffusion, init_from)
