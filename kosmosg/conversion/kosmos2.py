"""Convert Kosmos-2 of transformers (microsoft/kosmos-2-patch14-224) to a model folder of stage 1.

Both models compute the same. Tensors of the decoder and resampler have the names of the released code with other
prefixes, those of the vision encoder have CLIP's names. The vocabulary has additional grounding tokens at the end:
phrases, objects and image patches.
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
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # file names, not hub ids

PREFIXES = {  # Kosmos-2's prefix → that of the released code, or ours for the vision encoder
    "text_model.model.": "gpt_model.decoder.",
    "image_to_text_projection.": "img_connector.",
    "vision_model.model.": "vision.clip.",
}
EMBEDDING, HEAD = "text_model.model.embed_tokens.weight", "text_model.lm_head.weight"
GROUNDING = ("<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>", "<grounding>")
PATCH = "<patch_index_{:04}>"  # these follow the symbols above, up to the number of rows
NAMED = 5  # items listed in a message

# Settings that MLLM assumes. The maximum length is not among them: both models compute sinusoids of any length.
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
    """Return whether the source is a folder or looks like a hub id."""
    path = Path(checkpoint)
    hub_id = not path.is_absolute() and len(path.parts) == 2 and path.suffix not in CHECKPOINT_SUFFIXES
    return path.is_dir() or (hub_id and not path.exists() and not path.parent.exists())


def convert_kosmos2(name: str | Path, target: Path, dtype: str | None, keep_grounding: bool) -> dict[str, Any]:
    """Write mllm/ and tokenizer/ to `target` and return the content of conversion.json.

    Args:
        name: hub id, or folder with config.json, safetensors, sentencepiece.bpe.model and tokenizer.json or
            tokenizer_config.json.
        keep_grounding: keep the grounding tokens.

    Raises:
        ConversionError: a file is missing or not of a Kosmos-2, MLLM does not support a setting, an id differs from
            MLLM's, or a tensor is missing, left over, of another shape or type, or not finite.
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
        raise ConversionError(f"'{folder / CONFIG_FILE}': no MLLM can be built from it: {error}") from error
    require_exact("mllm", model, weights, named=kosmos2_name)
    require_usable(weights)
    left_out = tied_head(files)
    if (vocab_size := len(tokenizer)) < (rows := sizes["vocab_size"]):
        weights = Weights.of(folder, partial(first_rows, open_all, vocab_size))
        model = build("mllm", {**sizes, "vocab_size": vocab_size})
        left_out.append(f"rows {vocab_size:,} to {rows - 1:,} of '{EMBEDDING}' (grounding)")
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
    source = folder.resolve().name if Path(name).is_dir() else name
    record["source"]["file"] = f"{source}: {record['source']['file']}"
    with replaced(target) as temporary:
        write_part(temporary / "mllm", model, weights, DTYPES.get(str(dtype)))
        tokenizer.save_pretrained(temporary / "tokenizer")
        write_json(temporary / RECORD, record)
        write_text(temporary / "README.md", model_card(record))
    return record


def read_config(file: Path) -> Kosmos2Config:
    """Read config.json; transformers adds the defaults that saved files omit.

    Raises:
        ConversionError: MLLM does not support settings; names each with its value and what is allowed.
    """
    if not file.is_file():
        raise ConversionError(f"'{file}' does not exist, so its folder is not a Kosmos-2; a checkpoint is one file.")
    values = read_json(file)
    if (model_type := values.get("model_type")) != MODEL_TYPE:
        raise ConversionError(f"'{file}' has model_type={model_type!r}; allowed for a folder: '{MODEL_TYPE}'.")
    if "quantization_config" in values:
        raise ConversionError(f"'{file}' has quantization_config: its weights are quantized; give the original ones.")
    try:
        config: Any = Kosmos2Config.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"'{file}' is not a configuration of Kosmos-2: {error}") from error
    text, vision = config.text_config, config.vision_config
    # MLLM uses a single dropout rate, also for the resampler's attention weights.
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
        f"vision_config.{key}={getattr(vision, key)!r} (allowed: an integer)"
        for key in ("image_size", "patch_size")
        if not isinstance(getattr(vision, key), int)
    ]
    if wrong:
        raise ConversionError(f"'{file}' has settings that MLLM does not support: {'; '.join(wrong)}.")
    return config


def kosmos2_sizes(config: Kosmos2Config) -> dict[str, Any]:
    """Return the arguments of `MLLM`, with all rows of the embedding."""
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
    """Build the tokenizer from the folder's SentencePiece file and check its ids.

    Raises:
        ConversionError: the file is missing or invalid, the embedding has too few rows, or ids differ from those in
            config.json or the tokenizer files, which must contain all special symbols.
    """
    file = folder / SENTENCEPIECE_FILE
    if not file.is_file():
        raise ConversionError(f"'{file}' does not exist; it contains the vocabulary of Kosmos-2.")
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
        if (token_id := getattr(text, f"{key}_token_id")) != number:
            raise ConversionError(
                f"'{folder / CONFIG_FILE}' has text_config.{key}_token_id={token_id!r}; allowed: {number}."
            )
    stated = stated_ids(folder)
    if absent := [symbol for symbol in (*LEADING_SYMBOLS, *TRAILING_SYMBOLS) if symbol not in stated]:
        raise ConversionError(
            f"'{folder}': neither {TOKENIZER_FILE} nor {TOKENIZER_CONFIG} states the ids of {', '.join(absent)}, so "
            "they cannot be checked. Load the folder with Kosmos2Processor and write it with save_pretrained."
        )
    wrong = [
        f"'{symbol}' is {token_id}, expected {number}"
        for number, symbol in enumerate(whole.symbols)
        if (token_id := stated.get(symbol, number)) != number
    ]
    if wrong:
        raise ConversionError(
            f"'{folder}': {len(wrong)} ids of its tokenizer files are not those of {SENTENCEPIECE_FILE} and Kosmos-2's "
            f"special symbols: {'; '.join(wrong[:NAMED])}."
        )
    return whole if keep_grounding else tokenizer


def stated_ids(folder: Path) -> dict[str, int]:
    """Read the ids by symbol in tokenizer.json (all symbols) and tokenizer_config.json (added ones), if they exist."""
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
        raise ConversionError(f"'{file}' is not a tokenizer file of Kosmos-2: {error!r}") from error
    return ids


def safetensors_files(folder: Path) -> list[Path]:
    """Return the weights files. Raises ConversionError if there are none, or only pickles."""
    files = weight_files(folder)
    if files and all(file.suffix == ".safetensors" for file in files):
        return files
    if pickles := sorted(file.name for file in folder.glob("*.bin")):
        raise ConversionError(
            f"'{folder}' holds its weights only as pickles ({', '.join(pickles[:NAMED])}), which may contain code and "
            "are not loaded. If you trust them, load the folder with Kosmos2ForConditionalGeneration and write it with "
            "save_pretrained, which makes .safetensors files."
        )
    raise ConversionError(f"'{folder}' has a {CONFIG_FILE} but neither model.safetensors nor its index.")


def open_files(files: list[Path]) -> dict[str, Tensor]:
    """Memory-map the tensors by Kosmos-2's names. Raises ConversionError for damaged files and duplicate names."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        opened = open_weights(file)
        if twice := sorted(tensors.keys() & opened.keys()):
            raise ConversionError(f"'{file}' holds '{twice[0]}', which another file of the folder holds too.")
        tensors |= opened
    return tensors


def tied_head(files: list[Path]) -> list[str]:
    """Return the name of the output matrix if it is saved. Raises ConversionError if it is not the embedding."""
    tensors = open_files(files)
    head, embedding = tensors.get(HEAD), tensors[EMBEDDING]
    if head is not None and (head.shape != embedding.shape or not equal(head, embedding)):
        raise ConversionError(f"'{files[0].parent}': '{HEAD}' differs from '{EMBEDDING}', but the model ties them.")
    return [] if head is None else [HEAD]


def open_kosmos2(files: list[Path]) -> dict[str, Tensor]:
    """Memory-map the tensors by our names, without the output matrix. Raises ConversionError for unknown names."""
    tensors = open_files(files)
    names = {name: kosmos2_place(name) for name in tensors if name != HEAD}
    if unknown := sorted(name for name, ours in names.items() if ours is None):
        raise ConversionError(
            f"'{files[0].parent}': {len(unknown)} names are not those of a Kosmos-2, such as {unknown[:NAMED]}."
        )
    return {str(ours): tensors[name] for name, ours in names.items()}


def kosmos2_place(name: str) -> str | None:
    """Return the name in MLLM for a name in Kosmos-2, or None."""
    for theirs, prefix in PREFIXES.items():
        if name.startswith(theirs):
            renamed = prefix + name.removeprefix(theirs)
            place = ("mllm", renamed) if renamed.startswith("vision.") else our_name(renamed)
            return place[1] if place else None
    return None


def kosmos2_name(name: str) -> str:
    """Return the name in Kosmos-2 for a name in MLLM, for messages."""
    released = name if name.startswith("vision.") else released_name("mllm", name) or name
    for theirs, prefix in PREFIXES.items():
        if released.startswith(prefix):
            return theirs + released.removeprefix(prefix)
    return released


def require_usable(weights: Weights) -> None:
    """Raise a ConversionError for tensors of an unsupported dtype, or with NaN or infinite values."""
    if wrong := [name for name, dtype in weights.dtypes.items() if dtype not in DTYPES.values()]:
        name, dtype = kosmos2_name(wrong[0]), weights.dtypes[wrong[0]]
        raise ConversionError(f"'{weights.origin}': '{name}' is {dtype}; allowed: {', '.join(DTYPES)}.")
    broken = []
    for group in weights.chunks():
        opened = weights.open()
        broken += [f"'{kosmos2_name(name)}'" for name in group if not is_finite(opened[name])]
    if broken:
        raise ConversionError(
            f"'{weights.origin}': {len(broken)} tensors are NaN or infinite, such as {', '.join(broken[:NAMED])}."
        )


def first_rows(open_all: Callable[[], Mapping[str, Tensor]], rows: int) -> dict[str, Tensor]:
    """Return the tensors with only the first rows of the embedding."""
    return {name: t[:rows] if name == "decoder.embed_tokens.weight" else t for name, t in open_all().items()}
