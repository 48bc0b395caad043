"""Section 4.4 of the paper: ControlNet, LoRA, image-to-image, inpainting and editing prompts, by diffusers' own
pipelines. Each is compared with the pipeline that diffusers loads itself, fed the same embeddings and seed."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw

from kosmosg.pipeline import KosmosGPipeline
from tests import tiny

DOG = Image.new("RGB", (70, 80), "sienna")
SIZE = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
EDGES = Image.new("RGB", SIZE)
ImageDraw.Draw(EDGES).ellipse((10, 10, 50, 50), outline="white", width=3)
MASK = Image.new("L", SIZE)
ImageDraw.Draw(MASK).rectangle((0, 0, 31, 63), fill=255)
PROMPT = {"prompt": "<i> in the snow", "images": [DOG]}


def options(seed=0, **more):
    return {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
        **more,
    }


@pytest.fixture
def pipe(tiny_model, tiny_stable_diffusion):
    pipe = KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def theirs(tiny_stable_diffusion, pipe):
    """A pipeline as diffusers loads it, text encoder and all, with the same scheduler."""

    def load(kind, **parts):
        loaded = kind.from_pretrained(tiny_stable_diffusion, safety_checker=None, **parts)
        loaded.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return load


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def controlnet(unet, seed):
    """A ControlNet whose zero convolutions are no longer zero."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(unet, conditioning_channels=3)
    for parameter in [*network.controlnet_down_blocks.parameters(), *network.controlnet_mid_block.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (StableDiffusionPipeline, {}),
        (StableDiffusionImg2ImgPipeline, {"image": EDGES, "strength": 0.7}),
        (StableDiffusionInpaintPipeline, {"image": EDGES, "mask_image": MASK, "height": SIZE[0], "width": SIZE[1]}),
    ],
)
def test_composed_is_diffusers_own(pipe, theirs, kind, inputs):
    embeddings = pipe.embeddings(**PROMPT)
    ours = quiet(pipe.compose(kind))(**embeddings, **inputs, **options()).images
    expected = theirs(kind)(**embeddings, **inputs, **options()).images
    assert np.array_equal(ours, expected)
    text = theirs(kind)("a dog in the snow", **inputs, **options()).images
    assert not np.array_equal(ours, text)


def test_one_controlnet_and_several(pipe, theirs):
    embeddings = pipe.embeddings(**PROMPT)
    one, two = controlnet(pipe.unet, 1), controlnet(pipe.unet, 2)
    for networks, images in ((one, EDGES), ([one, two], [EDGES, EDGES.transpose(Image.Transpose.ROTATE_90)])):
        composed = quiet(pipe.compose(StableDiffusionControlNetPipeline, controlnet=networks))
        ours = composed(**embeddings, image=images, **options()).images
        expected = theirs(StableDiffusionControlNetPipeline, controlnet=networks)
        assert np.array_equal(ours, expected(**embeddings, image=images, **options()).images)
        assert not np.array_equal(ours, pipe(**PROMPT, **options()).images)


def test_a_zero_controlnet_changes_nothing(pipe):
    zero = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3).eval()  # as it is before its training
    composed = quiet(pipe.compose(StableDiffusionControlNetPipeline, controlnet=zero))
    ours = composed(**pipe.embeddings(**PROMPT), image=EDGES, **options()).images
    assert np.array_equal(ours, pipe(**PROMPT, **options()).images)


def write_lora(folder, unet, text_encoder=None):
    """A LoRA folder as diffusers' training scripts write them, with weights that do something."""
    parts = {"unet_lora_layers": unet, "text_encoder_lora_layers": text_encoder}
    layers = {}
    for name, network in parts.items():
        if network is None:
            continue
        targets = ["to_q", "to_v"] if name.startswith("unet") else ["q_proj"]
        network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
        layers[name] = get_peft_model_state_dict(network)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


@pytest.fixture
def lora(tmp_path, theirs):
    loaded = theirs(StableDiffusionPipeline)
    return write_lora(tmp_path / "unet-only", loaded.unet)


def test_lora_files(pipe, theirs, lora):
    plain = pipe(**PROMPT, **options()).images
    embeddings = pipe.embeddings(**PROMPT)
    pipe.load_lora_weights(lora, adapter_name="style")
    styled = pipe(**PROMPT, **options()).images
    expected = theirs(StableDiffusionPipeline)
    expected.load_lora_weights(lora, adapter_name="style")
    assert np.array_equal(styled, expected(**embeddings, **options()).images)
    assert not np.array_equal(styled, plain)
    composed = quiet(pipe.compose(StableDiffusionPipeline))
    assert np.array_equal(composed(**embeddings, **options()).images, styled)
    pipe.set_adapters("style", 0.0)
    assert np.array_equal(pipe(**PROMPT, **options()).images, plain)
    pipe.set_adapters("style", 1.0)
    unscaled = pipe(**PROMPT, **options(), cross_attention_kwargs={"scale": 0.0}).images
    assert np.array_equal(unscaled, plain)
    pipe.unload_lora_weights()
    assert np.array_equal(pipe(**PROMPT, **options()).images, plain)


def test_lora_files_with_metadata_and_hot_swapping(pipe, theirs, tmp_path):
    """Metadata alone tell that the strength is alpha 8 over rank 2. A second file takes the first one's place."""
    files, embeddings = [], pipe.embeddings(**PROMPT)
    for number, alpha in enumerate((8, 4)):
        torch.manual_seed(number)
        unet = theirs(StableDiffusionPipeline).unet
        unet.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_v"], init_lora_weights=False))
        layers, metadata = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
        files.append(tmp_path / str(number))
        StableDiffusionPipeline.save_lora_weights(files[-1], layers, unet_lora_adapter_metadata=metadata)
    expected = theirs(StableDiffusionPipeline)
    for number, file in enumerate(files):
        for loaded in (pipe, expected):
            loaded.load_lora_weights(file, adapter_name="style", hotswap=number > 0)
        ours = pipe(**PROMPT, **options()).images
        assert np.array_equal(ours, expected(**embeddings, **options()).images)
        strengths = {float(module.scaling["style"]) for module in pipe.unet.modules() if hasattr(module, "scaling")}
        assert strengths == {(8 / 2, 4 / 2)[number]}


def test_a_lora_file_can_be_fused(pipe, lora):
    plain = pipe(**PROMPT, **options()).images
    pipe.load_lora_weights(lora)
    styled = pipe(**PROMPT, **options()).images
    pipe.fuse_lora()
    np.testing.assert_allclose(pipe(**PROMPT, **options()).images, styled, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(pipe(**PROMPT, **options()).images, plain, atol=1e-4)


def test_lora_weights_of_the_text_model_are_left_out(pipe, theirs, tmp_path, caplog):
    loaded = theirs(StableDiffusionPipeline)
    both = write_lora(tmp_path / "both", loaded.unet, loaded.text_encoder)
    pipe.load_lora_weights(both)
    assert "LoRA weights are for text models" in caplog.text
    pipe.unload_lora_weights()
    text_only = write_lora(tmp_path / "text", None, theirs(StableDiffusionPipeline).text_encoder)
    with pytest.raises(ValueError, match="holds no LoRA weights for the unet"):
        pipe.load_lora_weights(text_only)


def test_editing_prompts(pipe):
    """An edit as stage 3 reads it: image, then instruction; another instruction or image is another condition."""
    hat, snow = (pipe.embeddings(["", DOG, text])["prompt_embeds"] for text in (" add a hat", " make it snow"))
    assert not torch.equal(hat, snow)
    steps = quiet(pipe.compose(StableDiffusionImg2ImgPipeline))
    edited = steps(prompt_embeds=hat, image=DOG.resize(SIZE), strength=0.6, **options(guidance_scale=1.0)).images
    assert edited.shape == (1, *SIZE, 3)
