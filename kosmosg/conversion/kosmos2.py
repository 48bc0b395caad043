"""Kosmos-2 as transformers keeps it (microsoft/kosmos-2-patch14-224) → a model folder as after stage 1.

The two models are one computation. Kosmos-2's decoder and resampler keep the released code's names under other
prefixes; its vision encoder keeps CLIP's. Its vocabulary is ours and, behind it, tokens for grounding: phrases, objects
and the patches of an image.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import Kosmos2Config

from kosmosg.conversion.checkpoint import Header
from kosmosg.conversion.names import equal, our_name, released_name
from kosmosg.conversion.parts import RECORD, build, require_exact, write_part
from kosmosg.conversion.reader import ConversionError, find_folder, read_json
from kosmosg.conversion.record import PlannedPart, describe, model_card
from kosmosg.conversion.weights import DTYPES, Weights, open_weights, weight_files
from kosmosg.files import replaced, write_json, write_text
from kosmosg.models.build import LAYER_NORM_EPS
from kosmosg.models.model_config import ACTIVATIONS
from kosmosg.models.storage import CONFIG_FILE, is_finite
from kosmosg.tokenizer import LEADING_SYMBOLS, SENTENCEPIECE_FILE, TRAILING_SYMBOLS, Tokenizer

MODEL_TYPE = "kosmos-2"
ORIGIN = "Kosmos-2 (MIT for microsoft/kosmos-2-patch14-224)"
TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DOWNLOADED = [CONFIG_FILE, "model*.safetensors*", SENTENCEPIECE_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG]
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # a missing file, then, and no hub id

PREFIXES = {  # Kosmos-2's → the released code's, or ours where CLIP's names follow
    "text_model.model.": "gpt_model.decoder.",
    "image_to_text_projection.": "img_connector.",
    "vision_model.model.": "vision.clip.",
}
EMBEDDING, HEAD = "text_model.model.embed_tokens.weight", "text_model.lm_head.weight"
GROUNDING = ("<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>", "<grounding>")
PATCH = "<patch_index_{:04}>"  # follow the symbols above, as many as there are rows
NAMED = 5

# What MLLM computes without being told. Positions need no entry: the sinusoids are made to any length by both.
TEXT = {
    "activation_function": "gelu",
    "scale_embedding": True,
    "layer_norm_eps": LAYER_NORM_EPS,
    "activation_dropout": 0.0,
    "layerdrop": 0.0,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
VISION = {"num_channels": 3, "layer_norm_eps": LAYER_NORM_EPS, "attention_dropout": 0.0}


def is_kosmos2(checkpoint: str | Path) -> bool:
    """Whether what is to be converted is a folder or looks like a hub id."""
    path = Path(checkpoint)
    hub_id = not path.is_absolute() and len(path.parts) == 2 and path.suffix not in CHECKPOINT_SUFFIXES
    return path.is_dir() or (hub_id and not path.exists() and not path.parent.exists())


def convert_kosmos2(name: str | Path, target: Path, dtype: str | None, keep_grounding: bool) -> dict[str, Any]:
    """Write mllm/ and tokenizer/ into `target` and return what conversion.json records.

    Args:
        name: a folder with config.json, safetensors, sentencepiece.bpe.model and tokenizer.json or
            tokenizer_config.json; or a hub id.
        keep_grounding: keep the rows and symbols of the grounding tokens.

    Raises:
        ConversionError: a file is missing or no part of a Kosmos-2, a setting is one that MLLM cannot compute, an id is
            not where MLLM has it, or a tensor is missing, left over, of another shape or type, or not finite.
    """
    folder = find_folder(name, DOWNLOADED, "the Kosmos-2")
    config = read_config(folder / CONFIG_FILE)
    files, sizes = safetensors_files(folder), kosmos2_sizes(config)
    tokenizer = read_tokenizer(folder, config.text_config, keep_grounding)
    open_all = partial(open_kosmos2, files)
    weights = Weights.of(folder, open_all)
    try:
        model = build("mllm", sizes)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"'{folder / CONFIG_FILE}': no MLLM can be built of it: {error}") from error
    require_exact("mllm", model, weights, named=kosmos2_name)
    require_usable(weights)
    left_out = tied_head(files)
    if (kept := len(tokenizer)) < (rows := sizes["vocab_size"]):
        weights = Weights.of(folder, partial(first_rows, open_all, kept))
        model = build("mllm", {**sizes, "vocab_size": kept})
        left_out.append(f"rows {kept:,} to {rows - 1:,} of '{EMBEDDING}' (grounding)")
    decided = {f"mllm.{key}": f"{sizes[key]}, from {CONFIG_FILE}" for key in ("heads", "dropout")}
    decided["vision.heads"] = f"{sizes['vision_config']['num_attention_heads']}, from {CONFIG_FILE}"
    header = Header("cfg", {}, decided)
    record = {
        **describe(files, "stage1", header, {"mllm": PlannedPart(model, weights, "checkpoint")}, dtype),
        "left_out": left_out,
        "vocabulary": len(tokenizer),
        "decoder": None,
        "header": {"flavour": header.flavour, "values": header.values},
        "pipeline": False,
        "origin": ORIGIN,
    }
    shown = folder.resolve().name if Path(name).is_dir() else name
    record["source"]["file"] = f"{shown}: {record['source']['file']}"
    with replaced(target) as temporary:
        write_part(temporary / "mllm", model, weights, DTYPES.get(str(dtype)))
        tokenizer.save_pretrained(temporary / "tokenizer")
        write_json(temporary / RECORD, record)
        write_text(temporary / "README.md", model_card(record))
    return record


def read_config(file: Path) -> Kosmos2Config:
    """config.json, completed by transformers' defaults, which saved files leave out.

    Raises:
        ConversionError: names every setting that MLLM cannot compute, its value and what is allowed.
    """
    if not file.is_file():
        raise ConversionError(f"'{file}' does not exist, so its folder is no Kosmos-2; a checkpoint is one file.")
    values = read_json(file)
    if (found := values.get("model_type")) != MODEL_TYPE:
        raise ConversionError(f"'{file}' has model_type={found!r}; allowed for a folder: '{MODEL_TYPE}'.")
    if "quantization_config" in values:
        raise ConversionError(f"'{file}' has quantization_config: its weights are quantized; give the original ones.")
    try:
        config: Any = Kosmos2Config.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"'{file}' is no configuration of Kosmos-2: {error}") from error
    text, vision = config.text_config, config.vision_config
    # MLLM's one dropout is that of the attention weights too, as far as it drops them: in the resampler.
    allowed = [(text, key, (value,)) for key, value in {**TEXT, "attention_dropout": text.dropout}.items()]
    allowed += [(vision, key, (value,)) for key, value in VISION.items()]
    allowed += [(vision, "hidden_act", ACTIVATIONS), (config, "tie_word_embeddings", (True,))]
    wrong = [
        f"{f'{part.base_config_key}.' if part is not config else ''}{key}={getattr(part, key)!r} "
        f"(allowed: {', '.join(map(repr, choices))})"
        for part, key, choices in allowed
        if getattr(part, key) not in choices
    ]
    wrong += [
        f"vision_config.{key}={getattr(vision, key)!r} (allowed: one whole number)"
        for key in ("image_size", "patch_size")
        if not isinstance(getattr(vision, key), int)
    ]
    if wrong:
        raise ConversionError(f"'{file}' describes a model that MLLM cannot compute: {'; '.join(wrong)}.")
    return config


def kosmos2_sizes(config: Kosmos2Config) -> dict[str, Any]:
    """Arguments of `MLLM`, with all rows of the embedding."""
    settings: Any = config
    text, vision = settings.text_config, settings.vision_config
    fields = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    fields += ("intermediate_size", "hidden_act", "layer_norm_eps")
    return {
        "vocab_size": text.vocab_size,
        "width": text.embed_dim,
        "layers": text.layers,
        "heads": text.attention_heads,
        "ffn_width": text.ffn_dim,
        "image_tokens": settings.latent_query_num,
        "vision_config": {field: getattr(vision, field) for field in fields},
        "dropout": float(text.dropout),
        "xpos": False,
        "pad_id": text.pad_token_id,
        "bos_id": text.bos_token_id,
    }


def read_tokenizer(folder: Path, text: Any, keep_grounding: bool) -> Tokenizer:
    """The tokenizer of the folder's SentencePiece file.

    Raises:
        ConversionError: no such tokenizer, too few rows for it, or another id in config.json or the folder's own
            tokenizer files, which have to state those of all special symbols.
    """
    file = folder / SENTENCEPIECE_FILE
    if not file.is_file():
        raise ConversionError(f"'{file}' does not exist; it is the vocabulary of Kosmos-2's ids.")
    try:
        tokenizer = Tokenizer.from_sentencepiece(content := file.read_bytes())
        extra = text.vocab_size - len(tokenizer)
        if extra < 0:
            raise ValueError(f"it gives {len(tokenizer)} ids; allowed: text_config.vocab_size={text.vocab_size}.")
        patches = (PATCH.format(number) for number in range(extra))
        whole = Tokenizer.from_sentencepiece(content, [*GROUNDING, *patches][:extra])
    except ValueError as error:
        raise ConversionError(f"'{file}' is not the vocabulary of '{folder}': {error}") from error
    for key, number in (("pad", tokenizer.pad_id), ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if (found := getattr(text, f"{key}_token_id")) != number:
            raise ConversionError(
                f"'{folder / CONFIG_FILE}' has text_config.{key}_token_id={found!r}; allowed: {number}."
            )
    stated = stated_ids(folder)
    if absent := [symbol for symbol in (*LEADING_SYMBOLS, *TRAILING_SYMBOLS) if symbol not in stated]:
        raise ConversionError(
            f"'{folder}': neither {TOKENIZER_FILE} nor {TOKENIZER_CONFIG} states the ids of {', '.join(absent)}, which "
            "cannot be checked then. Load the folder with Kosmos2Processor and write it with save_pretrained."
        )
    wrong = [
        f"'{symbol}' is {found}, expected {place}"
        for place, symbol in enumerate(whole.symbols)
        if (found := stated.get(symbol, place)) != place
    ]
    if wrong:
        raise ConversionError(
            f"'{folder}': {len(wrong)} ids of its tokenizer files are not those of {SENTENCEPIECE_FILE} and Kosmos-2's "
            f"special symbols: {'; '.join(wrong[:NAMED])}."
        )
    return whole if keep_grounding else tokenizer


def stated_ids(folder: Path) -> dict[str, int]:
    """Ids by symbol in tokenizer.json (all of them) and tokenizer_config.json (added ones), where these exist."""
    ids: dict[str, int] = {}
    try:
        if (file := folder / TOKENIZER_FILE).is_file():
            values = read_json(file)
            ids |= {piece: place for place, (piece, _) in enumerate(values["model"]["vocab"])}
            ids |= {token["content"]: int(token["id"]) for token in values["added_tokens"]}
        if (file := folder / TOKENIZER_CONFIG).is_file():
            added = read_json(file).get("added_tokens_decoder", {})
            ids |= {token["content"]: int(number) for number, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"'{file}' is no tokenizer file of Kosmos-2: {error!r}") from error
    return ids


def safetensors_files(folder: Path) -> list[Path]:
    """Raises ConversionError: no weights, or pickled ones alone."""
    files = weight_files(folder)
    if files and all(file.suffix == ".safetensors" for file in files):
        return files
    if pickles := sorted(file.name for file in folder.glob("*.bin")):
        raise ConversionError(
            f"'{folder}' holds its weights as pickles alone ({', '.join(pickles[:NAMED])}), which may hold code and "
            "are not read. Where you trust them, load the folder with Kosmos2ForConditionalGeneration and "
            "write it with save_pretrained, which makes .safetensors files."
        )
    raise ConversionError(f"'{folder}' has a {CONFIG_FILE} but neither model.safetensors nor its index.")


def open_files(files: list[Path]) -> dict[str, Tensor]:
    """Mapped tensors by Kosmos-2's names. Raises ConversionError: a damaged file, or a name in two files."""
    found: dict[str, Tensor] = {}
    for file in files:
        opened = open_weights(file)
        if twice := sorted(found.keys() & opened.keys()):
            raise ConversionError(f"'{file}' holds '{twice[0]}', which another file of the folder holds too.")
        found |= opened
    return found


def tied_head(files: list[Path]) -> list[str]:
    """The output matrix's name where it is saved. Raises ConversionError: it is not the embedding."""
    found = open_files(files)
    head, embedding = found.get(HEAD), found[EMBEDDING]
    if head is not None and (head.shape != embedding.shape or not equal(head, embedding)):
        raise ConversionError(f"'{files[0].parent}': '{HEAD}' differs from '{EMBEDDING}', but the model ties them.")
    return [] if head is None else [HEAD]


def open_kosmos2(files: list[Path]) -> dict[str, Tensor]:
    """Mapped tensors by our names, without the output matrix. Raises ConversionError: also an unknown name."""
    found = open_files(files)
    named = {name: kosmos2_place(name) for name in found if name != HEAD}
    if unknown := sorted(name for name, ours in named.items() if ours is None):
        raise ConversionError(
            f"'{files[0].parent}': {len(unknown)} names are not those of a Kosmos-2, as {unknown[:NAMED]}."
        )
    return {str(ours): found[name] for name, ours in named.items()}


def kosmos2_place(name: str) -> str | None:
    """Our name in MLLM for one of Kosmos-2's; None where there is none."""
    for theirs, prefix in PREFIXES.items():
        if name.startswith(theirs):
            renamed = prefix + name.removeprefix(theirs)
            place = ("mllm", renamed) if renamed.startswith("vision.") else our_name(renamed)
            return place[1] if place else None
    return None


def kosmos2_name(name: str) -> str:
    """The inverse of `kosmos2_place`, for messages."""
    released = name if name.startswith("vision.") else released_name("mllm", name) or name
    for theirs, prefix in PREFIXES.items():
        if released.startswith(prefix):
            return theirs + released.removeprefix(prefix)
    return released


def require_usable(weights: Weights) -> None:
    """Raises ConversionError: names the first few tensors of another type, or with NaN or infinite values."""
    if typed := [name for name, dtype in weights.dtypes.items() if dtype not in DTYPES.values()]:
        name, dtype = kosmos2_name(typed[0]), weights.dtypes[typed[0]]
        raise ConversionError(f"'{weights.origin}': '{name}' is {dtype}; allowed: {', '.join(DTYPES)}.")
    broken = []
    for group in weights.chunks():
        opened = weights.open()
        broken += [f"'{kosmos2_name(name)}'" for name in group if not is_finite(opened[name])]
    if broken:
        raise ConversionError(
            f"'{weights.origin}': {len(broken)} tensors have NaN or infinite values, as {', '.join(broken[:NAMED])}."
        )


def first_rows(open_all: Callable[[], Mapping[str, Tensor]], rows: int) -> dict[str, Tensor]:
    """The tensors with only the first rows of the embedding."""
    return {name: t[:rows] if name == "decoder.embed_tokens.weight" else t for name, t in open_all().items()}
