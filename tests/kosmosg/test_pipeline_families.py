"""The pipeline over every family of image decoders. Each result is compared with the pipeline that diffusers loads
itself, over the same networks and fed the same embeddings and seed: bit for bit the same images."""

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
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import SDXLCFGCutoffCallback
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
    "2.1": (partial(tiny.write_stable_diffusion_2, prediction_type="v_prediction"), "StableDiffusionPipeline"),
    "xl": (tiny.write_stable_diffusion_xl, "StableDiffusionXLPipeline"),
    "sana": (tiny.write_sana, "SanaPipeline"),
}
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
    embeddings = pipe.embeddings(**PROMPT, negative_prompt=negative)
    ours = drawn(pipe, negative_prompt=negative)
    assert np.array_equal(ours, theirs()(**embeddings, **sized(family), **options()).images)
    assert np.array_equal(ours, pipe(**embeddings, **options()).images)
    if family == "xl" and negative is None:  # zeros, as the library's own without a negative prompt
        positive = {name: value for name, value in embeddings.items() if "negative" not in name}
        assert np.array_equal(ours, theirs()(**positive, **sized(family), **options()).images)


def test_several_prompts_and_images_each_have_their_own_seed(pipe):
    prompts = {"prompt": ["a dog", "<i>"], "images": [[], [RED]]}
    batch = pipe(**prompts, num_images_per_prompt=2, seeds=[1, 2, 3, 4], **options(generator=None)).images
    alone = pipe("<i>", [RED], seeds=[4], **options(generator=None)).images
    np.testing.assert_allclose(batch[3:], alone, atol=1e-4)  # another batch size rounds another way
    assert np.abs(batch[2] - batch[3]).max() > 0.01


def test_saved_and_loaded_it_draws_the_same_bits(pipe, family, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected = drawn(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert (index["family"], index["unconditional"]) == (FAMILIES[family][1], "zeros" if family == "xl" else "prompt")
    again = KosmosGPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(drawn(again), expected)
    assert not any(parameter.requires_grad for parameter in again.denoiser.parameters())
    trusted = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    assert type(trusted) is KosmosGPipeline and np.array_equal(drawn(trusted), expected)
    again.save_pretrained(tmp_path / "twice")
    twice = json.loads((tmp_path / "twice" / "model_index.json").read_text())
    assert {**index, "_name_or_path": None} == {**twice, "_name_or_path": None}


def test_halves_of_a_pipeline_work_without_each_other(pipe, tmp_path):
    encoding, drawing = ("mllm", "aligner", "tokenizer"), (*pipe.decoder_class.networks, "scheduler")
    encoded, expected = pipe.encode_prompt(**PROMPT), drawn(pipe)
    for name, absent in (("encoder", drawing), ("drawer", encoding)):
        parts = {**pipe.components, **dict.fromkeys(absent)}
        KosmosGPipeline(**parts, family=pipe.config.family).save_pretrained(tmp_path / name)
    encoder, drawer = (quiet(KosmosGPipeline.from_pretrained(tmp_path / name)) for name in ("encoder", "drawer"))
    assert all(map(torch.equal, encoder.encode_prompt(**PROMPT), encoded))
    assert np.array_equal(drawer(**pipe.embeddings(**PROMPT), **options()).images, expected)
    with pytest.raises(ValueError, match=f"no {drawing[0]}, scheduler, vae, which is needed here"):
        encoder(**PROMPT)


def test_conditions_are_in_the_order_of_diffusers_own(pipe, theirs, family):
    found = pipe.encode_prompt(**PROMPT)
    given = theirs().encode_prompt(
        **{"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True},
        **({"prompt": None} | pipe.embeddings(**PROMPT)),
    )
    assert len(found) == len(given) == (2 if family == "2.1" else 4)
    assert all(map(torch.equal, found, given))


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


@pytest.mark.parametrize("family", ["xl"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (StableDiffusionXLPipeline, {}),
        (StableDiffusionXLImg2ImgPipeline, {"image": EDGES, "strength": 0.7}),
        (StableDiffusionXLInpaintPipeline, {"image": EDGES, "mask_image": MASK, "height": SIZE[0], "width": SIZE[1]}),
    ],
)
def test_composed_with_xl(pipe, theirs, kind, inputs):
    embeddings = pipe.embeddings(**PROMPT)
    ours = quiet(pipe.compose(kind))(**embeddings, **inputs, **options()).images
    assert np.array_equal(ours, theirs(kind)(**embeddings, **inputs, **options()).images)
    assert not np.array_equal(ours, theirs(kind)("a dog in the snow", **inputs, **options()).images)


@pytest.mark.parametrize("family", ["xl"], indirect=True)
def test_a_controlnet_of_xl(pipe, theirs):
    torch.manual_seed(1)
    network = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3).eval()
    composed = quiet(pipe.compose(StableDiffusionXLControlNetPipeline, controlnet=network))
    call = {**pipe.embeddings(**PROMPT), "image": EDGES}
    assert np.array_equal(composed(**call, **options()).images, drawn(pipe))  # as it is before its training
    for parameter in [*network.controlnet_down_blocks.parameters(), *network.controlnet_mid_block.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    ours = composed(**call, **options()).images
    expected = theirs(StableDiffusionXLControlNetPipeline, controlnet=network)
    assert np.array_equal(ours, expected(**call, **options()).images) and not np.array_equal(ours, drawn(pipe))


def sana_controlnet(transformer):
    torch.manual_seed(1)
    sizes = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    unknown = ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale", "num_layers")
    sizes = {name: value for name, value in sizes.items() if name not in unknown}
    control = SanaControlNetModel(**sizes, num_layers=1).eval()
    torch.nn.init.normal_(control.controlnet_blocks[0].weight, std=0.3)
    return control


@pytest.mark.parametrize("family", ["sana"], indirect=True)
def test_composed_with_sana(pipe, theirs):
    control = sana_controlnet(pipe.transformer)
    embeddings = {**pipe.embeddings(**PROMPT), **sized("sana")}
    for kind, parts, inputs in (
        (SanaPipeline, {}, {}),
        (SanaControlNetPipeline, {"controlnet": control}, {"control_image": EDGES}),
        (SanaPAGPipeline, {"pag_applied_layers": ["transformer_blocks.1"]}, {"pag_scale": 2.0}),
    ):
        ours = quiet(pipe.compose(kind, **parts))(**embeddings, **inputs, **options()).images
        assert np.array_equal(ours, theirs(kind, **parts)(**embeddings, **inputs, **options()).images)
        assert np.array_equal(ours, drawn(pipe)) == (kind is SanaPipeline)


def lora_file(folder: Path, denoiser, name: str, **others) -> Path:
    """As diffusers' training scripts write them, with weights that do something."""
    torch.manual_seed(4)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(denoiser)} | others
    denoiser.unload_lora()
    {"unet": StableDiffusionXLPipeline, "transformer": SanaPipeline}[name].save_lora_weights(folder, **layers)
    return folder


@pytest.mark.parametrize("family", ["xl", "sana"], indirect=True)
def test_lora_files(pipe, theirs, family, tmp_path):
    denoiser = next(iter(pipe.decoder_class.networks))
    file, plain, embeddings = lora_file(tmp_path, pipe.denoiser, denoiser), drawn(pipe), pipe.embeddings(**PROMPT)
    expected = theirs()
    expected.load_lora_weights(file, adapter_name="style")
    styled = expected(**embeddings, **sized(family), **options()).images
    expected.unload_lora_weights()
    pipe.load_lora_weights(file, adapter_name="style")
    assert np.array_equal(drawn(pipe), styled) and not np.array_equal(styled, plain)
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
        sana_controlnet(pipe.transformer).save_pretrained(tmp_path / "controlnet")
        lora = lora_file(tmp_path, pipe.transformer, "transformer") / "pytorch_lora_weights.safetensors"
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


@pytest.mark.parametrize("family", ["xl"], indirect=True)
def test_lora_weights_of_xls_text_models_are_left_out(pipe, theirs, models, tmp_path, caplog):
    second = theirs().text_encoder_2
    second.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    others = {"text_encoder_2_lora_layers": get_peft_model_state_dict(second)}
    pipe.load_lora_weights(lora_file(tmp_path, pipe.denoiser, "unet", **others))
    assert "LoRA weights are for text models" in caplog.text and pipe.get_active_adapters()
    with pytest.raises(ValueError, match="holds no LoRA weights for the transformer, as 'text_encoder_2"):
        KosmosGPipeline.from_pretrained(*models["sana"]).load_lora_weights(tmp_path)


def test_callbacks_see_what_the_family_has(pipe, family):
    seen, names = [], pipe._callback_tensor_inputs
    assert ("add_time_ids" in names) == (family == "xl")

    def look(called, step, timestep, tensors):
        assert called is pipe and tensors.keys() == {*names}
        seen.append((called.guidance_scale, called.num_timesteps, called.do_classifier_free_guidance))
        called._interrupt = step == 1
        return {}

    drawn(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert seen == [(4.0, 3, True)] * 2


@pytest.mark.parametrize("family", ["xl"], indirect=True)
def test_diffusers_own_callback_cuts_guidance_off(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda unet, arguments: rows.append(len(arguments[0])))
    drawn(pipe, num_inference_steps=4, callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5))
    assert rows == [2, 2, 2, 1]


def test_parts_may_lie_elsewhere_than_they_compute(pipe):
    """accelerate's hooks in the order of `model_cpu_offload_seq`, as enable_model_cpu_offload sets them."""
    expected, hook, order = drawn(pipe), None, []
    there = [name for name in pipe.model_cpu_offload_seq.split("->") if getattr(pipe, name) is not None]
    for name in there:
        _, hook = cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
        inner = hook.hook.pre_forward
        hook.hook.pre_forward = lambda *a, name=name, inner=inner, **k: (order.append(name), inner(*a, **k))[1]
    assert np.array_equal(drawn(pipe), expected)
    assert order == ["mllm", "aligner", *[there[2]] * 3, "vae"]  # the null condition is known already


def test_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = KosmosGPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.denoiser.dtype == half.vae.dtype == half.mllm.dtype == torch.bfloat16
    assert np.abs(drawn(half) - drawn(pipe)).mean() < 0.1


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
    with pytest.raises(ValueError, match="pooled vector has the width None but the image decoder reads 10"):
        KosmosGPipeline.from_pretrained(plain, xl)
    with pytest.raises(ValueError, match="pooled vector has the width 10 but the image decoder reads None"):
        KosmosGPipeline.from_pretrained(with_pooled, sd)
    parts = KosmosGPipeline.from_pretrained(with_pooled, xl).components
    with pytest.raises(ValueError, match=r"addition_embed_type='text_time', but Stable Diffusion's has None"):
        KosmosGPipeline(**parts)
    with pytest.raises(ValueError, match=r"family='FluxPipeline' is not allowed; allowed: StableDiffusionPipeline, "):
        KosmosGPipeline(**parts, family="FluxPipeline")
    pipe = KosmosGPipeline.from_pretrained(plain, sana)
    with pytest.raises(ValueError, match="sampler='ddim' is not allowed for flow matching"):
        pipe("a dog", sampler="ddim")
    with pytest.raises(ValueError, match="a pooled vector of width 10; Sana reads"):
        pipe(prompt_embeds=pipe.encode_prompt("a dog")[0], pooled_prompt_embeds=torch.zeros(1, 10))


def test_a_run_folder_knows_its_decoder(pipe, family, models, tmp_path):
    model, decoder = models[family]
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"image_decoder": str(decoder)}}))
    assert np.array_equal(drawn(KosmosGPipeline.from_pretrained(tmp_path)), drawn(pipe))
