"""Back to the released layout: bit for bit, both ways."""

import argparse
import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel

from kosmosg.conversion import ConversionError, convert_checkpoint, export_checkpoint, read_checkpoint
from kosmosg.models.aligner import AlignerEncoder
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import load_part
from kosmosg.tokenizer import Tokenizer
from tests import tiny
from tests.kosmosg.conversion.conftest import weights_of
from tests.kosmosg.conversion.test_convert import PARTS, convert_golden

MEANINGLESS = "gpt_model.decoder.embed_positions._float_tensor"
TOP = ["args", "cfg", "model", "criterion", "optimizer_history", "task_state", "extra_state", "last_optimizer_state"]


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("checkpoint", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_released_to_folder_to_released(recording, checkpoint, dtype, tmp_path):
    theirs = load(recording.folder / "model" / f"checkpoint_{checkpoint}.pt")
    theirs["model"] = {name: tensor.to(dtype) for name, tensor in theirs["model"].items()}
    record = convert_golden(recording, checkpoint, tmp_path / "out", dtype=str(dtype).removeprefix("torch."))
    done = export_checkpoint(tmp_path / "out", tmp_path / "again.pt")
    ours = load(tmp_path / "again.pt")
    assert set(ours) == set(TOP) and done["stage"] == checkpoint
    assert set(ours["model"]) == set(theirs["model"])
    for name, tensor in theirs["model"].items():
        assert ours["model"][name].dtype == tensor.dtype and ours["model"][name].shape == tensor.shape
        assert name == MEANINGLESS or torch.equal(ours["model"][name], tensor), name
    tied = [ours["model"][f"gpt_model.decoder.{name}.weight"] for name in ("embed_tokens", "output_projection")]
    assert tied[0].data_ptr() == tied[1].data_ptr()  # one tensor, saved once
    # the header is of the same flavour and tells the same, and the heads that it had no place for
    flavour = record["header"]["flavour"]
    assert type(ours[flavour]) is type(theirs[flavour]) and ours[{"args": "cfg", "cfg": "args"}[flavour]] is None
    again, before = (read_checkpoint(path)[flavour] for path in
                     (tmp_path / "again.pt", recording.folder / "model" / f"checkpoint_{checkpoint}.pt"))  # fmt: skip
    heads = again.pop("kosmosg")
    assert again == before and heads["vision_heads"] == recording.config["vision"]["heads"]


@pytest.mark.parametrize("checkpoint", PARTS)
def test_folder_to_released_to_folder(recording, checkpoint, tmp_path, golden):
    convert_golden(recording, checkpoint, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "again.pt")
    decoder = None if checkpoint == "stage1" else recording.stable_diffusion
    tokenizer = tmp_path / "out" / "tokenizer"
    convert_checkpoint(
        tmp_path / "again.pt",
        tmp_path / "again",
        decoder=decoder,
        spm=tokenizer / "sentencepiece.bpe.model",
        dictionary=tokenizer / "dict.txt",
    )  # no flags for heads: the export noted them
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "again")
    for config in (tmp_path / "out").rglob("*.json"):
        if config.name != "conversion.json":
            assert (tmp_path / "again" / config.relative_to(tmp_path / "out")).read_text() == config.read_text()


def test_a_run_folder(tiny_model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "model")
    done = export_checkpoint(run, tmp_path / "run.pt")
    assert done == {"stage": "final", "parts": done["parts"], "left_out": []} and set(done["parts"]) == {
        "mllm",
        "aligner",
    }
    header = load(tmp_path / "run.pt")["cfg"]
    sizes = tiny.mllm_sizes()
    assert header["model"]["decoder_attention_heads"] == sizes["heads"]
    assert header["model"]["latent_query_num"] == header["task"]["image_token_length"] == sizes["image_tokens"]
    assert header["kosmosg"] == {"vision_heads": 2, "aligner_heads": 2}
    for name in ("sentencepiece.bpe.model", "dict.txt"):
        shutil.copy(tiny_model / "tokenizer" / name, tmp_path)
    convert_checkpoint(tmp_path / "run.pt", tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tiny_model)
    for part in ("mllm", "aligner"):
        once, again = (
            json.loads((folder / part / "config.json").read_text()) for folder in (tiny_model, tmp_path / "out")
        )
        assert once == again


def test_stage_2_with_a_unet_leaves_it_out(stage2, tiny_stable_diffusion, tmp_path):
    convert_checkpoint(stage2, tmp_path / "out", decoder=tiny_stable_diffusion)
    done = export_checkpoint(tmp_path / "out", tmp_path / "out.pt")
    assert done["stage"] == "stage2" and done["left_out"] == ["unet", "vae"]
    assert set(load(tmp_path / "out.pt")["model"]) == set(load(stage2)["model"])


def saved(folder, tokenizer, mllm_options=None, vision_options=None):
    sizes = tiny.mllm_sizes()
    sizes |= {"vision_config": {**sizes["vision_config"], **(vision_options or {})}, **(mllm_options or {})}
    words = Tokenizer.from_pretrained(tokenizer)
    MLLM(vocab_size=len(words), **sizes).save_pretrained(folder / "mllm")
    words.save_pretrained(folder / "tokenizer")
    return folder


def test_what_the_released_code_would_compute_otherwise(tiny_tokenizer, tmp_path):
    with pytest.raises(ConversionError, match="xpos=True is not exported"):
        export_checkpoint(saved(tmp_path / "xpos", tiny_tokenizer, {"xpos": True}), tmp_path / "out.pt")
    gelu = saved(tmp_path / "gelu", tiny_tokenizer, vision_options={"hidden_act": "gelu"})
    with pytest.raises(ConversionError, match="hidden_act='gelu' is not exported"):
        export_checkpoint(gelu, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_files_and_folders_that_do_not_serve(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        export_checkpoint(tmp_path, tmp_path / "out.pt")
    file = tmp_path / "out.pt"
    file.write_text("mine")
    with pytest.raises(ConversionError, match=r"out\.pt' exists"):
        export_checkpoint(tiny_model, file)
    assert file.read_text() == "mine"
    with pytest.raises(ConversionError, match="is a folder; name the file"):
        export_checkpoint(tiny_model, tmp_path, overwrite=True)
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    config = damaged / "aligner" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "decoder_layers": 3}))
    with pytest.raises(ConversionError, match=r"aligner do not fit its sizes: \d+ missing"):
        export_checkpoint(damaged, file, overwrite=True)
    (damaged / "aligner" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"aligner' has a config\.json but no weights"):
        export_checkpoint(damaged, file, overwrite=True)
    assert file.read_text() == "mine"
    export_checkpoint(tiny_model, file, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "out.pt"]


def test_an_interruption_leaves_the_old_file(tiny_model, tmp_path, monkeypatch):
    file = tmp_path / "out.pt"
    file.write_text("mine")

    def interrupt(content, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_model, file, overwrite=True)
    assert file.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out.pt"]


def test_sharded_parts(tiny_pipeline, tmp_path, final):
    """Parts that diffusers wrote in several files."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_pipeline, folder)
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").save_pretrained(
        folder / "unet", max_shard_size="200KB"
    )
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    export_checkpoint(folder, tmp_path / "out.pt")
    ours, whole = load(tmp_path / "out.pt")["model"], load(final)["model"]
    assert all(torch.equal(ours[name], whole[name]) for name in whole) and len(ours) == len(whole)


def test_what_is_exported_is_what_was_trained(tiny_model, tmp_path):
    export_checkpoint(tiny_model, tmp_path / "out.pt")
    state = load(tmp_path / "out.pt")["model"]
    mllm, aligner = (load_part(kind, tiny_model / name) for kind, name in ((MLLM, "mllm"), (AlignerEncoder, "aligner")))
    assert torch.equal(state["img_connector.latent_query"], mllm.resampler.latents)
    assert torch.equal(state["aligner.encoder_query"], aligner.queries)
