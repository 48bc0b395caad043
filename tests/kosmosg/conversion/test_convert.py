"""Released checkpoints become folders that load, with the very weights, and back again, bit for bit."""

import argparse
import json
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from kosmosg.conversion import ConversionError, convert_checkpoint, export_checkpoint, read_checkpoint, weights
from kosmosg.conversion.parts import build
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder, LinearAligner
from kosmosg.models.build import build_mllm
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM
from kosmosg.models.model_config import MLLMConfig, ModelConfig, VisionConfig
from kosmosg.models.published import CONFIGS, STABLE_DIFFUSION_1_5
from kosmosg.models.storage import load_part
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.tokenizer import DICTIONARY_FILE, SENTENCEPIECE_FILE, Tokenizer
from tests import tiny
from tests.kosmosg.conversion.conftest import PROJECTION, weights_of, without

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
MEANINGLESS = "gpt_model.decoder.embed_positions._float_tensor"
TOP = {"args", "cfg", "model", "criterion", "optimizer_history", "task_state", "extra_state", "last_optimizer_state"}


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def read_json(file):
    """Without what diffusers adds: where a part was read from."""
    return {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}


@pytest.mark.parametrize("checkpoint", PARTS)
def test_parts_of_the_recorded_checkpoints(recording, checkpoint, converted):
    folder, loaded = converted(checkpoint), recording.load(checkpoint)
    extra = {"tokenizer", "conversion.json", "README.md"}
    extra |= set() if checkpoint == "stage1" else {"scheduler", "model_index.json", "pipeline.py"}
    assert {path.name for path in folder.iterdir()} == PARTS[checkpoint] | extra
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    for part in PARTS[checkpoint]:
        ours = KINDS[part].from_pretrained(folder / part).state_dict()
        theirs = loaded.converted.parts.get(part)
        if theirs is None:  # stage 2 carries no U-Net and no VAE
            theirs = KINDS[part].from_pretrained(recording.stable_diffusion, subfolder=part).state_dict()
        theirs = {name.removeprefix("text_model.") if part == "text_encoder" else name: t for name, t in theirs.items()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    record = json.loads((folder / "conversion.json").read_text())
    assert record["kind"] == checkpoint and record["vocabulary"] == recording.config["vocab_size"]
    assert set(record["left_out"]) == {PROJECTION, MEANINGLESS, "gpt_model.decoder.self_attn_sope.scale"}
    if checkpoint == "final":
        expected = {"name": str(recording.stable_diffusion), "unet": "bit-equal", "vae": "bit-equal"}
        assert record["decoder"] == expected


@pytest.mark.parametrize("checkpoint", PARTS)
def test_recorded_checkpoints_there_and_back(recording, checkpoint, converted, tmp_path):
    file, folder = recording.folder / "model" / f"checkpoint_{checkpoint}.pt", converted(checkpoint)
    done = export_checkpoint(folder, tmp_path / "again.pt")
    theirs, ours = load(file), load(tmp_path / "again.pt")
    assert set(ours) == TOP and done["stage"] == checkpoint and set(ours["model"]) == set(theirs["model"])
    for name, tensor in theirs["model"].items():
        assert ours["model"][name].dtype == tensor.dtype and ours["model"][name].shape == tensor.shape
        assert name == MEANINGLESS or torch.equal(ours["model"][name], tensor), name
    tied = [ours["model"][f"gpt_model.decoder.{name}.weight"] for name in ("embed_tokens", "output_projection")]
    assert tied[0].data_ptr() == tied[1].data_ptr()  # one tensor, saved once
    # the header is of the same flavour and tells the same, and the heads that it had no place for
    flavour = json.loads((folder / "conversion.json").read_text())["header"]["flavour"]
    assert type(ours[flavour]) is type(theirs[flavour]) and ours[{"args": "cfg", "cfg": "args"}[flavour]] is None
    again, before = (read_checkpoint(path)[flavour] for path in (tmp_path / "again.pt", file))
    heads = again.pop("kosmosg")
    assert again == before and heads["vision_heads"] == recording.config["vision"]["heads"]
    # and to the same folder, without flags for heads
    convert_checkpoint(
        tmp_path / "again.pt",
        tmp_path / "again",
        decoder=None if checkpoint == "stage1" else recording.stable_diffusion,
        spm=folder / "tokenizer" / SENTENCEPIECE_FILE,
        dictionary=folder / "tokenizer" / DICTIONARY_FILE,
    )
    assert weights_of(tmp_path / "again") == weights_of(folder)
    for config in folder.rglob("*.json"):
        if config.name != "conversion.json":
            assert (tmp_path / "again" / config.relative_to(folder)).read_text() == config.read_text()


def test_the_recorded_model_computes_the_same_bits(recording, converted):
    ours, theirs = KosmosG.from_pretrained(converted("final")), recording.load("final").model
    assert dict(ours.mllm.config)["vision_config"] == dict(theirs.mllm.config)["vision_config"]
    with torch.no_grad():
        for name in ("interleaved", "text_long", "sample"):
            conditions = (model.condition(recording.prompts(name)).states for model in (ours, theirs))
            assert torch.equal(*conditions)
        assert torch.equal(ours.null_condition().states, theirs.null_condition().states)


def test_training_starts_from_a_recorded_checkpoint(recording, converted, tmp_path):
    llm, vision = recording.config["llm"], recording.config["vision"]
    sizes = {"width": llm["dim"], "layers": llm["layers"], "heads": llm["heads"], "ffn_width": llm["ffn"]}
    tower = {key: vision[key] for key in ("image_size", "patch_size", "width", "layers", "heads")}
    tower["ffn_width"] = round(vision["width"] * vision["mlp_ratio"])
    mllm = MLLMConfig(**sizes, image_tokens=llm["latent_query_num"], vision=VisionConfig(**tower))
    config = ModelConfig(tokenizer="", image_decoder="", mllm=mllm)
    tokenizer = Tokenizer.from_pretrained(converted("stage1") / "tokenizer")
    ours = build_mllm(config, tokenizer, init_from=converted("stage1")).state_dict()
    theirs = recording.load("stage1").mllm.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # and the image tower of a public CLIP is one that stage 1 may start from
    clip, options = recording.folder / "model/vit_pretrained.pt", {"vision_heads": vision["heads"]}
    record = convert_checkpoint(clip, tmp_path / "clip", **options)
    assert record["left_out"] == ["logit_scale", "text_projection", "visual.proj"]
    config.vision_weights = str(tmp_path / "clip")
    with torch.no_grad():
        tokens = build_mllm(config, tokenizer).vision(recording.inputs["interleaved.images"][:2])
    recording.assert_activation(tokens, "vit_pretrained.tokens")


def test_own_save_pretrained_writes_the_same(stage2, plain, tiny_pipeline, tiny_stable_diffusion, tmp_path):
    for name in ("mllm", "aligner", "unet", "vae", "scheduler", "tokenizer"):
        for file in (tiny_pipeline / name).iterdir():
            ours = plain / name / file.name
            same = read_json(ours) == read_json(file) if file.suffix == ".json" else None
            assert same or ours.read_bytes() == file.read_bytes(), file
    assert read_json(plain / "model_index.json") == read_json(tiny_pipeline / "model_index.json")
    pipe = KosmosGPipeline.from_pretrained(plain)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    settings = {"final_sigmas_type": "sigma_min", "beta_start": 0.00085, "beta_schedule": "scaled_linear"}
    assert settings.items() <= dict(pipe.scheduler.config).items()
    assert pipe("a dog", num_inference_steps=1, output_type="np").images.shape[0] == 1
    record = convert_checkpoint(stage2, tmp_path / "two", decoder=tiny_stable_diffusion)
    assert record["decoder"]["unet"] == "taken from it" and record["pipeline"]
    CLIPTextModel.from_pretrained(tmp_path / "two" / "text_encoder").save_pretrained(tmp_path / "text_encoder")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "text_encoder" / name).read_bytes() == (tmp_path / "two/text_encoder" / name).read_bytes()
    # N's weights come back, and the U-Net and VAE, which released checkpoints of stage 2 lack, do not
    done = export_checkpoint(tmp_path / "two", tmp_path / "two.pt")
    assert done["stage"] == "stage2" and done["left_out"] == ["unet", "vae"]
    ours, theirs = load(tmp_path / "two.pt")["model"], load(stage2)["model"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_dtypes(final, plain, tiny_stable_diffusion, tmp_path, changed, monkeypatch):
    def halve(checkpoint):
        checkpoint["model"] = {name: tensor.half() for name, tensor in checkpoint["model"].items()}

    options = {"decoder": tiny_stable_diffusion}
    half = changed(halve)
    record = convert_checkpoint(half, tmp_path / "half", **options)
    assert {part["dtype"] for part in record["parts"].values()} == {"float16"}
    assert record["decoder"]["unet"] == record["decoder"]["vae"] == "bit-equal after rounding to float16"
    monkeypatch.setattr(weights, "CHUNK_BYTES", 200_000)  # tensors are compared and cast in several groups
    convert_checkpoint(final, tmp_path / "cast", dtype="float16", **options)
    assert weights_of(tmp_path / "half") == weights_of(tmp_path / "cast") != weights_of(plain)
    export_checkpoint(tmp_path / "half", tmp_path / "half.pt")
    ours, theirs = load(tmp_path / "half.pt")["model"], load(half)["model"]
    assert all(ours[name].dtype == torch.float16 and torch.equal(ours[name], theirs[name]) for name in theirs)


def test_old_names_in_checkpoint_and_decoder(plain, changed, tiny_stable_diffusion, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(state, prefix=""):
        for name in [name for name in state if name.startswith(f"{prefix}") and ".attentions." in name]:
            for new, theirs in old.items():
                if f".{new}." in name:
                    state[name.replace(f".{new}.", f".{theirs}.")] = state.pop(name)

    aged = changed(lambda checkpoint: age(checkpoint["model"], "vae.vae."))
    assert any(".proj_attn." in name for name in torch.load(aged, weights_only=True)["model"])
    decoder = shutil.copytree(tiny_stable_diffusion, tmp_path / "decoder")
    (decoder / "vae/diffusion_pytorch_model.safetensors").unlink()
    vae = load_file(tiny_stable_diffusion / "vae/diffusion_pytorch_model.safetensors")
    age(vae)
    torch.save(vae, decoder / "vae/diffusion_pytorch_model.bin")
    record = convert_checkpoint(aged, tmp_path / "aged", decoder=decoder)
    assert record["decoder"]["vae"] == "bit-equal"
    assert weights_of(tmp_path / "aged") == weights_of(plain)


def test_what_the_decoder_gives_and_what_is_left_to_it(final, stage2, plain, changed, tiny_stable_diffusion, tmp_path):
    bare, options = without("diffusion_unet.", "vae."), {"decoder": tiny_stable_diffusion}
    record = convert_checkpoint(changed(bare), tmp_path / "bare")
    assert list(record["parts"]) == ["mllm", "aligner"] and not record["pipeline"]
    convert_checkpoint(changed(bare), tmp_path / "filled", **options)
    assert weights_of(tmp_path / "filled") == weights_of(plain)
    record = convert_checkpoint(changed(without("aligner.clip_encoder."), of=stage2), tmp_path / "without text")
    assert list(record["parts"]) == ["mllm", "aligner", "aligner_decoder"] and record["decoder"] is None
    assert not (tmp_path / "without text" / "model_index.json").exists() and not record["pipeline"]
    empty = shutil.copytree(tiny_stable_diffusion, tmp_path / "empty")
    for file in empty.rglob("*.safetensors"):
        file.unlink()
    assert convert_checkpoint(final, tmp_path / "out", decoder=empty)["decoder"]["unet"] == "not compared"
    tuned = changed(lambda checkpoint: checkpoint["model"]["diffusion_unet.unet.conv_out.bias"].add_(1))
    record = convert_checkpoint(tuned, tmp_path / "tuned", **options)
    assert record["decoder"]["unet"].startswith("1 of ") and record["decoder"]["vae"] == "bit-equal"


def test_published_configurations_are_stable_diffusion_v1_5():
    """Parameter counts of the released-code.md, "keys_full.json"."""
    counts = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert {
        part: sum(p.numel() for p in build(part, CONFIGS[STABLE_DIFFUSION_1_5][part]).parameters()) for part in counts
    } == counts


def test_a_decoder_on_the_hub_and_the_card(final, plain, tiny_stable_diffusion, tmp_path, monkeypatch):
    def fetch(name, allow_patterns):
        if name != "someone/stable-diffusion":
            raise huggingface_hub.errors.LocalEntryNotFoundError("the hub was not reached")
        assert "unet/config.json" in allow_patterns
        return str(tiny_stable_diffusion)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    record = convert_checkpoint(final, tmp_path / "out", decoder="someone/stable-diffusion")
    card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "someone/stable-diffusion"
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "image-to-image"
    for told in (record["source"]["sha256"], "checkpoint.pt", "licence", "KosmosGPipeline.from_pretrained"):
        assert told in card.text
    of_this_disk = huggingface_hub.ModelCard.load(plain / "README.md")
    assert of_this_disk.data.base_model is None  # a folder on this disk is no model of the hub
    with pytest.raises(ConversionError, match=r"--decoder 'someone/else' is not a folder.*the hub was not reached"):
        convert_checkpoint(final, tmp_path / "none", decoder="someone/else")


def test_a_run_folder_is_exported_and_comes_back(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "run" / "model")
    done = export_checkpoint(tmp_path / "run", tmp_path / "run.pt")
    assert done["stage"] == "final" and set(done["parts"]) == {"mllm", "aligner"} and done["left_out"] == []
    content, sizes = load(tmp_path / "run.pt"), tiny.mllm_sizes()
    header = content["cfg"]
    assert header["model"]["decoder_attention_heads"] == sizes["heads"]
    assert header["model"]["latent_query_num"] == header["task"]["image_token_length"] == sizes["image_tokens"]
    assert header["kosmosg"] == {"vision_heads": 2, "aligner_heads": 2}
    mllm, aligner = (load_part(kind, tiny_model / name) for kind, name in ((MLLM, "mllm"), (AlignerEncoder, "aligner")))
    assert torch.equal(content["model"]["img_connector.latent_query"], mllm.resampler.latents)
    assert torch.equal(content["model"]["aligner.encoder_query"], aligner.queries)
    for name in (SENTENCEPIECE_FILE, DICTIONARY_FILE):
        shutil.copy(tiny_model / "tokenizer" / name, tmp_path)
    convert_checkpoint(tmp_path / "run.pt", tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tiny_model)
    for part in ("mllm", "aligner"):
        assert read_json(tmp_path / "out" / part / "config.json") == read_json(tiny_model / part / "config.json")


def test_parts_in_several_files_are_exported_whole(tiny_pipeline, tmp_path, final):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "sharded")
    shutil.rmtree(folder / "unet")
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    export_checkpoint(folder, tmp_path / "out.pt")
    ours, whole = load(tmp_path / "out.pt")["model"], load(final)["model"]
    assert all(torch.equal(ours[name], whole[name]) for name in whole) and len(ours) == len(whole)


def other_mllm(vision=None, **changes):
    def edit(folder):
        vocabulary, sizes = len(Tokenizer.from_pretrained(folder / "tokenizer")), tiny.mllm_sizes()
        sizes |= {"vision_config": {**sizes["vision_config"], **(vision or {})}, **changes}
        MLLM(vocab_size=vocabulary, **sizes).save_pretrained(folder / "mllm")

    return edit


def deeper(folder):
    file = folder / "aligner" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder_layers": 3}))


def linear(folder):
    shutil.rmtree(folder / "aligner")
    LinearAligner(tiny.WIDTH, tiny.CONDITION_WIDTH, tiny.QUERIES).save_pretrained(folder / "aligner")


NO_EXPORT = {
    "xpos": (other_mllm(xpos=True), "xpos=True is not exported"),
    "gelu": (other_mllm(vision={"hidden_act": "gelu"}), "hidden_act='gelu' is not exported"),
    "sizes": (deeper, r"aligner do not fit its sizes: \d+ missing"),
    "no weights": (lambda folder: (folder / "aligner" / "diffusion_pytorch_model.safetensors").unlink(), "no weights"),
    "linear": (linear, "a LinearAligner, which released checkpoints have no place for"),
}


@pytest.mark.parametrize("case", NO_EXPORT)
def test_what_cannot_be_exported(case, tiny_model, tmp_path):
    edit, message = NO_EXPORT[case]
    folder, file = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "out.pt"
    edit(folder)
    file.write_text("mine")
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(folder, file, overwrite=True)
    assert file.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.pt"]


def test_places_of_an_export_and_its_interruption(tiny_model, tmp_path, monkeypatch):
    file = tmp_path / "out.pt"
    file.write_text("mine")
    for source, target, options, error, message in (
        (tmp_path, tmp_path / "new.pt", {}, FileNotFoundError, "holds no model"),
        (tiny_model, file, {}, ConversionError, r"out\.pt' exists"),
        (tiny_model, tmp_path, {"overwrite": True}, ConversionError, "is a folder; name the file"),
    ):
        with pytest.raises(error, match=message):
            export_checkpoint(source, target, **options)

    def interrupt(content, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_model, file, overwrite=True)
    assert file.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out.pt"]
    monkeypatch.undo()
    export_checkpoint(tiny_model, file, overwrite=True)
    assert set(load(file)) == TOP and [path.name for path in tmp_path.iterdir()] == ["out.pt"]
