"""DreamBench and COCO from their published folders; what is missing is named."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from evaluation.config import EvaluationConfig
from evaluation.protocols.benchmark import DataSetError, read_image, spread
from evaluation.protocols.coco import Coco
from evaluation.protocols.dreambench import DreamBench
from evaluation.protocols.protocol import KID, CocoProtocol, DreamBenchProtocol, identity
from evaluation.reports.galleries import fit
from evaluation.reports.report import embed
from kosmosg.config import load_config
from tests.conftest import REPOSITORY
from tests.evaluation import tiny_world

PROTOCOL = DreamBenchProtocol(name="dreambench/tiny", facts="dreambench.json", images_per_prompt=2)
COCO = CocoProtocol(name="coco/tiny", captions=5, references="half")


@pytest.fixture
def changeable(dreambench_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dreambench_folder, tmp_path / "dreambench")


def test_requests_follow_the_protocol(dreambench_folder: Path) -> None:
    requests = DreamBench(PROTOCOL, dreambench_folder).requests()
    assert [request.index for request in requests] == list(range(3 * 3 * 2))
    assert len({request.seed for request in requests}) == len(requests)
    hat = requests[2]
    assert (hat.prompt, hat.text, hat.inputs, hat.unit) == (
        "<i> wearing a hat",
        "a fish wearing a hat",
        ("fish/01.png",),
        "fish",
    )
    with_class = DreamBench(replace(PROTOCOL, fed="class_and_image"), dreambench_folder).requests()
    assert with_class[2].prompt == "fish <i> wearing a hat"


def test_noise_is_shared_where_the_protocol_says_so(dreambench_folder: Path) -> None:
    sampling = replace(PROTOCOL.sampling, noise_period=3)
    seeds = [r.seed for r in DreamBench(replace(PROTOCOL, sampling=sampling), dreambench_folder).requests()]
    assert seeds[:6] == seeds[6:12] == seeds[12:] and len(set(seeds)) == 6


def test_references(dreambench_folder: Path) -> None:
    kept = DreamBench(PROTOCOL, dreambench_folder)
    every = DreamBench(replace(PROTOCOL, references="all"), dreambench_folder)
    assert [path.name for path in kept.references_of("fish")] == ["01.png"]
    assert [path.name for path in every.references_of("fish")] == ["00.png", "01.png", "02.png"]
    others = [image for image in kept.other_real_images() if image.unit == "fish"]
    assert [image.file.name for image in others] == ["00.png", "02.png"], "no photo is compared with itself"
    assert all(image.file not in image.references for image in every.other_real_images())
    assert len(every.other_real_images()) == 9


def test_trial_sizes_are_spread(dreambench_folder: Path) -> None:
    small = DreamBench(replace(PROTOCOL, max_subjects=2, max_templates=1), dreambench_folder)
    assert list(small.subjects) == ["fish", "dog"] and len(small.requests()) == 4
    assert spread(list(range(10)), 3) == [0, 3, 6]


DAMAGES = [
    (
        lambda folder, facts: shutil.rmtree(folder / "boat") or (folder / "fish" / "01.png").unlink(),
        "subject 'fish' lacks its kept image 01.png (there: 00.png, 02.png); subject 'boat' has no folder",
    ),
    (
        lambda folder, facts: facts["subjects"]["dog"].update(kind="liquid"),
        "'dog' is of kind 'liquid', but there are prompts for: live, object",
    ),
    (lambda folder, facts: facts["subjects"]["dog"].pop("class"), "not of DreamBench's structure"),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES)
def test_everything_missing_is_named(changeable: Path, damage, told: str) -> None:
    facts = json.loads((changeable / "dreambench.json").read_text())
    damage(changeable, facts)
    (changeable / "dreambench.json").write_text(json.dumps(facts))
    with pytest.raises(DataSetError) as error:
        DreamBench(PROTOCOL, changeable)
    assert told in str(error.value)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    """Damaged ones, a small file of many pixels, and formats whose decoders run code."""
    Image.new("1", (12_000, 12_000)).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "page.eps")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    for name, told in (
        ("large.png", r"12000×12000, at most 64000000 pixels"),
        ("page.eps", r"page\.eps' cannot be read as an image"),
        ("damaged.png", r"damaged\.png' cannot be read as an image"),
    ):
        for read in (read_image, fit):
            with pytest.raises(DataSetError, match=told):
                read(tmp_path / name)
    with pytest.raises(OSError, match="cannot identify image"):
        embed(tmp_path / "page.eps")


def test_identity_follows_every_value(dreambench_folder: Path, changeable: Path) -> None:
    protocol = DreamBench(PROTOCOL, dreambench_folder).protocol
    assert identity(protocol) == identity(DreamBench(PROTOCOL, dreambench_folder).protocol)
    assert identity(protocol) != identity(replace(protocol, sampling=replace(protocol.sampling, steps=99)))
    text = (changeable / "dreambench.json").read_text()
    (changeable / "dreambench.json").write_text(text.replace("a red {}", "a blue {}"))
    assert identity(protocol) != identity(DreamBench(PROTOCOL, changeable).protocol)


def test_released_protocol_holds_the_recorded_facts(recorded: Path, tmp_path: Path) -> None:
    config = load_config(
        [str(REPOSITORY / "configs" / "evaluation.yaml"), f"data.dreambench={tmp_path}"], EvaluationConfig
    )
    facts = json.loads((recorded / "dreambench.json").read_text())
    protocol = config.dreambench
    assert protocol is not None
    found = {
        name: {"class": subject.class_noun, "kind": subject.kind, "kept_image": subject.kept_image}
        for name, subject in protocol.subjects.items()
    }
    assert found == facts["subjects"]
    prompts = {kind: {"original": t.original, "modified": t.modified} for kind, t in protocol.prompts.items()}
    assert prompts == facts["prompts"]
    for name, subject in facts["subjects"].items():
        (tmp_path / name).mkdir()
        (tmp_path / name / subject["kept_image"]).write_bytes(b"")
    assert len(DreamBench(protocol, tmp_path).requests()) == facts["total_images"]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("paper", {"fed": "class_and_image", "noise_period": None}),
        ("all-references", {"references": "all"}),
    ],
)
def test_other_protocols_of_dreambench_differ_in_what_they_say(tmp_path: Path, name: str, changed: dict) -> None:
    main = str(REPOSITORY / "configs" / "evaluation.yaml")
    other = str(REPOSITORY / "configs" / "protocols" / "dreambench" / f"{name}.yaml")
    released, protocol = (
        load_config([*files, f"data.dreambench={tmp_path}"], EvaluationConfig).dreambench
        for files in ([main], [main, other])
    )
    assert released is not None and protocol is not None
    assert protocol.name == f"dreambench/{name}" and identity(protocol) != identity(released)
    sampling = {key: changed.pop(key) for key in list(changed) if key == "noise_period"}
    back = replace(released, name=protocol.name, **changed, sampling=replace(released.sampling, **sampling))
    assert identity(back) == identity(protocol)


def test_captions_are_drawn_as_the_released_script_does(coco_folder: Path) -> None:
    content = json.loads((coco_folder / "annotations" / "captions_val2014.json").read_text())
    random.seed(COCO.caption_seed)
    expected = [row["caption"] for row in random.sample(content["annotations"], COCO.captions)]
    requests = Coco(COCO, coco_folder).requests()
    assert [request.prompt for request in requests] == expected
    assert all(request.inputs == () for request in requests)


@pytest.fixture
def listed(coco_folder: Path, tmp_path: Path) -> Path:
    """A COCO whose list takes three captions of two images, one of which has no place in the first list's order."""
    folder = shutil.copytree(coco_folder, tmp_path / "coco")
    names = [f"COCO_val2014_{number:012d}.png" for number in (7, 2, 7)]
    rows = [{"file_name": name, "caption": f"caption {row}"} for row, name in enumerate(names)]
    (folder / "list.json").write_text(json.dumps(rows))
    return folder


LISTED = CocoProtocol(name="coco/l", captions=3, caption_seed=None, caption_list="list.json", references="listed")


def test_listed_captions_are_taken_whole(listed: Path) -> None:
    coco = Coco(LISTED, listed)
    assert [request.text for request in coco.requests()] == ["caption 0", "caption 1", "caption 2"]
    assert [path.name[-6:] for path in coco.references()] == ["07.png", "02.png", "07.png"], "as often as taken"
    assert coco.held_out_images() == [] and {path.name for path in coco.files()} == {
        "captions_val2014.json",
        "list.json",
        "COCO_val2014_000000000002.png",
        "COCO_val2014_000000000007.png",
    }
    assert len(Coco(replace(LISTED, references="all"), listed).references()) == tiny_world.CAPTIONED
    (listed / "val2014" / "COCO_val2014_000000000003.png").unlink()
    assert len(Coco(LISTED, listed).references()) == 3, "an image that is not looked at may be missing"
    (listed / "val2014" / "COCO_val2014_000000000002.png").unlink()
    for protocol, told in (
        (LISTED, "1 of 2 images are missing in val2014/: COCO_val2014_000000000002.png"),
        (COCO, "2 of 12 images are missing in val2014/: COCO_val2014_000000000002.png; COCO_"),
    ):
        with pytest.raises(DataSetError) as error:
            Coco(protocol, listed)
        assert told in str(error.value)


def test_drawn_captions_name_their_images(coco_folder: Path) -> None:
    coco = Coco(replace(COCO, references="listed"), coco_folder)
    content = json.loads((coco_folder / "annotations" / "captions_val2014.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    drawn = random.Random(0).sample(content["annotations"], COCO.captions)
    assert [path.name for path in coco.references()] == [names[row["image_id"]] for row in drawn]


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        (replace(LISTED, captions=4), "lists 3 captions but coco.captions=4"),
        (replace(LISTED, caption_list="other.json"), "'other.json' is missing, which coco.caption_list names"),
        (replace(LISTED, caption_list="bad.json"), "is no JSON list of {file_name, caption}: KeyError"),
        (replace(COCO, captions=7, kid=KID(subset_size=7)), "has 6 real images but coco.kid draws 7 at once"),
        (replace(COCO, captions=100), "has 12 captions but the protocol draws 100"),
    ],
)
def test_protocols_that_do_not_fit_are_refused(listed: Path, protocol: CocoProtocol, told: str) -> None:
    (listed / "bad.json").write_text('[{"file": "a"}]')
    with pytest.raises(DataSetError) as error:
        Coco(protocol, listed)
    assert told in str(error.value)
    Coco(replace(COCO, captions=7, kid=KID(subset_size=6)), listed)


def test_halves_are_disjoint(coco_folder: Path) -> None:
    coco = Coco(COCO, coco_folder)
    references, held_out = coco.references(), coco.held_out_images()
    assert len(references) == tiny_world.CAPTIONED // 2 and len(held_out) == COCO.captions
    assert not {image.file for image in held_out} & set(references)
    everything = Coco(replace(COCO, references="all"), coco_folder)
    assert len(everything.references()) == tiny_world.CAPTIONED and everything.held_out_images() == []
