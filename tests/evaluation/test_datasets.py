"""DreamBench and COCO from their published folders; missing files are named."""

import json
import random
import shutil
from collections.abc import Callable
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
LISTED = CocoProtocol(name="coco/l", captions=3, caption_seed=None, caption_list="list.json", references="listed")


@pytest.fixture
def changeable(dreambench_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dreambench_folder, tmp_path / "dreambench")


def change_facts(folder: Path, change: Callable[[dict], object]) -> None:
    facts = json.loads((folder / "dreambench.json").read_text())
    change(facts)
    (folder / "dreambench.json").write_text(json.dumps(facts))


def test_requests_follow_the_protocol(dreambench_folder: Path) -> None:
    requests = DreamBench(PROTOCOL, dreambench_folder).requests()
    assert [request.index for request in requests] == list(range(3 * 3 * 2))
    assert len({request.seed for request in requests}) == len(requests)
    hat = requests[2]
    assert (hat.prompt, hat.text) == ("<i> wearing a hat", "a fish wearing a hat")
    assert (hat.inputs, hat.unit) == (("fish/01.png",), "fish")
    with_class = DreamBench(replace(PROTOCOL, fed="class_and_image"), dreambench_folder).requests()
    assert with_class[2].prompt == "fish <i> wearing a hat"
    shared_noise = replace(PROTOCOL, sampling=replace(PROTOCOL.sampling, noise_period=3))
    seeds = [request.seed for request in DreamBench(shared_noise, dreambench_folder).requests()]
    assert seeds[:6] == seeds[6:12] == seeds[12:] and len(set(seeds)) == 6
    small = DreamBench(replace(PROTOCOL, max_subjects=2, max_templates=1), dreambench_folder)
    assert list(small.subjects) == ["fish", "dog"] and len(small.requests()) == 4
    assert spread(list(range(10)), 3) == [0, 3, 6]


def test_items_have_references_labels_and_parts(dreambench_folder: Path) -> None:
    dataset = DreamBench(PROTOCOL, dreambench_folder)
    items = [dataset.item(request, Path("x")) for request in dataset.requests()]
    first, hat, red = items[::2][:3]
    assert first.labels == {"kind": "fish", "colour": "blue", "setting": "in the snow"}
    assert (first.words, hat.words, red.words) == ({"setting": "in the snow"}, {}, {"colour": "red"})
    assert red.labels == {"kind": "fish", "colour": "red"}, "the prompt overrides the subject's label"
    assert first.parts == {
        "kind": ("live", "fish"),
        "subject": ("fish", "a {} in the snow"),
        "template": ("a {} in the snow", "fish"),
        "words": ("setting", "fish"),
    }
    assert "words" not in hat.parts and items[1].group == "a {} in the snow" and hat.group == "a {} wearing a hat"
    given = {item.unit: item.given.name for item in items if item.given}
    assert given == {"fish": "01.png", "dog": "00.png", "boat": "00.png"}
    others = tuple(dreambench_folder / "fish" / "others" / name for name in ("00.png", "01.png"))
    assert first.others == others and set(others) < set(dataset.files())


def test_real_images_are_compared_with_other_photos(dreambench_folder: Path) -> None:
    kept = DreamBench(PROTOCOL, dreambench_folder)
    every = DreamBench(replace(PROTOCOL, references="all"), dreambench_folder)
    assert [path.name for path in kept.references_of("fish")] == ["01.png"]
    assert [path.name for path in every.references_of("fish")] == ["00.png", "01.png", "02.png"]
    real = kept.other_real_images()
    assert [item.file.name for item in real if item.unit == "fish"] == ["00.png", "02.png"]
    assert all(item.labels == kept.subjects[item.unit].labels and item.file not in kept.others("fish") for item in real)
    assert all(item.file not in item.references for item in every.other_real_images())
    assert len(every.other_real_images()) == 9
    photos = {(item.unit, item.file.name): item.given for item in every.other_real_images()}
    assert photos["fish", "01.png"] is None, "the input image is not a copy of itself"
    assert photos["fish", "00.png"] == dreambench_folder / "fish" / "01.png"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder, facts: shutil.rmtree(folder / "boat") or (folder / "fish" / "01.png").unlink(),
            "subject 'fish' lacks its kept_image 01.png (found: 00.png, 02.png); subject 'boat' has no folder",
        ),
        (
            lambda folder, facts: facts["subjects"]["dog"].update(kind="liquid"),
            "'dog' is of kind 'liquid', but there are prompts only for: live, object",
        ),
        (lambda folder, facts: facts["subjects"]["dog"].pop("class"), "does not have DreamBench's structure"),
    ],
)
def test_missing_subjects_and_files_are_named(changeable: Path, damage, message: str) -> None:
    change_facts(changeable, lambda facts: damage(changeable, facts))
    with pytest.raises(DataSetError) as error:
        DreamBench(PROTOCOL, changeable)
    assert message in str(error.value)


def test_unreadable_images_are_refused(tmp_path: Path) -> None:
    """Damaged files, small files with too many pixels, and formats whose decoders run code."""
    Image.new("1", (12_000, 12_000)).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "page.eps")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    for name, message in (
        ("large.png", r"12000×12000; at most 64000000 pixels"),
        ("page.eps", r"page\.eps' cannot be read as an image"),
        ("damaged.png", r"damaged\.png' cannot be read as an image"),
    ):
        for read in (read_image, fit):
            with pytest.raises(DataSetError, match=message):
                read(tmp_path / name)
    with pytest.raises(OSError, match="cannot identify image"):
        embed(tmp_path / "page.eps")


def test_identity_depends_on_every_value(dreambench_folder: Path, changeable: Path) -> None:
    protocol = DreamBench(PROTOCOL, dreambench_folder).protocol
    assert identity(protocol) == identity(DreamBench(PROTOCOL, dreambench_folder).protocol)
    assert identity(protocol) != identity(replace(protocol, sampling=replace(protocol.sampling, steps=99)))
    text = (changeable / "dreambench.json").read_text()
    (changeable / "dreambench.json").write_text(text.replace("a red {}", "a blue {}"))
    assert identity(protocol) != identity(DreamBench(PROTOCOL, changeable).protocol)


def test_released_protocol_has_the_recorded_facts(recorded: Path, tmp_path: Path) -> None:
    arguments = [str(REPOSITORY / "configs" / "evaluation.yaml"), f"data.dreambench={tmp_path}"]
    protocol = load_config(arguments, EvaluationConfig).dreambench
    facts = json.loads((recorded / "dreambench.json").read_text())
    assert protocol is not None
    assert facts["subjects"] == {
        name: {"class": subject.class_noun, "kind": subject.kind, "kept_image": subject.kept_image}
        for name, subject in protocol.subjects.items()
    }
    prompts = {kind: {"original": t.original, "modified": t.modified} for kind, t in protocol.prompts.items()}
    assert prompts == facts["prompts"]
    for name, subject in facts["subjects"].items():
        (tmp_path / name).mkdir()
        (tmp_path / name / subject["kept_image"]).write_bytes(b"")
    assert len(DreamBench(protocol, tmp_path).requests()) == facts["total_images"]


@pytest.mark.parametrize(
    ("name", "changed", "sampling"),
    [
        ("paper", {"fed": "class_and_image"}, {"noise_period": None}),
        ("all-references", {"references": "all"}, {}),
    ],
)
def test_other_dreambench_protocols_differ_as_documented(
    tmp_path: Path, name: str, changed: dict, sampling: dict
) -> None:
    main = str(REPOSITORY / "configs" / "evaluation.yaml")
    other = str(REPOSITORY / "configs" / "protocols" / "dreambench" / f"{name}.yaml")
    released, protocol = (
        load_config([*files, f"data.dreambench={tmp_path}"], EvaluationConfig).dreambench
        for files in ([main], [main, other])
    )
    assert released is not None and protocol is not None
    assert protocol.name == f"dreambench/{name}" and identity(protocol) != identity(released)
    same = replace(released, name=protocol.name, **changed, sampling=replace(released.sampling, **sampling))
    assert identity(same) == identity(protocol)


def test_captions_are_drawn_as_in_the_released_script(coco_folder: Path) -> None:
    content = json.loads((coco_folder / "annotations" / "captions_val2014.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    random.seed(COCO.caption_seed)
    drawn = random.sample(content["annotations"], COCO.captions)
    coco = Coco(replace(COCO, references="listed"), coco_folder)
    assert [request.prompt for request in coco.requests()] == [row["caption"] for row in drawn]
    assert all(request.inputs == () for request in coco.requests())
    assert [path.name for path in coco.references()] == [names[row["image_id"]] for row in drawn]


@pytest.fixture
def listed(coco_folder: Path, tmp_path: Path) -> Path:
    """A COCO folder with a list of three captions of two images."""
    folder = shutil.copytree(coco_folder, tmp_path / "coco")
    names = [f"COCO_val2014_{number:012d}.png" for number in (7, 2, 7)]
    rows = [{"file_name": name, "caption": f"caption {row}"} for row, name in enumerate(names)]
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "bad.json").write_text('[{"file": "a"}]')
    return folder


def test_listed_captions_are_used_in_order(listed: Path) -> None:
    coco = Coco(LISTED, listed)
    assert [request.text for request in coco.requests()] == ["caption 0", "caption 1", "caption 2"]
    assert [path.name[-6:] for path in coco.references()] == ["07.png", "02.png", "07.png"], "with repetition"
    first, second = (f"COCO_val2014_{number:012d}.png" for number in (2, 7))
    assert coco.held_out_images() == []
    assert {path.name for path in coco.files()} == {"captions_val2014.json", "list.json", first, second}
    assert len(Coco(replace(LISTED, references="all"), listed).references()) == tiny_world.CAPTIONED
    (listed / "val2014" / "COCO_val2014_000000000003.png").unlink()
    assert len(Coco(LISTED, listed).references()) == 3, "unused images may be missing"
    (listed / "val2014" / first).unlink()
    for protocol, message in (
        (LISTED, f"1 of 2 images are missing in val2014/: {first}"),
        (COCO, f"2 of 12 images are missing in val2014/: {first}; COCO_"),
    ):
        with pytest.raises(DataSetError) as error:
            Coco(protocol, listed)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (replace(LISTED, captions=4), "lists 3 captions but coco.captions=4"),
        (replace(LISTED, caption_list="other.json"), "coco.caption_list=other.json does not exist"),
        (replace(LISTED, caption_list="bad.json"), "is not a JSON list of {file_name, caption}: KeyError"),
        (replace(COCO, captions=7, kid=KID(subset_size=7)), "has 6 real images but coco.kid.subset_size=7"),
        (replace(COCO, captions=100), "has 12 captions but the protocol draws 100"),
    ],
)
def test_protocols_that_do_not_fit_are_refused(listed: Path, protocol: CocoProtocol, message: str) -> None:
    with pytest.raises(DataSetError) as error:
        Coco(protocol, listed)
    assert message in str(error.value)


def test_halves_are_disjoint(coco_folder: Path) -> None:
    coco = Coco(COCO, coco_folder)
    references, held_out = coco.references(), coco.held_out_images()
    assert len(references) == tiny_world.CAPTIONED // 2 and len(held_out) == COCO.captions
    Coco(replace(COCO, captions=7, kid=KID(subset_size=6)), coco_folder)  # exactly as many images as a subset
    assert not {item.file for item in held_out} & set(references)
    everything = Coco(replace(COCO, references="all"), coco_folder)
    assert len(everything.references()) == tiny_world.CAPTIONED and everything.held_out_images() == []
