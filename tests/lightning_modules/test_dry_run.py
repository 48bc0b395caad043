"""The dry run counts what a real pass does, knows the paper's model, and refuses what cannot run; batch layouts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from kosmosg.config import load_config
from lightning_modules import dry_run
from lightning_modules.base import build_stage
from lightning_modules.dry_run import Estimate, PassCost, refusal, size_up
from lightning_modules.trainer import BatchLayout, TrainerConfig, batch_layout, count_devices

CONFIGS = Path(train.__file__).parent / "configs"
GIB = 2**30
PARAMETERS = {
    "kosmosg": {"mllm": 1_662_375_936, "aligner": 225_461_760, "aligner_decoder": 250_569_728},
    "stable_diffusion_2_1": {"aligner": 388_696_064},
    "stable_diffusion_xl": {"aligner": 325_999_872},
    "sana": {"aligner": 399_186_432},
    "qwen2_5_vl_3b": {"mllm": 3_754_622_976},
    "qwen3_vl_4b": {"mllm": 4_437_815_808},
    "toyland": {"aligner": 1_017_472},
}
LAUNCHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


LANGUAGE = ["init_from=null", "recipe.new_aligner=true", "data.max_pieces=100", "model.max_image_pixels=4096"]
LANGUAGE += ["hardware.prompt_tokens=200", "hardware.images_per_row=2"]


@pytest.mark.parametrize(
    ("stage", "language"),
    [
        *((stage, None) for stage in train.STAGES),
        *(("instruction_tuning", name) for name in ("qwen2_5_vl", "qwen3_vl", "llava_onevision")),
    ],
)
def test_it_counts_what_runs(
    stage: str, language: str | None, configs: dict[str, Path], tiny_folder: Callable[[str], Path]
) -> None:
    """FLOPs and parameters of the miniature and of language models, beside the same pass with values."""
    given = [str(CONFIGS / "toyland" / f"{stage}.yaml"), "init_from=null"]
    if language:
        given = [str(configs[stage]), f"model.language_model={tiny_folder(language)}", *LANGUAGE]
    experiment = load_config(given, train.stage_schema)
    sized = size_up(experiment)
    module = build_stage(experiment.module, experiment, train.build_tokenizer(experiment.model))
    batch = module.train().fake_batch(3, sized.shape, experiment.model.image_size)
    # As matrix products, attention is counted on a CPU too.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.losses(batch)["loss"].backward()
    # Of transformers' attention, the backward pass computes a product again.
    assert sized.flops(3) == pytest.approx(counter.get_total_flops(), rel=0.1 if language else 0.02)
    for name, network in module.named_children():
        theirs = getattr(sized.module, name)
        assert dry_run.count(network, True) == dry_run.count(theirs, True), name
        assert dry_run.count(network, False) == dry_run.count(theirs, False), name
    assert sized.row_bytes > 0 and all(parameter.grad is None for parameter in sized.module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(file.stem for file in (CONFIGS / "model").glob("*.yaml")))
def test_every_model_has_its_parameters_without_a_network(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-size modules that fit their image decoder; the passes, which take minutes, are not counted here."""
    monkeypatch.setattr(dry_run, "measure", lambda *_: PassCost(1.0, 1.0))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the dry run asked the network"))
    files = [str(CONFIGS / "alignment.yaml"), str(CONFIGS / "model" / f"{model}.yaml")]
    module = size_up(load_config(files, train.stage_schema)).module
    for name, expected in PARAMETERS[model].items():
        assert sum(parameter.numel() for parameter in getattr(module, name).parameters()) == expected, name


def test_report_and_refusal_write_nothing(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [str(configs["language_modelling"]), "dry_run=true"]
    assert train.main([*command, "hardware.images_per_row=0"]) == 0
    told = capsys.readouterr().out
    assert "4 rows per step = 4 rows × 1 devices × 1 micro-batches" in told and ": fits" in told
    assert train.main([*command, "hardware.memory_gib=0.001", "hardware.reserve_gib=0"]) == 2
    captured = capsys.readouterr()
    assert "DOES NOT FIT" in captured.out and "GiB are needed on each GPU, but h100-80gb has 0.0" in captured.err
    assert train.main([*command, "hardware.images_per_row=8"]) == 2
    assert "8 images need rows of 49 tokens, but a row has 48" in capsys.readouterr().err
    assert not (tmp_path / "language_modelling").exists()


def test_refusal_says_what_would_fit() -> None:
    layout = BatchLayout(micro_batch_size=8, world_size=1, micro_batches=1)
    rows = Estimate({"weights": 10 * GIB, "activations": 8 * GIB}, GIB, 15 * GIB, 1.0, 1.0)
    assert "18.0 GiB are needed on each GPU, but card has 15.0: data.micro_batch_size=5 would fit" in refusal(
        rows, layout, "card"
    )
    none = Estimate({"weights": 20 * GIB, "activations": 8 * GIB}, GIB, 15 * GIB, 1.0, 1.0)
    assert "no micro-batch fits; the largest parts are weights 20.0" in refusal(none, layout, "card")


def test_micro_batches_are_derived_and_devices_are_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = batch_layout(56, TrainerConfig(global_batch_size=3584, devices=8))
    assert (layout.micro_batches, layout.global_batch) == (8, 3584)
    assert batch_layout(4, TrainerConfig(devices=2, num_nodes=3)).global_batch == 24
    assert count_devices(TrainerConfig(devices=0, accelerator="cpu")) == 1
    for micro_batch_size, rows, told in [
        (56, 3600, r"3600, but data.micro_batch_size 56 × 64 devices = 3584 rows.*nearest.*\[3584, 3648\]"),
        (5, 3584, r"with these devices data.micro_batch_size may be 1, 2, 4, 7, 8\."),
    ]:
        with pytest.raises(ValueError, match=told):
            batch_layout(micro_batch_size, TrainerConfig(global_batch_size=rows, devices=8, num_nodes=8))
    for world, local in (LAUNCHERS[:2], LAUNCHERS[2:]):
        monkeypatch.setenv(world, "16")
        monkeypatch.setenv(local, "8")
        assert count_devices(TrainerConfig(devices=0, num_nodes=2)) == 8
        with pytest.raises(ValueError, match=r"started 16 ranks, 8 a node, but trainer.devices is 8 and"):
            count_devices(TrainerConfig(devices=8))
        monkeypatch.delenv(world)
