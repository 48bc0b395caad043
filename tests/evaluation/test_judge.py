"""The judge's metrics against values computed by hand; labels that it does not know are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetForImageClassification

from evaluation.protocols.benchmark import Crop, EvaluationError, Item, Slot, read_image
from evaluation.protocols.dreambench import DreamBench
from evaluation.protocols.protocol import DreamBenchProtocol, Encoder, Sampling, identity
from evaluation.scores.bootstrap import Bootstrap
from evaluation.scores.encoders import JudgeEncoder
from evaluation.scores.judge import Identity, Judge
from evaluation.scores.metric import Context
from evaluation.scores.results import columns, score_images
from tests.evaluation.test_datasets import change_facts

BOOTSTRAP = Bootstrap(replicates=200)
PROTOCOL = DreamBenchProtocol(name="dreambench/tiny", facts="dreambench.json", images_per_prompt=1)
LABELS = (
    ("kind", "cat"),
    ("kind", "dog"),
    ("colour", "red"),
    ("colour", "blue"),
    ("light", "none"),
    ("light", "night"),
)
LOGITS = {  # image: logits by LABELS, then a feature of two numbers
    "own": [2, 1, 0, 1, 1, 0, 1.0, 0.0],
    "other": [2, 1, 0, 1, 1, 0, 0.0, 1.0],
    "night": [2, 1, 0, 1, 0, 1, 0.9, 0.5],  # that cat, blue, at night
    "day": [2, 1, 0, 1, 1, 0, 0.5, 0.9],  # another blue cat
    "red": [1, 2, 1, 0, 1, 0, 9.0, 1.0],  # a red dog with that cat's feature
}
NIGHT, DAY, RED = (Path(name) for name in ("night", "day", "red"))


def judge() -> Judge:
    return Judge(lambda files: torch.tensor([LOGITS[str(file)] for file in files]), LABELS)


def test_values_by_hand() -> None:
    cat, given = {"kind": "cat", "colour": "blue"}, {"given": Path("own"), "others": (Path("other"),)}
    at_night = {"labels": cat | {"light": "night"}, "words": {"light": "night"}, "group": "a {} at night"}
    recoloured = {"colour": "red", "light": "none"}
    items = [
        Item(NIGHT, "cat", "", **at_night, **given),
        Item(DAY, "cat", "", **at_night, **given),
        Item(RED, "tom", "", labels=cat | recoloured, words=recoloured, group="a red {}", **given),
        Item(DAY, "tom", "", group="a {}"),  # without labels
    ]
    blank = {"pixels": lambda files: torch.zeros(len(files), 32 * 32 * 3)}
    scores, samples = score_images("dreambench", "p@1#0", Context({"judge": judge(), **blank}, BOOTSTRAP), "S", items)
    scores = [score for score in scores if score.table == "dreambench"]
    assert {score.metric: (score.value, score.n) for score in scores} == {
        "kind": (pytest.approx(2 / 3), 3),
        "colour": (1.0, 3),  # the prompt's colour overrides the subject's
        "identity": (pytest.approx(2 / 3), 3),
        "words": (pytest.approx(2 / 3), 3),
    }
    words = [(str(sample.item.file), sample.against, sample.score) for sample in samples if sample.metric == "words"]
    assert words == [("night", "light: night", 1), ("day", "light: night", 0), ("red", "colour: red, light: none", 1)]
    (score,) = [score for score in scores if score.metric == "identity"]
    assert (score.low, score.high) == (0.5, 1.0), "over subjects: 0.5 for the cat and 1 for tom"


def test_a_tie_with_another_individual_is_no_identity() -> None:
    own, other = Path("own"), Path("other")
    items = [Item(own, "cat", "", given=own, others=others) for others in ((other,), (own,))]
    assert [row.value for row in Identity(Context({"judge": judge()})).score(items)] == [True, False]


def test_pairs_by_hand() -> None:
    """A cat and a dog: with another cat, swapped, and with the cat twice."""
    cat, other, dog = [2, 1, 0, 1, 1, 0, 1.0, 0.0], [2, 1, 0, 1, 1, 0, 0.2, 0.9], [1, 2, 0, 1, 1, 0, 0.9, 0.2]
    halves = ((0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 2.0, 1.0))
    logits = {Path(name): row for name, row in LOGITS.items()}
    for file, shown in ((NIGHT, (other, dog)), (DAY, (dog, cat)), (RED, (cat, cat))):
        logits |= {Crop(file, box): row for box, row in zip(halves, shown, strict=True)}
    pair_judge = Judge(lambda files: torch.tensor([logits[file] for file in files]), LABELS)
    slots = tuple(Slot(box, k, Path("own"), (Path("other"),)) for box, k in zip(halves, ("cat", "dog"), strict=True))
    pairs = [Item(file, "cat + dog", "", slots=slots) for file in (NIGHT, DAY, RED)]
    scores, samples = score_images("dreambench", "p@1#0", Context({"judge": pair_judge}, BOOTSTRAP), "S", pairs)
    assert {(score.table, score.metric): (score.value, score.n) for score in scores} == {
        ("pairs", "pair_kind"): (0.5, 6),
        ("pairs", "pair_identity"): (pytest.approx(5 / 6), 6),
        ("pairs", "swapped"): (pytest.approx(1 / 3), 3),
        ("pairs", "missing"): (pytest.approx(1 / 3), 3),
    }
    assert [sample.score for sample in samples if sample.metric == "pair_kind"] == [1, 1, 0, 0, 1, 0]
    headings = [kind.heading() for kind in columns(scores, "pairs")]
    assert headings == ["Kind ↑", "Identity ↑", "Swapped ↓", "Missing ↓"]


def test_crops(dreambench_folder: Path, tmp_path: Path) -> None:
    """Two subjects are in the lower left and right half; boxes outside of an image read its nearest pixel."""
    pixels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)
    image = Image.fromarray(np.stack([pixels // 32, pixels % 32, 0 * pixels], axis=-1).astype(np.uint8))
    image.save(file := tmp_path / "a.png")
    small = replace(PROTOCOL, judge=Encoder("j"), sampling=Sampling(image_size=32))
    slots = DreamBench(small, dreambench_folder).prompts[-1].item.slots
    left, right = (np.asarray(read_image(Crop(file, slot.box))) for slot in slots)
    assert left.shape == right.shape == (16, 16, 3)
    assert left[0, 0].tolist() == [13, 0, 0] and right[0, 0].tolist() == [13, 16, 0]
    assert np.array_equal(read_image(Crop(file, (2, 4.4, 9, 8))), np.asarray(image)[4:8, 2:9])
    assert read_image(Crop(file, (40, -3, 40, 0.2))).getpixel((0, 0)) == (0, 31, 0)


def test_pairs_are_requested_last_and_only_with_a_judge(dreambench_folder: Path) -> None:
    assert all(len(request.inputs) == 1 for request in DreamBench(PROTOCOL, dreambench_folder).requests())
    judged = replace(PROTOCOL, judge=Encoder("j"), images_per_prompt=2)
    dataset = DreamBench(judged, dreambench_folder)
    *single, pair, again = dataset.requests()
    assert len(single) == 2 * 9 and (pair.index, again.index) == (18, 19) and pair.seed != again.seed
    assert (pair.prompt, pair.text) == ("<i> and <i> in the snow", "a fish and a dog in the snow")
    assert pair.inputs == ("fish/01.png", "dog/00.png") and pair.unit == "fish + dog"
    item = dataset.item(again, Path("x"))
    assert [slot.kind for slot in item.slots] == ["fish", "dog"] and not item.references and not item.text
    assert len(dataset.baselines()["Copy of the input"]) == len(single)
    assert len(DreamBench(replace(judged, max_subjects=1), dreambench_folder).requests()) == 2 * 3


def test_logits_and_features_are_the_classifiers(encoders_folder: Path, dreambench_folder: Path) -> None:
    folder = encoders_folder / "judge"
    encoder = JudgeEncoder(Encoder(str(folder)), folder, torch.device("cpu"))
    images = [read_image(dreambench_folder / "fish" / f"{photo:02d}.png") for photo in range(2)]
    classifier = ResNetForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = encoder.preprocess(images)
        logits, maps = classifier(inputs).logits, classifier.resnet(inputs).last_hidden_state
    assert torch.allclose(encoder.images(images), torch.cat([logits, maps.mean((2, 3))], dim=1), atol=1e-6)
    assert encoder.labels[:3] == (("kind", "fish"), ("kind", "dog"), ("colour", "red"))
    with pytest.raises(EvaluationError, match="is not a judge: its id2label has 'LABEL_0'"):
        JudgeEncoder(Encoder(""), encoders_folder / "fid", torch.device("cpu"))


def test_facts_without_labels_keep_their_identity(dreambench_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dreambench_folder, tmp_path / "dreambench")
    with_labels = identity(DreamBench(PROTOCOL, folder).protocol)
    facts = json.loads((folder / "dreambench.json").read_text())
    del facts["pairs"]
    for owner in (*facts["subjects"].values(), *facts["prompts"].values()):
        owner.pop("labels", None)
    (folder / "dreambench.json").write_text(json.dumps(facts))
    without = DreamBench(PROTOCOL, folder).protocol
    assert with_labels != identity(without) == "dreambench/tiny@1#408cba0c+44136fa3"
    assert identity(replace(without, judge=Encoder("j"))) != identity(without)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda facts: facts["subjects"]["dog"].update(labels={"kind": "wolf"}),
            "subject 'dog' has the label 'kind: wolf', which the judge does not know; allowed names of kind: fish, dog",
        ),
        (
            lambda facts: facts["prompts"]["live"]["labels"][1].update(dress="a hat"),
            "template 'a {} wearing a hat' has the label 'dress: a hat', which the judge does not know; allowed "
            "groups: kind, colour, setting",
        ),
        (
            lambda facts: facts["subjects"]["dog"].update(labels={"shape": "round"}),
            "subject 'dog' has a label of 'shape'; allowed are: kind, colour, pattern",
        ),
        (
            lambda facts: facts["prompts"]["live"]["labels"].pop(),
            "prompts have 3 templates but 2 labels",
        ),
        (
            lambda facts: facts["pairs"]["subjects"].append(["fish", "boat"]),
            "the pair fish + boat needs two subjects with different labels of 'kind'",
        ),
        (
            lambda facts: facts["pairs"].update(modified="{} in the snow"),
            "pairs.modified='{} in the snow' must hold {} twice",
        ),
    ],
)
def test_unknown_labels_are_refused(
    dreambench_folder: Path, encoders_folder: Path, tmp_path: Path, change, message: str
) -> None:
    folder = shutil.copytree(dreambench_folder, tmp_path / "dreambench")
    change_facts(folder, change)
    encoder = JudgeEncoder(Encoder(""), encoders_folder / "judge", torch.device("cpu"))
    with pytest.raises(EvaluationError) as error:
        DreamBench(PROTOCOL, folder).check_networks({"judge": Judge(encoder.images, encoder.labels)})
    assert message in str(error.value)
