"""The pipeline over every family of image decoders: each result is that of the pipeline which diffusers loads itself,
over the same networks and fed the same embeddings and seed: bit for bit the same images. So are ControlNet, LoRA,
image-to-image and inpainting (section 4.4 of the paper), which diffusers' own pipelines do."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw

from kosmosg import drawing
from kosmosg.generation import Job, Request, Settings
from kosmosg.pipeline import KosmosGPipeline
from tests import tiny

RED = Image.new("RGB", (70, 80), "red")
SIZE = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
EDGES, MASK = Image.new("RGB", SIZE), Image.new("L", SIZE)
ImageDraw.Draw(EDGES).ellipse((10, 10, 50, 50), outline="white", width=3)
ImageDraw.Draw(MASK).rectangle((0, 0, 31, 63), fill=255)
PROMPT = {"prompt": "<i> in the snow", "images": [RED]}
FAMILIES = {
    "1.5": (tiny.write_stable_diffusion, StableDiffusionPipeline),
    "2.1": (partial(tiny.write_stable_diffusion_2, prediction_type="v_prediction"), StableDiffusionPipeline),
    "xl": (tiny.write_stable_diffusion_xl, StableDiffusionXLPipeline),
    "sana": (tiny.write_sana, SanaPipeline),
}
WITHOUT_2_1 = [name for name in FAMILIES if name != "2.1"]  # which differs from 1.5 in what is drawn alone
FOR_WITHOUT_2_1 = pytest.mark.parametrize("family", WITHOUT_2_1, indirect=True)
POOLED = {"xl": {"pooled_width": tiny.POOLED_WIDTH}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, tuple[Path, Path]]:
    """(model folder, decoder folder) by family."""
    return {
        name: (
            tiny.write_model(tmp_path_factory.mktemp("model"), tiny_tokenizer, **POOLED.get(name, {})),
            write(tmp_path_factory.mktemp("decoder")),
        )
        for name, (write, _) in FAMILIES.items()
    }


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(family: str, models: dict[str, tuple[Path, Path]]) -> KosmosGPipeline:
    return quiet(KosmosGPipeline.from_pretrained(*models[family]))


@pytest.fixture
def theirs(pipe: KosmosGPipeline, family: str, models: dict[str, tuple[Path, Path]]):
    """A pipeline as diffusers loads it, text encoder and all, over the same networks and with the same scheduler."""

    def load(kind=DiffusionPipeline, **parts):
        loaded = kind.from_pretrained(models[family][1], **parts)
        loaded.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        for name in pipe.decoder_class.networks:
            setattr(loaded, name, getattr(pipe, name))
        return quiet(loaded)

    return load


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def options(**more):
    return {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "np",
        **more,
    }


def sized(family: str) -> dict:
    """What diffusers' own pipelines need to draw as small as these."""
    return {"height": SIZE[0], "width": SIZE[1], **({"use_resolution_binning": False} if family == "sana" else {})}


def drawn(pipe, **more):
    return quiet(pipe)(**PROMPT, **options(**more)).images


@pytest.mark.parametrize("negative", [None, "a boat"])
def test_drawing_is_diffusers_own(pipe, theirs, family, negative):
    embeddings, given = pipe.embeddings(**PROMPT, negative_prompt=negative), theirs()
    ours = drawn(pipe, negative_prompt=negative)
    assert np.array_equal(ours, given(**embeddings, **sized(family), **options()).images)
    assert np.array_equal(ours, pipe(**embeddings, **options()).images)
    if family == "xl" and negative is None:  # zeros, as the library's own without a negative prompt
        positive = {name: value for name, value in embeddings.items() if "negative" not in name}
        assert np.array_equal(ours, given(**positive, **sized(family), **options()).images)
    # Conditions come in the order of diffusers' own.
    found = pipe.encode_prompt(**PROMPT, negative_prompt=negative)
    call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, "prompt": None}
    expected = given.encode_prompt(**{**call, **embeddings})
    assert len(found) == len(expected) == (4 if family in ("xl", "sana") else 2)
    assert all(map(torch.equal, found, expected))


@FOR_WITHOUT_2_1
def test_several_prompts_and_images_each_have_their_own_seed(pipe):
    prompts = {"prompt": ["a dog", "<i>"], "images": [[], [RED]]}
    batch = pipe(**prompts, num_images_per_prompt=2, seeds=[1, 2, 3, 4], **options(generator=None)).images
    alone = pipe("<i>", [RED], seeds=[4], **options(generator=None)).images
    np.testing.assert_allclose(batch[3:], alone, atol=1e-4)  # another batch size rounds another way
    assert np.abs(batch[2] - batch[3]).max() > 0.01


@FOR_WITHOUT_2_1
def test_saved_and_loaded_it_draws_the_same_bits(pipe, family, tmp_path, monkeypatch):
    """Whole, by diffusers' loader where the folder's code is trusted, and in bfloat16."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected = drawn(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    parts = {path.name for path in (tmp_path / "pipe").iterdir()}
    ours = {"mllm", "aligner", "tokenizer", "scheduler", "model_index.json", "pipeline.py"}
    assert parts == {*ours, *pipe.decoder_class.networks}
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    if family != "1.5":
        assert index["family"] == FAMILIES[family][1].__name__
        assert index["unconditional"] == ("zeros" if family == "xl" else "prompt")
    again = KosmosGPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(drawn(again), expected)
    assert not any(parameter.requires_grad for part in (again.denoiser, again.model) for parameter in part.parameters())
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    trusted = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    assert type(trusted) is KosmosGPipeline and np.array_equal(drawn(trusted), expected)
    again.save_pretrained(tmp_path / "twice")
    twice = json.loads((tmp_path / "twice" / "model_index.json").read_text())
    assert {**index, "_name_or_path": None} == {**twice, "_name_or_path": None}
    half = KosmosGPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.bfloat16)
    assert half.denoiser.dtype == half.vae.dtype == half.mllm.dtype == half.aligner.dtype == torch.bfloat16
    assert np.abs(drawn(half) - expected).mean() < 0.1


@FOR_WITHOUT_2_1
def test_a_pipeline_without_some_parts_does_what_the_others_can(pipe, tmp_path):
    """Before and after saving; what is missing is named."""
    encoding, drawing = ("mllm", "aligner", "tokenizer"), (*pipe.decoder_class.networks, "scheduler")
    embeddings, encoded, expected = pipe.embeddings(**PROMPT), pipe.encode_prompt(**PROMPT), drawn(pipe)
    for absent in (drawing, encoding, ("vae",)):
        whole = KosmosGPipeline(**{**pipe.components, **dict.fromkeys(absent)}, family=pipe.config.family)
        folder = tmp_path / "-".join(absent)
        whole.save_pretrained(folder)
        for part in (whole, KosmosGPipeline.from_pretrained(folder)):
            if absent == encoding:
                assert np.array_equal(quiet(part)(**embeddings, **options()).images, expected)
            else:
                assert all(map(torch.equal, part.encode_prompt(**PROMPT), encoded))
            with pytest.raises(ValueError, match="this pipeline has no ") as told:
                part(**PROMPT)
            assert all(name in str(told.value) for name in absent)
            with pytest.raises(ValueError, match="this pipeline has no "):
                part.embeddings(**PROMPT) if "vae" not in absent else part.compose(FAMILIES["1.5"][1])


@pytest.mark.parametrize("family", ["xl"], indirect=True)
def test_the_null_condition_of_xl_is_zeros_or_as_its_folder_says(pipe, models, tmp_path):
    null = pipe.null_condition
    assert not null.states.any() and not null.pooled.any() and null.pooled.shape == (1, tiny.POOLED_WIDTH)
    _, negative, _, pooled = pipe.encode_prompt(["a dog", "a cat"], negative_prompt=["", "a boat"])
    assert negative.abs().amax((1, 2)).gt(0).tolist() == pooled.abs().amax(1).gt(0).tolist() == [False, True]
    other = tiny.write_stable_diffusion_xl(tmp_path / "decoder", force_zeros_for_empty_prompt=False)
    found = KosmosGPipeline.from_pretrained(models["xl"][0], other)
    found.save_pretrained(tmp_path / "pipe")
    for loaded in (found, KosmosGPipeline.from_pretrained(tmp_path / "pipe", unet=None, vae=None)):
        assert torch.equal(loaded.null_condition.states, loaded.model.null_condition().states)
        assert loaded.null_condition.pooled.any()


# Composition.
def controlnet(unet, seed):
    """As it is before its training: its zero convolutions are zero."""
    torch.manual_seed(seed)
    return ControlNetModel.from_unet(unet, conditioning_channels=3).eval()


def trained(network):
    for parameter in [*network.controlnet_down_blocks.parameters(), *network.controlnet_mid_block.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def control_of_sana(transformer):
    torch.manual_seed(1)
    unknown = ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale", "num_layers")
    sizes = {n: v for n, v in transformer.config.items() if not n.startswith("_") and n not in unknown}
    control = SanaControlNetModel(**sizes, num_layers=1).eval()
    torch.nn.init.normal_(control.controlnet_blocks[0].weight, std=0.3)
    return control


INPAINTING = {"image": EDGES, "mask_image": MASK, "height": SIZE[0], "width": SIZE[1]}
TWO = [EDGES, EDGES.transpose(Image.Transpose.ROTATE_90)]
# Of each family: diffusers' pipeline, parts by its denoiser, and inputs of the call.
COMPOSED = {
    "1.5": [
        (StableDiffusionPipeline, lambda _: {}, {}),
        (StableDiffusionImg2ImgPipeline, lambda _: {}, {"image": EDGES, "strength": 0.7}),
        (StableDiffusionInpaintPipeline, lambda _: {}, INPAINTING),
        (StableDiffusionControlNetPipeline, lambda u: {"controlnet": trained(controlnet(u, 1))}, {"image": EDGES}),
        (
            StableDiffusionControlNetPipeline,
            lambda u: {"controlnet": [trained(controlnet(u, seed)) for seed in (1, 2)]},
            {"image": TWO},
        ),
    ],
    "xl": [
        (StableDiffusionXLPipeline, lambda _: {}, {}),
        (StableDiffusionXLImg2ImgPipeline, lambda _: {}, {"image": EDGES, "strength": 0.7}),
        (StableDiffusionXLInpaintPipeline, lambda _: {}, INPAINTING),
        (StableDiffusionXLControlNetPipeline, lambda u: {"controlnet": trained(controlnet(u, 1))}, {"image": EDGES}),
    ],
    "sana": [
        (SanaPipeline, lambda _: {}, {}),
        (SanaControlNetPipeline, lambda t: {"controlnet": control_of_sana(t)}, {"control_image": EDGES}),
        (SanaPAGPipeline, lambda _: {"pag_applied_layers": ["transformer_blocks.1"]}, {"pag_scale": 2.0}),
    ],
}


@pytest.mark.parametrize("family", COMPOSED, indirect=True)
def test_composed_is_diffusers_own(pipe, theirs, family):
    embeddings, plain = pipe.embeddings(**PROMPT), drawn(pipe)
    if family == "sana":
        embeddings |= sized(family)
    for kind, parts_of, inputs in COMPOSED[family]:
        parts = parts_of(pipe.denoiser)
        ours = quiet(pipe.compose(kind, **parts))(**embeddings, **inputs, **options()).images
        assert np.array_equal(ours, theirs(kind, **parts)(**embeddings, **inputs, **options()).images)
        assert np.array_equal(ours, plain) == (kind is FAMILIES[family][1])


@pytest.mark.parametrize("family", ["1.5", "xl"], indirect=True)
def test_an_untrained_controlnet_changes_nothing(pipe, family):
    kind = {"1.5": StableDiffusionControlNetPipeline, "xl": StableDiffusionXLControlNetPipeline}[family]
    composed = quiet(pipe.compose(kind, controlnet=controlnet(pipe.unet, 1)))
    ours = composed(**pipe.embeddings(**PROMPT), image=EDGES, **options()).images
    assert np.array_equal(ours, drawn(pipe))


# LoRA.
def lora_file(folder: Path, denoiser, kind, alpha=4, text=None, metadata=False) -> Path:
    """As diffusers' training scripts write them, with weights that do something."""
    torch.manual_seed(alpha)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_v"], init_lora_weights=False))
    name = "transformer" if kind is SanaPipeline else "unet"
    layers: dict = {f"{name}_lora_layers": get_peft_model_state_dict(denoiser)} | (text or {})
    if metadata:
        layers[f"{name}_lora_adapter_metadata"] = denoiser.peft_config["default"].to_dict()
    denoiser.unload_lora()
    kind.save_lora_weights(folder, **layers)
    return folder


@FOR_WITHOUT_2_1
def test_lora_files(pipe, theirs, family, tmp_path):
    denoiser = next(iter(pipe.decoder_class.networks))
    file, plain = lora_file(tmp_path, pipe.denoiser, FAMILIES[family][1]), drawn(pipe)
    embeddings, expected = pipe.embeddings(**PROMPT), theirs()
    expected.load_lora_weights(file, adapter_name="style")
    styled = expected(**embeddings, **sized(family), **options()).images
    expected.unload_lora_weights()
    pipe.load_lora_weights(file, adapter_name="style")
    assert np.array_equal(drawn(pipe), styled) and not np.array_equal(styled, plain)
    composed = quiet(pipe.compose(FAMILIES[family][1]))
    assert np.array_equal(composed(**embeddings, **sized(family), **options()).images, styled)
    assert pipe.get_list_adapters() == {denoiser: ["style"]}
    assert np.array_equal(drawn(pipe, cross_attention_kwargs={"scale": 0.0}), plain)
    pipe.set_adapters("style", 0.0)
    assert np.array_equal(drawn(pipe), plain)
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    np.testing.assert_allclose(drawn(pipe), styled, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(drawn(pipe), plain, atol=1e-4)


@pytest.mark.parametrize("family", ["xl", "sana"], indirect=True)
def test_files_of_a_request_are_drawn_as_composed_by_hand(pipe, family, tmp_path):
    """`kosmosg generate` and the page draw through `drawing.draw`."""
    files = {"images": (str(tmp_path / "red.png"),)}
    for name, image in (("red", RED), ("edges", EDGES)):
        image.save(tmp_path / f"{name}.png")
    if family == "xl":
        _, lora = tiny.write_controlnet_and_lora(tmp_path, pipe.unet)
    else:
        control_of_sana(pipe.transformer).save_pretrained(tmp_path / "controlnet")
        lora = lora_file(tmp_path, pipe.transformer, SanaPipeline) / "pytorch_lora_weights.safetensors"
    network, settings = drawing.load_controlnet(str(tmp_path / "controlnet"), pipe), Settings(2, 4.0)
    control = {"control_image": str(tmp_path / "edges.png"), "control_scale": 0.5}
    initial = {"init_image": str(tmp_path / "edges.png"), "strength": 0.5}

    def ours(**more):
        jobs = [Job(Request("<i> in the snow", **files, **more), seed, tmp_path, {}) for seed in (3, 4)]
        return np.stack(list(map(np.asarray, drawing.draw(pipe, jobs, settings, network))))

    def theirs(kind, parts, **inputs):
        twice = pipe.embeddings([PROMPT["prompt"]] * 2, [PROMPT["images"]] * 2)
        inputs = {name: [value] * 2 if value is EDGES else value for name, value in inputs.items()}
        composed = quiet(pipe.compose(kind, **parts))
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        call = {**twice, **inputs, **sized(family), "generator": generators}
        images = composed(**call, num_inference_steps=2, guidance_scale=4.0).images
        return np.stack(list(map(np.asarray, images)))

    scaled, parts = {"controlnet_conditioning_scale": 0.5}, {"controlnet": network}
    if family == "sana":
        hand = theirs(SanaControlNetPipeline, parts, control_image=EDGES, **scaled)
        assert np.abs(ours(**control).astype(int) - hand).max() <= 1 and not np.array_equal(hand, ours())
        with pytest.raises(ValueError, match="diffusers has no SanaImg2ImgPipeline"):
            ours(**initial)
    else:
        kinds = (
            (StableDiffusionXLControlNetPipeline, parts, control, {"image": EDGES, **scaled}),
            (StableDiffusionXLImg2ImgPipeline, {}, initial, {"image": EDGES, "strength": 0.5}),
            (
                StableDiffusionXLControlNetImg2ImgPipeline,
                parts,
                control | initial,
                {"image": EDGES, "strength": 0.5, "control_image": EDGES, **scaled},
            ),
        )
        for kind, networks, request, inputs in kinds:
            assert np.array_equal(ours(**request), theirs(kind, networks, **inputs))
    plain = ours()
    drawing.load_loras(pipe, [str(lora)])
    styled = ours()
    drawing.scale_loras(pipe, [0.0])
    assert np.array_equal(ours(), plain) and not np.array_equal(styled, plain)


@pytest.mark.parametrize("family", ["1.5"], indirect=True)
def test_lora_files_with_metadata_and_hot_swapping(pipe, theirs, tmp_path):
    """Metadata alone tell that the strength is alpha 8 over rank 2. A second file takes the first one's place."""
    kind, embeddings = StableDiffusionPipeline, pipe.embeddings(**PROMPT)
    files = [lora_file(tmp_path / str(alpha), pipe.unet, kind, alpha, metadata=True) for alpha in (8, 4)]
    expected = kind.from_pipe(theirs(), unet=type(pipe.unet).from_config(pipe.unet.config))
    expected.unet.load_state_dict(pipe.unet.state_dict())
    for number, file in enumerate(files):
        for loaded in (pipe, expected):
            loaded.load_lora_weights(file, adapter_name="style", hotswap=number > 0)
        ours = drawn(pipe)
        np.testing.assert_allclose(ours, quiet(expected)(**embeddings, **options()).images, atol=1e-5)
        strengths = {float(module.scaling["style"]) for module in pipe.unet.modules() if hasattr(module, "scaling")}
        assert strengths == {(8 / 2, 4 / 2)[number]}


@pytest.mark.parametrize(("family", "text"), [("1.5", "text_encoder"), ("xl", "text_encoder_2")], indirect=["family"])
def test_lora_weights_of_text_models_are_left_out(pipe, theirs, family, text, models, tmp_path, caplog):
    network = getattr(theirs(), text)
    network.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    of_text, kind = {f"{text}_lora_layers": get_peft_model_state_dict(network)}, FAMILIES[family][1]
    pipe.load_lora_weights(lora_file(tmp_path / "both", pipe.denoiser, kind, text=of_text))
    assert "LoRA weights are for text models" in caplog.text and pipe.get_active_adapters()
    kind.save_lora_weights(tmp_path / "text", **of_text)
    for other, file in ((family, "text"), ("sana", "both")):
        with pytest.raises(ValueError, match="holds no LoRA weights for the "):
            KosmosGPipeline.from_pretrained(*models[other]).load_lora_weights(tmp_path / file)


# While drawing.
@FOR_WITHOUT_2_1
def test_callbacks_see_and_change_what_the_family_has(pipe, family):
    """As the library's own callback tests: names in `_callback_tensor_inputs`, and what a callback may read and set."""
    seen, names = [], pipe._callback_tensor_inputs
    assert ("add_time_ids" in names) == (family == "xl")

    def look(called, step, timestep, tensors):
        assert called is pipe and tensors.keys() == {*names}
        seen.append((called.guidance_scale, called.num_timesteps, called.do_classifier_free_guidance))
        called._guidance_scale = called.guidance_scale + 1
        called._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    given = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names, "output_type": "latent"}
    latents = drawn(pipe, **given)
    assert seen == [(4.0, 3, True), (5.0, 3, True)] and not latents.any()


@pytest.mark.parametrize(
    ("family", "cutoff"), [("1.5", SDCFGCutoffCallback), ("xl", SDXLCFGCutoffCallback)], indirect=["family"]
)
def test_diffusers_own_callback_cuts_guidance_off(pipe, cutoff):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda unet, arguments: rows.append(len(arguments[0])))
    drawn(pipe, num_inference_steps=4, callback_on_step_end=cutoff(cutoff_step_ratio=0.5))
    assert rows == [2, 2, 2, 1] and pipe.guidance_scale == 0


@FOR_WITHOUT_2_1
def test_parts_may_lie_elsewhere_than_they_compute(pipe):
    """accelerate's hooks in the order of `model_cpu_offload_seq`, as enable_model_cpu_offload sets them."""
    expected, hook, order = drawn(pipe), None, []
    there = [name for name in pipe.model_cpu_offload_seq.split("->") if getattr(pipe, name) is not None]
    for name in there:
        _, hook = cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
        inner = hook.hook.pre_forward
        hook.hook.pre_forward = lambda *a, name=name, inner=inner, **k: (order.append(name), inner(*a, **k))[1]
    assert str(pipe._execution_device) == "cpu" and np.array_equal(drawn(pipe), expected)
    assert order == ["mllm", "aligner", *[there[2]] * 3, "vae"]  # the null condition is known already


# Which decoder.
@FOR_WITHOUT_2_1
def test_a_run_folder_knows_its_decoder(pipe, family, models, tmp_path):
    model, decoder = models[family]
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"image_decoder": str(decoder)}}))
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained(tmp_path)), drawn(pipe))


def test_another_decoder_takes_the_place_of_the_folders(models, tmp_path):
    """Of another family, too, where its condition is of the same form."""
    model, decoder = models["2.1"]
    expected = drawn(KosmosGPipeline.from_pretrained(model, models["sana"][1]))
    KosmosGPipeline.from_pretrained(model, decoder).save_pretrained(tmp_path)
    replaced = KosmosGPipeline.from_pretrained(tmp_path, models["sana"][1])
    assert replaced.unet is None and np.array_equal(drawn(replaced), expected)
    replaced.save_pretrained(tmp_path / "sana")  # a pipeline folder of ours has an image decoder, too
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained(model, tmp_path / "sana")), expected)
    whole = KosmosGPipeline.from_pretrained(tmp_path)
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained(model, tmp_path)), drawn(whole))


def test_what_does_not_fit_is_named(models):
    (plain, sd), (with_pooled, xl), (_, sana) = (models[name] for name in ("2.1", "xl", "sana"))
    parts = KosmosGPipeline.from_pretrained(with_pooled, xl).components
    pipe = KosmosGPipeline.from_pretrained(plain, sana)
    for refused, told in (
        (lambda: KosmosGPipeline.from_pretrained(plain, xl), "width None but the image decoder reads 10"),
        (lambda: KosmosGPipeline.from_pretrained(with_pooled, sd), "width 10 but the image decoder reads None"),
        (lambda: KosmosGPipeline(**parts), "addition_embed_type='text_time', but Stable Diffusion's has None"),
        (lambda: KosmosGPipeline(**parts, family="FluxPipeline"), "family='FluxPipeline'.*StableDiffusionPipeline, "),
        (lambda: pipe("a dog", sampler="ddim"), "sampler='ddim' is not allowed for flow matching"),
        (
            lambda: pipe(prompt_embeds=pipe.encode_prompt("a dog")[0], pooled_prompt_embeds=torch.zeros(1, 10)),
            "a pooled vector of width 10; Sana reads",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            refused()
