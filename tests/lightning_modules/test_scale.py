"""Global batch, recomputed and compiled layers, precision of shards, skipped steps, and the dry run."""

import io
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_modules.estimate.hardware import HardwareConfig
from lightning_modules.estimate.run_estimate import DoesNotFitError, Estimate, refuse_what_does_not_fit
from lightning_modules.runs.trained_weights import VisionTraining, train_mllm
from lightning_modules.scale.batch_layout import batch_layout, count_devices
from lightning_modules.scale.recompute import apply_compile, apply_recompute
from lightning_modules.scale.sharding import layer_policy
from lightning_modules.scale.trainer import TrainerConfig
from rich.console import Console
from torch import nn

import train
from kosmosg.config import load_config
from kosmosg.models.kosmosg import KosmosG
from kosmosg.prompt import PromptBatch
from lightning_modules.base import build_stage
from tests import tiny

SCALED = sorted((Path(train.__file__).parent / "configs" / "scale").rglob("*.yaml"))
PAPER_PARAMETERS = {"mllm": 1_662_375_936, "aligner": 225_461_760, "aligner_decoder": 250_569_728}


def test_accumulation_is_derived() -> None:
    layout = batch_layout(56, 3584, devices=8, num_nodes=1)
    assert (layout.accumulate, layout.global_batch) == (8, 3584)
    assert batch_layout(4, None, devices=2, num_nodes=3).global_batch == 24


@pytest.mark.parametrize(
    ("batch_size", "rows", "told"),
    [
        (
            56,
            3600,
            r"data.batch_size 56 × trainer.devices 8 × trainer.num_nodes 8 = 3584 rows.*nearest.*\[3584, 3648\]",
        ),
        (5, 3584, r"with these devices data.batch_size may be 1, 2, 4, 7, 8"),
    ],
)
def test_impossible_global_batch_names_the_factors(batch_size: int, rows: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        batch_layout(batch_size, rows, devices=8, num_nodes=8)


def test_devices_are_the_launchers() -> None:
    torchrun = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert count_devices(0, 2, "auto", torchrun) == 8
    with pytest.raises(ValueError, match=r"torchrun started 16 processes, 8 a node, but trainer.devices is 8 and"):
        count_devices(8, 1, "auto", torchrun)
    slurm = {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}
    assert count_devices(0, 2, "auto", slurm) == 8
    assert count_devices(0, 1, "cpu", {}) == 1


@pytest.mark.parametrize("file", SCALED, ids=lambda file: "/".join(file.parts[-2:]))
def test_shipped_scales_are_the_papers_batches(file: Path) -> None:
    experiment = load_config([str(file)], train.stage_schema)
    options = experiment.trainer
    layout = batch_layout(experiment.data.batch_size, options.global_batch_size, options.devices, options.num_nodes)
    assert layout.processes == int(file.parent.name)
    papers = {"language_modelling": 576, "alignment": 3584, "instruction_tuning": 1024}[experiment.stage]
    assert layout.global_batch == (
        512 if (experiment.stage, layout.processes) == ("language_modelling", 256) else papers
    )
    assert f"configs/scale/{layout.processes}/{file.name}" in file.read_text()


def graph(mllm: nn.Module, prompt: PromptBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Output, gradients, and bytes kept for the backward pass."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(0)  # for dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = mllm(prompt)
    hidden.square().mean().backward()
    gradients = {name: weight.grad for name, weight in mllm.named_parameters() if weight.grad is not None}
    return hidden.detach(), gradients, kept


def fresh_mllm(tiny_model: Path) -> nn.Module:
    mllm = KosmosG.from_pretrained(tiny_model).mllm.train()
    train_mllm(mllm, VisionTraining())
    return mllm


@pytest.fixture
def prompt() -> PromptBatch:
    ids = torch.randint(5, 50, (2, 12))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 1 : 1 + tiny.IMAGE_TOKENS] = True
    images = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return PromptBatch(ids, mask, images, torch.zeros_like(mask))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(
    mode: str, tiny_model: Path, prompt: PromptBatch
) -> None:
    plain, again = fresh_mllm(tiny_model), fresh_mllm(tiny_model)
    apply_recompute(again, mode)
    expected, gradients, kept = graph(plain, prompt)
    found, others, kept_now = graph(again, prompt)
    assert torch.equal(found, expected)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert others.keys() == gradients.keys()
    assert any("vision.clip.encoder.layers.1" in name for name in others), "CLIP's last block trains"
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name
    assert kept_now < kept


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "backend"), [("none", "aot_eager"), ("selective", "inductor")])
def test_compiled_layers_give_the_same(
    mode: str, backend: str, tiny_model: Path, prompt: PromptBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what another process left half written
    plain, compiled = fresh_mllm(tiny_model), fresh_mllm(tiny_model)
    for module in (*plain.modules(), *compiled.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled dropout draws other numbers
    apply_recompute(compiled, mode)
    apply_compile(compiled.decoder, backend=backend)
    expected, gradients, _ = graph(plain, prompt)
    found, others, _ = graph(compiled, prompt)
    assert torch.allclose(found, expected, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(others[name], gradient, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("language_modelling", []),
        ("alignment", ["recipe.variant=masked", "recipe.length_groups=2"]),
        ("instruction_tuning", ["recipe.length_groups=2"]),
    ],
)
def test_no_layer_of_a_stage_is_left_uncompiled(
    stage: str, options: list[str], configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(train, "apply_compile", partial(apply_compile, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        assert train.main([str(configs[stage]), "trainer.compile=true", "trainer.max_steps=8", *options]) == 0


def test_layers_travel_in_half_precision_on_a_gpu_alone() -> None:
    policy = layer_policy("bf16-mixed", "cuda")
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert layer_policy("16-mixed", "cuda").param_dtype == torch.float16
    assert layer_policy("bf16-mixed", "cpu").param_dtype is layer_policy("32-true", "cuda").param_dtype is None


def test_single_strategy_is_for_one_device() -> None:
    with pytest.raises(ValueError, match=r"trainer\.strategy is single, but trainer\.devices is 2"):
        TrainerConfig(strategy="single", devices=2)


@pytest.mark.parametrize(("key", "value"), [("device", "abacus"), ("utilisation", 0.0), ("memory_gib", -1.0)])
def test_hardware_that_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"hardware\.{key} is .*allowed"):
        HardwareConfig(**{key: value})


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    layout = batch_layout(8, None, devices=1, num_nodes=1)
    rows = Estimate({"weights": 10 * 2**30, "activations": 8 * 2**30}, 2**30, 15 * 2**30, 1.0, 1.0)
    with pytest.raises(DoesNotFitError, match=r"3\.0 too few: data.batch_size=5 would fit"):
        refuse_what_does_not_fit(rows, layout, "card")
    none = Estimate({"weights": 20 * 2**30, "activations": 8 * 2**30}, 2**30, 15 * 2**30, 1.0, 1.0)
    with pytest.raises(DoesNotFitError, match=r"no batch fits; most is taken by weights 20\.0"):
        refuse_what_does_not_fit(none, layout, "card")


@pytest.mark.slow
def test_dry_run_of_toyland_counts_what_runs(capsys: pytest.CaptureFixture) -> None:
    """FLOPs and parameters of the miniature, beside the same pass with values."""
    from lightning_modules.estimate.dry_run import prompts, size_up
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = Path(train.__file__).parent / "configs" / "toyland" / "language_modelling.yaml"
    experiment = load_config([str(config), "hardware.images_per_row=0"], train.stage_schema)
    sized = size_up(experiment)
    tokenizer = train.Tokenizer.from_pretrained(Path(experiment.model.tokenizer))
    experiment.model.vision_weights = None
    module = build_stage(experiment, tokenizer).train()
    prompt = prompts(module, 2, sized.hardware)
    # As matrix products, attention is counted on a CPU too.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.loss(prompt, torch.zeros_like(prompt.ids)).backward()
    assert sized.cost.flops(2) == pytest.approx(counter.get_total_flops(), rel=0.05)
    for name, network in module.named_children():
        counted = sum(parameter.numel() for parameter in network.parameters())
        assert counted == sum(parameter.numel() for parameter in getattr(sized.module, name).parameters())
    assert sized.cost.row_bytes() > 0


@pytest.mark.slow
def test_dry_run_of_the_paper_has_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_modules.estimate import dry_run
    from lightning_modules.estimate.run_estimate import parameters_table
    from lightning_modules.estimate.step_cost import PassCost, StepCost

    monkeypatch.setattr(dry_run, "measure", lambda *_: PassCost(1.0, 1.0))
    experiment = load_config(["configs/alignment.yaml"], train.stage_schema)
    sized = dry_run.size_up(experiment)
    assert isinstance(sized.cost, StepCost)
    for name, count in PAPER_PARAMETERS.items():
        assert sum(parameter.numel() for parameter in getattr(sized.module, name).parameters()) == count
    told = io.StringIO()
    Console(file=told, width=100).print(parameters_table(sized))
    assert "1,662,375,936" in told.getvalue()
