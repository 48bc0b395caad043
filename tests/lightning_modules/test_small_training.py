"""Training that fits small GPUs: LoRA, moments in 8 bits, frozen weights in fewer bits."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kosmosg.condition import Condition
from kosmosg.models.build import load_image_decoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import VisionTraining
from kosmosg.prompt import PromptBatch
from lightning_modules.checkpointing import checkpoints, read_shapes
from lightning_modules.lora import add_lora, merge_lora
from lightning_modules.optimizer import MOMENTS, OptimizerConfig, build_optimizer, code_values, dequantize, quantize
from lightning_modules.parallelize import apply_activation_checkpointing, store_frozen_weights, stored_weights
from tests import tiny
from tests.lightning_modules.runs import assert_same_training, back_to, exported, finish, numbers, training

STAGE = "instruction_tuning"
SMALL = [
    "recipe.lora_rank=2",
    "optimizer.eight_bit=true",
    "trainer.frozen_storage=float8",
    "trainer.activation_checkpointing=full",
]


def test_resumed_run_of_all_that_makes_training_small_is_the_same_to_the_last_bit(
    configs: dict[str, Path], tmp_path: Path
) -> None:
    """LoRA, moments in 8 bits, frozen weights in 8 bits, recomputed layers."""
    folder = tmp_path / "run"
    finish(1, configs[STAGE], folder, *SMALL)
    rows, tensors = numbers(folder, STAGE), exported(folder)
    back_to(folder, 2)
    finish(1, configs[STAGE], folder, *SMALL)
    assert numbers(folder, STAGE) == rows and tensors
    for name, tensor in exported(folder).items():
        assert torch.equal(tensors[name], tensor), name
    assert not any("lora" in name for name in tensors)  # a model folder as any other
    saved = read_shapes(checkpoints(folder / "checkpoints")[-1])
    trained = [name for name in saved if name.startswith("model.mllm.decoder.")]
    assert trained and all(".lora_" in name for name in trained)
    assert any(name.endswith("_codes") for name in saved)


@pytest.mark.slow
def test_sharded_8_bit_moments_go_on_on_one_rank(configs: dict[str, Path], tmp_path: Path) -> None:
    """Two ranks train as one does, and either reads what the other wrote."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["optimizer.eight_bit=true", "recipe.lora_rank=2", "trainer.checkpoint_every=2"]
    for ranks, run in ((1, one), (2, two)):
        finish(ranks, configs[STAGE], run, *options)
    back_to(two, 2)
    finish(1, configs[STAGE], two, *options)
    assert_same_training(one, two, STAGE, rel=1e-3)
    back_to(two, 2)
    other = [option for option in options if "eight_bit" not in option]
    assert training(configs[STAGE], two, *other, "data.micro_batch_size=4")() == 2, "moments of another kind"


def test_lora_begins_as_the_model_and_merges_into_it(tiny_model: Path) -> None:
    prompt = PromptBatch(torch.randint(5, 50, (2, 7)), torch.zeros(2, 7, dtype=torch.bool), None, torch.zeros(2, 7) > 0)
    model = KosmosG.from_pretrained(tiny_model)
    before, names = model.condition(prompt).states, set(model.state_dict())
    model.mllm.set_trainable(VisionTraining())
    trained = sum(parameter.numel() for parameter in model.mllm.decoder.parameters() if parameter.requires_grad)
    add_lora(model.mllm, 2)
    assert torch.equal(model.condition(prompt).states, before)
    adapters = [parameter for parameter in model.mllm.decoder.parameters() if parameter.requires_grad]
    assert 0 < sum(parameter.numel() for parameter in adapters) < trained / 4
    for parameter in adapters:
        nn.init.normal_(parameter, std=0.1)
    unmerged = model.condition(prompt).states
    merge_lora(model.mllm)
    assert set(model.state_dict()) == names
    assert (unmerged - before).abs().max() > 1e-2
    torch.testing.assert_close(model.condition(prompt).states, unmerged, rtol=0, atol=1e-5)


def test_codes_keep_numbers_of_six_decades_to_a_few_percent() -> None:
    generator = torch.Generator().manual_seed(0)
    for moment in MOMENTS:
        values = code_values(moment, torch.device("cpu"))
        assert len(values) == 256 and bool((values.diff() > 0).all())
        rows = torch.randn(5, 700, generator=generator) * 10.0 ** torch.randint(-6, 1, (5, 1), generator=generator)
        rows = rows.abs() if moment == "exp_avg_sq" else rows
        codes, scales = quantize(rows, values)
        assert codes.dtype == torch.uint8 and codes.shape == rows.shape and scales.shape == (5, 3)
        error = (dequantize(codes, scales, values) - rows).abs().mean() / rows.abs().mean()
        assert error < 0.02


def test_8_bit_moments_train_as_float32s_do() -> None:
    """A linear map is learned with nearly the same losses, at a quarter of the states' bytes; biases keep float32's."""
    losses, state_bytes = {}, {}
    for eight_bit in (False, True):
        torch.manual_seed(0)
        target, network = nn.Linear(64, 128), nn.Linear(64, 128)
        optimizer = build_optimizer([*network.parameters()], OptimizerConfig(lr=1e-2, eight_bit=eight_bit))
        optimizer.param_groups[0]["lr"] = 3e-3
        for _ in range(40):
            inputs = torch.randn(32, 64)
            loss = (network(inputs) - target(inputs).detach()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[eight_bit] = loss.item()
        state_bytes[eight_bit] = sum(value.nbytes for value in optimizer.state[network.weight].values())
        assert optimizer.state[network.bias]["exp_avg"].dtype == torch.float32
    assert losses[False] < 0.2 and losses[True] == pytest.approx(losses[False], rel=0.02)
    assert state_bytes[True] < 0.27 * state_bytes[False]


def condition_gradient(folder: Path, storage: str, precision: str, checkpointing: str = "none") -> torch.Tensor:
    decoder = load_image_decoder(folder, "images")
    module = nn.ModuleList([decoder])
    store_frozen_weights(module, storage)
    apply_activation_checkpointing(module, checkpointing)
    torch.manual_seed(0)
    states = torch.randn(2, decoder.spec.tokens, decoder.spec.width, requires_grad=True)
    latents, timesteps = torch.randn(2, 4, tiny.LATENT_SIZE, tiny.LATENT_SIZE), torch.tensor([100, 700])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        decoder.predict(latents, timesteps, Condition(states)).square().mean().backward()
    assert states.grad is not None
    return states.grad


def test_frozen_weights_in_fewer_bits_and_the_gradient_that_reaches_the_condition(tiny_stable_diffusion: Path) -> None:
    """bfloat16 is what autocast makes of the weights anyway; float8's gradient points the same way."""
    folder = tiny_stable_diffusion
    exact = condition_gradient(folder, "float32", "bf16-mixed")
    assert torch.equal(condition_gradient(folder, "bfloat16", "bf16-mixed"), exact)
    single = condition_gradient(folder, "float32", "32-true")
    rounded = condition_gradient(folder, "float8", "32-true")
    cosine = nn.functional.cosine_similarity(single.flatten(), rounded.flatten(), dim=0)
    assert 0.98 < cosine < 1
    assert torch.equal(condition_gradient(folder, "float8", "32-true", "full"), rounded)


def test_weights_that_train_and_those_that_make_targets_stay_as_they_are(tiny_stable_diffusion: Path) -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 3), nn.Linear(64, 64))
    network[:2].requires_grad_(False)
    weight, trained = network[0].weight.detach().clone(), network[2].weight
    store_frozen_weights(network, "float8")
    assert network[2].weight is trained
    assert [value.dtype for value in stored_weights(network)] == [torch.bfloat16] * 2
    assert torch.equal(network[0].weight, weight.bfloat16().float())
    decoder = load_image_decoder(tiny_stable_diffusion)
    images = torch.rand(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    moments, weight = decoder.moments(images), decoder.denoiser.conv_in.weight.detach().clone()
    store_frozen_weights(nn.ModuleList([decoder]), "float8")
    assert torch.equal(decoder.moments(images), moments)
    assert {stored.dtype for stored in stored_weights(decoder.denoiser)} == {torch.float8_e4m3fn}
    assert 0 < (decoder.denoiser.conv_in.weight - weight).abs().max() <= weight.abs().max() / 16
