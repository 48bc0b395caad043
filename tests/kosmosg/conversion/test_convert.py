"""Released checkpoints become folders that load, with the very weights."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from kosmosg.conversion import ConversionError, convert_checkpoint, weights
from kosmosg.conversion.parts import build
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.build import build_mllm
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM
from kosmosg.models.model_config import MLLMConfig, ModelConfig, VisionConfig
from kosmosg.models.published import CONFIGS, STABLE_DIFFUSION_1_5
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from tests.kosmosg.conversion.conftest import weights_of

EMBEDDING, PROJECTION = "gpt_model.decoder.embed_tokens.weight", "gpt_model.decoder.output_projection.weight"
KINDS = {
    "mllm": MLLM,
    "aligner": AlignerEncoder,
    "aligner_decoder": AlignerDecoder,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
}
PARTS = {
    "stage1": {"mllm"},
    "stage2": {"mllm", "aligner", "aligner_decoder", "text_encoder", "unet", "vae"},
    "final": {"mllm", "aligner", "unet", "vae"},
}


def golden_options(recording, checkpoint):
    """What the recorded set's own config.json tells and no header does."""
    options = {
        "spm": recording.folder.parent / "tokenizer" / SENTENCEPIECE_FILE,
        "dictionary": recording.folder / "model" / "dict_tiny.txt",
        "vision_heads": recording.config["vision"]["heads"],
    }
    if checkpoint != "stage1":
        options |= {"decoder": recording.stable_diffusion, "aligner_heads": recording.config["aligner"]["heads"]}
    return options


def convert_golden(recording, checkpoint, folder, **options):
    file = recording.folder / "model" / f"checkpoint_{checkpoint}.pt"
    return convert_checkpoint(file, folder, **{**golden_options(recording, checkpoint), **options})


def nothing_but(folder: Path, *names: str) -> bool:
    """No half-written folder, hidden or not, beside what was there."""
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("checkpoint", PARTS)
def test_parts_of_the_recorded_checkpoints(recording, checkpoint, tmp_path):
    record = convert_golden(recording, checkpoint, tmp_path / "out")
    loaded = recording.load(checkpoint)
    extra = {"tokenizer", "conversion.json", "README.md"}
    extra |= set() if checkpoint == "stage1" else {"scheduler", "model_index.json", "pipeline.py"}
    assert nothing_but(tmp_path / "out", *PARTS[checkpoint], *extra) and nothing_but(tmp_path, "out")
    for part in PARTS[checkpoint]:
        ours = KINDS[part].from_pretrained(tmp_path / "out" / part).state_dict()
        theirs = loaded.converted.parts.get(part)
        if theirs is None:  # stage 2 carries no U-Net and no VAE
            theirs = KINDS[part].from_pretrained(recording.stable_diffusion, subfolder=part).state_dict()
        theirs = {name.removeprefix("text_model.") if part == "text_encoder" else name: t for name, t in theirs.items()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert record["kind"] == checkpoint and record["vocabulary"] == recording.config["vocab_size"]
    assert set(record["left_out"]) == {
        PROJECTION,
        "gpt_model.decoder.embed_positions._float_tensor",
        "gpt_model.decoder.self_attn_sope.scale",
    }
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == json.loads(json.dumps(record))
    expected = {"name": str(recording.stable_diffusion), "unet": "bit-equal", "vae": "bit-equal"}
    if checkpoint == "final":
        assert record["decoder"] == expected


def test_the_model_computes_the_same_bits(recording, tmp_path):
    convert_golden(recording, "final", tmp_path / "out")
    ours, theirs = KosmosG.from_pretrained(tmp_path / "out"), recording.load("final").model
    assert dict(ours.mllm.config)["vision_config"] == dict(theirs.mllm.config)["vision_config"]
    with torch.no_grad():
        for name in ("interleaved", "text_long", "sample"):
            conditions = (model.condition(recording.prompts(name)).states for model in (ours, theirs))
            assert torch.equal(*conditions)
        assert torch.equal(ours.null_condition().states, theirs.null_condition().states)


def test_the_pipeline_loads(recording, tmp_path):
    convert_golden(recording, "final", tmp_path / "out")
    pipe = KosmosGPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    settings = {"final_sigmas_type": "sigma_min", "beta_start": 0.00085, "beta_schedule": "scaled_linear"}
    assert settings.items() <= dict(pipe.scheduler.config).items()
    image = pipe("a dog", num_inference_steps=1, output_type="np").images
    assert image.shape[0] == 1
    pipe.save_pretrained(tmp_path / "again")
    for name in ("mllm", "aligner", "unet", "vae"):
        once, again = (json.loads((tmp_path / f / name / "config.json").read_text()) for f in ("out", "again"))
        assert once == {key: value for key, value in again.items() if key != "_name_or_path"}
    index = [json.loads((tmp_path / folder / "model_index.json").read_text()) for folder in ("out", "again")]
    assert index[0] == {key: value for key, value in index[1].items() if key != "_name_or_path"}
    assert (tmp_path / "out/scheduler/scheduler_config.json").read_text() == (
        tmp_path / "again/scheduler/scheduler_config.json"
    ).read_text()


def test_training_starts_from_it(recording, tmp_path):
    convert_golden(recording, "stage1", tmp_path / "out")
    llm, vision = recording.config["llm"], recording.config["vision"]
    config = ModelConfig(
        tokenizer="",
        image_decoder="",
        mllm=MLLMConfig(
            width=llm["dim"],
            layers=llm["layers"],
            heads=llm["heads"],
            ffn_width=llm["ffn"],
            image_tokens=llm["latent_query_num"],
            vision=VisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                width=vision["width"],
                layers=vision["layers"],
                heads=vision["heads"],
                ffn_width=round(vision["width"] * vision["mlp_ratio"]),
            ),
        ),
    )
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    ours = build_mllm(config, tokenizer, init_from=tmp_path / "out").state_dict()
    theirs = recording.load("stage1").mllm.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # and the image tower of a public CLIP is one that stage 1 may start from
    record = convert_checkpoint(
        recording.folder / "model/vit_pretrained.pt", tmp_path / "clip", vision_heads=vision["heads"]
    )
    assert record["left_out"] == ["logit_scale", "text_projection", "visual.proj"]
    config.vision_weights = str(tmp_path / "clip")
    tower = build_mllm(config, tokenizer).vision
    with torch.no_grad():
        tokens = tower(recording.inputs["interleaved.images"][:2])
    recording.assert_activation(tokens, "vit_pretrained.tokens")


def test_own_save_pretrained_writes_the_same(final, stage2, tiny_pipeline, tiny_stable_diffusion, tmp_path):
    convert_checkpoint(final, tmp_path / "out", decoder=tiny_stable_diffusion)
    for name in ("mllm", "aligner", "unet", "vae", "scheduler", "tokenizer"):
        for file in (tiny_pipeline / name).iterdir():
            same = (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()
            if file.name == "config.json":  # diffusers adds where a part was read from
                values = [
                    json.loads((folder / name / file.name).read_text()) for folder in (tiny_pipeline, tmp_path / "out")
                ]
                same = {**values[0], "_name_or_path": ""} == {**values[1], "_name_or_path": ""}
            assert same, file
    convert_checkpoint(stage2, tmp_path / "two", decoder=tiny_stable_diffusion)
    text_encoder = CLIPTextModel.from_pretrained(tmp_path / "two" / "text_encoder")
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "text_encoder" / name).read_bytes() == (tmp_path / "two/text_encoder" / name).read_bytes()


def test_stage_2_without_a_decoder(stage2, tmp_path, tiny_stable_diffusion, changed):
    with pytest.raises(
        ConversionError, match=r"M's conditions are 32 wide but text_encoder's hidden_size is 768.*--deco"
    ):
        convert_checkpoint(stage2, tmp_path / "out")

    def without_text(checkpoint):
        for name in [name for name in checkpoint["model"] if "clip_encoder" in name]:
            del checkpoint["model"][name]

    record = convert_checkpoint(changed(without_text, of=stage2), tmp_path / "out")
    assert list(record["parts"]) == ["mllm", "aligner", "aligner_decoder"] and record["decoder"] is None
    assert not (tmp_path / "out" / "model_index.json").exists() and not record["pipeline"]
    record = convert_checkpoint(stage2, tmp_path / "whole", decoder=tiny_stable_diffusion)
    assert record["decoder"]["unet"] == "taken from it" and record["pipeline"]
    assert (tmp_path / "whole/model_index.json").is_file()


def test_dtypes(final, tiny_stable_diffusion, tmp_path, changed, monkeypatch):
    def halve(checkpoint):
        checkpoint["model"] = {name: tensor.half() for name, tensor in checkpoint["model"].items()}

    half = changed(halve)
    record = convert_checkpoint(half, tmp_path / "half", decoder=tiny_stable_diffusion)
    assert {part["dtype"] for part in record["parts"].values()} == {"float16"}
    assert record["decoder"]["unet"] == record["decoder"]["vae"] == "bit-equal after rounding to float16"
    convert_checkpoint(final, tmp_path / "cast", decoder=tiny_stable_diffusion, dtype="float16")
    monkeypatch.setattr(weights, "CHUNK_BYTES", 200_000)
    convert_checkpoint(final, tmp_path / "pieces", decoder=tiny_stable_diffusion, dtype="float16")
    assert weights_of(tmp_path / "half") == weights_of(tmp_path / "cast") == weights_of(tmp_path / "pieces")
    convert_checkpoint(final, tmp_path / "wide", decoder=tiny_stable_diffusion, dtype="float32")
    convert_checkpoint(final, tmp_path / "plain", decoder=tiny_stable_diffusion)
    assert weights_of(tmp_path / "wide") == weights_of(tmp_path / "plain") != weights_of(tmp_path / "half")
    loaded = load_file(tmp_path / "cast/mllm/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float16}
    overflowing = changed(lambda checkpoint: checkpoint["model"]["aligner.encoder_query"].fill_(1e5))
    with pytest.raises(ConversionError, match=r"'queries' does not fit torch\.float16.*bfloat16"):
        convert_checkpoint(overflowing, tmp_path / "out", decoder=tiny_stable_diffusion, dtype="float16")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="dtype='int8' is unknown; allowed: float32"):
        convert_checkpoint(final, tmp_path / "out", decoder=tiny_stable_diffusion, dtype="int8")


def test_old_names_in_checkpoint_and_decoder(final, changed, tiny_stable_diffusion, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(state, prefix=""):
        for name in [name for name in state if name.startswith(f"{prefix}") and ".attentions." in name]:
            for new, theirs in old.items():
                if f".{new}." in name:
                    state[name.replace(f".{new}.", f".{theirs}.")] = state.pop(name)

    aged = changed(lambda checkpoint: age(checkpoint["model"], "vae.vae."))
    assert any(".proj_attn." in name for name in torch.load(aged, weights_only=True)["model"])
    decoder = tmp_path / "decoder"
    shutil.copytree(tiny_stable_diffusion, decoder)
    (decoder / "vae/diffusion_pytorch_model.safetensors").unlink()
    vae = load_file(tiny_stable_diffusion / "vae/diffusion_pytorch_model.safetensors")
    age(vae)
    torch.save(vae, decoder / "vae/diffusion_pytorch_model.bin")
    record = convert_checkpoint(aged, tmp_path / "aged", decoder=decoder)
    assert record["decoder"]["vae"] == "bit-equal"
    convert_checkpoint(final, tmp_path / "plain", decoder=tiny_stable_diffusion)
    assert weights_of(tmp_path / "aged") == weights_of(tmp_path / "plain")


def test_decoder_gives_what_the_checkpoint_lacks(final, changed, tiny_stable_diffusion, tmp_path):
    def drop(*prefixes):
        def edit(checkpoint):
            model = checkpoint["model"]
            checkpoint["model"] = {name: t for name, t in model.items() if not name.startswith(prefixes)}

        return changed(edit)

    bare = drop("diffusion_unet.", "vae.")
    record = convert_checkpoint(bare, tmp_path / "bare")
    assert list(record["parts"]) == ["mllm", "aligner"] and not record["pipeline"]
    convert_checkpoint(bare, tmp_path / "filled", decoder=tiny_stable_diffusion)
    convert_checkpoint(final, tmp_path / "plain", decoder=tiny_stable_diffusion)
    assert weights_of(tmp_path / "filled") == weights_of(tmp_path / "plain")
    with pytest.raises(ConversionError, match=r"lacks the part vae \(vae\.vae\.\*\).*give --decoder"):
        convert_checkpoint(drop("vae."), tmp_path / "out")
    empty = tmp_path / "empty"
    shutil.copytree(tiny_stable_diffusion, empty)
    for file in empty.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConversionError, match="no weights in unet/"):
        convert_checkpoint(drop("diffusion_unet.", "vae."), tmp_path / "out", decoder=empty)
    assert convert_checkpoint(final, tmp_path / "out", decoder=empty)["decoder"]["unet"] == "not compared"
    changed_unet = changed(lambda checkpoint: checkpoint["model"]["diffusion_unet.unet.conv_out.bias"].add_(1))
    record = convert_checkpoint(changed_unet, tmp_path / "tuned", decoder=tiny_stable_diffusion)
    assert record["decoder"]["unet"].startswith("1 of ") and record["decoder"]["vae"] == "bit-equal"


def test_published_configurations_are_stable_diffusion_v1_5():
    """Parameter counts of the released-code.md, "keys_full.json"."""
    counts = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert {
        part: sum(p.numel() for p in build(part, CONFIGS[STABLE_DIFFUSION_1_5][part]).parameters()) for part in counts
    } == counts


def test_a_decoder_on_the_hub(final, tiny_stable_diffusion, tmp_path, monkeypatch):
    def fetch(name, allow_patterns):
        assert name == "someone/stable-diffusion" and "unet/config.json" in allow_patterns
        return str(tiny_stable_diffusion)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    convert_checkpoint(final, tmp_path / "out", decoder="someone/stable-diffusion")
    assert "base_model: someone/stable-diffusion\n" in (tmp_path / "out/README.md").read_text()


def test_a_hub_that_is_not_reached(final, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("the hub was not reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConversionError, match=r"--decoder 'someone/else' is not a folder.*the hub was not reached"):
        convert_checkpoint(final, tmp_path / "out", decoder="someone/else")


def test_the_card(final, tiny_stable_diffusion, tmp_path):
    record = convert_checkpoint(final, tmp_path / "out", decoder=tiny_stable_diffusion)
    card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "image-to-image"
    assert card.data.base_model is None  # a folder on this disk is no model of the hub
    for told in (record["source"]["sha256"], "checkpoint.pt", "licence", "KosmosGPipeline.from_pretrained"):
        assert told in card.text
