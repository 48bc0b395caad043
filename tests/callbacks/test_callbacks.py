"""The log that survives a resume, pictures of prompts, counted tokens, progress without a terminal, offline W&B."""

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from callbacks.contact_sheet import CELL, Row, contact_sheet, to_image
from callbacks.metrics_file import MetricsFile
from callbacks.throughput import Throughput
from lightning_modules.runs.run_folder import RunFolder, RunFolderError
from PIL import Image
from rich.console import Console

import train
from callbacks.image_grid import describe, image_counts, select, spread
from callbacks.progress import RunProgress
from kosmosg.image_processing import UnderstandingTransform
from kosmosg.prompt import PromptBatch, PromptEncoder
from kosmosg.tokenizer import Tokenizer
from tests import tiny
from tests.lightning_modules import miniature


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as source:
        return list(csv.DictReader(source))


def test_metrics_file_joins_rows_of_a_step_and_takes_new_columns(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 2.0, "epoch": 0}, step=0)
    log.log_metrics({"loss": 1.0}, step=1)
    log.log_metrics({"val": 0.5}, step=1)
    assert rows(log.file) == [{"step": "0", "loss": "2.0", "val": ""}, {"step": "1", "loss": "1.0", "val": "0.5"}]


def test_metrics_file_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path / "metrics.csv")
    for step in range(5):
        log.log_metrics({"loss": float(step)}, step=step)
    resumed = MetricsFile(tmp_path / "metrics.csv", first_step=3)
    resumed.log_metrics({"loss": 30.0}, step=3)
    assert [(row["step"], row["loss"]) for row in rows(log.file)] == [
        ("0", "0.0"),
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "30.0"),
    ]


@pytest.fixture
def batch(tiny_tokenizer: Path) -> tuple[PromptBatch, Tokenizer]:
    tokenizer = Tokenizer.from_pretrained(tiny_tokenizer)
    encoder = PromptEncoder(tokenizer, UnderstandingTransform(tiny.IMAGE_SIZE), tiny.IMAGE_TOKENS)
    first, second, third = (miniature.picture(number) for number in range(3))
    prompts = [["a ", first, " and a ", second, " in the snow"], ["a red fish"], [third, " at night"]]
    return encoder.collate([encoder(prompt) for prompt in prompts]), tokenizer


def test_rows_of_a_batch_keep_their_images(batch: tuple[PromptBatch, Tokenizer]) -> None:
    prompt, tokenizer = batch
    assert image_counts(prompt) == [2, 0, 1]
    chosen = select(prompt, [2, 0])
    assert torch.equal(chosen.images, prompt.images[[2, 0, 1]])
    (first, own), (second, images) = describe(chosen, tokenizer)
    assert (first, second) == ("<i> at night", "a <i> and a <i> in the snow")
    assert (len(own), len(images)) == (1, 2)
    assert select(prompt, [1]).images is None


def test_pictures_survive_normalisation() -> None:
    image = miniature.picture(0)
    again = to_image(UnderstandingTransform(tiny.IMAGE_SIZE)(image))
    assert (torch.tensor(list(again.tobytes())) - torch.tensor(list(image.tobytes()))).abs().max() <= 1


def test_contact_sheet_puts_each_picture_in_its_cell() -> None:
    red, blue = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    sheet = contact_sheet([Row("a fish", [], [blue]), Row("<i> at night", [red], [blue])], ["now"])
    assert sheet.getpixel((sheet.width - CELL // 2, sheet.height - CELL // 2)) == (0, 0, 255)
    assert sheet.getpixel((sheet.width - CELL - CELL // 2, sheet.height - CELL // 2)) == (255, 0, 0)
    assert sheet.getpixel((sheet.width - CELL - CELL // 2, CELL // 2)) == (255, 255, 255)


def test_spread() -> None:
    assert spread(8, 4) == [0, 2, 4, 6]
    assert spread(3, 8) == [0, 1, 2]


def test_throughput_counts_samples_and_real_tokens(
    batch: tuple[PromptBatch, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, _ = batch
    logged: dict[str, float] = {}
    module = SimpleNamespace(log=lambda name, value, **_: logged.update({name: value}))
    clock = iter([0.0, 4.0])
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: next(clock))
    callback = Throughput()
    for due in (False, True):
        trainer = SimpleNamespace(world_size=2, _logger_connector=SimpleNamespace(should_update_logs=due))
        callback.on_train_batch_start()
        callback.on_train_batch_end(trainer, module, None, SimpleNamespace(prompt=prompt))
    tokens = int((~prompt.padding).sum())
    assert logged == {"samples_per_second": 2 * 2 * 3 / 4, "tokens_per_second": 2 * 2 * tokens / 4}


def test_progress_in_a_pipe_is_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: now[0])
    progress = RunProgress("alignment", Console(file=stream))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: False))
    trainer = SimpleNamespace(global_step=0, max_steps=100, is_global_zero=True, fit_loop=loop)
    progress.get_metrics = lambda *_: {"train/loss": 0.25}
    progress.on_train_start(trainer, None)
    for step, seconds in ((1, 1.0), (50, 50.0), (51, 51.0), (100, 100.0)):
        trainer.global_step, now[0] = step, seconds
        progress.on_train_batch_end(trainer, None)
    assert stream.getvalue().splitlines() == [
        "alignment 50/100  0:00:50 left  loss 0.25",
        "alignment 100/100  0:00:00 left  loss 0.25",
    ]


def test_model_folder_is_whole_or_absent(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.write_model(fail)
    assert not run.model.exists()
    run.write_model(lambda folder: (folder.mkdir(), (folder / "whole").write_text("x")))
    assert [file.name for file in run.model.iterdir()] == ["whole"]


@pytest.mark.parametrize("stage", ["alignment", "instruction_tuning"])
def test_grids_and_offline_wandb(
    stage: str,
    tmp_path: Path,
    tiny_tokenizer: Path,
    tiny_stable_diffusion: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    shards = miniature.write_shards(tmp_path / "shards")
    init_from = {"alignment": tiny_model, "instruction_tuning": tiny_model}
    files = miniature.write_config(tmp_path, shards, tiny_tokenizer, tiny_stable_diffusion, init_from)
    grids = ["grids.every=1", "grids.prompts=2", "grids.steps=2"]
    assert train.main([str(files[stage]), "trainer.max_steps=2", "wandb.mode=offline", *grids]) == 0
    run = tmp_path / stage
    sheets = sorted(file.name for file in (run / "grids").glob("*.png"))
    assert sheets == ["step-00000001.png", "step-00000002.png"]
    before = Image.open(run / "grids" / "before" / "00.png")
    assert before.size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert (offline / "files" / "media" / "images").is_dir()
    assert json.loads((run / "finished.json").read_text())["step"] == 2


def test_changed_configuration_is_named_and_free_keys_are_free(tmp_path: Path) -> None:
    experiment = train.LanguageModelling(stage="language_modelling", run=str(tmp_path))
    experiment.model.tokenizer = experiment.model.image_decoder = "x"
    run = RunFolder(tmp_path)
    with run.held(experiment):
        run.mark_finished(step=1)
    experiment.trainer.log_every = 99
    with run.held(experiment):
        pass
    experiment.optimizer.lr = 5.0
    with pytest.raises(RunFolderError, match=r"optimizer\.lr is 0\.001 there and 5\.0 here"), run.held(experiment):
        pass
