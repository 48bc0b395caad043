"""Fixtures of the tiny world, written once per session."""

from pathlib import Path

import pytest

from evaluation.config import EvaluationConfig
from evaluation.protocols.protocol import DreamBenchProtocol
from kosmosg.config import load_config
from tests.conftest import REPOSITORY
from tests.evaluation import tiny_world


@pytest.fixture(scope="session")
def dreambench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.write_dreambench(tmp_path_factory.mktemp("data") / "dreambench")


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="session")
def encoders_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.write_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def arguments(
    dreambench_folder: Path, coco_folder: Path, encoders_folder: Path, tiny_stable_diffusion: Path, tiny_model: Path
) -> list[str]:
    """Toyland's evaluation on the tiny world, complete except for `output`."""
    folder = REPOSITORY / "configs" / "toyland"
    return [
        str(folder / "evaluation.yaml"),
        str(folder / "evaluation_short.yaml"),
        f"data.dreambench={dreambench_folder}",
        f"data.coco={coco_folder}",
        f"models.image_decoder={tiny_stable_diffusion}",
        f"models.before_stage_3={tiny_model}",
        f"models.after_stage_3={tiny_model}",
        f"dreambench.clip.weights={encoders_folder / 'clip'}",
        f"dreambench.dino.weights={encoders_folder / 'dino'}",
        f"dreambench.judge.weights={encoders_folder / 'judge'}",
        f"coco.clip.weights={encoders_folder / 'clip'}",
        f"coco.fid.weights={encoders_folder / 'fid'}",
        "coco.captions=6",
        "batch_size=4",
    ]


@pytest.fixture
def config(arguments: list[str], tmp_path: Path) -> EvaluationConfig:
    return load_config([*arguments, f"output={tmp_path / 'evaluation'}"], EvaluationConfig)


@pytest.fixture
def protocol(config: EvaluationConfig) -> DreamBenchProtocol:
    assert config.dreambench is not None
    return config.dreambench
