"""Kosmos-2 of transformers becomes a model folder that computes the same bits and numbers text the same way."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig, Kosmos2VisionConfig

from kosmosg.cli import main
from kosmosg.conversion import ConversionError, convert_checkpoint, export_checkpoint, inspect_model
from kosmosg.conversion.kosmos2 import HEAD, kosmos2_name, kosmos2_place, kosmos2_sizes
from kosmosg.conversion.parts import build
from kosmosg.models.build import vision_config
from kosmosg.models.mllm import MLLM
from kosmosg.models.model_config import MLLMConfig
from kosmosg.prompt import PromptBatch, parse_prompt
from kosmosg.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from tests import tiny
from tests.kosmosg.conversion.conftest import weights_of

WEIGHTS = "model.safetensors"
FC1 = "text_model.model.layers.1.ffn.fc1.weight"
EMBEDDING = "text_model.model.embed_tokens.weight"
TEXTS = [
    *tiny.SENTENCES,
    "A photo of a dog, 3.5 times as big!",
    "  two  blanks,\ttab\nand line ",
    "ＦＵＬＬ width ﬁsh … “quoted” naïve café",
    "語 unknown 漢字 in the garden 🐟",
    "it's a well-known (red) fish; isn't it?",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_tokenizer):
    return tiny.write_kosmos2(tmp_path_factory.mktemp("kosmos2"), tiny_tokenizer)


@pytest.fixture(scope="module", params=[False, True], ids=["dropped", "kept"])
def converted(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "lm"
    convert_checkpoint(source, folder, keep_grounding=request.param)
    return folder


# An image in the middle, two at the ends, none; each `<i>` is one.
PROMPTS = ["a photo of <i> on the beach, a dog sleeps beside the boat", "<i> and <i>", "a fish in the garden"]


def prompts(mllm: MLLM, folder) -> PromptBatch:
    """`PROMPTS` with random images, padded on the right."""
    encoder = mllm.encoder(Tokenizer.from_pretrained(folder / "tokenizer"))
    images = [torch.randn(text.count("<i>"), 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) for text in PROMPTS]
    return encoder.collate([encoder(parse_prompt(*prompt)) for prompt in zip(PROMPTS, images, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits(dtype, source, converted):
    # Both call the same attention; transformers' "eager" one multiplies in another order and differs by 1e-6.
    theirs = Kosmos2ForConditionalGeneration.from_pretrained(source, attn_implementation="sdpa", dtype=dtype)
    theirs, ours = theirs.eval(), MLLM.from_pretrained(converted / "mllm", torch_dtype=dtype).eval()
    batch = prompts(ours, converted)
    with torch.no_grad():
        expected = theirs(
            pixel_values=batch.images.to(dtype),
            input_ids=batch.ids,
            attention_mask=(~batch.padding).long(),
            image_embeds_position_mask=batch.image_mask.long(),
        )
        assert torch.equal(ours.image_features(batch.images), expected.image_embeds)
        logits = ours.logits(ours(batch))
    assert batch.padding.any() and logits.shape[-1] == ours.config.vocab_size
    assert torch.equal(logits[~batch.padding], expected.logits[..., : logits.shape[-1]][~batch.padding])


def test_the_same_ids(source, converted):
    theirs, ours = Kosmos2Processor.from_pretrained(source), Tokenizer.from_pretrained(converted / "tokenizer")
    numbers = theirs.tokenizer.get_vocab()
    assert len(ours) in (len(numbers), len(numbers) - 10) and [numbers[symbol] for symbol in ours.symbols] == [
        *range(len(ours))
    ]
    for text in TEXTS:
        assert ours.encode(text) == theirs.tokenizer(text, add_special_tokens=False).input_ids, text
    mllm = MLLM.from_pretrained(converted / "mllm")
    tokens = "<image>" * (1 + tiny.IMAGE_TOKENS) + "</image>"
    written = [f"<s>{text.replace('<i>', tokens)}" for text in PROMPTS]
    batch, expected = prompts(mllm, converted), theirs.tokenizer(written, add_special_tokens=False, padding=True)
    assert batch.ids.tolist() == expected.input_ids and (~batch.padding).long().tolist() == expected.attention_mask
    # and their processor, which puts one image first, with the ids after <unk> in its place
    image = Image.new("RGB", (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), "red")
    row = mllm.encoder(ours)([image, tiny.SENTENCES[0]])
    expected = theirs(images=image, text=tiny.SENTENCES[0], num_image_tokens=tiny.IMAGE_TOKENS, return_tensors="pt")
    assert torch.equal(row.image_mask, expected.image_embeds_position_mask[0].bool())
    assert torch.equal(row.ids[~row.image_mask], expected.input_ids[0][~row.image_mask])
    assert torch.allclose(row.images[0], expected.pixel_values[0], atol=1e-6)


def test_all_885_tensors_and_the_published_sizes():
    config = Kosmos2Config()
    with torch.device("meta"):
        theirs = Kosmos2ForConditionalGeneration(config).state_dict()
    ours = build("mllm", kosmos2_sizes(config)).state_dict()
    shapes = {kosmos2_place(name): tensor.shape for name, tensor in theirs.items() if name != HEAD}
    assert len(theirs) - 1 == len(shapes) == 885 and shapes == {name: tensor.shape for name, tensor in ours.items()}
    assert all(kosmos2_place(kosmos2_name(name)) == name for name in ours)
    published = MLLMConfig()
    sizes = kosmos2_sizes(config)
    assert sizes.pop("vision_config") == vision_config(published.vision)
    assert sizes.pop("vocab_size") == 64_007 + 1030 and (sizes.pop("pad_id"), sizes.pop("bos_id")) == (1, 0)
    assert sizes == {key: getattr(published, key) for key in sizes}


def test_the_command(source, converted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(source), "lm", "--dtype", "bfloat16"]) == 0
    record = json.loads((tmp_path / "lm/conversion.json").read_text())
    words = record["vocabulary"]
    assert record["left_out"] == [f"rows {words} to {words + 9} of '{EMBEDDING}' (grounding)"]
    assert record["decided"]["mllm.heads"] == "2, from config.json" and record["source"]["file"].endswith(WEIGHTS)
    assert "licence of these weights is that of Kosmos-2 (MIT for" in (tmp_path / "lm/README.md").read_text()
    found = inspect_model(tmp_path / "lm")
    assert found["dtype"] == "bfloat16" and found["vocabulary"] == words == found["sizes"]["mllm"]["vocab_size"]
    # and the released code's layout, from which the same folder comes back
    convert_checkpoint(source, tmp_path / "plain")
    export_checkpoint(tmp_path / "plain", tmp_path / "stage1.pt")
    files = {"spm": source / SENTENCEPIECE_FILE, "dictionary": tmp_path / "plain/tokenizer/dict.txt"}
    convert_checkpoint(tmp_path / "stage1.pt", tmp_path / "again", **files)
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "plain")
    assert main(["convert", str(source), "lm"]) == 2 and "exists" in capsys.readouterr().err
    assert main(["convert", str(source), "kept", "--keep-grounding"]) == 0
    with pytest.raises(ConversionError, match="has grounding tokens, for which the released code has no ids"):
        export_checkpoint("kept", "kept.pt")


def test_shards_and_a_hub_id(source, tiny_tokenizer, tmp_path, monkeypatch):
    shards = tiny.write_kosmos2(tmp_path / "shards", tiny_tokenizer, max_shard_size="50KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    for name, given in (("one", source), ("many", shards)):
        record = convert_checkpoint(given, tmp_path / name)
    assert "model-00002-of-" in record["source"]["file"]
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "many")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="'nobody/kosmos-2' is not a folder and cannot be downloaded"):
        convert_checkpoint("nobody/kosmos-2", "hub")
    for missing in ("nobody/stage1.pt", "one/kosmos-2"):  # files, by their suffix and by the folder that is there
        with pytest.raises(FileNotFoundError):
            convert_checkpoint(missing, "hub")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(source)
    )
    record = convert_checkpoint("nobody/kosmos-2", "hub")
    assert asked == ["nobody/kosmos-2"] and record["source"]["file"] == f"nobody/kosmos-2: {WEIGHTS}"
    assert weights_of(tmp_path / "hub") == weights_of(tmp_path / "one")


def rewritten(name, change):
    """An edit of a JSON file."""

    def edit(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


def settings(**values):
    return rewritten("config.json", lambda config: config.update(values))


def text(**values):
    return rewritten("config.json", lambda config: config["text_config"].update(values))


def vision(**values):
    return rewritten("config.json", lambda config: config["vision_config"].update(values))


def tokens(change):
    return rewritten("tokenizer.json", change)


def tensors(change):
    def edit(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return edit


def put(name, tensor):
    return tensors(lambda state: state.update({name: tensor}))


def without(name):
    return lambda folder: (folder / name).rename(folder / "other")


def swapped(values):
    vocab = values["model"]["vocab"]
    vocab[4], vocab[5] = vocab[5], vocab[4]


def other_id(values):
    next(token for token in values["added_tokens"] if token["content"] == "<image>")["id"] = 99


DROPOUTS = {"activation_dropout": 0.1, "attention_dropout": 0.2, "layerdrop": 0.3}
LAYER_2 = FC1.replace(".1.", ".2.")
# What MLLM cannot compute, and the key that is named.
CANNOT = [
    (text(activation_function="relu"), r"text_config\.activation_function='relu' \(allowed: 'gelu'\)"),
    (text(activation_function="gelu_new"), "'gelu_new'"),
    (text(scale_embedding=False), r"text_config\.scale_embedding"),
    (text(layer_norm_eps=1e-6), r"text_config\.layer_norm_eps=1e-06"),
    (text(add_cross_attention=True), r"text_config\.add_cross"),
    (text(**DROPOUTS), r"activation_dropout=0\.1 .*layerdrop=0\.3 .*attention_dropout=0\.2 \(allowed: 0\.1\)"),
    (vision(layer_norm_eps=1e-6), r"vision_config\.layer_norm_eps"),
    (vision(hidden_act="silu"), r"vision_config\.hidden_act='silu' \(allowed: 'quick_gelu', 'gelu'\)"),
    (settings(tie_word_embeddings=False), "tie_word_embeddings=False"),
]
CASES = [
    *((edit, f"has settings that MLLM does not support: .*{told}") for edit, told in CANNOT),
    (settings(model_type="kosmos-2.5"), "model_type='kosmos-2.5'; allowed for a folder: 'kosmos-2'"),
    (settings(quantization_config={}), "quantization_config: its weights are quantized"),
    (text(layers="two"), "is not a configuration of Kosmos-2: .*layers"),
    (text(attention_heads=5), "no MLLM can be built from it: .*heads=5"),
    (text(pad_token_id=3), r"text_config\.pad_token_id=3; allowed: 1"),
    (text(embed_dim=64), r"do not fit its sizes: .*latent_query' \[4, 32\] for \[4, 64\]"),
    (text(vocab_size=50), r"it gives 73 ids; allowed: text_config\.vocab_size=50"),
    (text(vocab_size=90), rf"'{EMBEDDING}' \[83, 32\] for \[90, 32\]"),
    (vision(image_size=[64, 32]), r"vision_config\.image_size=\[64, 32\]"),
    (tensors(lambda s: s.pop(FC1)), f"1 missing, such as '{FC1}'"),
    (put(LAYER_2, torch.ones(64, 32)), rf"1 left over, such as '{LAYER_2}'"),
    (put("novel", torch.ones(1)), r"1 names are not those of a .* as \['novel'\]"),
    (put(FC1, torch.ones(2, 2)), rf"'{FC1}' \[2, 2\] for \[64, 32\]"),
    (put(FC1, torch.ones(64, 32, dtype=torch.int8)), rf"'{FC1}' is torch\.int8; allowed: float32"),
    (tensors(lambda s: s.update({HEAD: s[EMBEDDING] + 1})), f"'{HEAD}' differs from '{EMBEDDING}'"),
    (tensors(lambda s: s[FC1][0].fill_(torch.nan)), f"1 tensors are NaN or infinite, such as '{FC1}'"),
    (lambda folder: os.truncate(folder / WEIGHTS, 10_000), r"safetensors' is missing, truncated"),
    (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), r"only as pickles.*save_pretrained"),
    (without(WEIGHTS), "neither model.safetensors nor its index"),
    (without("config.json"), r"config\.json' does not exist, so its folder is not a Kosmos-2"),
    (without(SENTENCEPIECE_FILE), r"sentencepiece\.bpe\.model' does not exist"),
    (without("tokenizer.json"), r"states the ids of <s>, .*</line>.*Kosmos2Processor"),
    (lambda folder: (folder / SENTENCEPIECE_FILE).write_text("a"), "damaged or not a SentencePiece"),
    (tokens(swapped), r"2 ids of its tokenizer files .* is 4, expected 5"),
    (tokens(other_id), "1 ids of .*'<image>' is 99, expected 69"),
    (tokens(lambda values: values.pop("model")), r"tokenizer\.json' is not a tokenizer file"),
]


@pytest.mark.parametrize(("edit", "message"), CASES)
def test_what_does_not_fit_is_refused(edit, message, source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "kosmos2")
    edit(folder)
    with pytest.raises(ConversionError, match=message) as error:
        convert_checkpoint(folder, tmp_path / "out")
    assert str(folder) in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["kosmos2"]


def test_older_files(source, tmp_path):
    """Without defaults in config.json, with the tied matrix, and with the added ids in tokenizer_config.json."""
    folder = shutil.copytree(source, tmp_path / "kosmos2")
    config = json.loads((folder / "config.json").read_text())
    for part, legacy in (("text_config", Kosmos2TextConfig()), ("vision_config", Kosmos2VisionConfig())):
        config[part] = {k: v for k, v in config[part].items() if k == "model_type" or getattr(legacy, k) != v}
        config[part] |= {"bad_words_ids": None, "return_dict": True, "top_k": 50, "torch_dtype": None}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True, "torch_dtype": "float32"}))
    tensors(lambda state: state.update({HEAD: state[EMBEDDING].clone()}))(folder)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    (folder / "tokenizer.json").unlink()
    decoder = {str(token["id"]): {"content": token["content"]} for token in added}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert HEAD in convert_checkpoint(folder, tmp_path / "out")["left_out"]
    convert_checkpoint(source, tmp_path / "today")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "today")
    decoder["1"], decoder["2"] = decoder["2"], decoder["1"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(ConversionError, match=r"2 ids of its tokenizer files .*'<pad>' is 2, expected 1"):
        convert_checkpoint(folder, tmp_path / "other")


def test_flags_that_would_do_nothing(source, tmp_path):
    with pytest.raises(ConversionError, match="not a checkpoint, so --spm, --vision-heads does not apply"):
        convert_checkpoint(source, tmp_path / "out", spm="a", vision_heads=2)
