"""What each rank reads, and folders of tiny image decoders and language models."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from lightning_modules.base import StageModule
from tests import tiny


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
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_stable_diffusion: Path) -> Callable[[str], Path]:
    """The folder of a tiny image decoder or language model, by its name; written when it is first asked for."""
    makers: dict[str, Callable[[Path], Path]] = {
        "2.1-base": partial(tiny.write_stable_diffusion_2, prediction_type="epsilon"),
        "2.1": partial(tiny.write_stable_diffusion_2, prediction_type="v_prediction"),
        "xl": tiny.write_stable_diffusion_xl,
        "sana": tiny.write_sana,
    }

    @cache
    def write(name: str) -> Path:
        if name == "1.5":
            return tiny_stable_diffusion
        folder = tmp_path_factory.mktemp(name)
        return makers[name](folder) if name in makers else tiny.write_language_model(folder, name)

    return write
