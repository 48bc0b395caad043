"""The pipeline's prompts, seeds and settings, and its folders; over every image decoder: test_pipeline_families.py."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from kosmosg.config import load_config
from kosmosg.models.build import build_aligner, build_mllm
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.stable_diffusion import StableDiffusion
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.sampling import DiffusionSampler
from kosmosg.tokenizer import Tokenizer
from tests import tiny
from train import STAGES

RED, BLUE = Image.new("RGB", (70, 80), "red"), Image.new("RGB", (64, 64), "blue")
FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(tiny_model, tiny_stable_diffusion):
    return quiet(KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion))


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    """A copy of the pipeline's folder, to be changed."""
    return shutil.copytree(tiny_pipeline, tmp_path / "pipe")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **options):
    call = {"images": [RED], "num_inference_steps": 2, "seeds": [3], "output_type": "np"}
    return quiet(pipe)("a <i>", **{**call, **options}).images


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


def test_the_image_in_the_prompt_matters_and_so_does_an_edits_instruction(pipe):
    red, blue = pipe.encode_prompt(["<i>", "<i>"], images=[[RED], [BLUE]])[0]
    assert (red - blue).abs().max() > 1e-3
    hat, snow = (pipe.embeddings(["", RED, text])["prompt_embeds"] for text in (" add a hat", " make it snow"))
    assert not torch.equal(hat, snow)


def test_an_image_depends_on_its_prompt_and_seed_alone(pipe):
    batch = pipe(["a dog", "a <i>"], images=[[], [RED]], num_images_per_prompt=2, seeds=[1, 2, 3, 4], **FAST).images
    assert [image.size for image in batch] == [(tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)] * 4
    alone = pipe("a <i>", images=[RED], seeds=[4], **FAST).images
    assert abs(pixels(alone) - pixels(batch[3:])).max() <= 1  # another batch size rounds another way
    assert abs(pixels(batch[2:3]) - pixels(batch[3:])).max() > 10


def test_generators_and_samplers(pipe):
    images = {}
    for sampler in ("dpm", "ddim", "pndm", "EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        one, two = (drawn(pipe, sampler=sampler, seeds=None, generator=torch.Generator().manual_seed(5)) for _ in "12")
        assert np.array_equal(one, two)
        images[sampler] = one.tobytes()
    assert len(set(images.values())) == 5
    own = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    assert (
        drawn(pipe, seeds=None, generator=torch.Generator().manual_seed(5)).tobytes()
        == images["EulerDiscreteScheduler"]
    )
    pipe.scheduler = own


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


def test_the_null_condition_is_computed_once_for_frozen_weights(tiny_model, tiny_stable_diffusion):
    pipe = KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion)
    before, query = pipe.null_condition, pipe.aligner.queries
    assert pipe.null_condition is before
    torch.testing.assert_close(before.states, pipe.model.null_condition().states)
    for trains in (False, True):
        query.requires_grad_(trains)
        before = pipe.null_condition.states
        with torch.no_grad():
            query.add_(1.0)
        assert not torch.equal(before, pipe.null_condition.states)
    assert pipe.to(torch.bfloat16).null_condition.states.dtype == torch.bfloat16


def test_encoding_is_without_dropout_and_leaves_the_mode_alone(pipe):
    pipe.model.mllm.train()
    modes = [module.training for module in pipe.model.modules()]
    torch.testing.assert_close(pipe.encode_prompt("a dog"), pipe.encode_prompt("a dog"), rtol=0, atol=0)
    assert [module.training for module in pipe.model.modules()] == modes and any(modes) and not all(modes)
    pipe.model.eval()


EMBEDDINGS = {"prompt_embeds": torch.zeros(1, tiny.QUERIES, tiny.CONDITION_WIDTH)}
ERRORS = [
    ("<i> and <i>", {"images": [RED]}, "2 placeholders <i> but 1 images"),
    (["a dog", "<i>"], {"images": [[], []]}, "prompt 1.*1 placeholders <i> but 0 images"),
    (["a <i>", "b <i>"], {"images": [RED, BLUE]}, "a list of 2 lists"),
    (["a ", RED], {"images": [RED]}, "prompt 0 is a list of segments"),
    ("  ", {}, "prompt 0 is empty"),
    ([], {}, "no prompts"),
    ("dog " * 3000, {}, "at most 254 are allowed"),
    ("a <i>", {"images": [Image.new("F", (8, 8))]}, "mode 'F' has no fixed range"),
    ("a <i>", {"images": [Image.new("RGB", (1, 101))]}, "1×101 pixels is not allowed"),
    ("a dog", {"sampler": "euler"}, "sampler='euler' is not allowed; allowed: dpm, ddim, pndm, or"),
    ("a dog", {"seeds": [1], "num_images_per_prompt": 2}, "1 seeds were given for 2 images"),
    ("a dog", {"seeds": [1], "generator": torch.Generator()}, "choose one source of noise"),
    ("a dog", {"num_inference_steps": 0}, "num_inference_steps=0"),
    (["a dog", "a cat"], {"negative_prompt": ["x"]}, "got 1 negative prompts for 2 prompts"),
    ("a dog", EMBEDDINGS, "either prompt= or prompt_embeds="),
    (None, {**EMBEDDINGS, "images": [RED]}, "belong to prompt="),
]


def test_errors(pipe):
    for prompts, options, told in ERRORS:
        with pytest.raises(ValueError, match=told):
            pipe(prompts, **{**FAST, **options})


def test_embeddings_in_place_of_prompts(pipe):
    condition, negative = pipe.encode_prompt("a <i>", [RED], "blurry")
    options = {"num_inference_steps": 2, "seeds": [3], "output_type": "np", "prompt_embeds": condition}
    guided = pipe(negative_prompt_embeds=negative, **options).images
    assert np.array_equal(guided, drawn(pipe, negative_prompt="blurry"))
    assert np.array_equal(pipe(**options).images, drawn(pipe))
    assert np.array_equal(pipe(**options, return_dict=False)[0], drawn(pipe))


def test_sizes_slicing_and_output_types(pipe):
    image = pipe("a dog", num_inference_steps=1, height=2 * tiny.IMAGE_SIZE, width=tiny.IMAGE_SIZE).images[0]
    assert image.size == (tiny.IMAGE_SIZE, 2 * tiny.IMAGE_SIZE)
    assert pipe("a dog", num_inference_steps=1, output_type="latent").images.shape[-2:] == (tiny.LATENT_SIZE,) * 2
    whole = drawn(pipe, num_images_per_prompt=2, seeds=[3, 4])
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    np.testing.assert_allclose(drawn(pipe, num_images_per_prompt=2, seeds=[3, 4]), whole, atol=1e-4)
    pipe.disable_attention_slicing()
    pipe.vae.disable_slicing()


def test_schedulers_are_not_shared_between_pipelines(pipe):
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.compose(StableDiffusionImg2ImgPipeline, scheduler=euler).scheduler is euler
    assert pipe.compose(StableDiffusionImg2ImgPipeline).scheduler is not pipe.scheduler


def test_parts_that_do_not_fit(tiny_stable_diffusion, tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="image_decoder="):
        KosmosGPipeline.from_pretrained(tiny_model)
    pipe = KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion)
    parts = {name: part for name, part in pipe.components.items()}
    parts["unet"].register_to_config(cross_attention_dim=768)
    with pytest.raises(ValueError, match="32 wide but the image decoder reads 768"):
        KosmosGPipeline(**parts)
    parts["mllm"].register_to_config(vocab_size=7)
    with pytest.raises(ValueError, match=r"vocabulary.* 7"):
        KosmosGPipeline(**parts)


# Folders.
def edit_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_code_in_a_folder_is_not_run(pipe, folder):
    (folder / "pipeline.py").write_text("raise RuntimeError('it ran')")
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained(folder)), drawn(pipe))


def test_a_hub_id_is_downloaded_without_pickles(pipe, tiny_pipeline, monkeypatch):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tiny_pipeline)

    monkeypatch.setattr("kosmosg.pipeline.snapshot_download", download)
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained("someone/model", revision="v1")), drawn(pipe))
    assert asked["repo_id"] == "someone/model" and asked["revision"] == "v1" and "*.bin" in asked["ignore_patterns"]


def test_pushing_to_the_hub_uploads_the_folder(pipe, monkeypatch):
    uploaded = {}

    def upload(self, folder, repo_id, **_):
        uploaded[repo_id] = {path.name for path in Path(folder).iterdir()}

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: ModelCard("card"))
    monkeypatch.setattr(KosmosGPipeline, "_upload_folder", upload)
    pipe.push_to_hub("someone/model")
    parts = {name for name, part in pipe.components.items() if part is not None}
    assert uploaded["someone/model"] >= {*parts, "model_index.json"}


def test_another_stable_diffusion_takes_the_place_of_the_folders(pipe, folder, tiny_stable_diffusion):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert not np.array_equal(drawn(KosmosGPipeline.from_pretrained(folder)), drawn(pipe))
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained(folder, tiny_stable_diffusion)), drawn(pipe))


def test_the_miniature_as_a_folder(tmp_path):
    """Toyland's model with its shipped tokenizer, CLIP, U-Net and VAE: the same bits after saving and loading."""
    sizes = load_config(["configs/toyland/instruction_tuning.yaml"], STAGES["instruction_tuning"]).model
    tokenizer = Tokenizer.from_pretrained(sizes.tokenizer)
    KosmosG(build_mllm(sizes, tokenizer), build_aligner(sizes)).save_pretrained(tmp_path / "run", tokenizer)
    pipe = KosmosGPipeline.from_pretrained(tmp_path / "run", sizes.image_decoder)
    pipe.save_pretrained(tmp_path / "pipe")
    again = KosmosGPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(drawn(again), drawn(pipe)) and drawn(pipe).std() > 0.01


def test_folders_that_are_refused(folder, tiny_stable_diffusion):
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline"):
        KosmosGPipeline.from_pretrained(tiny_stable_diffusion)
    edit_json(folder / "aligner" / "config.json", decoder_layers=3)
    with pytest.raises(ValueError, match=r"aligner' is not a AlignerEncoder.*missing_keys"):
        KosmosGPipeline.from_pretrained(folder)
    edit_json(folder / "aligner" / "config.json", decoder_layers=2)
    edit_json(folder / "model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"])
    if hasattr(diffusers.DPMSolverSDEScheduler, "_backends"):  # its package is not installed
        with pytest.raises(ValueError, match="torchsde"):
            KosmosGPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused(part, folder, tiny_stable_diffusion, tmp_path):
    """In a Stable Diffusion folder, and in a pipeline folder."""
    decoder = shutil.copytree(tiny_stable_diffusion, tmp_path / "decoder")
    for place in filter(Path.is_dir, (decoder / part, folder / part)):
        (file,) = place.glob("*.safetensors")
        weights = load_file(file)
        weights[sorted(weights)[0]].view(-1)[0] = torch.nan
        save_file(weights, file, metadata={"format": "pt"})
    told = f"{part}' has 1 weights with NaN or infinite values"
    with pytest.raises(ValueError, match=told):
        StableDiffusion.from_pretrained(decoder)
    if part != "text_encoder":
        with pytest.raises(ValueError, match=told):
            KosmosGPipeline.from_pretrained(folder)
