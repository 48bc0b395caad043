"""KID equals its definition, and FID and KID are the same over two processes as over one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from evaluation.config import Bootstrap
from evaluation.protocols.protocol import KID
from evaluation.protocols.requests import ScoredImage
from evaluation.scores.bootstrap import kid_interval
from evaluation.scores.metrics import FeatureFID, FeatureKID
from evaluation.scores.results import Score, markdown
from evaluation.scores.scoring import Encoders, Scorer
from tests.evaluation.test_scores import scipy_fid
from tests.lightning_modules.processes import run_together

WIDTH, REAL, MADE = 6, 31, 24


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(REAL, WIDTH, generator=generator), torch.randn(MADE, WIDTH, generator=generator) * 1.2 + 0.3


def filled(kid: KID, real: torch.Tensor, made: torch.Tensor) -> FeatureKID:
    metric = FeatureKID(kid)
    metric.update(real, torch.arange(len(real)), real=True)
    metric.update(made, torch.arange(len(made)), real=False)
    return metric


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    return float((a @ b / len(a) + 1) ** 3)


def direct_kid(real: np.ndarray, made: np.ndarray) -> float:
    """The unbiased estimate of MMD² (Bińkowski et al. 2018, section 4), pair by pair."""
    n = len(real)
    within = sum(kernel(x[i], x[j]) for x in (real, made) for i in range(n) for j in range(n) if i != j)
    between = sum(kernel(a, b) for a in real for b in made)
    return within / (n * (n - 1)) - 2 * between / n**2


def test_kid_of_everything_is_its_definition() -> None:
    real, made = features()
    real = real[:MADE]
    mean, deviation = filled(KID(subsets=3, subset_size=MADE), real, made).compute()
    assert float(mean) == pytest.approx(direct_kid(real.double().numpy(), made.double().numpy()), abs=1e-9)
    assert float(deviation) == pytest.approx(0, abs=1e-9), "each subset is the whole"


def test_subsets_are_drawn_by_the_protocols_seed_alone() -> None:
    real, made = features()
    kid = KID(subsets=4, subset_size=10, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = filled(kid, real, made).compute()
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    torch.manual_seed(2)
    metric = filled(kid, real, made)
    assert metric.compute() == first
    torch.manual_seed(3)
    draws = []
    for _ in range(kid.subsets):
        rows = torch.randperm(REAL)[:10], torch.randperm(MADE)[:10]
        draws.append(direct_kid(real[rows[0]].double().numpy(), made[rows[1]].double().numpy()))
    assert float(first[0]) == pytest.approx(np.mean(draws), abs=1e-9)
    assert float(first[1]) == pytest.approx(np.std(draws), abs=1e-9)
    assert filled(KID(4, 10, seed=4), real, made).compute() != first


def test_order_and_repetition_do_not_matter() -> None:
    real, made = features()
    kid = KID(subsets=4, subset_size=10)
    expected = filled(kid, real, made).compute()
    metric = FeatureKID(kid)
    for rows in (torch.arange(REAL).flip(0), torch.tensor([0, 5])):
        metric.update(real[rows], rows, real=True)
    for rows in torch.randperm(MADE, generator=torch.Generator().manual_seed(0)).split(7):
        metric.update(made[rows], rows, real=False)
    assert metric.compute() == expected


def test_scorer_gives_fid_and_kid_of_the_right_sides(tmp_path: Path) -> None:
    """Generated images and real photos go through encoders of their own."""
    real, made = features()
    photos = [ScoredImage(tmp_path / f"r{i}", str(i), "", real=True) for i in range(MADE)]
    images = [ScoredImage(tmp_path / f"g{i}", str(i), "") for i in range(MADE)]

    def none(items):
        raise AssertionError("nothing has a text or a reference")

    encoders = Encoders(none, none, fid_real=lambda files: real[: len(files)], fid_generated=lambda files: made)
    scorer = Scorer("coco", "p@1#0", encoders, Bootstrap(fid_replicates=5), real, KID(subsets=6, subset_size=10))
    scores = {score.metric: score for score in scorer("System", images)[0]}
    expected = filled(KID(subsets=6, subset_size=10), real, made).compute()
    assert scores["fid"].value == pytest.approx(scipy_fid(real.double().numpy(), made.double().numpy()), abs=1e-6)
    assert scores["kid"].value == float(expected[0])
    assert (scores["kid"].low, scores["kid"].high) == kid_interval(*map(float, expected))
    assert scores["kid"].n == scores["fid"].n == MADE
    of_photos = {score.metric: score for score in scorer("Real images", photos)[0]}
    assert of_photos["fid"].value == pytest.approx(
        scipy_fid(real.double().numpy(), real[:MADE].double().numpy()), abs=1e-6
    )
    without = Scorer("coco", "p@1#0", encoders, Bootstrap(fid_replicates=5), real)("System", images)[0]
    assert [score.metric for score in without] == ["fid"]


def test_interval_of_kid_covers_a_subset_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    real, made = rng.normal(0, 1, (400, 4)), rng.normal(0, 1.1, (400, 4))
    metric = filled(KID(subsets=200, subset_size=50), torch.from_numpy(real), torch.from_numpy(made))
    low, high = kid_interval(*map(float, metric.compute()))
    draws = [direct_kid(real[rng.permutation(400)[:50]], made[rng.permutation(400)[:50]]) for _ in range(40)]
    assert np.mean([low <= draw <= high for draw in draws]) >= 0.8 and low < np.mean(draws) < high


def test_the_column_stands_where_there_are_scores() -> None:
    def score(metric: str, value: float) -> Score:
        return Score("coco", "System", metric, value, value - 0.001, value + 0.001, 6, "p@1#0")

    assert "KID" not in markdown([score("fid", 8.0)], []).partition("# The paper")[0].partition("##")[2]
    table = markdown([score("fid", 8.0), score("kid", 0.00342)], [])
    assert "| System | FID ↓ | KID ↓ | CLIP-T ↑ | n |" in table
    assert "| System | 8.00 (8.00–8.00) | 0.00342 (0.00242–0.00442) | – | 6 |" in table


def reduce_on_rank(output: Path) -> None:
    dist.init_process_group("gloo")
    (real, made), rank = features(), dist.get_rank()
    distance, kernel_distance = FeatureFID(WIDTH), FeatureKID(KID(subsets=4, subset_size=10))
    for rows, side in ((real, True), (made, False)):
        mine = torch.arange(rank, len(rows), 2)
        # Another number of updates on each rank; KID is given one row on both.
        for part in mine.split(4 + 3 * rank):
            distance.update(rows[part], real=side)
            kernel_distance.update(rows[part], part, real=side)
        kernel_distance.update(rows[:1], torch.tensor([0]), real=side)
    torch.save([distance.compute(), *kernel_distance.compute()], output / f"rank{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    assert run_together(2, lambda: reduce_on_rank(tmp_path), tmp_path / "log") == [0, 0]
    real, made = features()
    expected = filled(KID(subsets=4, subset_size=10), real, made).compute()
    distance = scipy_fid(real.double().numpy(), made.double().numpy())
    for rank in range(2):
        fid, mean, deviation = torch.load(tmp_path / f"rank{rank}")
        assert float(fid) == pytest.approx(distance, abs=1e-6)
        assert (mean, deviation) == expected
