"""What each stage trains and freezes, and that the loss reaches all of the former and nothing else."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kosmosg.models.text_target import TextTarget
from lightning_modules.runs.trained_weights import CheckpointMismatchError, VisionTraining, check_trained, train_mllm
from torch import Tensor, nn

from kosmosg.losses import IGNORED_LABEL
from kosmosg.models.aligner import AlignerDecoder, LinearAligner
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.prompt import PromptBatch
from lightning_modules.alignment import AlignmentModule, AlignmentRecipe
from lightning_modules.instruction_tuning import InstructionTuningModule, InstructionTuningRecipe, with_null_row
from lightning_modules.language_modelling import LanguageModellingModule, LanguageModellingRecipe, wrong_images
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.randomness import DiffusionDraws
from tests import tiny

IMAGE_ID = 7  # any id; the slots' embeddings are replaced


@dataclass
class Batch:
    prompt: PromptBatch
    labels: Tensor | None = None
    clip_ids: Tensor | None = None
    targets: Tensor | None = None
    moments: Tensor | None = None


@pytest.fixture
def model(tiny_model: Path) -> KosmosG:
    return KosmosG.from_pretrained(tiny_model)


@pytest.fixture
def prompt(model: KosmosG) -> PromptBatch:
    """Two prompts: text and an image; text alone, shorter."""
    slots = model.mllm.config.image_tokens
    ids = torch.randint(8, 20, (2, 6 + slots))
    ids[:, 0] = model.mllm.config.bos_id
    image_mask = torch.zeros_like(ids, dtype=torch.bool)
    image_mask[0, 3 : 3 + slots] = True
    ids[image_mask] = IMAGE_ID
    padding = torch.zeros_like(image_mask)
    padding[1, 5:] = True
    ids[padding] = model.mllm.config.pad_id
    return PromptBatch(ids, image_mask, torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), padding)


@pytest.fixture
def language_modelling(model: KosmosG) -> LanguageModellingModule:
    return LanguageModellingModule(model.mllm, LanguageModellingRecipe(), OptimizerConfig(), seed=0)


@pytest.fixture
def alignment(model: KosmosG, tiny_stable_diffusion: Path) -> AlignmentModule:
    decoder = AlignerDecoder(output_width=tiny.WIDTH, **tiny.aligner_sizes())
    target = TextTarget.from_pretrained(tiny_stable_diffusion)
    return AlignmentModule(model.mllm, model.aligner, decoder, target, AlignmentRecipe(), OptimizerConfig(), seed=0)


@pytest.fixture
def instruction_tuning(model: KosmosG, tiny_stable_diffusion: Path) -> InstructionTuningModule:
    decoder = ImageDecoder.from_pretrained(tiny_stable_diffusion)
    return InstructionTuningModule(
        model.mllm, model.aligner, decoder, InstructionTuningRecipe(), OptimizerConfig(), seed=0
    )


def language_loss(module: LanguageModellingModule, prompt: PromptBatch) -> Tensor:
    labels = prompt.ids.roll(-1, 1).masked_fill(prompt.padding | prompt.image_mask, IGNORED_LABEL)
    return module.loss(prompt, labels)


def alignment_loss(module: AlignmentModule, prompt: PromptBatch) -> Tensor:
    clip_ids = module.text_target.tokenize(["a fish", "a dog"])
    return module.losses(Batch(prompt, clip_ids=clip_ids))["loss"]


def instruction_loss(module: InstructionTuningModule, prompt: PromptBatch, drop: float = 0.0) -> Tensor:
    targets = torch.rand(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) * 2 - 1
    draws = module._draws("train", range(2), targets)
    return module.sample_losses(prompt, targets, draws, drop).mean()


STAGES = {
    "language_modelling": language_loss,
    "alignment": alignment_loss,
    "instruction_tuning": instruction_loss,
}
TRAINED = {
    "language_modelling": ("mllm.decoder.", "mllm.resampler.", *(last := (".layers.1.", ".post_layernorm."))),
    "alignment": ("aligner.", "aligner_decoder."),
    "instruction_tuning": ("mllm.decoder.", "mllm.resampler.", "aligner.", *last),
}


def should_train(stage: str, name: str) -> bool:
    if name.startswith("mllm.vision."):
        return any(part in name for part in TRAINED[stage] if part.startswith("."))
    return name.startswith(tuple(part for part in TRAINED[stage] if not part.startswith(".")))


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_reaches_what_trains_and_nothing_else(
    stage: str, prompt: PromptBatch, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(stage).train()
    STAGES[stage](module, prompt).backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in module.named_parameters() if should_train(stage, name)}
    for name, parameter in module.named_parameters():
        if name not in trained:
            assert parameter.grad is None, f"{name} is frozen but has a gradient"
        else:
            assert parameter.grad is not None, f"{name} trains but has no gradient"
            # Softmax is blind to a shift of all scores: gradients of key biases are zero up to rounding.
            assert name.endswith("k_proj.bias") or parameter.grad.abs().max() > 0, f"{name} has a zero gradient"


@pytest.mark.parametrize("stage", STAGES)
def test_update_leaves_frozen_weights_bit_identical(
    stage: str, prompt: PromptBatch, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(stage).train()
    module._trainer = SimpleNamespace(max_steps=4, strategy=None, world_size=1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        optimizer.zero_grad()
        STAGES[stage](module, prompt).backward()
        optimizer.step()
    for name, value in module.state_dict().items():
        if should_train(stage, name):
            zero_gradient = name.endswith("k_proj.bias") and not before[name].any()
            assert zero_gradient or not torch.equal(value, before[name]), f"{name} did not move"
        else:
            assert torch.equal(value, before[name]), f"{name} is frozen but moved"


@pytest.mark.parametrize("kind", ["alignernet", "linear"])
def test_aligner_alone_trains_through_the_unet(
    model: KosmosG, tiny_stable_diffusion: Path, prompt: PromptBatch, kind: str
) -> None:
    sizes = {"input_width": tiny.WIDTH, "width": tiny.CONDITION_WIDTH, "num_queries": tiny.QUERIES}
    aligner = model.aligner if kind == "alignernet" else LinearAligner(**sizes)
    decoder, recipe = ImageDecoder.from_pretrained(tiny_stable_diffusion), InstructionTuningRecipe(trains="aligner")
    module = InstructionTuningModule(model.mllm, aligner, decoder, recipe, OptimizerConfig(), seed=0).train()
    assert aligner.training and not any(part.training for part in model.mllm.modules())
    instruction_loss(module, prompt).backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == name.startswith("aligner."), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        zero = name.endswith("k_proj.bias") or not parameter.requires_grad
        assert zero or parameter.grad.abs().max() > 0, f"{name} has a zero gradient"


def test_frozen_networks_stay_in_eval_mode(
    alignment: AlignmentModule, instruction_tuning: InstructionTuningModule
) -> None:
    alignment.train()
    assert alignment.aligner.training
    assert not any(module.training for module in alignment.mllm.modules())
    instruction_tuning.train()
    assert instruction_tuning.mllm.decoder.training
    assert not any(module.training for module in instruction_tuning.image_decoder.modules())


def test_dropout_of_the_frozen_mllm_is_a_choice(alignment: AlignmentModule, prompt: PromptBatch) -> None:
    alignment.train()
    assert torch.equal(alignment_loss(alignment, prompt), alignment_loss(alignment, prompt))
    alignment.recipe = replace(alignment.recipe, frozen_dropout=True)
    alignment.train()
    assert not torch.equal(alignment_loss(alignment, prompt), alignment_loss(alignment, prompt))


def test_weights_of_the_alignment_losses(alignment: AlignmentModule, prompt: PromptBatch) -> None:
    alignment.eval()
    batch = Batch(prompt, clip_ids=alignment.text_target.tokenize(["a fish", "a dog"]))
    alignment.recipe = AlignmentRecipe(mse_weight=2.0, rec_weight=0.5)
    losses = alignment.losses(batch)
    assert torch.allclose(losses["loss"], 2 * losses["mse_loss"] + losses["rec_loss"] / 2)


def test_null_row_gives_the_null_condition(model: KosmosG, prompt: PromptBatch) -> None:
    model.eval()
    batch = with_null_row(prompt, model.mllm.config.bos_id, model.mllm.config.pad_id)
    conditions = model.condition(batch)
    assert torch.allclose(conditions[:-1], model.condition(prompt), atol=1e-5)
    assert torch.allclose(conditions[-1:], model.null_condition(), atol=1e-5)


def test_dropped_condition_carries_gradients_of_the_null_condition(
    instruction_tuning: InstructionTuningModule, prompt: PromptBatch
) -> None:
    instruction_tuning.eval()
    instruction_loss(instruction_tuning, prompt, drop=1.0).backward()
    embedding = instruction_tuning.mllm.decoder.embed_tokens.weight.grad
    assert set(embedding.abs().sum(1).nonzero().flatten().tolist()) == {instruction_tuning.mllm.config.bos_id}


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("sds", lambda alphas: 1 - alphas), ("velocity", lambda alphas: (1 / alphas).clamp(max=25))],
)
def test_timestep_weighting(
    instruction_tuning: InstructionTuningModule, prompt: PromptBatch, weighting: str, weight
) -> None:
    instruction_tuning.eval()
    targets = torch.rand(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    draws = instruction_tuning._draws("train", range(2), targets)
    uniform = instruction_tuning.sample_losses(prompt, targets, draws, 0.0)
    instruction_tuning.recipe = InstructionTuningRecipe(timestep_weighting=weighting)
    weighted = instruction_tuning.sample_losses(prompt, targets, draws, 0.0)
    alphas = instruction_tuning.image_decoder.scheduler.alphas_cumprod[draws.timesteps]
    assert not torch.allclose(weighted, uniform)
    assert torch.allclose(weighted, uniform * weight(alphas))


def test_several_draws_of_a_sample_are_the_losses_of_each(
    instruction_tuning: InstructionTuningModule, prompt: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction_tuning.eval()
    targets = torch.rand(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    draws = instruction_tuning._draws("train", range(6), targets)
    draws.uniform[:] = torch.tensor([0.05, 0.5, 0.5, 0.5, 0.05, 0.5])
    together = instruction_tuning.sample_losses(prompt, targets, draws, 0.1)
    for number in range(3):
        rows = [number, 3 + number]
        one = DiffusionDraws(*(getattr(draws, field.name)[rows] for field in fields(draws)))
        torch.testing.assert_close(instruction_tuning.sample_losses(prompt, targets, one, 0.1), together[rows])
    instruction_tuning.recipe = InstructionTuningRecipe(draws_per_sample=3)
    drawn = []
    monkeypatch.setattr(instruction_tuning, "train_numbers", lambda rows: range(10, 10 + rows))
    monkeypatch.setattr(instruction_tuning, "log_losses", lambda *_: None)
    monkeypatch.setattr(instruction_tuning, "_draws", lambda _, numbers, __: drawn.append(numbers) or draws)
    loss = instruction_tuning.training_step(SimpleNamespace(prompt=prompt, targets=targets, moments=None), 0)
    assert drawn == [range(30, 36)]
    torch.testing.assert_close(loss, together.mean())


def test_wrong_images_change_the_loss_and_nothing_else(
    language_modelling: LanguageModellingModule, prompt: PromptBatch
) -> None:
    prompt = replace(prompt, images=torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
    wrong = wrong_images(prompt)
    assert torch.equal(wrong.images, prompt.images.flip(0))
    assert torch.equal(wrong.ids, prompt.ids)


@pytest.mark.parametrize("blocks", [0, 1, 2, -1])
def test_end_of_the_image_tower_that_trains(model: KosmosG, blocks: int) -> None:
    train_mllm(model.mllm, VisionTraining(blocks=blocks, final_norm=False))
    layers = model.mllm.vision.clip.encoder.layers
    training = [all(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    assert training == {0: [False, False], 1: [False, True], 2: [True, True], -1: [True, True]}[blocks]
    assert model.mllm.vision.clip.embeddings.class_embedding.requires_grad == (blocks == -1)
    assert not model.mllm.vision.clip.post_layernorm.weight.requires_grad
    with pytest.raises(ValueError, match="tower has 2 blocks"):
        train_mllm(model.mllm, VisionTraining(blocks=3))


def test_absent_and_left_over_tensors_are_named() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).requires_grad_(False))
    state = {name: value.shape for name, value in module.state_dict().items() if name.startswith("0.")}
    check_trained(module, state, "it")
    with pytest.raises(CheckpointMismatchError, match=r"1\.bias is not trained here"):
        check_trained(module, {name: value.shape for name, value in module.state_dict().items()}, "it")
    with pytest.raises(CheckpointMismatchError, match=r"0\.bias is absent"):
        check_trained(module, {"0.weight": state["0.weight"]}, "it")
