"""train.py end to end on CPU: each stage trains, is stopped and resumed, is finished, and refuses what it should."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import train
from callbacks.checkpoint import StepCheckpoint
from kosmosg.config import load_config, written_config
from kosmosg.conversion import convert_checkpoint
from kosmosg.models.kosmosg import KosmosG
from lightning_modules.alignment import AlignmentModule
from lightning_modules.checkpointing import CheckpointWriteError, write_checkpoint
from lightning_modules.run_folder import RunFolder
from tests import tiny
from tests.lightning_modules.miniature import STAGES, losses
from tests.lightning_modules.runs import back_to, part, run, trainable_names, weights

LOSSES = {
    "language_modelling": ("train/loss", "val/caption_loss", "val/caption_loss_mismatched_images"),
    "alignment": ("train/mse_loss", "train/rec_loss", "val/mse_loss", "val/rec_loss"),
    "instruction_tuning": ("train/loss", "val/diffusion_loss", "val/diffusion_loss_mismatched_images"),
}


@pytest.fixture
def copy(finished: Callable[[str], Path], tmp_path: Path) -> Path:
    """Of the finished run of stage 2, where `configs` has it."""
    return Path(shutil.copytree(finished("alignment"), tmp_path / "alignment"))


@pytest.mark.parametrize("stage", STAGES)
def test_stage_trains_and_a_stopped_run_resumes_bit_for_bit(
    stage: str,
    finished: Callable[[str], Path],
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, stopped = finished(stage), tmp_path / "stopped"
    press_ctrl_c(monkeypatch, after_step=3)
    assert run(configs[stage], f"run={stopped}") == 128 + signal.SIGINT
    monkeypatch.undo()
    assert [row[0] for row in losses(stopped)] == ["1", "2", "3"]
    assert run(configs[stage], f"run={stopped}") == 0

    expected = losses(whole, LOSSES[stage])
    assert losses(stopped, LOSSES[stage]) == expected
    assert [row[0] for row in expected] == ["1", "2", "3", "4"]
    assert all(expected[step][-1] != "" for step in (1, 3)), "validated after steps 2 and 4"
    assert weights(whole) == weights(stopped)


def test_second_ctrl_c_stops_at_once(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    press_ctrl_c(monkeypatch, after_step=3, times=2)
    assert run(configs["alignment"]) == 128 + signal.SIGINT
    assert "Stopped and saved after step 2." in capsys.readouterr().err
    monkeypatch.undo()
    assert run(configs["alignment"]) == 0


def test_killed_run_resumes_from_its_last_checkpoint(
    finished: Callable[[str], Path], configs: dict[str, Path], tmp_path: Path
) -> None:
    stage = "instruction_tuning"
    whole, killed = finished(stage), Path(shutil.copytree(finished(stage), tmp_path / "killed"))
    # As if killed in step 4: the log runs ahead of the checkpoint, and nothing of the end was written.
    back_to(killed, 2)
    (killed / "checkpoints" / ".step-00000004").mkdir()
    assert run(configs[stage], f"run={killed}") == 0
    assert losses(killed, LOSSES[stage]) == losses(whole, LOSSES[stage])
    assert weights(whole) == weights(killed)


def test_finished_run_says_so(configs: dict[str, Path], copy: Path, capsys: pytest.CaptureFixture) -> None:
    before, recorded = weights(copy), (copy / "config.yaml").read_text()
    assert run(configs["alignment"], "trainer.log_every=7") == 0
    assert "is finished" in capsys.readouterr().out
    assert weights(copy) == before and (copy / "config.yaml").read_text() == recorded
    assert (copy / "model" / "aligner_decoder" / "config.json").is_file()
    assert KosmosG.from_pretrained(copy).null_condition().states.isfinite().all()
    assert json.loads((copy / "versions.json").read_text())[0]["packages"]["torch"] == torch.__version__
    # What trains alone is in a checkpoint.
    assert {name.split(".")[0] for name in trainable_names(copy)} == {"aligner", "aligner_decoder"}
    # The run folder is itself an argument, and reads back as the same configuration.
    here = [f"run={copy}"]
    assert load_config([str(copy), *here], train.stage_schema) == load_config(
        [str(configs["alignment"]), *here], train.stage_schema
    )


def test_stages_follow_each_other(finished: Callable[[str], Path], configs: dict[str, Path], tmp_path: Path) -> None:
    first, second = finished("language_modelling"), tmp_path / "alignment"
    assert run(configs["alignment"], f"init_from={first}", "trainer.max_steps=1") == 0
    for name, tensor in part(first, "mllm").items():
        assert torch.equal(tensor, part(second, "mllm")[name]), f"{name} changed although stage 2 freezes the MLLM"
    assert run(configs["instruction_tuning"], f"init_from={second}", "trainer.max_steps=2") == 0
    third = part(tmp_path / "instruction_tuning", "mllm")
    changed = {name for name, tensor in part(second, "mllm").items() if not torch.equal(tensor, third[name])}
    assert any("decoder.layers" in name for name in changed)
    assert any("vision" in name and "layers.1" in name for name in changed)
    assert not any("vision" in name and "layers.0" in name for name in changed)


@pytest.mark.parametrize("keep_grounding", [False, True])
def test_stages_2_and_3_start_from_a_kosmos_2(
    keep_grounding: bool, configs: dict[str, Path], tmp_path: Path, tiny_tokenizer: Path
) -> None:
    source, lm = tiny.write_kosmos2(tmp_path / "kosmos2", tiny_tokenizer), tmp_path / "lm"
    convert_checkpoint(source, lm, keep_grounding=keep_grounding)
    given = [f"init_from={lm}", f"model.tokenizer={lm / 'tokenizer'}", "trainer.max_steps=1"]
    assert run(configs["alignment"], *given) == 0
    for name, tensor in part(lm, "mllm", "").items():
        assert torch.equal(tensor, part(tmp_path / "alignment", "mllm")[name]), f"{name} is not the converted one"
    assert run(configs["instruction_tuning"], *given, "recipe.new_aligner=true") == 0


def test_export_writes_the_model_of_a_checkpoint(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(configs["alignment"], "ema.decay=0.5") == 0
    folder = tmp_path / "alignment"
    chosen = {"last": [], "raw": ["weights=raw"], "early": ["step=2"], "half": ["dtype=float16"]}
    for name, options in chosen.items():
        assert train.main(["export", str(folder), f"output={tmp_path / name}", *options]) == 0
    exported = {name: part(tmp_path, "aligner", model=name) for name in chosen}
    assert all(torch.equal(tensor.half(), exported["half"][name]) for name, tensor in exported["last"].items())
    assert all(torch.equal(tensor, exported["last"][name]) for name, tensor in part(folder, "aligner").items())
    changed = next(name for name in exported["last"] if name.endswith("fc1.weight"))
    assert not torch.equal(exported["last"][changed], exported["raw"][changed]), "the average is exported"
    assert not torch.equal(exported["last"][changed], exported["early"][changed])
    (folder / "checkpoints" / "step-00000002" / "state.json").unlink()
    assert train.main(["export", str(folder), f"output={tmp_path / 'none'}", "step=2"]) == 2
    assert "state.json is missing" in capsys.readouterr().err
    assert train.main(["export", str(folder)]) == 2
    assert train.main(["export", str(folder), f"output={tmp_path / 'none'}", "dtype=int8"]) == 2


@pytest.mark.parametrize("step", [4, 6])
def test_failed_save_is_loud_and_a_run_without_its_last_checkpoint_fails(
    step: int,
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    def full(folder: Path, *given) -> None:
        if folder.name.endswith(str(step)):
            raise CheckpointWriteError("No space left on device")
        write_checkpoint(folder, *given)

    monkeypatch.setattr("lightning_modules.checkpointing.write_checkpoint", full)
    status = run(configs["alignment"], "trainer.max_steps=6")
    folder = tmp_path / "alignment"
    assert f"NO CHECKPOINT of step {step}: No space left on device" in caplog.text
    assert f"step {step - 2} is intact" in caplog.text
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if step == 4:
        assert status == 0 and kept == ["step-00000002", "step-00000006"]
    else:
        assert status == 2 and kept == ["step-00000002", "step-00000004"]
        assert "Make room, and start the same command again" in capsys.readouterr().err
        assert not (folder / "finished.json").exists() and not (folder / "model").exists()
        monkeypatch.undo()
        assert run(configs["alignment"], "trainer.max_steps=6") == 0


def test_steps_that_are_not_finite_are_skipped_and_bounded(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    losses_of = AlignmentModule.losses
    monkeypatch.setattr(
        AlignmentModule,
        "losses",
        lambda self, batch: {
            name: value * (float("nan") if self.training and self.trainer.global_step == 1 else 1.0)
            for name, value in losses_of(self, batch).items()
        },
    )
    assert run(configs["alignment"]) == 0
    folder = tmp_path / "alignment"
    assert [row[1] for row in losses(folder, ["skipped_steps"])] == ["0.0", "1.0", "1.0", "1.0"]
    skipped = json.loads((folder / "skipped_steps.jsonl").read_text())
    assert (skipped["step"], len(skipped["ranks"][0]["samples"])) == (2, 4)
    assert all(tensor.isfinite().all() for tensor in part(folder, "aligner").values())
    assert run(configs["alignment"], f"run={tmp_path / 'none'}", "trainer.max_skipped_steps=0") == 2
    assert skipped["ranks"][0]["samples"][0] in capsys.readouterr().err


def test_checkpoint_of_another_model_is_refused(
    configs: dict[str, Path], copy: Path, capsys: pytest.CaptureFixture
) -> None:
    (copy / "finished.json").unlink()
    (copy / "config.yaml").unlink()
    assert run(configs["alignment"], "trainer.max_steps=5", "model.aligner.ffn_width=48") == 2
    message = capsys.readouterr().err
    assert "checkpoint of another model" in message
    assert "feed_forward.fc1.weight is (64, 32) there and (48, 32) here" in message


def test_a_started_folder_goes_on_with_its_own_configuration_alone(
    configs: dict[str, Path], copy: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also one of an earlier version: a key that came later has its default there; an unknown one is refused."""
    assert run(configs["alignment"], "optimizer.lr=0.5") == 2
    assert "optimizer.lr is 0.01 there and 0.5 here" in capsys.readouterr().err
    file = copy / "config.yaml"
    recorded = yaml.safe_load(file.read_text())
    del recorded["runs"], recorded["trainer"]["compile"], recorded["model"]["aligner"]["kind"]
    file.write_text(yaml.safe_dump(recorded))
    assert run(configs["alignment"]) == 0
    assert run(configs["alignment"], "model.aligner.kind=linear") == 2
    assert "model.aligner.kind is 'alignernet' there and 'linear' here" in capsys.readouterr().err
    file.write_text(yaml.safe_dump({**recorded, "colour": "red"}))
    assert run(configs["alignment"]) == 2
    assert "holds a run of another version" in capsys.readouterr().err


def test_run_folder_is_taken_by_one_process(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    written = written_config([str(configs["alignment"])], train.stage_schema)
    with RunFolder(tmp_path / "alignment").lock(written, train.stage_schema):
        assert run(configs["alignment"]) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_help_lists_stages_and_keys(configs: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert train.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(stage in told for stage in STAGES)
    assert train.main([str(configs["alignment"]), "--help"]) == 0
    assert "optimizer.lr: float = 0.001  # Peak learning rate." in capsys.readouterr().out
    assert train.main([]) == 2


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, after_step: int, times: int = 1) -> None:
    """Send SIGINT to this process in optimizer step `after_step`."""
    ended = StepCheckpoint.on_train_batch_end

    def press(self: StepCheckpoint, trainer, *arguments) -> None:
        if trainer.global_step == after_step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        ended(self, trainer, *arguments)

    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", press)
