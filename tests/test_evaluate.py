"""The whole evaluation by its command: tables, report, reuse, resumption, and mistakes answered."""

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
from evaluation.benchmarks import METRICS, benchmark_of
from kosmosg.generation import read_manifest
from tests.evaluation.conftest import *  # noqa: F403  the tiny world's fixtures
from tests.lightning_modules.processes import run_together, start, wait

SYSTEMS = {
    "Real images",
    "Copy of the input",
    "Stable Diffusion (text)",
    "KOSMOS-G before stage 3",
    "KOSMOS-G after stage 3",
}
AFTER = "KOSMOS-G after stage 3"
WHOLE = ["curve.guidance_scales=[4,1.5]", "curve.systems=[KOSMOS-G after stage 3]", "encoder_batch_size=4"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As forked processes have: the last bits of an image depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(one_thread: None, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "evaluation"
    assert evaluate.main([*arguments, *WHOLE, f"output={output}"]) == 0
    return output


def rows_of(output: Path, table: str | None = None) -> list[dict]:
    """Rows of results.json, of one table alone if given."""
    rows = json.loads((output / "results.json").read_text())
    return [row for row in rows if table in (None, row["table"])]


def images_of(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("images/*.png"))}


def manifests_of(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("manifest.jsonl"))}


def test_results_have_the_agreed_form(finished: Path) -> None:
    rows = rows_of(finished)
    for row in rows:
        assert list(row)[:8] == ["table", "system", "metric", "value", "low", "high", "n", "protocol"]
        assert list(row)[8:] == (["guidance_scale"] if row["table"] == "guidance" else [])
        assert row["low"] <= row["value"] <= row["high"]
        name = benchmark_of(row["table"])
        sampled = row["system"] not in ("Real images", "Copy of the input")
        assert re.fullmatch(rf"{name}/toyland@4#[0-9a-f]{{8}}" + r"\+[0-9a-f]{8}" * sampled, row["protocol"])
    shown = {(row["system"], row["metric"]) for row in rows if row["table"] == "leakage"}
    assert shown == {(s, m.name) for s in SYSTEMS for m in METRICS["leakage"]}
    found = {
        (row["table"], row["system"], row["metric"]) for row in rows if row["table"] not in ("guidance", "leakage")
    }
    of_all = ("dino", "clip_i", "near_copies", "kind", "colour", "identity")
    fidelity = {("dreambench", s, metric) for s in SYSTEMS for metric in of_all}
    told = {("dreambench", s, metric) for s in SYSTEMS - {"Real images"} for metric in ("clip_t", "words")}
    captions = {("coco", system, metric) for system in SYSTEMS - {"Copy of the input"} for metric in ("fid", "clip_t")}
    drawn = SYSTEMS - {"Real images", "Copy of the input"}
    pairs = {("pairs", s, metric) for s in drawn for metric in ("pair_kind", "pair_identity", "swapped", "missing")}
    assert found == fidelity | told | captions | pairs
    copy = {row["metric"]: row["value"] for row in rows if row["system"] == "Copy of the input"}
    assert (
        copy["dino"] == pytest.approx(1)
        and copy["clip_i"] == pytest.approx(1)
        and copy["near_copies"] == copy["identity"] == copy["kept"] == copy["leaked"] == 1
    )
    assert {row["n"] for row in rows if row["table"] == "coco"} == {6}


def test_samples_average_to_the_results(finished: Path) -> None:
    with (finished / "samples.csv").open() as stream:
        samples = list(csv.DictReader(stream))
    assert all(
        bool(sample["template"]) == (sample["table"] in ("dreambench", "leakage"))
        for sample in samples
        if sample["system"] != "Real images"
    )
    for row in rows_of(finished):
        if row["metric"] == "fid" or row["table"] == "guidance":
            continue
        key = {name: row[name] for name in ("table", "system", "metric")}
        own = [float(sample["score"]) for sample in samples if key.items() <= sample.items()]
        assert len(own) == row["n"]
        mean = sum(own) / len(own)
        assert (mean if row["table"] == "leakage" else max(0, mean)) == pytest.approx(row["value"], abs=1e-6)


def test_report_and_tables(finished: Path) -> None:
    report = (finished / "report.html").read_text()
    assert set(re.findall(r"<td>([^<]+)</td>", report)) >= SYSTEMS
    assert not re.findall(r'(?:src|href)="(?!data:|#)', report), "the report must hold everything itself"
    assert "same prompt, another input image" in report and "Two input images" in report
    tables = (finished / "results.md").read_text()
    for text in (report, tables):
        assert all(column in text for column in ("Kind ↑", "Colour ↑", "Identity ↑", "Words ↑")), "what was judged"
        assert "Two subjects: 1 pairs" in text and "Swapped ↓" in text
        assert "Pattern ↑" not in text and "chance is 0.333" in text
        assert re.search(r"The judge on \d real images: kind \d\.\d\d, colour \d\.\d\d, identity \d\.\d\d\.", text)
    assert tables.index("KOSMOS-G after stage 3") < tables.index("# The paper's numbers") < tables.index("0.694")
    assert {file.name for file in (finished / "sheets").iterdir()} == {
        "subjects.png",
        "systems.png",
        "captions.png",
        "swap.png",
        "pairs.png",
        "stages.png",
        "inputs.png",
        "guidance_dino.svg",
        "guidance_clip_i.svg",
    }


def test_breakdown_is_of_the_samples(finished: Path) -> None:
    """Every part of every system that answers prompts; parts of one kind make up the whole."""
    with (finished / "breakdown.csv").open() as stream:
        parts = list(csv.DictReader(stream))
    scores = {(row["system"], row["metric"]): row for row in rows_of(finished, "dreambench")}
    for by, count in (("kind", 2), ("subject", 3), ("template", 4)):
        for metric in ("dino", "clip_i", "clip_t", "near_copies", "identity"):
            own = [part for part in parts if (part["by"], part["metric"], part["system"]) == (by, metric, AFTER)]
            assert len(own) == count and all(float(p["low"]) <= float(p["value"]) <= float(p["high"]) for p in own)
            whole, n = scores[AFTER, metric], sum(int(part["n"]) for part in own)
            mean = sum(float(part["value"]) * int(part["n"]) for part in own) / n
            assert n == whole["n"] and max(0.0, mean) == pytest.approx(whole["value"], abs=1e-5)
    assert {part["system"] for part in parts} == SYSTEMS - {"Real images"}
    tables = (finished / "results.md").read_text()
    assert {part["part"] for part in parts if part["by"] == "words"} == {"setting", "colour"}
    assert "## By what the words ask for" in tables and "## By subject" in tables and "| a {} in the snow |" in tables


def test_curve_over_guidance(finished: Path) -> None:
    """Two points under protocols of their own; the table's own scale is not made again."""
    rows = rows_of(finished, "guidance")
    assert {(row["system"], row["guidance_scale"]) for row in rows} == {(AFTER, 1.5), (AFTER, 4.0)}
    by_scale = {row["guidance_scale"]: row["protocol"] for row in rows}
    table = {row["metric"]: row for row in rows_of(finished, "dreambench") if row["system"] == AFTER}
    assert by_scale[4.0] == table["dino"]["protocol"] != by_scale[1.5]
    for row in rows:
        if row["guidance_scale"] == 4.0:
            assert {k: row[k] for k in ("value", "low", "high", "n")} == {
                k: table[row["metric"]][k] for k in ("value", "low", "high", "n")
            }
    assert len(list((finished / "guidance").iterdir())) == 1
    assert "Over guidance scales" in (finished / "report.html").read_text()
    assert "## Over guidance scales" in (finished / "results.md").read_text()


def test_finished_evaluation_is_reused(
    arguments: list[str], finished: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_, **__):
        raise AssertionError("a finished evaluation generates nothing")

    monkeypatch.setattr("evaluation.plan.generate", fail)
    before = (finished / "results.json").stat().st_mtime_ns
    assert evaluate.main([*arguments, *WHOLE, f"output={finished}"]) == 0
    assert (finished / "results.json").stat().st_mtime_ns == before
    assert "KOSMOS-G after stage 3" in capsys.readouterr().out


def test_other_code_scores_anew(
    arguments: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images stay, since what they depend on is in their manifests."""
    output = shutil.copytree(finished, tmp_path / "evaluation")
    code = tmp_path / "code"
    code.mkdir()
    (code / "metric.py").write_text("changed")
    monkeypatch.setattr("evaluation.plan.CODE", code)
    (output / "results.json").write_text("[]")
    assert evaluate.main([*arguments, *WHOLE, f"output={output}"]) == 0
    assert (output / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    assert images_of(output) == images_of(finished)


def test_changed_protocol_starts_new_images_and_keeps_the_old(
    arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation"
    shutil.copytree(finished, output)
    protocols = {row["protocol"] for row in rows_of(output)}
    task = {protocol for protocol in protocols if "+" not in protocol}
    assert evaluate.main([*arguments, f"output={output}", "coco=null", "dreambench.sampling.guidance_scale=2"]) == 0
    new = {row["protocol"] for row in rows_of(output)}
    assert len(new) == 2 and len(new & protocols) == 1 and new & protocols <= task
    assert images_of(finished).items() <= images_of(output).items()


@pytest.mark.slow
def test_killed_evaluation_goes_on_to_the_same_end(arguments: list[str], finished: Path, tmp_path: Path) -> None:
    """Two processes, one of which is killed, and the other does not wait for it; then two to the end."""
    output = tmp_path / "evaluation"
    command, total = [*arguments, *WHOLE, f"output={output}"], len(images_of(finished))
    children, deadline = start(2, lambda: evaluate.main(command), tmp_path / "log"), time.monotonic() + 300
    while len(list(output.rglob("images/[0-9]*.png"))) < total // 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(children[0], signal.SIGKILL)
    first, other = wait(children, kill_after=60)
    assert first == -signal.SIGKILL and other not in (0, -signal.SIGKILL) and len(images_of(output)) < total
    assert run_together(2, lambda: evaluate.main(command), tmp_path / "log") == [0, 0]
    assert manifests_of(output) == manifests_of(finished)
    assert images_of(output) == images_of(finished)
    for file in ("results.json", "samples.csv", "breakdown.csv"):
        # Paths of the samples are relative to the output.
        assert (output / file).read_bytes() == (finished / file).read_bytes()


REFUSALS = [
    (["dreambench.sampling.guidence_scale=5"], "Did you mean: 'guidance_scale'"),
    (["dreambench.sampling.steps=0"], "sampling.steps=0 is not allowed"),
    (["dreambench.sampling.sampler=euler"], "euler"),
    (["data.dreambench=/nowhere"], "dreambench.json' does not exist"),
    (["data.coco=/nowhere"], "there is no COCO at '/nowhere'"),
    (["models.after_stage_3=/nowhere"], "'/nowhere' holds no model"),
    (["models.image_decoder=/nowhere"], "there is no folder '/nowhere'"),
    (["dreambench.dino.weights=/nowhere"], "'/nowhere' is not an encoder"),
    (["coco.fid.network=inception2"], "inception2"),
    (["coco.fid.network=inception"], "there is no weight file"),
    (["coco.kid.subset_size=7"], "coco.kid.subset_size=7 is not allowed; it must be at most coco.captions=6"),
    (["coco.real_resize.library=pil"], "resize.antialias=false is not allowed"),
    (["coco.captions=100000"], "has 12 captions but the protocol draws 100000"),
    (["gallery.pair_prompt=<i> alone"], "must hold <i> 2 times"),
    (["curve.guidance_scales=[2,2]"], "curve.guidance_scales=[2.0, 2.0] is not allowed"),
    (["curve.guidance_scales=[2]", "dreambench=null"], "is not allowed without a dreambench protocol"),
    (
        ["curve.guidance_scales=[2]", "curve.systems=[SD]"],
        "curve.systems=['SD'] are not generated here; allowed",
    ),
    (["models.external.Rival=/nowhere"], "there is no folder '/nowhere'"),
    (["models.external.Real images=/"], "the name of a row of ours"),
]


def test_mistakes_are_answered(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for changes, message in REFUSALS:
        assert evaluate.main([*arguments, f"output={tmp_path / 'evaluation'}", *changes]) == 2, changes
        assert message in capsys.readouterr().err, changes


def test_interruption_is_told(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluation.plan.generate", interrupt)
    assert evaluate.main([*arguments, f"output={tmp_path / 'evaluation'}"]) == 130
    assert "Run the same command again" in capsys.readouterr().err


def test_help_lists_the_keys(capsys: pytest.CaptureFixture) -> None:
    assert evaluate.main(["configs/toyland/evaluation.yaml", "--help"]) == 0
    assert "models.after_stage_3" in capsys.readouterr().out


@pytest.fixture
def rival(finished: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> Path:
    """A rival whose images are KOSMOS-G's after stage 3, by what `evaluate.py requests` asked for."""
    assert evaluate.main(["requests", *arguments, f"output={tmp_path}"]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "requests" / f"{t}.jsonl") for t in ("dreambench", "coco")
    ]
    folder = tmp_path / "rival"
    for table in ("dreambench", "coco"):
        own = next((finished / table).glob("kosmos-g-after-stage-3-*"))
        (folder / table).mkdir(parents=True)
        lines = []
        for line in (tmp_path / "requests" / f"{table}.jsonl").read_text().splitlines():
            asked = json.loads(line)
            name = f"{asked['index']}.png"
            shutil.copy(own / "images" / f"{asked['index']:06d}.png", folder / table / name)
            answer = {"index": asked["index"], "file": name, "prompt": asked["text"], "note": "one\u2028line"}
            lines.append(json.dumps(answer, ensure_ascii=False))
        (folder / table / "manifest.jsonl").write_text("\ufeff" + "\n".join(lines))  # as Windows' editors save it
    return folder


def test_a_rival_with_our_images_has_our_scores(
    finished: Path, rival: Path, arguments: list[str], tmp_path: Path
) -> None:
    output = shutil.copytree(finished, tmp_path / "evaluation")
    assert evaluate.main([*arguments, f"output={output}", f"models.external.Rival={rival}"]) == 0
    scores: dict[str, dict] = {}
    for row in rows_of(output):
        key = (row["table"], row["metric"])
        scores.setdefault(row["system"], {})[key] = {k: v for k, v in row.items() if k not in ("system", "protocol")}
        if row["system"] == "Rival":
            assert "+" not in row["protocol"], "how it was sampled is not ours to say"
    assert scores["Rival"] == scores["KOSMOS-G after stage 3"]
    assert "Rival, coco" in (output / "report.html").read_text()
    before = (output / "results.json").read_bytes()
    shutil.copy(rival / "dreambench" / "0.png", rival / "dreambench" / "1.png")
    assert evaluate.main([*arguments, f"output={output}", f"models.external.Rival={rival}"]) == 0
    assert (output / "results.json").read_bytes() != before, "changed images are scored anew"


def test_a_folder_of_images_is_scored_without_any_model(
    finished: Path, rival: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Files named after the request, or as `kosmosg generate` does; what is drawn by either compares by the task."""
    asked, wrong = read_manifest(tmp_path / "requests" / "dreambench.generate.jsonl")
    assert asked and not wrong and asked[0].name == "000000" and Path(asked[0].images[0]).is_file()
    (rival / "dreambench" / "0.png").rename(rival / "dreambench" / f"{asked[0].name}-{asked[0].seed}.png")
    images, data = rival / "dreambench", dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    (images / "manifest.jsonl").unlink()
    short = ["dreambench.max_subjects=4", "dreambench.max_templates=3", "dreambench.sampling.steps=3"]
    short += [argument for argument in arguments if argument.startswith("dreambench.")]
    command = ["score", "dreambench/toyland", f"images={images}", f"data={data['data.dreambench']}", "name=Theirs"]
    output = tmp_path / "theirs"
    assert evaluate.main([*command, f"output={output}", *short]) == 0
    ours, theirs = (
        {
            (row["system"], row["metric"]): row["value"]
            for row in json.loads((folder / "results.json").read_text())
            if row["table"] == "dreambench"
        }
        for folder in (finished, output)
    )
    assert {system for system, _ in theirs} == {"Real images", "Copy of the input", "Theirs"}
    for (system, metric), value in theirs.items():
        expected = ours[AFTER if system == "Theirs" else system, metric]
        assert value == pytest.approx(expected, abs=1e-6), (system, metric)  # other batches round otherwise
    assert "Theirs" in (output / "report.html").read_text() and (output / "sheets" / "systems.png").is_file()
    capsys.readouterr()
    assert evaluate.main(["compare", str(finished), str(output)]) == 0, capsys.readouterr().err
    Image.new("RGB", (31, 32)).save(images / "0.png")
    for wrong, told in (
        ([*command, f"output={output}", *short], "image 1: '" + str(images / "0.png") + "' has 31×32 pixels"),
        (["score", "dreambench/toy"], "there is no benchmark 'dreambench/toy'; allowed: coco/kosmosg-cached, "),
        (["score", "dreambench/toyland", "images=x"], "score dreambench/toyland needs data=FOLDER, output=FOLDER"),
    ):
        assert evaluate.main(wrong) == 2
        assert told in capsys.readouterr().err


DAMAGED_ANSWERS = [
    (lambda lines: lines[1:], "1 of 10 images are missing, as index 0"),
    (lambda lines: [*lines, lines[0]], "index 0 is given twice"),
    (lambda lines: [*lines, '{"index": 99, "file": "0.png"}'], "line 11: index 99 is no request's"),
    (lambda lines: [lines[0].replace("0.png", "x.png"), *lines[1:]], "x.png' does not exist"),
    (lambda lines: ['{"index": 0, "file": "0.png", "prompt": "a cat"}', *lines[1:]], "index 0 is of 'a cat', but"),
    (lambda lines: ["[]", *lines[1:]], "line 1: expected an object"),
    (lambda lines: ['{"index": 0.5, "file": "0.png"}', *lines[1:]], "line 1: index 0.5 is no request's"),
]


def test_a_rival_that_does_not_answer(rival: Path, arguments: list[str], tmp_path: Path, capsys) -> None:
    manifest = rival / "dreambench" / "manifest.jsonl"
    lines = manifest.read_text().split("\n")
    for damage, told in DAMAGED_ANSWERS:
        manifest.write_text("\n".join(damage(lines)))
        assert evaluate.main([*arguments, f"output={tmp_path / 'out'}", f"models.external.Rival={rival}"]) == 2
        assert told in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `evaluate.py tables … | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert evaluate.main(["tables", str(finished), f"output={tmp_path}"]) == 0
