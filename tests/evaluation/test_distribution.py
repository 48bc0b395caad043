"""FID and KID equal their definitions and recorded values; features of real images are computed once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from rich.console import Console
from safetensors.torch import save_file

from evaluation.config import EvaluationConfig
from evaluation.processes import Processes
from evaluation.protocols.benchmark import Item, read_image
from evaluation.protocols.coco import Coco
from evaluation.protocols.protocol import KID, CocoProtocol, FeatureNetwork
from evaluation.run import evaluate
from evaluation.scores import encoders
from evaluation.scores.bootstrap import Bootstrap, fid_interval
from evaluation.scores.distribution import cached_features, fid, kid
from evaluation.scores.metric import Context
from evaluation.scores.results import Score, score_images
from kosmosg.config import load_config

WIDTH, REAL, MADE = 6, 31, 24


def scipy_fid(real: np.ndarray, made: np.ndarray) -> float:
    """The textbook formula with scipy's matrix root."""
    covariances = np.cov(real, rowvar=False), np.cov(made, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    shift = real.mean(0) - made.mean(0)
    return float(shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root.real))


def test_fid_equals_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    # Large values, so that rounding to single precision anywhere exceeds the tolerance.
    real = torch.randn(300, 16, generator=generator) * 30
    made = torch.randn(200, 16, generator=generator) * 40 + 5
    assert fid(real, made) == pytest.approx(scipy_fid(real.double().numpy(), made.double().numpy()), abs=1e-6)


def test_fid_interval_surrounds_the_value_and_narrows() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 8, generator=generator)
    widths = []
    for count in (100, 1600):
        made = torch.randn(count, 8, generator=generator) + 0.5
        value = scipy_fid(real.double().numpy(), made.double().numpy())
        low, high = fid_interval(real, made, value, replicates=200, seed=0)
        assert low < value < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35), "the spread falls with the root of n"


def test_fid_interval_equals_the_textbook_formula() -> None:
    """FID of each resample, although the interval uses a faster symmetric form."""
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(50, 4, generator=generator).double(), torch.randn(40, 4, generator=generator).double()
    rng = np.random.default_rng(5)
    drawn = [scipy_fid(real.numpy(), made.numpy()[rng.integers(40, size=40)]) for _ in range(30)]
    expected = np.quantile(drawn, (0.025, 0.975)) - np.mean(drawn)
    assert np.allclose(fid_interval(real, made, 0.0, replicates=30, seed=5), expected, atol=1e-8)


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(REAL, WIDTH, generator=generator), torch.randn(MADE, WIDTH, generator=generator) * 1.2 + 0.3


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    return float((a @ b / len(a) + 1) ** 3)


def direct_kid(real: np.ndarray, made: np.ndarray) -> float:
    """The unbiased estimate of MMD² (Bińkowski et al. 2018, section 4), pair by pair."""
    n = len(real)
    within = sum(kernel(x[i], x[j]) for x in (real, made) for i in range(n) for j in range(n) if i != j)
    between = sum(kernel(a, b) for a in real for b in made)
    return within / (n * (n - 1)) - 2 * between / n**2


def test_kid_of_all_images_equals_its_definition() -> None:
    real, made = features()
    real = real[:MADE]
    mean, deviation = kid(real, made, KID(subsets=3, subset_size=MADE))
    assert mean == pytest.approx(direct_kid(real.double().numpy(), made.double().numpy()), abs=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9), "each subset has all images"


def formula(rows: int, step: float, scale: float, shift: float) -> torch.Tensor:
    """Return reproducible features, rows × 8."""
    at = np.arange(rows * 8, dtype=np.float64).reshape(rows, 8)
    return torch.from_numpy(scale * np.sin(step * at**1.5) + shift * np.cos(np.arange(8)))


def test_fid_and_kid_equal_recorded_values() -> None:
    """Recorded from the textbook formulas in double precision: FID with scipy's matrix root, as in pytorch-fid, and KID
    over all pairs."""
    real, made = formula(300, 0.7310585, 2.0, 0.5), formula(240, 0.5772157, 1.5, 0.8)
    assert fid(real, made) == pytest.approx(1.4574124557510224, rel=1e-13)
    value, deviation = kid(real[:240], made, KID(subsets=2, subset_size=240))
    assert value == pytest.approx(0.3221473183450074, rel=1e-13) and deviation < 1e-14


def test_kid_subsets_depend_only_on_the_protocols_seed() -> None:
    real, made = features()
    drawn = KID(subsets=4, subset_size=10, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = kid(real, made, drawn)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is unchanged"
    torch.manual_seed(2)
    assert kid(real, made, drawn) == first
    torch.manual_seed(3)
    draws = []
    for _ in range(drawn.subsets):
        rows = torch.randperm(REAL)[:10], torch.randperm(MADE)[:10]
        draws.append(direct_kid(real[rows[0]].double().numpy(), made[rows[1]].double().numpy()))
    assert first == pytest.approx((np.mean(draws), np.std(draws)), abs=1e-9)
    assert kid(real, made, KID(4, 10, seed=4)) != first


def test_generated_and_real_images_have_separate_encoders(tmp_path: Path) -> None:
    real, made = features()
    photos = [Item(tmp_path / f"r{i}", str(i), "", real=True) for i in range(MADE)]
    images = [Item(tmp_path / f"g{i}", str(i), "") for i in range(MADE)]

    def scores_of(protocol: CocoProtocol, items: list[Item]) -> dict[str, Score]:
        networks = {"fid_real": lambda files: real[: len(files)], "fid_generated": lambda files: made}
        context = Context(networks, Bootstrap(fid_replicates=5), protocol, lambda: real)
        return {score.metric: score for score in score_images("coco", "p@1#0", context, "System", items)[0]}

    protocol = CocoProtocol(captions=MADE, fid=FeatureNetwork("w"), kid=KID(subsets=6, subset_size=10))
    scores = scores_of(protocol, images)
    expected = kid(real, made, KID(subsets=6, subset_size=10))
    assert scores["fid"].value == pytest.approx(scipy_fid(real.double().numpy(), made.double().numpy()), abs=1e-6)
    assert scores["kid"].value == expected[0]
    spread = 1.96 * expected[1]
    assert (scores["kid"].low, scores["kid"].high) == (expected[0] - spread, expected[0] + spread)
    assert scores["kid"].n == scores["fid"].n == MADE
    assert scores_of(protocol, photos)["fid"].value == pytest.approx(
        scipy_fid(real.double().numpy(), real[:MADE].double().numpy()), abs=1e-6
    )
    assert list(scores_of(replace(protocol, kid=None), images)) == ["fid"]


def test_interval_of_kid_covers_most_subsets() -> None:
    rng = np.random.default_rng(0)
    real, made = rng.normal(0, 1, (400, 4)), rng.normal(0, 1.1, (400, 4))
    value, deviation = kid(torch.from_numpy(real), torch.from_numpy(made), KID(subsets=200, subset_size=50))
    low, high = value - 1.96 * deviation, value + 1.96 * deviation
    draws = [direct_kid(real[rng.permutation(400)[:50]], made[rng.permutation(400)[:50]]) for _ in range(40)]
    assert np.mean([low <= draw <= high for draw in draws]) >= 0.8 and low < np.mean(draws) < high


KEY = {"protocol": "coco/x@1#aaaa", "data": "d", "weights": "w"}


def test_features_of_real_images_are_cached(tmp_path: Path) -> None:
    """For the same protocol, data and weights; damaged files are replaced."""
    calls: list[int] = []

    def features_of(**changed: str) -> torch.Tensor | None:
        def compute() -> torch.Tensor:
            calls.append(len(calls))
            return torch.full((6, 4), float(calls[-1]))

        return cached_features(tmp_path, KEY | changed, compute, Processes())

    first = features_of()
    assert torch.equal(features_of(), first) and len(calls) == 1
    for changed in ({"protocol": "coco x 1 aaaa"}, {"data": "e"}, {"weights": "v"}):
        assert not torch.equal(features_of(**changed), first), changed
    assert torch.equal(features_of(), first) and len(calls) == 4
    for path in tmp_path.iterdir():
        path.write_bytes(b"half")
    assert features_of() is not None and len(calls) == 5
    for path in tmp_path.iterdir():
        save_file({"statistics": torch.zeros(2)}, path)
    assert features_of() is not None and len(calls) == 6


def test_second_evaluation_reads_no_reference_image(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def count(file: Path, **options):
        read.append(file)
        return read_image(file, **options)

    monkeypatch.setattr(encoders, "read_image", count)
    results = []
    for output in ("first", "second"):
        read.clear()
        options = ["dreambench=null", "coco.kid={subsets: 5, subset_size: 4, seed: 0}"]
        options += [f"reference_features={tmp_path / 'kept'}", f"output={tmp_path / output}"]
        config = load_config([*arguments, *options], EvaluationConfig)
        references = set(Coco(config.protocols()["coco"], config.folder_of("coco")).references())
        evaluate(config, Console(quiet=True))
        assert references & set(read) == (references if output == "first" else set())
        assert read, "generated images are read both times"
        results.append(json.loads((tmp_path / output / "results.json").read_text()))
    assert results[0] == results[1]
    kid = [row for row in results[0] if row["metric"] == "kid"]
    assert len(kid) == 4 and all(row["low"] < row["value"] < row["high"] and row["n"] == 6 for row in kid)
    page, table = ((tmp_path / "second" / name).read_text() for name in ("report.html", "results.md"))
    assert "KID ↓" in page and "KID ↓" in table and "the mean over 5 subsets of 4 images" in table
