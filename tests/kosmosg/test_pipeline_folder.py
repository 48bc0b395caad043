"""The pipeline as diffusers' users know it: folders, precision, offload, schedulers, callbacks, the hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import dynamic_modules_utils, hub_utils
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from kosmosg.config import load_config
from kosmosg.models.build import build_aligner, build_mllm
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.stable_diffusion import StableDiffusion
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.tokenizer import Tokenizer
from tests import tiny
from train import STAGES

RED = Image.new("RGB", (70, 80), "red")
CALL = {"images": [RED], "num_inference_steps": 2, "seeds": [3], "output_type": "np"}


@pytest.fixture
def pipe(tiny_model, tiny_stable_diffusion):
    pipe = KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a <i>", **{**CALL, **options}).images


def test_saved_and_loaded_it_draws_the_same_bits(pipe, tmp_path):
    expected = drawn(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    parts = {path.name for path in (tmp_path / "pipe").iterdir()}
    assert parts == {"model_index.json", "pipeline.py", "mllm", "aligner", "tokenizer", "unet", "vae", "scheduler"}
    again = KosmosGPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(drawn(again), expected)
    assert isinstance(again.tokenizer, Tokenizer) and isinstance(again.scheduler, DPMSolverMultistepScheduler)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    again.save_pretrained(tmp_path / "twice")
    once, twice = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("pipe", "twice"))
    assert once.pop("_name_or_path", None) != "" and twice.pop("_name_or_path", None) != ""
    assert once == twice and once["mllm"] == ["kosmosg.models.mllm", "MLLM"]


def test_diffusers_finds_the_class_where_the_folders_code_is_trusted(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    found = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    assert type(found) is KosmosGPipeline and np.array_equal(drawn(found), drawn(pipe))


def test_code_in_a_folder_is_not_run(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('it ran')")
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained(tmp_path)), drawn(pipe))


def test_a_hub_id_is_downloaded_without_pickles(pipe, tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    pipe.save_pretrained(tmp_path)
    monkeypatch.setattr("kosmosg.pipeline.snapshot_download", download)
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained("someone/model", revision="v1")), drawn(pipe))
    assert asked["repo_id"] == "someone/model" and asked["revision"] == "v1" and "*.bin" in asked["ignore_patterns"]


ENCODING, DRAWING = ("mllm", "aligner", "tokenizer"), ("unet", "vae", "scheduler")


@pytest.mark.parametrize("absent", [ENCODING, DRAWING, ("vae",)], ids="-".join)
def test_a_pipeline_without_some_parts(pipe, tmp_path, absent):
    """What the other parts can do works, before and after saving; what is missing is named."""
    condition, negative = pipe.encode_prompt("a <i>", [RED])
    options = {"num_inference_steps": 2, "seeds": [3], "output_type": "latent"}
    embeddings = {"prompt_embeds": condition, "negative_prompt_embeds": negative}
    latents = pipe(**embeddings, **options).images
    partial = KosmosGPipeline(**{**pipe.components, **dict.fromkeys(absent)})
    partial.save_pretrained(tmp_path)
    for part in (partial, KosmosGPipeline.from_pretrained(tmp_path)):
        part.set_progress_bar_config(disable=True)
        if "mllm" not in absent:
            torch.testing.assert_close(part.encode_prompt("a <i>", [RED])[0], condition)
        if "unet" not in absent:
            torch.testing.assert_close(part(**embeddings, **options).images, latents)
        with pytest.raises(ValueError, match="which this call needs") as told:
            part("a <i>", [RED], num_inference_steps=2)
        assert all(name in str(told.value) for name in absent)
        with pytest.raises(ValueError, match="which this call needs"):
            part.embeddings("a <i>", images=[RED]) if "vae" not in absent else part.compose(lambda **parts: parts)


def test_a_folder_of_another_pipeline_is_refused(tiny_stable_diffusion):
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline, which is not a KosmosGPipeline"):
        KosmosGPipeline.from_pretrained(tiny_stable_diffusion)


def test_a_scheduler_whose_package_is_missing_names_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverSDEScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    if not hasattr(diffusers.DPMSolverSDEScheduler, "_backends"):
        pytest.skip("the package is installed")
    with pytest.raises(ValueError, match="torchsde"):
        KosmosGPipeline.from_pretrained(tmp_path)


def test_another_stable_diffusion_takes_the_place_of_the_folders(pipe, tmp_path, tiny_stable_diffusion):
    pipe.unet.conv_out.bias.data.add_(1.0)
    pipe.save_pretrained(tmp_path)
    assert not np.array_equal(drawn(KosmosGPipeline.from_pretrained(tmp_path, tiny_stable_diffusion)), drawn(pipe))


def test_a_run_folder_knows_its_stable_diffusion(tiny_model, tiny_stable_diffusion, pipe, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    config = {"stage": "instruction_tuning", "model": {"image_decoder": str(tiny_stable_diffusion)}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained(tmp_path)), drawn(pipe))


def test_the_miniature_as_a_folder(tmp_path):
    """Toyland's model with its shipped tokenizer, CLIP, U-Net and VAE: the same bits after saving and loading."""
    sizes = load_config(["configs/toyland/instruction_tuning.yaml"], STAGES["instruction_tuning"]).model
    tokenizer = Tokenizer.from_pretrained(sizes.tokenizer)
    model = KosmosG(build_mllm(sizes, tokenizer), build_aligner(sizes))
    model.save_pretrained(tmp_path / "run", tokenizer)
    pipe = KosmosGPipeline.from_pretrained(tmp_path / "run", sizes.image_decoder)
    pipe.save_pretrained(tmp_path / "pipe")
    again = KosmosGPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(drawn(again), drawn(pipe)) and drawn(pipe).std() > 0.01


def test_damaged_weights_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    config = tmp_path / "aligner" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "decoder_layers": 3}))
    with pytest.raises(ValueError, match=r"aligner' is not a AlignerEncoder.*missing_keys"):
        KosmosGPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused(pipe, part, tiny_stable_diffusion, tmp_path):
    """In a Stable Diffusion folder, and in a pipeline folder."""
    decoder = shutil.copytree(tiny_stable_diffusion, tmp_path / "decoder")
    pipe.save_pretrained(tmp_path / "pipe")
    for folder in filter(Path.is_dir, (decoder / part, tmp_path / "pipe" / part)):
        (file,) = folder.glob("*.safetensors")
        weights = load_file(file)
        name = sorted(weights)[0]
        weights[name].view(-1)[0] = torch.nan
        save_file(weights, file, metadata={"format": "pt"})
    told = f"{part}' has 1 weights with NaN or infinite values"
    with pytest.raises(ValueError, match=told):
        StableDiffusion.from_pretrained(decoder)
    if part != "text_encoder":
        with pytest.raises(ValueError, match=told):
            KosmosGPipeline.from_pretrained(tmp_path / "pipe")


def test_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = KosmosGPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for part in (half.model, half.unet, half.vae) for parameter in part.parameters()} == {
        torch.bfloat16
    }
    assert np.abs(drawn(half) - drawn(pipe)).mean() < 0.1


def test_a_moved_or_changed_model_has_another_null_condition(pipe):
    before = pipe.null_condition
    assert pipe.null_condition is before
    with torch.no_grad():
        pipe.aligner.queries.add_(1.0)
    assert not torch.equal(pipe.null_condition.states, before.states)
    assert pipe.to(torch.bfloat16).null_condition.states.dtype == torch.bfloat16


@pytest.mark.parametrize("sampler", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_any_scheduler_of_diffusers(pipe, sampler):
    named = drawn(pipe, sampler=sampler)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler) and not np.array_equal(named, drawn(pipe))
    pipe.scheduler = getattr(diffusers, sampler).from_config(pipe.scheduler.config)
    assert np.array_equal(named, drawn(pipe))


def test_callback_interrupts_and_sees_latents(pipe):
    seen = []

    def look(inner, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        inner._interrupt = step == 0
        return tensors

    drawn(pipe, num_inference_steps=3, callback_on_step_end=look)
    assert seen == [(0, (1, 4, tiny.LATENT_SIZE, tiny.LATENT_SIZE))]


def test_callbacks_see_the_pipeline_that_was_called(pipe):
    """As the library's own callback tests: names in `_callback_tensor_inputs`, and what a callback may read and set."""
    seen = []

    def look(called, step, timestep, tensors):
        assert called is pipe and tensors.keys() == {*pipe._callback_tensor_inputs}
        seen.append((called.guidance_scale, called.num_timesteps, called.do_classifier_free_guidance))
        called._guidance_scale = called.guidance_scale + 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = pipe._callback_tensor_inputs
    options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names, "output_type": "latent"}
    latents = drawn(pipe, num_inference_steps=3, guidance_scale=4.0, **options)
    assert seen == [(4.0, 3, True), (5.0, 3, True), (6.0, 3, True)] and not latents.any()


def test_diffusers_own_callback_cuts_guidance_off(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda unet, arguments: rows.append(len(arguments[0])))
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    images = drawn(pipe, num_inference_steps=4, callback_on_step_end=cutoff)
    assert rows == [2, 2, 2, 1] and pipe.guidance_scale == 0
    assert not np.array_equal(images, drawn(pipe, num_inference_steps=4))


def test_embeddings_in_place_of_prompts(pipe):
    condition, negative = pipe.encode_prompt("a <i>", [RED], "blurry")
    expected = drawn(pipe, negative_prompt="blurry")
    options = {**CALL, "images": None, "prompt_embeds": condition}
    assert np.array_equal(pipe(negative_prompt_embeds=negative, **options).images, expected)
    assert np.array_equal(pipe(**options).images, drawn(pipe))
    assert np.array_equal(pipe(**options, return_dict=False)[0], drawn(pipe))
    with pytest.raises(ValueError, match="either prompt= or prompt_embeds="):
        pipe("a dog", **options)
    with pytest.raises(ValueError, match="belong to prompt="):
        pipe(**{**options, "images": [RED]})


def test_sizes_slicing_and_output_types(pipe):
    pixels = tiny.IMAGE_SIZE * 2
    image = pipe("a dog", num_inference_steps=1, height=pixels, width=tiny.IMAGE_SIZE).images[0]
    assert image.size == (tiny.IMAGE_SIZE, pixels)
    assert pipe("a dog", num_inference_steps=1, output_type="latent").images.shape[-2:] == (tiny.LATENT_SIZE,) * 2
    whole = drawn(pipe, num_images_per_prompt=2, seeds=[3, 4])
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    np.testing.assert_allclose(drawn(pipe, num_images_per_prompt=2, seeds=[3, 4]), whole, atol=1e-4)


def test_parts_may_lie_elsewhere_than_they_compute(pipe):
    """accelerate's hooks in the order of `model_cpu_offload_seq`, as enable_model_cpu_offload sets them."""
    expected, hook, order = drawn(pipe), None, []
    assert pipe.model_cpu_offload_seq == "mllm->aligner->unet->transformer->vae"
    for name in ("mllm", "aligner", "unet"):
        _, hook = cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
        inner = hook.hook.pre_forward
        hook.hook.pre_forward = lambda *a, name=name, inner=inner, **k: (order.append(name), inner(*a, **k))[1]
    assert str(pipe._execution_device) == "cpu"
    assert np.array_equal(drawn(pipe), expected)
    assert order == ["mllm", "aligner", "unet", "unet"]  # the null condition is known already


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


@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ("a <i>", {"images": [Image.new("F", (8, 8))]}, "mode 'F' has no fixed range"),
        ("a <i>", {"images": [Image.new("RGB", (1, 101))]}, "1×101 pixels is not allowed"),
        ("dog " * 3000, {"images": None}, "at most 254 are allowed"),
        ("a <i>", {"sampler": "EulerScheduler"}, "'EulerScheduler' is not allowed"),
    ],
)
def test_errors(pipe, prompt, options, told):
    with pytest.raises(ValueError, match=told):
        pipe(prompt, **{**CALL, **options})


def test_schedulers_are_not_shared_between_pipelines(pipe):
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    composed = pipe.compose(diffusers.StableDiffusionPipeline, scheduler=euler)
    assert composed.scheduler is euler
    assert pipe.compose(diffusers.StableDiffusionPipeline).scheduler is not pipe.scheduler
