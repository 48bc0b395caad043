"""Fixtures shared by all tests. Tiny models are built once per session in temporary folders."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.lightning_modules import miniature

REPOSITORY = Path(__file__).resolve().parent.parent
# Run first, so that no worker is left with a long file at the end.
LONG_FILES = (
    "lightning_modules/test_ranks",
    "lightning_modules/test_matrix",
    "lightning_modules/test_parallelize",
    "test_benchmarks",
    "test_train",
    "datamodules/curation/test_curation",
    "datamodules/toyland/test_pretrained",
    "datamodules/toyland/test_data_sets",
    "test_evaluate",
    "lightning_modules/test_image_decoders",
    "lightning_modules/test_caches",
    "kosmosg/conversion/test_convert",
    "kosmosg/conversion/test_memory",
    "kosmosg/test_wheel",
    "lightning_modules/test_fault_injection",
    "callbacks/test_wandb_faults",
    "lightning_modules/test_extending",
    "test_rehearsal",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--faults", type=int, default=0, metavar="N", help="inject N faults in every fault-injection test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {REPOSITORY / "tests" / f"{name}.py": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data (KOSMOSG_SHARED, default ../shared); skips the test if it is missing."""
    return present(Path(os.environ.get("KOSMOSG_SHARED", REPOSITORY.parent / "shared")), "KOSMOSG_SHARED")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The full set of recorded outputs (KOSMOSG_GOLDEN, default <shared>/golden/a); skips the test if it is missing."""
    if "KOSMOSG_GOLDEN" in os.environ:
        return present(Path(os.environ["KOSMOSG_GOLDEN"]), "KOSMOSG_GOLDEN")
    return present(request.getfixturevalue("shared") / "golden" / "a", "KOSMOSG_GOLDEN")


@pytest.fixture(scope="session")
def recorded() -> Path:
    """The reduced set of recorded outputs, which is part of the repository."""
    return REPOSITORY / "tests" / "parity" / "recorded"


def present(folder: Path, variable: str) -> Path:
    if not folder.is_dir():
        pytest.skip(f"no reference data at '{folder}'; set {variable} to its folder")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder with tiny random weights: 64 px, latents 4×8×8, condition 24×32."""
    return tiny.write_stable_diffusion(tmp_path_factory.mktemp("stable-diffusion"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder trained on `tiny.SENTENCES`."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A KosmosG folder (mllm, aligner, tokenizer) that fits `tiny_stable_diffusion`."""
    return tiny.write_model(tmp_path_factory.mktemp("model"), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_stable_diffusion: Path) -> Path:
    """A pipeline folder of both, in which all is saved by the parts' own save_pretrained."""
    from kosmosg.pipeline import KosmosGPipeline

    folder = tmp_path_factory.mktemp("pipeline") / "model"
    KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with training and validation shards of every kind of sample."""
    return miniature.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def write_configs(
    shards: Path, tiny_tokenizer: Path, tiny_stable_diffusion: Path, tiny_model: Path
) -> Callable[..., dict[str, Path]]:
    """A function that writes the YAML file of each miniature stage into a folder, which also gets their runs."""
    return lambda folder: miniature.write_config(folder, shards, tiny_tokenizer, tiny_stable_diffusion, tiny_model)


@pytest.fixture
def configs(tmp_path: Path, write_configs: Callable[..., dict[str, Path]]) -> dict[str, Path]:
    return write_configs(tmp_path)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_configs: Callable[..., dict[str, Path]]
) -> Callable[[str], Path]:
    """A function that returns the run folder of a stage after an uninterrupted run, to read or copy."""
    import train

    folder = tmp_path_factory.mktemp("finished")
    files = write_configs(folder)

    @cache
    def train_once(stage: str) -> Path:
        assert train.main([str(files[stage])]) == 0
        return folder / stage

    return train_once


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> int:
    """Number of faults that a test injects (--faults)."""
    given = request.config.getoption("--faults")
    if not given and request.node.get_closest_marker("one_fault") is None:
        pytest.skip("injects faults; run with --faults 5")
    return given or 1


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed the global generator, so that no test depends on those before it."""
    torch.manual_seed(0)
