"""Scores equal a direct computation; intervals have their statistical properties."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn.functional import cosine_similarity, normalize
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer, ResNetForImageClassification, ViTModel

from evaluation.processes import Batching, Cached, Processes
from evaluation.protocols.benchmark import EvaluationError, Item, read_image
from evaluation.protocols.protocol import FeatureNetwork, Preprocessing
from evaluation.scores.bootstrap import Bootstrap, mean_interval
from evaluation.scores.cosine import Dino
from evaluation.scores.encoders import ResNetFeatures, preprocessing
from evaluation.scores.metric import Context
from evaluation.scores.results import score_images
from kosmosg.looking import CLIPEncoder, DinoEncoder
from tests import tiny
from tests.evaluation import tiny_world

CPU = torch.device("cpu")
BOOTSTRAP = Bootstrap(replicates=200, fid_replicates=20)


def test_interval_resamples_whole_subjects() -> None:
    scores = torch.tensor([0.1, 0.9, 0.1, 0.9])
    low, high = mean_interval(scores, ["a", "a", "b", "b"], 100, seed=0)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5), "both subjects have the same mean"
    low, high = mean_interval(scores, list("abcd"), 100, seed=0)
    assert low < 0.4 and high > 0.6


def test_interval_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        subjects = rng.normal(0.5, 0.1, 30)
        scores = torch.from_numpy(np.repeat(subjects, 5) + rng.normal(0, 0.02, 150))
        low, high = mean_interval(scores, [str(i // 5) for i in range(150)], 300, seed=trial)
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_subjects_are_weighted_by_their_images() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = mean_interval(scores, ["a", "a", "a", "b"], 500, seed=0)
    assert (low, high) == (0.0, 1.0)


def test_mean_is_clamped_after_averaging() -> None:
    known = {"a": [-1.0, 0.0], "b": [0.6, 0.8], "r": [1.0, 0.0]}
    context = Context({"dino": lambda items: torch.tensor([known[str(item)] for item in items])}, BOOTSTRAP)
    rows = Dino(context).score([Item(Path(name), name, "", (Path("r"),)) for name in "ab"])
    assert [row.value for row in rows] == pytest.approx([-1.0, 0.6])
    estimate = Dino(context).aggregate(rows)
    assert estimate.value == estimate.low == 0.0


def test_intervals_of_many_captions_fit_in_memory() -> None:
    """Blocks of replicates equal all replicates at once."""
    scores, units = torch.rand(3000, generator=torch.Generator().manual_seed(0)), [str(i) for i in range(3000)]
    drawn = np.random.default_rng(1).multinomial(3000, np.full(3000, 1 / 3000), size=500)
    _, of_unit = np.unique(units, return_inverse=True)
    expected = np.quantile(drawn @ np.bincount(of_unit, weights=scores.double().numpy()) / 3000, (0.025, 0.975))
    assert mean_interval(scores, units, 500, seed=1) == pytest.approx(expected, abs=1e-12)
    tracemalloc.start()
    mean_interval(torch.rand(30_000), [str(i) for i in range(30_000)], 100, seed=0)
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()


def pictures(folder: Path) -> list[Image.Image]:
    return [read_image(path) for path in sorted((folder / "fish").glob("*.png"))]


def test_clip_equals_transformers(encoders_folder: Path, dreambench_folder: Path) -> None:
    folder, images = encoders_folder / "clip", pictures(dreambench_folder)
    encoder, model = CLIPEncoder(folder, CPU), CLIPModel.from_pretrained(folder).eval()
    texts = ["a fish in the snow", "a dog " + "very " * 40 + "long"]
    tokens = CLIPTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=tiny.QUERIES, return_tensors="pt"
    )
    processor = CLIPProcessor.from_pretrained(folder)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens)
    assert torch.allclose(normalize(encoder.images(images), dim=-1), expected.image_embeds, atol=1e-6)
    assert torch.allclose(normalize(encoder.texts(texts), dim=-1), expected.text_embeds, atol=1e-6)


def test_dino_returns_the_class_token(encoders_folder: Path, dreambench_folder: Path) -> None:
    folder, images = encoders_folder / "dino", pictures(dreambench_folder)
    settings = Preprocessing(resize=64, crop=64, mean=[0.5] * 3, std=[0.5] * 3)
    encoder = DinoEncoder(folder, CPU, preprocessing(settings, folder))
    pixels = torch.stack([torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1).float() for image in images])
    with torch.no_grad():
        model = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
        expected = model(pixels).last_hidden_state[:, 0]
    assert torch.allclose(encoder.images(images), expected, atol=1e-5)


def test_preprocessing_equals_the_official_one() -> None:
    """Shorter side 256 bicubic by PIL, centre crop 224, ImageNet statistics (released-code.md, "Evaluation")."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    image = tiny_world.picture(1).resize((400, 320), Image.Resampling.BICUBIC)
    pixels = preprocessing(Preprocessing(256, "bicubic", 224, mean, std), Path("unused"))([image])
    small = image.resize((320, 256), Image.Resampling.BICUBIC).crop((48, 16, 272, 240))
    expected = (np.asarray(small) / 255 - mean) / std
    assert pixels.shape == (1, 3, 224, 224)
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_fid_features_are_pooled(encoders_folder: Path, dreambench_folder: Path) -> None:
    folder, images = encoders_folder / "fid", pictures(dreambench_folder)
    encoder = ResNetFeatures(FeatureNetwork(str(folder)), folder, CPU)
    classifier = ResNetForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        maps = classifier.resnet(encoder.preprocess(images)).last_hidden_state
    assert torch.allclose(encoder.images(images), maps.mean((2, 3)), atol=1e-6)


def test_weights_of_another_network_are_refused(encoders_folder: Path) -> None:
    for make in (
        lambda: DinoEncoder(encoders_folder / "fid", CPU),
        lambda: ResNetFeatures(FeatureNetwork(""), encoders_folder / "dino", CPU),
    ):
        with pytest.raises(ValueError, match="missing_keys"):
            make()


def test_custom_code_of_an_encoder_is_not_run(encoders_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(encoders_folder / "dino", tmp_path / "dino")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    own = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "code.Own"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    with pytest.raises(EvaluationError, match="dino' has no usable preprocessing"):
        preprocessing(None, folder)
    assert not (tmp_path / "ran").exists()


def test_each_item_is_encoded_once() -> None:
    asked: list[list[int]] = []

    def encode(items: list[int]) -> torch.Tensor:
        asked.append(items)
        return torch.tensor(items)[:, None].float()

    features = Cached("numbers", encode, Batching(Processes(), batch_size=2, console=Console(quiet=True)))
    assert features([3, 1, 3, 2]).flatten().tolist() == [3, 1, 3, 2]
    assert features([2, 4]).flatten().tolist() == [2, 4]
    assert asked == [[3, 1], [2], [4]]


def test_scores_equal_a_direct_computation(tmp_path: Path) -> None:
    """Means over pairs: CLIP-T of items with a text, fidelity of items with references."""
    generator = torch.Generator().manual_seed(0)
    files = [tmp_path / name for name in ("a", "b", "r1", "r2")]
    features = {key: torch.randn(5, generator=generator) for key in (*files, "a dog")}
    a, b, first, second = files
    images = [Item(a, "dog", "a dog", (first, second)), Item(b, "fish", "", (first,))]
    networks = dict.fromkeys(
        ("clip_images", "clip_texts", "dino"), lambda items: torch.stack([features[i] for i in items])
    )
    scores, samples = score_images("dreambench", "p@1#0", Context(networks, BOOTSTRAP), "System", images)

    def cosine(left, right) -> float:
        return float(cosine_similarity(features[left].double(), features[right].double(), dim=0))

    fidelity = [cosine(a, first), cosine(a, second), cosine(b, first)]
    by_metric = {score.metric: score for score in scores}
    assert by_metric["dino"].value == pytest.approx(max(0.0, sum(fidelity) / 3)) and by_metric["dino"].n == 3
    assert by_metric["clip_t"].value == pytest.approx(max(0.0, cosine(a, "a dog"))) and by_metric["clip_t"].n == 1
    assert [sample.score for sample in samples if sample.metric == "dino"] == pytest.approx(fidelity)
    assert "fid" not in by_metric
