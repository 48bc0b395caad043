"""What does not fit is refused before anything is written; what fails while writing leaves nothing behind."""

import pickle
import re
import shutil

import pytest
import torch

from kosmosg.conversion import ConversionError, convert_checkpoint, export_checkpoint, inspect_model
from kosmosg.models.mllm import MLLM
from kosmosg.models.storage import load_part
from kosmosg.tokenizer import DICTIONARY_FILE, SENTENCEPIECE_FILE, Tokenizer
from tests import tiny
from tests.kosmosg.conversion.conftest import weights_of

EMBEDDING, PROJECTION = "gpt_model.decoder.embed_tokens.weight", "gpt_model.decoder.output_projection.weight"
FC1 = "gpt_model.decoder.layers.1.ffn.fc1.weight"


def model(edit):
    return lambda checkpoint: edit(checkpoint["model"])


def header(**values):
    return lambda checkpoint: checkpoint["cfg"]["model"].update(values)


def without(*prefixes):
    def edit(checkpoint):
        checkpoint["model"] = {n: tensor for n, tensor in checkpoint["model"].items() if not n.startswith(prefixes)}

    return edit


CASES = {
    "unknown name": (model(lambda m: m.update(novel=torch.ones(1))), "1 names .* as .'novel'"),
    "missing tensor": (model(lambda m: m.pop(FC1)), rf"mllm do not fit its sizes: 1 missing, as '{FC1}'"),
    "another shape": (
        model(lambda m: m.update({FC1: torch.ones(2, 2)})),
        rf"1 of another shape, as '{FC1}' \[2, 2\] for \[64, 32\]",
    ),
    "NaN": (
        model(lambda m: m[FC1].view(-1)[5:6].fill_(float("nan"))),
        "'decoder.layers.1.feed_forward.fc1.weight' has NaN or inf",
    ),
    "a layer more in the middle": (
        model(lambda m: m.update({FC1.replace(".1.", ".2."): torch.ones(64, 32)})),
        "decoder_layers=2 but the tensors 3",
    ),
    "missing size": (
        model(lambda m: m.pop("aligner.encoder_query")),
        r"aligner: the checkpoint lacks 'aligner\.encoder_query'",
    ),
    "untied": (model(lambda m: m.update({PROJECTION: m[EMBEDDING] + 1})), f"'{PROJECTION}' differs from '{EMBEDDING}'"),
    "no mllm": (without("gpt_model", "img_"), r"lacks the part mllm \(gpt_model\.\*.*it holds aligner, unet, vae"),
    "no aligner": (without("aligner"), r"lacks the part aligner .*it holds mllm, unet, vae"),
    "no unet, no decoder": (without("diffusion_unet"), None),
    "no heads": (
        lambda c: c["cfg"]["model"].pop("decoder_attention_heads"),
        r"decoder_attention_heads=None; it must be an integer",
    ),
    "heads that are text": (header(decoder_attention_heads="2"), r"decoder_attention_heads='2'; it must"),
    "heads that do not divide": (header(decoder_attention_heads=5), r"decoder_attention_heads=5 do not divide .* 32"),
    "another model's header": (header(decoder_embed_dim=2048), "decoder_embed_dim=2048 but the tensors have 32"),
    "no heads of the tower": (
        lambda c: c["cfg"].pop("kosmosg"),
        "vision: the header does not contain its heads, and its width 32 is not a multiple of 64.*give --vision-heads",
    ),
    "patches of no square": (
        model(lambda m: m.update({"img_model.visual.positional_embedding": torch.ones(16, 32)})),
        r"16 positions; allowed: 1 \+ a square",
    ),
    "states of another width": (
        model(lambda m: m.update({"aligner.encoder_proj.embed_tokens.weight": torch.ones(32, 16)})),
        "aligner is made for states 16 wide but the MLLM's are 32",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_does_not_fit(case, changed, tiny_stable_diffusion, tmp_path):
    edit, message = CASES[case]
    file = changed(edit)
    if message is None:  # the decoder gives what is missing
        convert_checkpoint(file, tmp_path / "out", decoder=tiny_stable_diffusion)
        return
    with pytest.raises(ConversionError, match=message) as error:
        convert_checkpoint(file, tmp_path / "out", decoder=tiny_stable_diffusion)
    assert str(file) in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


def test_heads_that_are_given(changed, tiny_stable_diffusion, tmp_path):
    file = changed(lambda checkpoint: checkpoint["cfg"].pop("kosmosg"))
    options = {"decoder": tiny_stable_diffusion, "vision_heads": 2}
    with pytest.raises(ConversionError, match=r"aligner: its heads.*give --aligner-heads"):
        convert_checkpoint(file, tmp_path / "out", **options)
    with pytest.raises(ConversionError, match=r"aligner: 5 heads \(from --aligner-heads\) do not divide its width 32"):
        convert_checkpoint(file, tmp_path / "out", aligner_heads=5, **options)
    record = convert_checkpoint(file, tmp_path / "out", aligner_heads=4, **options)
    assert record["decided"]["aligner.heads"] == "4, from --aligner-heads"


def test_a_tokenizer_that_is_missing_or_anothers(final, tmp_path, tiny_tokenizer, tiny_stable_diffusion):
    alone = tmp_path / "alone" / "checkpoint.pt"
    alone.parent.mkdir()
    shutil.copy(final, alone)
    spm, words = tiny_tokenizer / SENTENCEPIECE_FILE, tiny_tokenizer / DICTIONARY_FILE
    for given in ({}, {"spm": spm}, {"dictionary": words}):
        with pytest.raises(ConversionError, match=r"does not exist.*give --spm and --dict"):
            convert_checkpoint(alone, tmp_path / "out", decoder=tiny_stable_diffusion, **given)
    longer = tmp_path / "dict.txt"
    longer.write_text(words.read_text() + "another 1\n")
    ids = len(Tokenizer.from_pretrained(tiny_tokenizer))
    message = rf"dict\.txt' gives {ids + 1} ids but '{re.escape(EMBEDDING)}' has {ids} rows"
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(alone, tmp_path / "out", decoder=tiny_stable_diffusion, spm=spm, dictionary=longer)
    with pytest.raises(ConversionError, match="are not a tokenizer"):
        convert_checkpoint(alone, tmp_path / "out", decoder=tiny_stable_diffusion, spm=words, dictionary=words)
    for content in (b"", b"no model", spm.read_bytes()[:-100]):
        (tmp_path / "empty.model").write_bytes(content)
        with pytest.raises(ConversionError, match=r"empty\.model' is empty, damaged or not a SentencePiece model"):
            convert_checkpoint(alone, tmp_path / "out", spm=tmp_path / "empty.model", dictionary=words)
    assert not (tmp_path / "out").exists()
    convert_checkpoint(alone, tmp_path / "out", decoder=tiny_stable_diffusion, spm=spm, dictionary=words)


def test_another_stable_diffusion(final, changed, tmp_path, tiny_stable_diffusion):
    with pytest.raises(
        ConversionError, match=r"conditions are 32 wide but unet's cross_attention_dim is 768.*--decoder"
    ):
        convert_checkpoint(final, tmp_path / "out")  # v1.5's configuration
    other = tmp_path / "other"
    shutil.copytree(tiny_stable_diffusion, other)
    config = other / "unet" / "config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(
        ConversionError, match=r"unet do not fit its sizes: .*missing, as 'diffusion_unet\.unet\..*other'"
    ):
        convert_checkpoint(final, tmp_path / "out", decoder=other)
    config.write_text("{")
    with pytest.raises(ConversionError, match=r"unet/config\.json' is not valid JSON"):
        convert_checkpoint(final, tmp_path / "out", decoder=other)
    shutil.rmtree(other / "vae")
    with pytest.raises(ConversionError, match="is not a Stable Diffusion folder: vae missing"):
        convert_checkpoint(final, tmp_path / "out", decoder=other)
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_stable_diffusion, damaged)
    file = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConversionError, match=r"safetensors' is missing, truncated or not a safetensors file"):
        convert_checkpoint(final, tmp_path / "out", decoder=damaged)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
@pytest.mark.parametrize("content", [[1], {"a": 1}, {"state_dict": {"a": torch.ones(1)}}])
def test_a_pickle_among_the_parts(final, tmp_path, tiny_model, tiny_stable_diffusion, write, content):
    decoder, model = tmp_path / "decoder", tmp_path / "model"
    shutil.copytree(tiny_stable_diffusion, decoder)
    shutil.copytree(tiny_model, model)
    for part in (decoder / "unet", model / "mllm"):
        (part / "diffusion_pytorch_model.safetensors").unlink()
        with (part / "diffusion_pytorch_model.bin").open("wb") as file:
            write(content, file)
    reading = (
        lambda: convert_checkpoint(final, tmp_path / "out", decoder=decoder),
        lambda: inspect_model(model),
        lambda: export_checkpoint(model, tmp_path / "out.pt"),
        lambda: load_part(MLLM, model / "mllm"),
    )
    for read in reading:
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin' (is a|holds no)") as error:
            read()
        assert "weights_only" not in str(error.value) and "write" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder", "model"]


def test_flags_that_would_do_nothing(final, changed, tmp_path, tiny_stable_diffusion, golden):
    stage1 = changed(without("aligner", "diffusion_unet", "vae"))
    with pytest.raises(ConversionError, match=r"is of stage 1 and has no AlignerNet.*--decoder"):
        convert_checkpoint(stage1, tmp_path / "out", decoder=tiny_stable_diffusion)
    with pytest.raises(ConversionError, match="has no AlignerNet, so --aligner-heads does not apply"):
        convert_checkpoint(stage1, tmp_path / "out", aligner_heads=2)
    clip = golden / "model" / "vit_pretrained.pt"
    with pytest.raises(ConversionError, match="weights of CLIP, so --decoder, --spm does not apply"):
        convert_checkpoint(clip, tmp_path / "out", decoder=tiny_stable_diffusion, spm="a")
    with pytest.raises(ConversionError, match=r"vision: the header does not contain its heads.*--vision-heads"):
        convert_checkpoint(clip, tmp_path / "out")


def test_a_public_clip_that_lacks_a_tensor(golden, tmp_path):
    state = torch.load(golden / "model" / "vit_pretrained.pt", weights_only=True)
    del state["visual.transformer.resblocks.1.mlp.c_fc.bias"]
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ConversionError, match=r"1 missing, as 'visual\.transformer\.resblocks\.1\.mlp\.c_fc\.bias'"):
        convert_checkpoint(tmp_path / "clip.pt", tmp_path / "out", vision_heads=3)


def test_both_stages_in_one(final, stage2, changed, tmp_path, tiny_stable_diffusion):
    unet = {n: t for n, t in torch.load(final, weights_only=True)["model"].items() if n.startswith(("diff", "vae"))}
    with pytest.raises(ConversionError, match="no released checkpoint has both"):
        convert_checkpoint(changed(model(lambda m: m.update(unet)), of=stage2), tmp_path / "out")


def test_a_folder_that_exists(final, tmp_path, tiny_stable_diffusion):
    out, options = tmp_path / "out", {"decoder": tiny_stable_diffusion}
    convert_checkpoint(final, out, **options)
    with pytest.raises(ConversionError, match=r"out' exists; give another name, or --overwrite"):
        convert_checkpoint(final, out, **options)
    (out / "mllm" / "stale").write_text("")
    convert_checkpoint(final, out, overwrite=True, **options)
    assert not (out / "mllm" / "stale").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
    mistaken = tmp_path / "photographs"
    mistaken.mkdir()
    convert_checkpoint(final, mistaken, overwrite=True, **options)  # an empty folder holds nothing to lose
    shutil.rmtree(mistaken)
    mistaken.mkdir()
    (mistaken / "1.jpg").write_text("")
    with pytest.raises(ConversionError, match="photographs' is not a model folder"):
        convert_checkpoint(final, mistaken, overwrite=True, **options)
    shutil.copy(final, out / "checkpoint.pt")
    with pytest.raises(ConversionError, match=r"checkpoint\.pt' lies in '.*out', which --overwrite would replace"):
        convert_checkpoint(out / "checkpoint.pt", out, overwrite=True, **options)
    with pytest.raises(ConversionError, match=r"1\.jpg' is a file; name the folder"):
        convert_checkpoint(final, mistaken / "1.jpg", overwrite=True, **options)
    assert (mistaken / "1.jpg").exists() and (out / "checkpoint.pt").exists()


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_failing_half_way(failure, final, tmp_path, tiny_stable_diffusion, monkeypatch):
    out, options = tmp_path / "out", {"decoder": tiny_stable_diffusion}
    convert_checkpoint(final, out, **options)
    (out / "mine").write_text("")
    before = weights_of(out)

    def fail(self, folder):
        assert any(path.name.startswith(".") for path in tmp_path.iterdir())  # mllm/ and others are written already
        raise failure

    monkeypatch.setattr(Tokenizer, "save_pretrained", fail)
    with pytest.raises(type(failure)):
        convert_checkpoint(final, out, overwrite=True, **options)
    with pytest.raises(type(failure)):
        convert_checkpoint(final, tmp_path / "new", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert weights_of(out) == before and (out / "mine").exists()


def test_without_flags_the_heads_are_64_wide(tmp_path):
    """The released widths: 1024 / 64 = 16 and 768 / 64 = 12."""
    from kosmosg.conversion.checkpoint import Header

    header = Header("cfg", {})
    assert header.heads("vision", 1024, None, "--vision-heads") == 16
    assert header.heads("aligner", 768, None, "--aligner-heads") == 12
    assert tiny.WIDTH % 64 and header.heads("aligner", 768, 6, "--aligner-heads") == 6
