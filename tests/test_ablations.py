"""Ablations: every shipped file fits the full size and Toyland; what they need of the model trains and draws."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import train
from kosmosg.config import load_config
from kosmosg.models.build import build_aligner, build_aligner_decoder
from kosmosg.pipeline import KosmosGPipeline
from tests import tiny
from tests.conftest import REPOSITORY
from tests.lightning_modules.runs import run, trainable_names

FOLDER = REPOSITORY / "configs" / "ablations"
ABLATIONS = sorted(file for file in FOLDER.glob("*.yaml") if file.stem != "run")
TABLE_2 = sorted(file for file in REPOSITORY.glob("configs/toyland/table_2/*.yaml") if file.stem != "run")
FORMS = ("", "toyland/")
LAYERS = {"": 24, "toyland/": 4}


@cache
def shipped(name: str, form: str, *arguments: str) -> train.Experiment:
    file = FOLDER / f"{name}.yaml"
    commands = re.findall(r"^#   python train.py configs/(\S+) configs/ablations/(\S+) seed=0$", file.read_text(), re.M)
    assert [ablation for _, ablation in commands] == [file.name] * 2
    assert commands[1][0] == f"toyland/{commands[0][0]}", "both forms are named, the full size first"
    stage = REPOSITORY / "configs" / commands[0][0].replace("", form, 1)
    return load_config([str(stage), str(file), *arguments], train.stage_schema)


def test_shipped_ablations_fit_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOYLAND_RUNS", raising=False)
    models = {}
    for form in FORMS:
        for file in ABLATIONS:
            experiment = shipped(file.stem, form, "seed=2")
            runs = "runs/toyland" if form else "runs"
            assert experiment.ablation == file.stem
            assert experiment.run == f"{runs}/ablations/{file.stem}/{experiment.stage}-seed-2"
            assert experiment.seed == experiment.data.seed == 2
            models[repr(experiment.model)] = experiment.model
    with torch.device("meta"):
        for model in models.values():
            build_aligner(model)
            build_aligner_decoder(model)


def layers(name: str, form: str) -> list[int]:
    model = shipped(name, form).model
    parts = (model.aligner, model.aligner_decoder)
    return [getattr(part, half) for part in parts for half in ("encoder_layers", "decoder_layers")]


def test_table_2_in_parts_of_the_mllms_layers() -> None:
    for form in FORMS:
        half, quarter = LAYERS[form] // 2, LAYERS[form] // 4
        assert layers("alignernet_24_layers", form) == [half] * 4
        assert layers("alignernet_12_layers", form) == [quarter] * 4
        assert layers("decoder_12_layers", form) == [0, half] * 2
        linear = shipped("end_to_end_without_alignernet", form)
        assert (linear.model.aligner.kind, linear.recipe.trainable) == ("linear", "aligner")
        assert linear.data.validation_sources == ["captions"]
        assert linear.data.constructed.weight == linear.data.edit.weight == 0 < linear.data.captions.weight
        assert linear.init_from == shipped("alignernet_24_layers", form).init_from


def test_what_is_not_ablated_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the further ablations changes its key, and nothing else but where it runs."""
    changed = {
        "without_l_rec": {"recipe.rec_weight": 0.0},
        "without_stage_1": {"init_from": None},
        "without_entity_dropping": {"data.entities.drop_probability": 0.0},
        "without_edit_data": {"data.edit.weight": 0},
        "weighting_sds": {"recipe.timestep_weighting": "sds"},
        "weighting_velocity": {"recipe.timestep_weighting": "velocity"},
        "weighting_uniform": {},  # it is what the full size does
    }
    for name, expected in changed.items():
        ablated = shipped(name, "", "ablation=null", "run=x", "wandb.group=null", "wandb.name=null")
        base = load_config([str(REPOSITORY / "configs" / f"{ablated.stage}.yaml"), "run=x"], train.stage_schema)
        assert differences(base, ablated) == expected, name


def differences(base: object, other: object, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in vars(base).items():
        theirs = getattr(other, name)
        if hasattr(value, "__dataclass_fields__"):
            found |= differences(value, theirs, f"{prefix}{name}.")
        elif value != theirs:
            found[f"{prefix}{name}"] = theirs
    return found


MECHANISMS = {
    "end_to_end_with_alignernet": ("instruction_tuning", "AlignerEncoder"),
    "end_to_end_without_alignernet": ("instruction_tuning", "LinearAligner"),
    "decoder_12_layers": ("alignment", "AlignerEncoder"),
    "without_stage_1": ("alignment", "AlignerEncoder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_it_trains_and_draws(
    name: str,
    configs: dict[str, Path],
    tmp_path: Path,
    tiny_model: Path,
    tiny_stable_diffusion: Path,
) -> None:
    stage, kind = MECHANISMS[name]
    captions = yaml.safe_load(configs["alignment"].read_text())["data"]["captions"]["validation"]
    arguments = [str(FOLDER / f"{name}.yaml"), f"runs={tmp_path}", "trainer.max_steps=2"]
    arguments += [] if name == "without_stage_1" else [f"init_from={tiny_model}"]
    arguments += [f"data.captions.validation={captions}"] if stage == "instruction_tuning" else []
    assert run(configs[stage], *arguments) == 0
    folder = tmp_path / "ablations" / name / f"{stage}-seed-0"
    trained = {key.split(".")[0] for key in trainable_names(folder)}
    assert trained == ({"aligner"} if stage == "instruction_tuning" else {"aligner", "aligner_decoder"})
    same = file_bytes(folder / "model" / "mllm") == file_bytes(tiny_model / "mllm")
    assert same == (name != "without_stage_1"), "the MLLM is frozen, and of stage 1 where there was one"

    pipe = KosmosGPipeline.from_pretrained(folder, image_decoder=tiny_stable_diffusion)
    assert type(pipe.aligner).__name__ == kind
    drawn = pipe(["a red fish", "a small dog in the garden"], num_inference_steps=2, seeds=[0, 1]).images
    alone = pipe("a red fish", num_inference_steps=2, seeds=[0], output_type="np").images
    assert len(drawn) == 2 and drawn[0].size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    together = torch.tensor(list(drawn[0].tobytes())).div(255)
    assert (together - torch.tensor(alone[0]).flatten()).abs().max() < 0.02, "an image depends on its neighbours"
    pipe.save_pretrained(tmp_path / "pipe")
    assert type(KosmosGPipeline.from_pretrained(tmp_path / "pipe").aligner).__name__ == kind


def file_bytes(folder: Path) -> bytes:
    return next(folder.glob("*.safetensors")).read_bytes()


def test_rows_of_table_2_have_the_same_compute() -> None:
    """Steps times the FLOPs of one, as the file tells them."""
    for file in TABLE_2:
        steps, flops = re.search(r"(\d+) steps of ([\d.]+) GFLOP", file.read_text()).groups()
        [stage] = re.findall(
            r"^#   python train.py configs/(\S+) configs/toyland/table_2/\S+ seed=0$", file.read_text(), re.M
        )
        experiment = load_config([str(REPOSITORY / "configs" / stage), str(file), "seed=1"], train.stage_schema)
        assert experiment.trainer.max_steps == int(steps) and experiment.ablation == file.stem
        assert int(steps) * float(flops) == pytest.approx(8000, rel=0.005)
        assert experiment.run.endswith(f"ablations/{file.stem}/{experiment.stage}-seed-1")
