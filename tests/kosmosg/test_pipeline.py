import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from kosmosg.models.stable_diffusion import StableDiffusion
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.sampling import DiffusionSampler
from tests import tiny

RED, BLUE = Image.new("RGB", (70, 80), "red"), Image.new("RGB", (64, 64), "blue")
FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(tiny_model, tiny_stable_diffusion):
    pipe = KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_every_form_of_a_prompt_means_the_same(pipe):
    expected, null = pipe.encode_prompt("a <i> in the suit of <i>", images=[RED, BLUE])
    assert torch.equal(null, pipe.null_condition.states)
    assert expected.shape == (1, tiny.QUERIES, tiny.CONDITION_WIDTH)
    segments = ["a ", RED, " in the suit of ", BLUE]
    torch.testing.assert_close(pipe.encode_prompt(segments)[0], expected)
    torch.testing.assert_close(pipe.encode_prompt([segments, "a dog"])[0][:1], expected)
    both, null = pipe.encode_prompt(["a dog", "a <i> in the suit of <i>"], images=[[], [RED, BLUE]])
    assert null.shape == both.shape
    torch.testing.assert_close(both[1:], expected)
    torch.testing.assert_close(both[:1], pipe.encode_prompt("a dog")[0])


def test_the_image_in_the_prompt_matters(pipe):
    red, blue = pipe.encode_prompt(["<i>", "<i>"], images=[[RED], [BLUE]])[0]
    assert (red - blue).abs().max() > 1e-3


def test_an_image_depends_on_its_prompt_and_seed_alone(pipe):
    batch = pipe(["a dog", "a <i>"], images=[[], [RED]], num_images_per_prompt=2, seeds=[1, 2, 3, 4], **FAST).images
    assert [image.size for image in batch] == [(tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)] * 4
    alone = pipe("a <i>", images=[RED], seeds=[4], **FAST).images
    assert abs(pixels(alone) - pixels(batch[3:])).max() <= 1  # another batch size rounds another way
    assert abs(pixels(batch[2:3]) - pixels(batch[3:])).max() > 10


@pytest.mark.parametrize("sampler", ["dpm", "ddim", "pndm"])
def test_generators_and_samplers(pipe, sampler):
    one, two = (
        pipe("a dog", sampler=sampler, generator=torch.Generator().manual_seed(5), **FAST).images for _ in range(2)
    )
    assert np.array_equal(pixels(one), pixels(two))


def test_sampling_is_diffusers_own(tiny_stable_diffusion):
    """Conditions of CLIP's text model through our sampler: bit for bit what StableDiffusionPipeline draws."""
    decoder = StableDiffusion.from_pretrained(tiny_stable_diffusion)
    condition, null = (decoder.text_condition(decoder.tokenize(texts)) for texts in (["a red fish", "a dog"], [""]))
    ours = DiffusionSampler(decoder)(condition, null, sampler="ddim", guidance_scale=3.0, seeds=[0, 1], **FAST)
    scheduler = DDIMScheduler.from_pretrained(
        tiny_stable_diffusion,
        subfolder="scheduler",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
    )
    # The same networks, not a second copy: at another place in memory a kernel may round otherwise.
    networks = {name: getattr(decoder, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = StableDiffusionPipeline(**networks, scheduler=scheduler, **nothing)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = theirs(["a red fish", "a dog"], guidance_scale=3.0, generator=generators, **FAST).images
    assert np.array_equal(pixels(ours), pixels(images))


def test_guidance_moves_away_from_the_negative_prompt(pipe):
    plain = pipe("a dog", seeds=[0], **FAST).images
    assert np.array_equal(pixels(plain), pixels(pipe("a dog", negative_prompt="", seeds=[0], **FAST).images))
    assert not np.array_equal(
        pixels(plain), pixels(pipe("a dog", negative_prompt="a red boat", seeds=[0], **FAST).images)
    )
    each = pipe(["a dog", "a dog"], negative_prompt=["", "a red boat"], seeds=[0, 0], **FAST).images
    assert abs(pixels(plain) - pixels(each[:1])).max() <= 1
    unguided = (
        pipe("a dog", negative_prompt=n, guidance_scale=1.0, seeds=[0], **FAST).images for n in ("", "a red boat")
    )
    assert np.array_equal(*map(pixels, unguided))


def test_the_null_condition_is_computed_once_and_only_while_frozen(pipe, monkeypatch):
    assert pipe.null_condition is pipe.null_condition
    torch.testing.assert_close(pipe.null_condition.states, pipe.model.null_condition().states)
    query = pipe.model.aligner.queries
    monkeypatch.setattr(query, "requires_grad", True)
    before = pipe.null_condition
    with torch.no_grad():
        query.add_(1.0)
    assert not torch.equal(before.states, pipe.null_condition.states)
    with torch.no_grad():
        query.sub_(1.0)


def test_encoding_is_without_dropout_and_leaves_the_mode_alone(pipe):
    pipe.model.mllm.train()
    modes = [module.training for module in pipe.model.modules()]
    torch.testing.assert_close(pipe.encode_prompt("a dog"), pipe.encode_prompt("a dog"), rtol=0, atol=0)
    assert [module.training for module in pipe.model.modules()] == modes and any(modes) and not all(modes)
    pipe.model.eval()


@pytest.mark.parametrize(
    ("prompts", "options", "told"),
    [
        ("<i> and <i>", {"images": [RED]}, "2 placeholders <i> but 1 images"),
        (["a dog", "<i>"], {"images": [[], []]}, "prompt 1.*1 placeholders <i> but 0 images"),
        (["a <i>", "b <i>"], {"images": [RED, BLUE]}, "a list of 2 lists"),
        (["a ", RED], {"images": [RED]}, "which contains its images"),
        ("  ", {}, "prompt 0 is empty"),
        ([], {}, "no prompts"),
        ("a dog", {"sampler": "euler"}, "sampler='euler' is not allowed; allowed: dpm, ddim, pndm, or"),
        ("a dog", {"seeds": [1], "num_images_per_prompt": 2}, "1 seeds were given for 2 images"),
        ("a dog", {"seeds": [1], "generator": torch.Generator()}, "choose one source of noise"),
        ("a dog", {"num_inference_steps": 0}, "num_inference_steps=0"),
        (["a dog", "a cat"], {"negative_prompt": ["x"]}, "got 1 negative prompts for 2 prompts"),
    ],
)
def test_errors(pipe, prompts, options, told):
    with pytest.raises(ValueError, match=told):
        pipe(prompts, **{**FAST, **options})


def test_parts_that_do_not_fit(tiny_stable_diffusion, tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="image_decoder="):
        KosmosGPipeline.from_pretrained(tiny_model)
    pipe = KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion)
    parts = {name: part for name, part in pipe.components.items()}
    parts["unet"].register_to_config(cross_attention_dim=768)
    with pytest.raises(ValueError, match="32 wide but the image decoder reads 768"):
        KosmosGPipeline(**parts)
    parts["mllm"].register_to_config(vocab_size=7)
    with pytest.raises(ValueError, match="MLLM has a vocabulary of 7"):
        KosmosGPipeline(**parts)
