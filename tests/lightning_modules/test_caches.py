"""Training from caches equals training with the networks, which are then not loaded; else it is refused."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import train
from kosmosg.config import load_config
from kosmosg.models.kosmosg import KosmosG
from lightning_modules import dry_run
from lightning_modules.base import StageModule
from lightning_modules.dry_run import count, measure_module
from tests import tiny
from tests.lightning_modules import miniature
from tests.lightning_modules.runs import back_to, exported, finish, run

CONFIGS = Path(train.__file__).parent / "configs"
CACHED = {
    "alignment": ["recipe.variant=masked", "recipe.length_buckets=2", "data.cached_states={}"],
    "instruction_tuning": ["data.cached_latents={}", "data.cached_vision={}"],
}
PLAIN = {stage: [item for item in given if "cached" not in item] for stage, given in CACHED.items()}
VAE_ENCODER = 34_163_592  # parameters
TRACKED = {
    "alignment": ("train/loss", "train/mse_loss", "train/rec_loss", "grad_norm", "val/mse_loss", "val/rec_loss"),
    "instruction_tuning": (
        "train/loss",
        "grad_norm",
        "val/diffusion_loss",
        "val/diffusion_loss_with_image",
        "val/diffusion_loss_mismatched_images",
    ),
}


def cache(*arguments: object) -> int:
    return train.main(["cache", *map(str, arguments)])


def cached(stage: str, precision: str = "float32") -> list[str]:
    return [item.format(precision) for item in CACHED[stage]]


def write(folder: Path, tokenizer: Path, decoder: Path, model: Path) -> dict[str, Path]:
    """Configurations over shards of their own."""
    shards = miniature.write_shards(folder / "shards")
    return miniature.write_config(folder, shards, tokenizer, decoder, model)


@pytest.fixture(scope="module")
def configs(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, tiny_stable_diffusion: Path, tiny_model: Path
) -> dict[str, Path]:
    """Over shards that have caches in float32 beside them."""
    files = write(tmp_path_factory.mktemp("caches"), tiny_tokenizer, tiny_stable_diffusion, tiny_model)
    for stage in CACHED:
        assert cache(files[stage], *cached(stage)) == 0
    return files


def trained(file: Path, *arguments: object) -> StageModule:
    """The module of a run that is finished."""
    begun, modules = StageModule.on_train_start, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageModule, "on_train_start", lambda self: (modules.append(self), begun(self))[-1])
        assert run(file, *arguments) == 0
    return modules[0]


@pytest.fixture(scope="module")
def networks(configs: dict[str, Path]) -> Callable[[str], tuple[Path, StageModule]]:
    """The run of a stage that computes everything, and its module."""

    @functools.cache
    def train_once(stage: str) -> tuple[Path, StageModule]:
        folder = configs[stage].parent / f"{stage}-networks"
        return folder, trained(configs[stage], *PLAIN[stage], f"run={folder}")

    return train_once


def numbers(folder: Path, stage: str) -> list[list[float]]:
    return [[float(value or 0) for value in row[1:]] for row in miniature.losses(folder, TRACKED[stage])]


@pytest.mark.parametrize("stage", CACHED)
def test_training_from_caches_equals_training_without(
    stage: str, configs: dict[str, Path], networks: Callable[[str], tuple[Path, StageModule]], tmp_path: Path
) -> None:
    """Losses of training and validation and the exported model, also after a resume with other workers; weights that
    are not read are not there."""
    folder = tmp_path / "cached"
    (plain, whole), read = networks(stage), trained(configs[stage], *cached(stage), f"run={folder}")
    expected, rows = numbers(plain, stage), miniature.losses(folder, TRACKED[stage])
    assert len(expected) == 4
    for row, other in zip(expected, numbers(folder, stage), strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    ours, theirs = exported(folder), exported(plain)
    assert ours.keys() == theirs.keys() and any(name.startswith("mllm.") for name in ours)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4)
    KosmosG.from_pretrained(folder)
    back_to(folder, 2)
    assert run(configs[stage], *cached(stage), f"run={folder}", "data.num_workers=2") == 0
    assert miniature.losses(folder, TRACKED[stage]) == rows
    assert count(read, True) == count(whole, True)
    if stage == "alignment":
        assert read.mllm is None and read.image_decoder is None and not count(read, False)
    else:
        vision = read.mllm.vision.clip
        assert vision.embeddings is None and not list(vision.encoder.layers[0].parameters())
        assert count(read.mllm, False) == 0 < count(whole.mllm, False) and read.image_decoder.vae.encoder is None


def test_captions_one_by_one_are_equal_bit_for_bit(
    tmp_path: Path, tiny_tokenizer: Path, tiny_stable_diffusion: Path, tiny_model: Path
) -> None:
    """In one batch with others, kernels may round differently; alone they cannot."""
    file = write(tmp_path, tiny_tokenizer, tiny_stable_diffusion, tiny_model)["alignment"]
    options = ["data.micro_batch_size=1", "trainer.global_batch_size=4", "recipe.length_buckets=1"]
    assert cache(file, *cached("alignment"), *options) == 0
    for name, given in (("networks", PLAIN["alignment"]), ("cached", cached("alignment"))):
        assert run(file, *given, *options, f"run={tmp_path / name}") == 0
    rows = [miniature.losses(tmp_path / name, TRACKED["alignment"]) for name in ("networks", "cached")]
    assert rows[0] == rows[1] and len(rows[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", CACHED)
def test_two_sharded_ranks_read_caches_as_one(stage: str, configs: dict[str, Path], tmp_path: Path) -> None:
    for ranks in (1, 2):
        finish(ranks, configs[stage], tmp_path / str(ranks), *cached(stage), "trainer.checkpoint_every=4")
    rows = [torch.tensor(numbers(tmp_path / ranks, stage))[:, :-1] for ranks in ("1", "2")]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-6)  # all but the images that are mismatched


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [("alignment", "bfloat16"), ("instruction_tuning", "float16")])
def test_half_precision_changes_losses_by_less_than_a_thousandth(
    stage: str,
    precision: str,
    networks: Callable[[str], tuple[Path, StageModule]],
    tmp_path: Path,
    tiny_tokenizer: Path,
    tiny_stable_diffusion: Path,
    tiny_model: Path,
) -> None:
    """docs/data.md has the differences in the miniature."""
    configs = write(tmp_path, tiny_tokenizer, tiny_stable_diffusion, tiny_model)
    expected = torch.tensor(numbers(networks(stage)[0], stage))[:, 0]
    given = cached(stage, precision)
    assert cache(configs[stage], *given) == 0
    assert run(configs[stage], *given, f"run={tmp_path / precision}") == 0
    ours = torch.tensor(numbers(tmp_path / precision, stage))[:, 0]
    assert 0 < ((ours - expected) / expected).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["xl", "sana"])
def test_states_of_a_language_model_and_of_other_text_models(
    decoder: str, tiny_folder: Callable[[str], Path], configs: dict[str, Path], tmp_path: Path
) -> None:
    """A pooled vector, a mask, and the states of a vision-language model, which is not copied into the run."""
    model = [f"model.image_decoder={tiny_folder(decoder)}", *miniature.KEYS.get(decoder, []), "init_from=null"]
    model += [f"model.language_model={tiny_folder('qwen2_5_vl')}"]
    model += ["data.max_pieces=100", "trainer.max_steps=2", "trainer.val_every=2"]
    assert cache(configs["alignment"], *cached("alignment"), *model) == 0
    for name, given in (("networks", PLAIN["alignment"]), ("cached", cached("alignment"))):
        assert run(configs["alignment"], *given, *model, f"run={tmp_path / name}") == 0
    for row, other in zip(*(numbers(tmp_path / name, "alignment") for name in ("networks", "cached")), strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    assert not list((tmp_path / "cached" / "model" / "mllm").rglob("*.safetensors"))


OTHERS = (
    ("alignment", "init_from={model}", "cache 'states'.* network is {hash} there and {hash} here"),
    ("alignment", "data.max_pieces=50", "cache 'states'.* max_pieces is 60 there and 50 here"),
    ("alignment", "model.image_decoder={decoder}", "cache 'text'.* network is {hash} there and {hash} here"),
    ("alignment", "data.cached_states=float16", "precision is float32 there and float16 here"),
    ("alignment", "trainer.precision=bf16-mixed", "computed is 32-true there and bf16-mixed here"),
    ("instruction_tuning", "init_from={model}", "cache 'vision'.* network is {hash} there and {hash} here"),
    ("instruction_tuning", "model.image_decoder={decoder}", "cache 'latents'.* network is {hash} there"),
    ("instruction_tuning", "model.image_size=32", "cache 'latents'.* images is 64×64, crop there and 32×32, crop"),
    ("instruction_tuning", "recipe.vision_training.blocks=0", "cache 'vision'.* layer is 1 there and 2 here"),
)


def test_a_cache_of_something_else_is_refused_naming_both(
    configs: dict[str, Path],
    tiny_tokenizer: Path,
    tmp_path: Path,
    subtests: pytest.Subtests,
    capsys: pytest.CaptureFixture,
) -> None:
    places = {"model": tmp_path / "model", "decoder": tmp_path / "decoder"}
    model = KosmosG.from_pretrained(tiny.write_model(places["model"], tiny_tokenizer))
    pipe = StableDiffusionPipeline.from_pretrained(tiny.write_stable_diffusion(places["decoder"]))
    with torch.no_grad():
        for network in (model.mllm.vision, pipe.vae, pipe.text_encoder):
            next(network.parameters()).add_(1e-3)
    model.mllm.save_pretrained(places["model"] / "mllm")
    pipe.save_pretrained(places["decoder"])
    for stage, change, told in OTHERS:
        with subtests.test(f"{stage} {change}"):
            assert run(configs[stage], *cached(stage), change.format(**places), f"run={tmp_path / 'run'}") == 2
            assert re.search(told.format(hash="[0-9a-f]{40}"), capsys.readouterr().err)


@pytest.mark.slow
def test_a_dry_run_shows_what_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size: M and N alone in stage 2; in stage 3 one block of CLIP of 24, and of the VAE its decoder."""
    monkeypatch.setattr(dry_run, "measure", lambda *_: dry_run.MicroBatchCost(1.0, 1.0))
    frozen: dict[str, list[int]] = {}
    for stage in CACHED:
        files = [str(CONFIGS / f"{stage}.yaml"), str(CONFIGS / "model" / "kosmosg.yaml")]
        experiments = [load_config([*files, *given], train.stage_schema) for given in (PLAIN[stage], cached(stage))]
        frozen[stage] = [count(measure_module(experiment).module, False) for experiment in experiments]
    assert frozen["alignment"][0] > 1e9 and frozen["alignment"][1] == 0
    vision = 303_179_776 - 12_596_224 - 2_048  # CLIP ViT-L/14, but for the last block and the norm after it
    assert frozen["instruction_tuning"][0] - frozen["instruction_tuning"][1] == vision + VAE_ENCODER


@pytest.mark.slow
@pytest.mark.parametrize("stage", CACHED)
def test_a_dry_run_computes_a_step_from_caches(
    stage: str, configs: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    assert run(configs[stage], *cached(stage), "dry_run=true") == 0
    told = capsys.readouterr().out
    assert ": fits" in told and ("mllm" in told) == (stage == "instruction_tuning")
