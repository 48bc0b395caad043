"""Every way of doing less work gives what the plain way gives: losses, gradients and conditions."""

from pathlib import Path

import pytest
import torch
from kosmosg.models.text_target import TextTarget
from lightning_modules.frozen_cache import FrozenCache
from torch import Tensor, nn

from kosmosg.batches import AlignmentBatch
from kosmosg.config import ConfigError, load_config
from kosmosg.models.aligner import AlignerDecoder
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.prompt import PromptBatch
from lightning_modules.alignment import AlignmentModule, AlignmentRecipe
from lightning_modules.instruction_tuning import InstructionTuningModule, InstructionTuningRecipe
from lightning_modules.optimizer import OptimizerConfig
from tests import tiny

LENGTHS = (4, 17, 6, 11, 5, 8)
WITHOUT_PADDING = ("masked", "paper")


@pytest.fixture
def model(tiny_model: Path) -> KosmosG:
    model = KosmosG.from_pretrained(tiny_model)
    for module in model.modules():  # the same draws in every way of grouping there cannot be
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.mllm.resampler.attention.dropout = 0.0
    return model


@pytest.fixture
def captions(model: KosmosG) -> AlignmentBatch:
    padding = torch.arange(max(LENGTHS))[None] >= torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(8, 40, padding.shape)
    ids[:, 0] = model.mllm.config.bos_id
    ids[padding] = model.mllm.config.pad_id
    prompt = PromptBatch(ids, torch.zeros_like(padding), None, padding)
    return AlignmentBatch(prompt, torch.randint(3, 40, (len(LENGTHS), tiny.QUERIES)))


def alignment(model: KosmosG, stable_diffusion: Path, **recipe) -> AlignmentModule:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        decoder = AlignerDecoder(output_width=tiny.WIDTH, **tiny.aligner_sizes())
    target = TextTarget.from_pretrained(stable_diffusion)
    made = AlignmentRecipe(**recipe)
    return AlignmentModule(model.mllm, model.aligner, decoder, target, made, OptimizerConfig(), seed=0).train()


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: value for name, value in zip(trained, found, strict=True) if value is not None}


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], share: float = 1e-4) -> None:
    assert ours.keys() == plain.keys() and ours
    for name, value in plain.items():
        if name.endswith("k_proj.bias"):
            continue  # softmax is blind to it: zero up to rounding
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=share * float(value.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize("variant", WITHOUT_PADDING)
def test_length_groups_give_the_loss_and_gradients_of_the_whole_batch(
    variant: str, model: KosmosG, tiny_stable_diffusion: Path, captions: AlignmentBatch
) -> None:
    whole = alignment(model, tiny_stable_diffusion, variant=variant)
    grouped = alignment(model, tiny_stable_diffusion, variant=variant, length_groups=3)
    losses = whole.losses(captions), grouped.losses(captions)
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-5, atol=0)
    assert_same(gradients(grouped, losses[1]["loss"]), gradients(whole, losses[0]["loss"]))


@pytest.mark.parametrize("variant", WITHOUT_PADDING)
def test_the_loss_of_a_batch_is_the_mean_of_its_captions_own(
    variant: str, model: KosmosG, tiny_stable_diffusion: Path, captions: AlignmentBatch
) -> None:
    module = alignment(model, tiny_stable_diffusion, variant=variant, length_groups=2)
    prompt, alone = captions.prompt, []
    for row, length in enumerate(LENGTHS):
        own = PromptBatch(
            prompt.ids[row : row + 1, :length],
            prompt.image_mask[row : row + 1, :length],
            None,
            prompt.padding[row : row + 1, :length],
        )
        alone.append(module.losses(AlignmentBatch(own, captions.clip_ids[row : row + 1])))
    together = module.losses(captions)
    for name in ("mse_loss", "rec_loss"):
        mean = torch.stack([losses[name] for losses in alone]).mean()
        torch.testing.assert_close(together[name], mean, rtol=1e-5, atol=0)


def test_without_padding_masked_is_the_released_loss_but_for_its_factor(
    model: KosmosG, tiny_stable_diffusion: Path, captions: AlignmentBatch
) -> None:
    length = min(LENGTHS)
    prompt = captions.prompt
    cut = PromptBatch(prompt.ids[:, :length], prompt.image_mask[:, :length], None, prompt.padding[:, :length])
    batch = AlignmentBatch(cut, captions.clip_ids)
    released, masked = (
        alignment(model, tiny_stable_diffusion, variant=variant).losses(batch) for variant in ("released", "masked")
    )
    torch.testing.assert_close(masked["mse_loss"], released["mse_loss"])
    torch.testing.assert_close(masked["rec_loss"] * tiny.QUERIES / length, released["rec_loss"])


def test_kept_states_give_the_same_loss_and_spare_the_frozen_networks(
    model: KosmosG, tiny_stable_diffusion: Path, captions: AlignmentBatch
) -> None:
    plain = alignment(model, tiny_stable_diffusion, variant="masked", length_groups=2).losses(captions)
    module = alignment(model, tiny_stable_diffusion, variant="masked", length_groups=2, cache_megabytes=1)
    first = module.losses(captions)
    calls: list[nn.Module] = []
    for network in (module.mllm, module.text_target):
        network.register_forward_hook(lambda network, *_: calls.append(network))
    again = module.losses(captions)
    assert not calls
    for name, value in plain.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=0)
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=0)


def test_states_that_depend_on_padding_or_dropout_are_not_kept(
    model: KosmosG, tiny_stable_diffusion: Path, captions: AlignmentBatch
) -> None:
    for recipe in ({"variant": "released"}, {"variant": "masked", "frozen_dropout": True}):
        module = alignment(model, tiny_stable_diffusion, cache_megabytes=1, **recipe)
        module.losses(captions)
        assert not module.hidden_cache.states and len(module.target_cache.states) == len(LENGTHS)


def test_the_cache_has_a_bound_and_forgets_what_was_used_longest_ago() -> None:
    cache = FrozenCache(megabytes=1)
    computed: list[int] = []

    def compute(places: list[int]) -> list[Tensor]:
        computed.extend(places)
        return [torch.full((100_000,), float(place)) for place in places]  # 0.4 MB each

    keys = [b"a", b"b", b"a"]
    assert [int(states[0]) for states in cache(keys, compute)] == [0, 1, 0]
    assert computed == [0, 1]  # a repeated key is computed once
    cache([b"c"], compute)
    assert cache.held <= cache.room and list(cache.states) == [b"a", b"c"]


def test_groups_are_refused_where_padding_counts() -> None:
    with pytest.raises(ConfigError, match=r"length_groups is 2, but recipe\.variant=released"):
        load_config(["length_groups=2"], AlignmentRecipe)
    assert load_config(["length_groups=2", "variant=masked"], AlignmentRecipe).length_groups == 2


@pytest.fixture
def prompts(model: KosmosG) -> PromptBatch:
    """Two images; none; one."""
    slots, counts, lengths = model.mllm.config.image_tokens, (2, 0, 1), (14, 4, 9)
    padding = torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]
    ids = torch.randint(8, 40, padding.shape)
    ids[:, 0] = model.mllm.config.bos_id
    ids[padding] = model.mllm.config.pad_id
    image_mask = torch.zeros_like(padding)
    for row, count in enumerate(counts):
        for image in range(count):
            begin = 2 + image * (slots + 1)
            image_mask[row, begin : begin + slots] = True
    images = torch.randn(sum(counts), 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return PromptBatch(ids, image_mask, images, padding)


def instruction(model: KosmosG, stable_diffusion: Path, **recipe) -> InstructionTuningModule:
    decoder = ImageDecoder.from_pretrained(stable_diffusion)
    made = InstructionTuningRecipe(**recipe)
    return InstructionTuningModule(model.mllm, model.aligner, decoder, made, OptimizerConfig(), seed=0).train()


def test_instruction_prompts_in_groups_and_kept_moments_change_nothing(
    model: KosmosG, tiny_stable_diffusion: Path, prompts: PromptBatch
) -> None:
    targets = torch.rand(3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) * 2 - 1
    whole = instruction(model, tiny_stable_diffusion)
    grouped = instruction(model, tiny_stable_diffusion, length_groups=3)
    moments = whole.image_decoder.moments(targets)
    pixels_draws, moments_draws = (whole._draws("train", range(3), given) for given in (targets, moments))
    assert torch.equal(pixels_draws.noise, moments_draws.noise)
    pixels_draws.uniform[1] = 0.0  # one sample takes the null condition, which must train too
    plain = whole.sample_losses(prompts, targets, pixels_draws, drop=0.1)
    moments_draws.uniform[1] = 0.0
    ours = grouped.sample_losses(prompts, moments, moments_draws, drop=0.1)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    assert_same(gradients(grouped, ours.mean()), gradients(whole, plain.mean()), share=1e-3)


def test_frozen_blocks_and_the_vae_leave_no_graph(
    model: KosmosG, tiny_stable_diffusion: Path, prompts: PromptBatch
) -> None:
    module = instruction(model, tiny_stable_diffusion)
    seen: dict[str, bool] = {}

    def note(name: str):
        def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0].requires_grad

        return look

    blocks = module.mllm.vision.clip.encoder.layers
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(note(f"into block {number}"))
    latents = module.image_decoder.latents(torch.zeros(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
    condition = module.conditions(prompts)
    assert seen == {f"into block {number}": False for number in range(len(blocks))}
    assert condition.requires_grad and not latents.requires_grad
