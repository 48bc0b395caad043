"""What each stage trains and what stays as it was; that computing less gives the same losses and gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kosmosg.batches import AlignmentBatch, InstructionBatch, LanguageModellingBatch, MicroBatch
from kosmosg.config import ConfigError, load_config
from kosmosg.losses import IGNORED_LABEL
from kosmosg.models.aligner import AlignerDecoder, LinearAligner
from kosmosg.models.build import load_image_decoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import VisionTraining
from kosmosg.prompt import EncodedPrompt, PromptBatch
from lightning_modules.alignment import AlignmentModule, AlignmentRecipe
from lightning_modules.base import StageModule
from lightning_modules.instruction_tuning import InstructionTuningModule, InstructionTuningRecipe
from lightning_modules.language_modelling import LanguageModellingModule, LanguageModellingRecipe
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.randomness import DiffusionDraws, draw_diffusion
from lightning_modules.trainer import TrainerConfig, build_trainer
from tests import tiny

LENGTHS = (4, 17, 6, 11, 5, 8)
ROWS = ((14, 2), (4, 0), (9, 1))  # tokens and images
OPTIMIZER = OptimizerConfig(lr=0.1, warmup_steps=0)
CASES = (
    "language_modelling",
    "alignment",
    "image_alignment",
    "instruction_tuning",
    "aligned",
    "aligner_alone",
    "linear_alone",
)
MLLM_TRAINS = ("language_modelling", "image_alignment", "instruction_tuning", "aligned")


@pytest.fixture
def model(tiny_model: Path) -> KosmosG:
    """Without dropout, so that a loss is one number."""
    model = KosmosG.from_pretrained(tiny_model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.mllm.resampler.attention.dropout = 0.0
    return model


def prompts(model: KosmosG, rows: tuple[tuple[int, int], ...]) -> PromptBatch:
    """Prompts of random tokens with so many tokens and images each."""
    encoded = []
    for length, count in rows:
        mask, images = torch.zeros(length, dtype=torch.bool), []
        for image in range(count):
            begin = 2 + image * (tiny.IMAGE_TOKENS + 1)
            mask[begin : begin + tiny.IMAGE_TOKENS] = True
            images.append(torch.randn(3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
        ids = torch.randint(8, 40, (length,))
        ids[0] = model.mllm.config.bos_id
        encoded.append(EncodedPrompt(ids, mask, images))
    return PromptBatch.stack(encoded, model.mllm.config.pad_id)


def targets(rows: int = len(ROWS)) -> Tensor:
    return torch.rand(rows, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) * 2 - 1


def alignment(model: KosmosG, stable_diffusion: Path, **recipe) -> AlignmentModule:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        decoder = AlignerDecoder(output_width=tiny.WIDTH, **tiny.aligner_sizes())
    target, chosen = load_image_decoder(stable_diffusion, "text"), AlignmentRecipe(**recipe)
    decoder = decoder if chosen.rec_weight else None
    return AlignmentModule(model.mllm, model.aligner, decoder, target, chosen, OPTIMIZER, 0).train()


def instruction(model: KosmosG, stable_diffusion: Path, **recipe) -> InstructionTuningModule:
    chosen = InstructionTuningRecipe(**recipe)
    decoder = load_image_decoder(stable_diffusion, "all" if chosen.mse_weight else "images")
    return InstructionTuningModule(model.mllm, model.aligner, decoder, chosen, OPTIMIZER, 0).train()


def stage(case: str, model: KosmosG, stable_diffusion: Path) -> tuple[StageModule, MicroBatch]:
    """A module in training mode, and a batch for it."""
    prompt, indices = prompts(model, ROWS), [0, 1, 2]
    if case == "language_modelling":
        labels = prompt.ids.roll(-1, 1).masked_fill(prompt.padding | prompt.image_mask, IGNORED_LABEL)
        module = LanguageModellingModule(model.mllm, LanguageModellingRecipe(), OPTIMIZER, 0).train()
        return module, LanguageModellingBatch(prompt=prompt, labels=labels, indices=indices)
    if case == "alignment":
        captions = prompts(model, tuple((length, 0) for length in LENGTHS))
        return alignment(model, stable_diffusion), AlignmentBatch(prompt=captions, text_ids=text_ids())
    if case == "image_alignment":
        module = alignment(model, stable_diffusion, trainable="all", rec_weight=0.0, variant="masked", length_buckets=2)
        return module, AlignmentBatch(prompt=prompt, text_ids=text_ids()[: len(ROWS)], indices=indices)
    if case == "linear_alone":
        model.aligner = LinearAligner(input_width=tiny.WIDTH, width=tiny.CONDITION_WIDTH, num_queries=tiny.QUERIES)
    recipe = {"instruction_tuning": {}, "aligned": {"mse_weight": 2.0}}.get(case, {"trainable": "aligner"})
    told = text_ids()[: len(ROWS)]
    told[1] = -1
    return instruction(model, stable_diffusion, **recipe), InstructionBatch(
        prompt=prompt, targets=targets(), text_ids=told if case == "aligned" else None, indices=indices
    )


def text_ids() -> Tensor:
    return torch.randint(3, 40, (len(LENGTHS), tiny.QUERIES))


def should_train(case: str, name: str) -> bool:
    if name.startswith("mllm."):
        if case not in MLLM_TRAINS:
            return False
        return not name.startswith("mllm.vision.") or ".layers.1." in name or ".post_layernorm." in name
    return name.startswith(("aligner.", "aligner_decoder."))


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_steps_reach_what_trains_and_nothing_else(
    case: str, model: KosmosG, tiny_stable_diffusion: Path, tmp_path: Path
) -> None:
    module, batch = stage(case, model, tiny_stable_diffusion)
    module.losses(batch)["loss"].backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == should_train(case, name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        # Softmax is blind to a shift of all scores: gradients of key biases are zero up to rounding.
        blind = name.endswith("k_proj.bias") or not parameter.requires_grad
        assert blind or parameter.grad.abs().max() > 0, f"{name} has a zero gradient"
    module.zero_grad()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    options = {"default_root_dir": tmp_path, "logger": False, "enable_checkpointing": False}
    trainer = build_trainer(TrainerConfig(max_steps=2, accelerator="cpu"), 1, **options)
    trainer.fit(module, DataLoader([[batch, batch]] * 2, batch_size=None, collate_fn=lambda step: step))
    assert trainer.global_step == 2 and not module.guard.skipped
    for name, value in module.state_dict().items():
        if should_train(case, name):
            assert name.endswith("k_proj.bias") or not torch.equal(value, before[name]), f"{name} did not move"
        else:
            assert torch.equal(value, before[name]), f"{name} is frozen but moved"
    for network in module.train().frozen_modules():
        assert not any(part.training for part in network.modules())
    assert (module.mllm.training, module.mllm.decoder.training) == (should_train(case, "mllm.decoder."),) * 2


@pytest.mark.parametrize("blocks", [0, 1, 2, -1])
def test_end_of_the_vision_encoder_that_trains(model: KosmosG, blocks: int) -> None:
    model.mllm.set_trainable(VisionTraining(blocks=blocks, final_norm=False))
    clip = model.mllm.vision.clip
    training = [all(parameter.requires_grad for parameter in layer.parameters()) for layer in clip.encoder.layers]
    assert training == {0: [False, False], 1: [False, True], 2: [True, True], -1: [True, True]}[blocks]
    assert clip.embeddings.class_embedding.requires_grad == (blocks == -1)
    assert not clip.post_layernorm.weight.requires_grad
    with pytest.raises(ValueError, match="vision encoder has 2 blocks"):
        model.mllm.set_trainable(VisionTraining(blocks=3))


@pytest.mark.parametrize("case", MLLM_TRAINS)
def test_without_any_image_the_vision_encoder_has_a_gradient_of_zero(
    case: str, model: KosmosG, tiny_stable_diffusion: Path
) -> None:
    """And not none, as on ranks that compute together with one that has images."""
    module, batch = stage(case, model, tiny_stable_diffusion)
    text = batch.rows([1])
    assert text.prompt.images is None
    loss = module.losses(text)["loss"]
    loss.backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and ("vision" in name or "resampler" in name):
            assert parameter.grad is not None and not parameter.grad.any(), name
    module.with_dummy_image = lambda prompt, mllm: prompt
    torch.testing.assert_close(module.losses(text)["loss"], loss)


def test_mismatched_images_change_the_loss_and_nothing_else(model: KosmosG, tiny_stable_diffusion: Path) -> None:
    for case in ("language_modelling", "instruction_tuning"):
        module, batch = stage(case, model, tiny_stable_diffusion)
        wrong = batch.prompt.roll_images()
        assert torch.equal(wrong.images, batch.prompt.images[[2, 0, 1]]) and torch.equal(wrong.ids, batch.prompt.ids)
        module._trainer = build_trainer(TrainerConfig(accelerator="cpu"), 1, logger=False)
        losses = module.eval().validation_losses(batch)
        name = next(name for name in losses if name.endswith("_mismatched_images"))
        right = losses[name.replace("_mismatched_images", "" if case == "language_modelling" else "_with_image")]
        assert losses[name][1] == right[1] and losses[name][0] != right[0]


# Stage 2.
def test_dropout_of_the_frozen_mllm_and_weights_of_the_losses(tiny_model: Path, tiny_stable_diffusion: Path) -> None:
    model = KosmosG.from_pretrained(tiny_model)  # with its dropout
    module, batch = stage("alignment", model, tiny_stable_diffusion)
    module.aligner.eval(), module.aligner_decoder.eval()
    weighted = AlignmentRecipe(mse_weight=2.0, rec_weight=0.5)
    module.recipe = weighted
    losses = module.losses(batch)
    torch.testing.assert_close(losses["loss"], 2 * losses["mse_loss"] + losses["rec_loss"] / 2)
    assert torch.equal(module.losses(batch)["loss"], losses["loss"])
    module.recipe = replace(weighted, frozen_dropout=True)
    module.train()
    assert not torch.equal(module.losses(batch)["loss"], module.losses(batch)["loss"])


@pytest.mark.parametrize("variant", ["masked", "paper"])
def test_without_padding_buckets_change_nothing_and_a_loss_is_the_mean_of_its_captions_own(
    variant: str, model: KosmosG, tiny_stable_diffusion: Path
) -> None:
    batch = AlignmentBatch(prompt=prompts(model, tuple((length, 0) for length in LENGTHS)), text_ids=text_ids())
    whole = alignment(model, tiny_stable_diffusion, variant=variant)
    divided = alignment(model, tiny_stable_diffusion, variant=variant, length_buckets=3)
    plain, ours = whole.losses(batch), divided.losses(batch)
    alone = [whole.losses(batch.rows([row])) for row in range(len(LENGTHS))]
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.stack([losses[name] for losses in alone]).mean(), value, rtol=1e-5, atol=0)
    assert_same(gradients(divided, ours["loss"]), gradients(whole, plain["loss"]))


def test_released_counts_padding_and_is_masked_but_for_a_factor_without_it(
    model: KosmosG, tiny_stable_diffusion: Path
) -> None:
    batch = AlignmentBatch(prompt=prompts(model, ((7, 0),) * len(LENGTHS)), text_ids=text_ids())
    released, masked = (
        alignment(model, tiny_stable_diffusion, variant=variant).losses(batch) for variant in ("released", "masked")
    )
    torch.testing.assert_close(masked["mse_loss"], released["mse_loss"])
    torch.testing.assert_close(masked["rec_loss"] * tiny.QUERIES / 7, released["rec_loss"])
    with pytest.raises(ConfigError, match=r"length_buckets is 2, but recipe\.variant=released"):
        load_config(["length_buckets=2"], AlignmentRecipe)


def test_prompts_with_images_are_drawn_to_the_text_of_their_captions(
    model: KosmosG, tiny_stable_diffusion: Path
) -> None:
    """Stage 2 with a training MLLM, and the same term in stage 3, where a row without a caption counts 0."""
    module, batch = stage("image_alignment", model, tiny_stable_diffusion)
    found = module.losses(batch)
    target = module.image_decoder.text_condition(batch.text_ids).states
    errors = (model.condition(batch.prompt).states - target).square().mean((1, 2))
    torch.testing.assert_close(found["loss"], errors.mean())
    assert set(found) == {"loss", "mse_loss"}
    module, batch = stage("aligned", model, tiny_stable_diffusion)
    found = module.losses(batch)
    target = module.image_decoder.text_condition(batch.text_ids.clamp(min=0)).states
    errors = (model.condition(batch.prompt).states - target).square().mean((1, 2))
    torch.testing.assert_close(found["mse_loss"], (errors[0] + errors[2]) / 3)
    torch.testing.assert_close(found["loss"], found["diffusion_loss"] + 2 * found["mse_loss"])
    with pytest.raises(ConfigError, match=r"recipe\.rec_weight is 1\.0; allowed with recipe\.trainable=all: 0"):
        load_config(["trainable=all"], AlignmentRecipe)


# Stage 3.
def test_conditions_are_the_models_and_a_dropped_one_trains_the_unconditional_prompt(
    model: KosmosG, tiny_stable_diffusion: Path
) -> None:
    module, batch = stage("instruction_tuning", model, tiny_stable_diffusion)
    condition, null = module.eval().conditions(batch.prompt)
    torch.testing.assert_close(condition.states, model.condition(batch.prompt).states, atol=1e-5, rtol=0)
    torch.testing.assert_close(null.states, model.null_condition().states, atol=1e-5, rtol=0)
    module.sample_losses(
        *module.conditions(batch.prompt), batch.targets, module.draws("train", batch), dropout=1.0
    ).mean().backward()
    embedding = module.mllm.decoder.embed_tokens.weight.grad
    assert set(embedding.abs().sum(1).nonzero().flatten().tolist()) == {module.mllm.config.bos_id}


def test_buckets_and_cached_latents_change_nothing(model: KosmosG, tiny_stable_diffusion: Path) -> None:
    whole, batch = stage("instruction_tuning", model, tiny_stable_diffusion)
    cached = replace(batch, targets=whole.image_decoder.moments(batch.targets))
    divided = instruction(model, tiny_stable_diffusion, length_buckets=3)
    draws = whole.draws("train", batch)
    assert torch.equal(draws.noise, divided.draws("train", cached).noise)
    draws.dropout[:] = torch.tensor([0.5, 0.0, 0.5])  # one sample takes the null condition, which must train too
    plain = whole.sample_losses(*whole.conditions(batch.prompt), batch.targets, draws, dropout=0.1)
    ours = divided.sample_losses(*divided.conditions(batch.prompt), cached.targets, draws, dropout=0.1)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    assert_same(gradients(divided, ours.mean()), gradients(whole, plain.mean()), share=1e-3)


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("sds", lambda alphas: 1 - alphas), ("velocity", lambda alphas: (1 / alphas).clamp(max=25))],
)
def test_timestep_weighting(weighting: str, weight, model: KosmosG, tiny_stable_diffusion: Path) -> None:
    module, batch = stage("instruction_tuning", model, tiny_stable_diffusion)
    draws = module.draws("train", batch)
    uniform = module.sample_losses(*module.conditions(batch.prompt), batch.targets, draws, 0.0)
    module.recipe = InstructionTuningRecipe(timestep_weighting=weighting)
    weighted = module.sample_losses(*module.conditions(batch.prompt), batch.targets, draws, 0.0)
    decoder = module.image_decoder
    torch.testing.assert_close(
        weighted, uniform * weight(decoder.schedule.alphas_cumprod[decoder.timesteps(draws.time)])
    )
    assert not torch.allclose(weighted, uniform)


def test_several_timesteps_of_a_sample_are_the_losses_of_each(model: KosmosG, tiny_stable_diffusion: Path) -> None:
    module, batch = stage("instruction_tuning", model, tiny_stable_diffusion)
    module.recipe = InstructionTuningRecipe(timesteps_per_sample=2)
    batch = replace(batch, indices=[10, 11, 12])
    draws = module.draws("train", batch)
    assert torch.equal(draws.noise, draw_diffusion(0, "train", range(20, 26), draws.noise.shape[1:]).noise)
    together = module.sample_losses(*module.conditions(batch.prompt), batch.targets, draws, 0.1)
    torch.testing.assert_close(module.losses(batch)["loss"], together.mean())
    for number in range(2):
        one = DiffusionDraws(*(getattr(draws, name)[number::2] for name in DiffusionDraws.__dataclass_fields__))
        torch.testing.assert_close(
            module.sample_losses(*module.conditions(batch.prompt), batch.targets, one, 0.1), together[number::2]
        )


def test_frozen_blocks_and_the_vae_leave_no_graph(model: KosmosG, tiny_stable_diffusion: Path) -> None:
    module, batch = stage("instruction_tuning", model, tiny_stable_diffusion)
    seen: list[bool] = []
    for block in module.mllm.vision.clip.encoder.layers:
        block.register_forward_pre_hook(lambda block, given: seen.append(given[0].requires_grad))
    condition, _ = module.conditions(batch.prompt)
    latents = module.image_decoder.latents(batch.targets, module.draws("train", batch).posterior)
    assert seen == [False, False] and condition.states.requires_grad and not latents.requires_grad


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    return {name: value for name, value in zip(trainable, found, strict=True) if value is not None}


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], share: float = 1e-4) -> None:
    assert ours.keys() == plain.keys() and ours
    for name, value in plain.items():
        if not name.endswith("k_proj.bias"):  # zero up to rounding
            limit = share * float(value.abs().max()) + 1e-7
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=limit, msg=name)
