"""Benchmarks in published layouts: requests, refusals, and scores by hand and with tiny networks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

import evaluate
from evaluation.benchmarks import BENCHMARKS, METRICS
from evaluation.protocols.benchmark import EvaluationError, read_image
from evaluation.protocols.geneval import GenEval, GenEvalProtocol
from evaluation.protocols.judged import DreamBenchPlus, DreamBenchPlusProtocol, OmniContext, OmniContextProtocol
from evaluation.protocols.pairs import DreamBenchPairs, PairListProtocol
from evaluation.protocols.protocol import Detector, Sampling, VisionJudge, identity
from evaluation.scores.detection import Correct, Detection, relations
from evaluation.scores.metric import Context
from evaluation.scores.vision_judge import Question, cached_answers, read_score
from tests import tiny
from tests.evaluation import tiny_world

SAMPLING = Sampling(image_size=tiny_world.SIDE)
NOUNS = {"fish": "fish", "dog": "dog", "boat": "toy boat"}
PAIRS = [
    {"prompt": "a fish and a dog in the snow", "image_paths": ["./fish/01.png", "./dog/00.png"], "image_tgt_path": "x"},
    {"prompt": "a toy boat beside a dog", "image_paths": ["./boat/00.png", "dog/00.png"]},
]
PLUS = DreamBenchPlusProtocol(
    "p", 1, SAMPLING, vlm=VisionJudge("j"), highest=4, preservation="same?", style_preservation="style?",
    following="does it show {prompt}?",
)  # fmt: skip
OMNI = OmniContextProtocol("o", 1, SAMPLING, vlm=VisionJudge("j"), preservation="kept?", following="{prompt}?")
GENEVAL = GenEvalProtocol("g", 1, SAMPLING, images_per_prompt=1, detector=Detector("d"))
ROWS = [
    {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], "prompt": "both"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "two cats"},
    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "position": ["left of", 0]}], "prompt": "left"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
]  # fmt: skip


def write_pairs(folder: Path, rows: list = PAIRS) -> Path:
    if not folder.is_dir():
        tiny_world.write_dreambench(folder)
    (folder / "dreambench_multiip.json").write_text(json.dumps(rows))
    return folder


def write_plus(folder: Path) -> Path:
    for kind, name, lines in (
        ("live_subject/animal", "00", ["Fish", "a fish in the snow", "swimming in milk"]),
        ("style", "00", ["oil painting", "a dog as an oil painting"]),
    ):
        for part in ("images", "captions"):
            (folder / part / kind).mkdir(parents=True)
        tiny_world.picture(len(kind)).save(folder / "images" / kind / f"{name}.jpg")
        (folder / "captions" / kind / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    return folder


def write_omni(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for number in range(2):
        names = [f"{number}-{i}.png" for i in range(number + 1)]
        for place, name in enumerate(names):
            tiny_world.picture(10 * number + place).save(folder / name)
        text = "the fish in the snow" if number == 0 else "both\u2028on the beach"
        rows.append({"key": f"k{number}", "task_type": f"t{number}", "instruction": text, "input_images": names})
    (folder / "omnicontext.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return folder


def write_geneval(folder: Path, rows: list = ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_requests_of_pairs(tmp_path: Path) -> None:
    protocol = PairListProtocol("p", 1, SAMPLING, class_nouns=NOUNS, images_per_prompt=2)
    dataset = DreamBenchPairs(protocol, write_pairs(tmp_path / "d"))
    first, again, second, _ = dataset.requests()
    assert (first.prompt, first.text) == ("<i> and <i> in the snow", "a fish and a dog in the snow")
    assert first.inputs == ("fish/01.png", "dog/00.png")
    assert first.unit == again.unit == "fish + dog" and first.seed != again.seed and second.prompt == "<i> beside <i>"
    assert dataset.item(second, Path("x")).references == (tmp_path / "d/boat/00.png", tmp_path / "d/dog/00.png")
    with_class = DreamBenchPairs(replace(protocol, fed="class_and_image"), tmp_path / "d").requests()
    assert with_class[2].prompt == "toy boat <i> beside dog <i>"


TEAL = {"class": "cat", "count": 1, "color": "teal"}
REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda folder: DreamBenchPairs(
            PairListProtocol("p", 1, SAMPLING, class_nouns={"dog": "dog", "boat": "ship"}),
            write_pairs(folder, [*PAIRS, {"prompt": "a", "image_paths": ["../x.png", "dog/00.png"]}]),
        ),
        "entry 1: dreambench_pairs.class_nouns has no 'fish'; entry 2: the prompt 'a toy boat beside a dog' does not "
        "name 'boat' as 'ship'; entry 3: '../x.png' lies outside of the folder.",
    ),
    (
        lambda folder: DreamBenchPairs(PairListProtocol("p", 1, SAMPLING), folder),
        "does not exist; see docs/evaluation.md",
    ),
    (lambda folder: DreamBenchPlus(PLUS, folder), "captions/ holds no .txt."),
    (
        lambda folder: (write_plus(folder) / "images/style/00.jpg").unlink() or DreamBenchPlus(PLUS, folder),
        "images/style/00.jpg is missing",
    ),
    (
        lambda folder: (write_omni(folder) / "1-0.png").unlink() or OmniContext(OMNI, folder),
        "task 2: the file '1-0.png' is missing",
    ),
    (
        lambda folder: GenEval(
            GENEVAL, write_geneval(folder, [{"tag": "t", "prompt": "p"}, ROWS[3] | {"include": [TEAL]}])
        ),
        "prompt 1: nothing is included or excluded; prompt 2: color 'teal' is not one of red, orange",
    ),
    (
        lambda folder: GenEval(GENEVAL, write_geneval(folder)).check_networks({"detector_names": ["dog", "kitten"]}),
        "geneval.detector does not know 1 of 2 classes of the metadata, as 'cat'; it knows dog, kitten",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_invalid_data_sets_are_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    with pytest.raises(EvaluationError) as error:
        make(tmp_path / "d")
    assert message in str(error.value)


def test_requests_and_questions_of_concepts_and_tasks(tmp_path: Path) -> None:
    plus = DreamBenchPlus(PLUS, write_plus(tmp_path / "plus"))
    requests = plus.requests()
    assert [r.prompt for r in requests] == ["<i> in the snow", "<i> swimming in milk", "a dog as <i>"]
    items = [plus.item(request, Path(f"{request.index}.png")) for request in requests]
    given = tmp_path / "plus/images/live_subject/animal/00.jpg"
    assert items[0].asked == {
        "preservation": ("same?", (given,)),
        "following": ("does it show a fish in the snow?", ()),
    }
    assert items[2].asked["preservation"][0] == "style?"
    assert [item.group for item in items] == ["animal", "animal", "style"]
    omni = OmniContext(OMNI, write_omni(tmp_path / "omni"))
    one, two = omni.requests()
    assert (one.prompt, two.prompt) == ("<i> the fish in the snow", "<i> <i> both\u2028on the beach")
    assert len(omni.item(two, Path("x")).asked["preservation"][1]) == 2
    assert identity(OMNI) != identity(replace(OMNI, vlm=VisionJudge("j", revision="abc")))
    assert identity(OMNI) != identity(replace(OMNI, vlm=VisionJudge("k")))


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Good.\nScore: 3", 0.75),
        ("**Score**: 4", 1.0),
        ("score is 2.0 of 4", 0.5),
        ("Score: 5", None),
        ("Score 1 at first, but then Score: 0", 0.0),
        ("four", None),
    ],
)
def test_scores_are_read_from_answers(answer: str, value: float | None) -> None:
    assert read_score(answer, 4) == value


def test_scores_of_a_vision_judge_by_hand(tmp_path: Path) -> None:
    omni = OmniContext(OMNI, write_omni(tmp_path / "omni"))
    items = [omni.item(request, tmp_path / f"{request.index}.png") for request in omni.requests()]
    said = {  # by number of images and text: the inputs and the generated image, or only that
        (2, "kept?"): "Score: 9",
        (1, "the fish in the snow?"): "Score: 4",
        (3, "kept?"): "Score: 0",
        (1, "both\u2028on the beach?"): "Score: 10",
    }
    context = Context({"vlm": lambda asked: [said[len(q.images), q.text] for q in asked]}, protocol=omni.protocol)
    metrics = {kind.name: kind(context) for kind in METRICS["omnicontext"]}
    values = {name: [row.value for row in metric.score(items)] for name, metric in metrics.items()}
    assert values == {"following": [0.4, 1.0], "preservation": [0.9, 0.0], "overall": [pytest.approx(0.6), 0.0]}
    said[1, "the fish in the snow?"] = "I cannot say"
    with pytest.raises(EvaluationError, match=r"gave no score from 0 to 10 in 1 of 2 answers, as 'I cannot say'"):
        metrics["following"].score(items)


def test_a_question_is_asked_once(tmp_path: Path) -> None:
    """Also across runs; again if an image has changed."""
    tiny_world.picture(1).save(tmp_path / "a.png")
    tiny_world.picture(2).save(tmp_path / "b.png")
    asked: list[str] = []

    def judge(questions: list[tuple[str, list[Image.Image]]]) -> list[str]:
        asked.extend(text for text, _ in questions)
        return [f"{text} {len(images)} Score: 1" for text, images in questions]

    def answers(*questions: Question) -> list[str]:
        return cached_answers(judge, tmp_path / "kept", read_image)(list(questions))

    first, second = Question("é?", (tmp_path / "a.png",)), Question("two?", (tmp_path / "a.png", tmp_path / "b.png"))
    assert answers(first, second, first) == ["é? 1 Score: 1", "two? 2 Score: 1", "é? 1 Score: 1"]
    assert asked == ["é?", "two?"]
    assert answers(second, Question("new", ())) == ["two? 2 Score: 1", "new 0 Score: 1"] and asked[2:] == ["new"]
    rows = [json.loads(file.read_text()) for file in (tmp_path / "kept").iterdir()]
    assert {"question": "é?", "images": [str(tmp_path / "a.png")], "answer": "é? 1 Score: 1"} in rows and len(rows) == 3
    tiny_world.picture(3).save(tmp_path / "b.png")
    answers(first, second)
    assert asked[3:] == ["two?"]


def detection(name: str, left: float, top: float, confidence: float = 0.95) -> Detection:
    return Detection(name, confidence, (left, top, left + 10, top + 10))


def test_geneval_by_hand(tmp_path: Path) -> None:
    """Thresholds, counts, exclusions, positions and colours; the mean over tasks, not over images."""
    benchmark = GenEval(replace(GENEVAL, images_per_prompt=1), write_geneval(tmp_path))
    items = [benchmark.item(request, Path(f"{request.index}.png")) for request in benchmark.requests()]
    detections = {
        "0.png": [detection("cat", 0, 0), detection("dog", 30, 0, 0.4)],
        "1.png": [detection("cat", 0, 0), detection("cat", 30, 0, 0.89), detection("cat", 50, 0)],
        "2.png": [detection("dog", 0, 0), detection("cat", 40, 0)],
        "3.png": [detection("dog", 0, 0)],
    }
    red = torch.eye(10)[0]
    networks = {
        "detector": lambda files: [detections[str(file)] for file in files],
        "clip_texts": lambda texts: torch.eye(10).repeat_interleave(3, dim=0),
        "clip_images": lambda crops: red[None].expand(len(crops), -1),
    }
    metric = Correct(Context(networks, protocol=benchmark.protocol))
    rows = metric.score(items)
    assert [row.against for row in rows] == ["", "", "expected cat left of target", ""]
    assert [row.value for row in rows] == [True, True, False, True]
    detections["1.png"].append(detection("cat", 70, 0, 0.91))
    red[:] = torch.eye(10)[4]
    rows = metric.score(items)
    assert [row.against for row in rows][1::2] == ["expected cat<3", "expected red dog>=1, found blue"]
    estimate = metric.aggregate([*rows, replace(rows[0], value=False)])
    assert estimate.value == pytest.approx((0.5 + 0 + 0 + 0) / 4) and estimate.n == 5
    assert relations(detection("a", 0, 0), detection("b", 0, 40), 0.1) == {"above"}
    assert relations(detection("a", 0, 0), detection("b", 1, 1), 0.1) == set()


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny judge with a chat template, and a tiny detector of cats and dogs."""
    folder = tmp_path_factory.mktemp("networks")
    tiny.write_language_model(folder / "vlm", "qwen2_5_vl")
    template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    )
    (folder / "vlm" / "chat_template.jinja").write_text(template)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = YolosConfig(
            **sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=6, id2label={0: "cat", 1: "dog"}
        )
        YolosForObjectDetection(config).save_pretrained(folder / "detector")
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(folder / "detector")
    return folder


@pytest.mark.parametrize("name", ["dreambench_pairs", "dreambench_plus", "omnicontext", "geneval"])
def test_a_folder_of_images_is_scored(
    name: str, networks: Path, encoders_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By the command, with shipped protocols and tiny networks. A random judge gives no scores, which is an error."""
    write = {
        "dreambench_pairs": write_pairs,
        "dreambench_plus": write_plus,
        "omnicontext": write_omni,
        "geneval": write_geneval,
    }
    data, output = write[name](tmp_path / "data"), tmp_path / "output"
    file = {"dreambench_pairs": "uno", "geneval": "detr"}.get(name, "open-judge")
    options = [f"{name}.sampling.image_size={tiny_world.SIDE}", "bootstrap.replicates=100", "device=cpu"]
    if name in ("dreambench_pairs", "dreambench_plus"):
        options += [f"{name}.dino.weights={encoders_folder / 'dino'}", f"{name}.dino.preprocessing=null"]
    if name != "omnicontext":
        options += [f"{name}.clip.weights={encoders_folder / 'clip'}", f"{name}.clip.preprocessing=null"]
    if name in ("dreambench_plus", "omnicontext"):
        options += [f"{name}.vlm.weights={networks / 'vlm'}", f"{name}.vlm.max_new_tokens=3"]
    if name == "dreambench_pairs":
        options += ["dreambench_pairs.class_nouns={fish: fish, dog: dog, boat: toy boat}"]
    if name == "geneval":
        options += [f"geneval.detector.weights={networks / 'detector'}", "geneval.detector.threshold=0.2"]
        options += ["geneval.detector.aliases={}"]
    arguments = [f"{name}/{file}", f"data={data}", f"output={output}", *options]
    assert evaluate.main(["requests", *arguments]) == 0
    asked = [json.loads(line) for line in (output / "requests" / f"{name}.jsonl").read_text().split("\n") if line]
    (tmp_path / "theirs").mkdir()
    for request in asked:
        tiny_world.picture(request["index"]).save(tmp_path / "theirs" / f"{request['index']:04d}.png")
    command = ["score", *arguments, f"images={tmp_path / 'theirs'}"]
    for _ in range(2 if name in ("dreambench_plus", "omnicontext") else 0):  # once for each question
        assert evaluate.main(command) == 2
        assert "the judge gave no score from 0 to" in capsys.readouterr().err
        kept = list((output / "answers").glob("*/*.json"))
        assert len(kept) >= len(asked)
        for answer in kept:  # replace with a valid answer
            answer.write_text(json.dumps(json.loads(answer.read_text()) | {"answer": "so it is. Score: 3"}))
    assert evaluate.main(command) == 0, capsys.readouterr().err
    rows = json.loads((output / "results.json").read_text())
    assert {row["metric"] for row in rows} == {metric.name for metric in METRICS[name]}
    assert all(row["system"] == "theirs" and row["protocol"].startswith(f"{name}/{file}@1#") for row in rows)
    assert all(row["n"] >= len(asked) for row in rows) and {row["table"] for row in rows} == {name}
    title = BENCHMARKS[name].tables[name]
    assert title in (output / "report.html").read_text().replace("&#43;", "+")
    assert f"## {title}" in (output / "results.md").read_text()
