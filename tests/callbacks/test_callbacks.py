"""The log that survives a resume and damage, image grids, counted tokens, progress without a terminal, offline W&B."""

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

import train
from callbacks.checkpoint import StepCheckpoint
from callbacks.ema import WeightAverage
from callbacks.metrics import MetricsFile, StepMetrics, read_rows
from callbacks.progress import RunProgress
from kosmosg.batches import MicroBatch
from kosmosg.image_processing import CLIP_MEAN, CLIP_STD, ClipImageTransform, to_images
from kosmosg.prompt import PromptBatch, PromptEncoder
from kosmosg.tokenizer import Tokenizer
from lightning_modules.run_folder import RunFolder
from tests import tiny
from tests.lightning_modules import miniature


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as source:
        return list(csv.DictReader(source))


def test_metrics_file_joins_rows_takes_new_columns_and_drops_what_follows_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsFile(tmp_path / "metrics.csv")
    log.log_metrics({"loss": float("nan")}, step=1)
    log.log_metrics({"loss": 1.0}, step=2)
    log.log_metrics({"val": 1e-9}, step=2)
    expected = [{"step": "1", "loss": "nan", "val": ""}, {"step": "2", "loss": "1.0", "val": "1e-09"}]
    assert read_rows(log.file) == rows(log.file) == expected and not caplog.text
    log.log_metrics({"loss": 3.0}, step=3)
    MetricsFile(log.file, first_step=2).log_metrics({"loss": 30.0}, step=3)
    assert [(row["step"], row["loss"]) for row in rows(log.file)] == [("1", "nan"), ("2", "1.0"), ("3", "30.0")]


DAMAGE = {
    "zeros": "\0\0\0\0",
    "zeros in a row": "3,\0\0\0,0.1\n",
    "torn between two numbers": "3,1",
    "torn after a comma": "3,1,",
    "torn inside the last number": "3,1.0,0.",
    "a row that lacks a number": "3,1\n",
    "two rows in one": "3,1,2,3,4\n",
    "no number": "3,1.0,0.1\ufffd\n",
    "an open quote": '3,"1.0,0.1\n4,1.0,0.1\n',
}


def test_damaged_rows_of_the_log_are_dropped_whole_with_a_warning(
    tmp_path: Path, subtests: pytest.Subtests, caplog: pytest.LogCaptureFixture
) -> None:
    """What a power cut leaves."""
    file = tmp_path / "metrics.csv"
    for name, damage in DAMAGE.items():
        with subtests.test(name):
            caplog.clear()
            file.write_text("step,loss,lr\n1,4.0,0.1\n2,3.0,0.1\n" + damage)
            log = MetricsFile(file, first_step=5)
            assert "is damaged" in caplog.text
            log.log_metrics({"loss": 2.0, "lr": 0.1}, step=6)
            kept = ["1,4.0,0.1", "2,3.0,0.1", *(["4,1.0,0.1"] if '"' in damage else []), "6,2.0,0.1"]
            assert file.read_text().splitlines() == ["step,loss,lr", *kept]


def test_what_a_checkpoint_holds_is_on_disk_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is flushed before the checkpoint is written, not after."""
    happened: list[str] = []
    monkeypatch.setattr("callbacks.metrics.flush", lambda path: happened.append(path.name))
    log = MetricsFile(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 2.0}, step=1)
    trainer = SimpleNamespace(global_step=1, is_global_zero=False, loggers=[log])
    trainer.save_checkpoint = lambda path, weights_only: happened.append(path.name)
    assert StepCheckpoint(tmp_path, every=1, keep=1).save(trainer)
    assert happened == ["metrics.csv", "step-00000001"]


def test_the_average_warms_up_and_passes_over_skipped_steps() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module.guard = SimpleNamespace(skipping=False)
    trainer, average = SimpleNamespace(global_step=0), WeightAverage(decay=0.5)
    torch.nn.init.constant_(module.weight, 1.0)
    average.on_train_start(trainer, module)
    expected = 1.0
    for step, (weight, skipping) in enumerate([(3.0, False), (5.0, True), (7.0, False), *[(9.0, False)] * 20], 1):
        trainer.global_step, module.guard.skipping = step, skipping
        torch.nn.init.constant_(module.weight, weight)
        average.on_train_batch_end(trainer, module)
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11 after the first step, 0.5 from the eighth on
        expected = expected if skipping else decay * expected + (1 - decay) * weight
        assert average.average["weight"].item() == pytest.approx(expected)
    assert average.average["weight"].dtype == torch.float32


def test_damaged_side_files_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, content in enumerate(("", "{", "\0\0")):
        for name in ("versions.json", "finished.json"):
            folder = tmp_path / f"{number}-{name}"
            folder.mkdir()
            (folder / name).write_text(content)
            caplog.clear()
            with RunFolder(folder).lock({"stage": "x"}, lambda _: None):
                assert RunFolder(folder).finished() is None
            assert f"damaged-{name}" in caplog.text and (folder / f"damaged-{name}").is_file()
            assert len(json.loads((folder / "versions.json").read_text())) == 1


@pytest.fixture
def batch(tiny_tokenizer: Path) -> tuple[PromptBatch, Tokenizer]:
    tokenizer = Tokenizer.from_pretrained(tiny_tokenizer)
    encoder = PromptEncoder(tokenizer, ClipImageTransform(tiny.IMAGE_SIZE), tiny.IMAGE_TOKENS)
    first, second, third = (miniature.picture(number) for number in range(3))
    prompts = [["a ", first, " and a ", second, " in the snow"], ["a red fish"], [third, " at night"]]
    return encoder.collate([encoder(segments) for segments in prompts]), tokenizer


def test_prompts_are_described_with_their_images(batch: tuple[PromptBatch, Tokenizer]) -> None:
    prompt, tokenizer = batch
    described = PromptEncoder(tokenizer, ClipImageTransform(tiny.IMAGE_SIZE), tiny.IMAGE_TOKENS).describe(prompt)
    assert [text for text, _ in described] == ["a <i> and a <i> in the snow", "a red fish", "<i> at night"]
    assert [len(images) for _, images in described] == [2, 0, 1]
    [shown] = described[2][1]
    difference = torch.tensor(list(shown.tobytes())) - torch.tensor(list(miniature.picture(2).tobytes()))
    assert difference.abs().max() <= 1
    assert to_images(prompt.images, CLIP_MEAN, CLIP_STD)[2] == shown


@pytest.mark.parametrize("parts", [1, 3])
def test_throughput_is_that_of_all_micro_batches_and_ranks(
    parts: int, batch: tuple[PromptBatch, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 4 s and 1 s of waiting, of three rows in one or three micro-batches, on two ranks."""
    prompt, _ = batch
    clock = iter([11.0, 15.0, 16.0, 20.0])  # start and end of two steps
    monkeypatch.setattr("callbacks.metrics.time.perf_counter", lambda: next(clock))
    logged: list[tuple[dict[str, float], int]] = []
    module = SimpleNamespace(step_began=11.0, waiting_since=10.0, step_metrics=lambda: {"lr": 0.1})
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append((values, step)))
    trainer = SimpleNamespace(world_size=2, global_step=0, loggers=[logger])
    step = [MicroBatch(prompt=prompt.rows(rows)) for rows in {1: [[0, 1, 2]], 3: [[0], [1], [2]]}[parts]]
    callback = StepMetrics(every=2)
    for began, waiting in ((11.0, 10.0), (16.0, 15.0)):
        module.step_began, module.waiting_since = began, waiting
        callback.on_train_batch_start(trainer, module)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, step, 0)
    tokens = int((~prompt.padding).sum())
    [(values, at)] = logged
    assert at == 2 and values == {
        "lr": 0.1,
        "samples_per_second": 2 * 2 * 3 / 10,
        "tokens_per_second": 2 * 2 * tokens / 10,
    }


def test_progress_in_a_pipe_is_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: now[0])
    progress = RunProgress("alignment", Console(file=stream))
    trainer = SimpleNamespace(global_step=0, max_steps=100, is_global_zero=True)
    progress.on_train_start(trainer, None)
    for step, seconds in ((1, 1.0), (50, 50.0), (51, 51.0), (100, 100.0)):
        trainer.global_step, now[0] = step, seconds
        progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.25)})
    assert stream.getvalue().splitlines() == [
        "alignment 50/100  0:00:50 left  loss 0.25",
        "alignment 100/100  0:00:00 left  loss 0.25",
    ]


def test_grids_and_offline_wandb_without_secrets(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    options = ["grids.every=1", "grids.prompts=2", "grids.steps=2", "wandb.mode=offline"]
    options += ["data.remote.options={s3: {key: '${oc.env:SECRET_KEY}', secret: swordfish}}"]
    monkeypatch.setattr("sys.argv", ["train.py", *options])  # which wandb would record
    assert train.main([str(configs["instruction_tuning"]), "trainer.max_steps=2", *options]) == 0
    run = tmp_path / "instruction_tuning"
    sheets = sorted(file.name for file in (run / "grids").glob("*.png"))
    assert sheets == ["step-00000001.png", "step-00000002.png"]
    assert Image.open(run / "grids" / "before" / "00.png").size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert (offline / "files" / "media" / "images").is_dir()
    assert offline.name.endswith((run / "wandb.id").read_text())
    assert json.loads((run / "finished.json").read_text())["step"] == 2
    recorded = yaml.safe_load((run / "config.yaml").read_text())["data"]["remote"]["options"]["s3"]
    assert recorded == {"key": "${oc.env:SECRET_KEY}", "secret": "***"}
    written = [file for file in run.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in written), "W&B's own log"
    assert not [file for file in written if any(word in file.read_bytes() for word in (b"hunter2", b"swordfish"))]


def test_a_folder_that_is_begun_again_is_another_wandb_run(tmp_path: Path) -> None:
    from callbacks.weights_and_biases import run_id

    first = run_id(tmp_path)
    assert run_id(tmp_path) == first, "a resumed run continues its own"
    (tmp_path / "wandb.id").unlink()
    assert run_id(tmp_path) != first
