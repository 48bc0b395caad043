"""Miniature stages that several test files train."""

import json
from pathlib import Path

import pytest

from lightning_modules.base import StageModule
from tests.lightning_modules import miniature


@pytest.fixture
def record_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank writes the samples of its micro-batches to samples.<rank>.jsonl of the run folder."""
    begun = StageModule.training_step

    def record(self: StageModule, step, batch_idx: int):
        with open(Path(self.trainer.default_root_dir) / f"samples.{self.trainer.global_rank}.jsonl", "a") as file:
            for number, batch in enumerate(step):
                entry = {"step": self.trainer.global_step, "micro_batch": number, "samples": batch.report.samples}
                file.write(json.dumps(entry) + "\n")
        return begun(self, step, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", record)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def configs(
    tmp_path: Path, shards: Path, tiny_tokenizer: Path, tiny_stable_diffusion: Path, tiny_model: Path
) -> dict[str, Path]:
    init_from = {"alignment": tiny_model, "instruction_tuning": tiny_model}
    return miniature.write_config(tmp_path, shards, tiny_tokenizer, tiny_stable_diffusion, init_from)
