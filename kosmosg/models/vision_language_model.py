"""A vision-language model of transformers as the MLLM, for example Qwen2.5-VL, Qwen3-VL or LLaVA-OneVision.

Notable: a prompt is a start token followed by text and images in reading order, without a chat template. The model's
own processor prepares each image separately, at its own size. AlignerNet reads one of transformers' `hidden_states` at
every position. Weights stay in transformers' format; if they were never trained, a model folder only names their
source.

Shapes: `B` batch, `L` tokens, `D` width, `K` tokens of an image.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    FeatureExtractionMixin,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from kosmosg.image_processing import read_image, resizable, to_images
from kosmosg.models.image_decoder import with_values
from kosmosg.models.mllm import MultimodalLM, VisionTraining
from kosmosg.models.published import LANGUAGE_MODELS
from kosmosg.models.storage import CONFIG_FILE, load_network
from kosmosg.prompt import (
    PLACEHOLDER,
    EncodedPrompt,
    ImageInput,
    PackedImages,
    PromptBatch,
    PromptEncoder,
    PromptTooLongError,
    Segment,
)

NETWORK = "network"  # subfolder of mllm/ with trained weights
NETWORKS: Any = AutoModel
WHOLE_MODELS: Any = AutoModelForImageTextToText
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
BLANK_SIDE, USUAL_SIDE = 32, 512  # pixels per side of dummy images: the smallest, and a typical one


class LanguageProcessor(FeatureExtractionMixin):
    """Tokenizer and image processor of a vision-language model, without its video part, which needs torchvision.

    The base class is FeatureExtractionMixin only because diffusers' pipelines save and load its subclasses.

    Args:
        processor: the processor of transformers.
        config: the model's configuration.
    """

    def __init__(self, processor: ProcessorMixin, config: PretrainedConfig):
        self.processor, self.config = processor, config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.model_type})"

    @classmethod
    def from_pretrained(cls, source: str | Path, **_: Any) -> "LanguageProcessor":
        """Load a transformers folder or hub id, or the folder that `save_pretrained` writes.

        Raises:
            ValueError: the model does not read images.
        """
        config = require_images(read_config(source), source)
        kind = without_videos(PROCESSOR_MAPPING[type(config)])
        parts: dict[str, Any] = {
            "tokenizer": AutoTokenizer.from_pretrained(source),
            # Backends round differently; this is the only one that does not need torchvision.
            "image_processor": AutoImageProcessor.from_pretrained(source, backend="pil"),
        }
        values, _options = kind.get_processor_dict(source)
        return cls(kind.from_args_and_dict([parts[name] for name in kind.get_attributes()], values), config)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the processor and the model's configuration."""
        self.processor.save_pretrained(folder)
        self.config.save_pretrained(folder)


def without_videos(kind: Any) -> Any:
    """Return a subclass of a processor class without the video processor, under the same name."""
    names = [name for name in kind.get_attributes() if name != "video_processor"]
    methods = {
        "get_attributes": classmethod(lambda _: names),
        "__reduce__": lambda self: (unpickle, (kind, self.__dict__)),  # for data workers that are not forked
    }
    return type(kind.__name__, (kind,), methods)


def unpickle(kind: Any, state: dict[str, Any]) -> Any:
    """Restore a pickled processor of `without_videos`."""
    processor = object.__new__(without_videos(kind))
    processor.__dict__.update(state)
    return processor


class ProcessorEncoder(PromptEncoder):
    """Encode segments of text and images with the model's processor.

    Args:
        max_image_pixels: larger images are resized to this area first; None leaves resizing to the processor.
        max_length: maximum number of tokens of a prompt, image tokens included.
    """

    def __init__(
        self, processor: LanguageProcessor, max_image_pixels: int | None = None, max_length: int | None = None
    ):
        self.processor: Any = processor.processor
        self.max_image_pixels, self.max_length = max_image_pixels, max_length
        self.start_id = start_id(processor.config)
        config = processor.config
        self.image_id = config.image_token_id
        # Tokens around an image, for models whose processor does not add them.
        self.before, self.after = (
            [getattr(config, name)] if getattr(config, name, None) is not None else []
            for name in ("vision_start_token_id", "vision_end_token_id")
        )

    def __call__(self, segments: Sequence[Segment], *, eos: bool = False) -> EncodedPrompt:
        """Encode one prompt as `PromptEncoder` does. Special tokens in a text are read as ordinary characters.

        Raises:
            PromptTooLongError: the prompt has more than `max_length` tokens.
            TypeError: a segment is neither text nor a PIL image.
        """
        ids, mask = [self.start_id], [False]
        images: list[PackedImages] = []
        for segment in segments:
            if isinstance(segment, str):
                segment_ids = self._text_ids([segment])[0]
            elif isinstance(segment, Image.Image):
                inputs, image_ids = self._image(segment)
                start, end = image_ids.index(self.image_id), len(image_ids) - image_ids[::-1].index(self.image_id)
                counts = {name: [len(tensor)] for name, tensor in inputs.items()}
                images.append(PackedImages(inputs, counts, [image_ids[start:end]]))
                segment_ids = [*self.before, *image_ids, *self.after]
            else:
                raise TypeError(
                    f"a prompt segment is {type(segment).__name__}; allowed are str and PIL images, which the model's "
                    "own processor prepares."
                )
            ids += segment_ids
            mask += [token == self.image_id for token in segment_ids]
        if eos:
            ids.append(self.processor.tokenizer.eos_token_id)
            mask.append(False)
        if self.max_length is not None and len(ids) > self.max_length:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens ({sum(mask)} of {len(images)} images) but at most {self.max_length} "
                "are allowed; shorten the text or use fewer or smaller images."
            )
        return EncodedPrompt(torch.tensor(ids), torch.tensor(mask), images)

    def collate(self, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        return PromptBatch.stack(prompts, self.start_id)

    def captions(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        return [EncodedPrompt([self.start_id, *ids], None, []) for ids in self._text_ids(texts)]

    def describe(self, batch: PromptBatch) -> list[tuple[str, list[Image.Image]]]:
        decode, described, first = self.processor.tokenizer.decode, [], 0
        for row, count in enumerate(batch.images_per_row):
            ids, mask = (part[row, : batch.lengths[row]].tolist() for part in (batch.ids, batch.image_mask))
            text, end, images = "", 0, []
            for image in range(first, first + count):
                assert isinstance(batch.images, PackedImages)
                start = mask.index(True, end)
                text += f"{decode(ids[end:start], skip_special_tokens=True)} {PLACEHOLDER} "
                end = start + len(batch.images.ids[image])
                images += self._pixels(batch.images.take([image]).inputs)
            text += decode(ids[end:], skip_special_tokens=True)
            described.append((" ".join(text.split()), images))
            first += count
        return described

    def blank_image(self, file: str) -> ImageInput:
        """Return the image itself, because its number of tokens depends on its size."""
        return read_image(file)

    def _text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.processor.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def _image(self, image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
        """Return the network's inputs for one image, and its token ids; errors as `resizable`."""
        image = resizable(image)
        width, height = image.size
        if self.max_image_pixels is not None and width * height > self.max_image_pixels:
            scale = math.sqrt(self.max_image_pixels / (width * height))
            image = image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
        output = self.processor(
            text=[self.processor.image_token], images=[image], add_special_tokens=False, return_tensors="pt"
        )
        inputs = {name: value for name, value in output.items() if name not in TEXT_INPUTS}
        return inputs, output["input_ids"][0].tolist()

    def _pixels(self, inputs: dict[str, Tensor]) -> list[Image.Image]:
        """Convert the inputs of one image back to a PIL image; if it was split into tiles, the tile of the whole."""
        processor, pixels = self.processor.image_processor, inputs["pixel_values"]
        if "image_grid_thw" in inputs:
            side, merged = processor.patch_size, processor.merge_size
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            blocks = (rows // merged, columns // merged, merged, merged, 3, -1, side, side)
            pixels = pixels.view(blocks)[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
            pixels = pixels.reshape(1, 3, rows * side, columns * side)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])[:1]
        return to_images(pixels, processor.image_mean, processor.image_std)


class VisionLanguageModel(MultimodalLM, ModelMixin, ConfigMixin):
    """A vision-language model of transformers behind the interface of an MLLM.

    Args:
        source: transformers folder or hub id that the weights come from, before any training.
        hidden_layer: index into transformers' `hidden_states`: 0 for the embeddings, -1 for the last layer, after the
            final norm.
        max_image_pixels: larger images of a prompt are resized to this area; None leaves resizing to the processor.
        network: transformers' base model, without an output matrix.

    Raises:
        ValueError: the model has no such hidden layer.
    """

    config: Any  # constructor arguments by name; diffusers types it as a plain dictionary
    config_name = CONFIG_FILE
    ignore_for_config: ClassVar = [NETWORK]

    @register_to_config
    def __init__(
        self,
        source: str,
        hidden_layer: int = -1,
        max_image_pixels: int | None = None,
        network: PreTrainedModel | None = None,
    ):
        super().__init__()
        assert network is not None
        self.network: Any = network
        text = network.config.get_text_config()
        states = text.num_hidden_layers + 1
        if not -states <= hidden_layer < states:
            raise ValueError(
                f"model.hidden_layer={hidden_layer} is not allowed; allowed for '{source}': {-states} … {states - 1}."
            )
        self.width, self.max_tokens = text.hidden_size, text.max_position_embeddings
        self.layer, self.last_layer = hidden_layer % states, states - 1
        self.start_id = start_id(network.config)
        self.takes_token_types = "mm_token_type_ids" in inspect.signature(network.forward).parameters
        self.has_own_weights = False
        # Computed now, because the vision encoder cannot run on its own once the network is sharded.
        self.blank = self._blank_image(BLANK_SIDE)

    def forward(self, batch: PromptBatch) -> Tensor:
        """Return the hidden states of the chosen layer, B×L×D."""
        inputs: dict[str, Any] = {}
        assert not isinstance(batch.images, Tensor)
        if batch.images is not None:
            inputs |= batch.images.map(
                lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            ).inputs
            if self.takes_token_types:  # without them, Qwen models give image tokens the positions of text
                inputs["mm_token_type_ids"] = batch.image_mask.long()
        if self.layer != self.last_layer:
            inputs["output_hidden_states"] = [self.layer]
        output = self.network(
            input_ids=batch.ids, attention_mask=(~batch.padding).long(), use_cache=False, return_dict=True, **inputs
        )
        return output.last_hidden_state if self.layer == self.last_layer else output.hidden_states[self.layer]

    @property
    def decoder(self) -> Any:  # type: ignore[override]
        return self.network.get_decoder()

    def encoder(self, tokenizer: Any, max_length: int | None = None) -> ProcessorEncoder:
        return ProcessorEncoder(tokenizer, self.config.max_image_pixels, max_length)

    def hidden_states(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        return self(batch), batch.padding

    def unconditional_prompt(self) -> PromptBatch:
        """Return a prompt of the start token alone."""
        return PromptBatch.stack([EncodedPrompt([self.start_id], None, [])], self.start_id)

    def dummy_image_prompt(self, usual: bool = False) -> PromptBatch:
        """Return a prompt of the start token and a blank image."""
        image = self.blank
        if usual:
            pixels = self.config.max_image_pixels or USUAL_SIDE**2
            image = self._blank_image(min(USUAL_SIDE, math.isqrt(pixels)))
        tokens = image.ids[0]
        mask = [False, *(token == tokens[0] for token in tokens)]
        return PromptBatch.stack([EncodedPrompt([self.start_id, *tokens], mask, [image])], self.start_id)

    def set_trainable(self, vision: VisionTraining) -> None:
        """Make all weights that the hidden states depend on trainable, except the frozen vision blocks.

        `vision.final_norm` has no effect: the layers after the blocks project to the language model's width and train.
        """
        self.requires_grad_(True)
        encoder = self.network.get_encoder(modality="image")
        blocks = layer_list(encoder)
        feature_layer = getattr(self.network.config, "vision_feature_layer", -1)
        if isinstance(feature_layer, int):  # later blocks are not used
            blocks = blocks[: len(blocks) + feature_layer + 1 if feature_layer < 0 else feature_layer]
        if vision.blocks > len(blocks):
            raise ValueError(
                f"vision_training.blocks is {vision.blocks}, but the vision encoder has {len(blocks)} blocks"
            )
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_("merger" in name or (vision.blocks == -1 and "embed" in name))
        for block in blocks if vision.blocks == -1 else blocks[len(blocks) - vision.blocks :]:
            block.requires_grad_(True)
        if self.layer != self.last_layer:
            for unused in (*layer_list(self.decoder)[self.layer :], self.decoder.norm):
                unused.requires_grad_(False)

    @classmethod
    def load(
        cls, source: str | Path, torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> "VisionLanguageModel":
        """Load published weights. In a dry run, under FakeTensorMode, only the sizes are read.

        Args:
            options: `hidden_layer` and `max_image_pixels`.

        Raises:
            ValueError: the model does not read images, its weights are incomplete or not finite, or in a dry run its
                sizes are unknown.
        """
        if type(torch.empty(0)) is not Tensor:
            with no_init_weights():  # some initialisations redraw values until they are in range; a dry run has none
                network = NETWORKS.from_config(language_config(source), dtype=torch_dtype)
        else:
            require_images(language_config(source), source)
            # The base model alone would not recognise some older names of weights.
            network = load_network(WHOLE_MODELS, source, dtype=torch_dtype).base_model
        return cls(source=str(source), network=network, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "VisionLanguageModel":
        """Load the folder that `save_pretrained` writes, in eval mode.

        Args:
            options: `dtype` or `torch_dtype`; other options of diffusers are ignored.

        Raises:
            OSError: the source of the weights does not exist.
        """
        loaded: Any = cls.load_config(str(folder))
        values = {name: value for name, value in loaded.items() if not name.startswith("_")}
        dtype = options.get("dtype", options.get("torch_dtype")) or torch.float32
        weights = Path(folder) / NETWORK
        if not weights.is_dir():
            return cls.load(torch_dtype=dtype, **values).eval()
        model = cls(network=load_network(NETWORKS, weights, dtype=dtype), **values)
        model.has_own_weights = True
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the configuration, and the weights if they are or were trained."""
        self.save_config(save_directory)
        if self.has_own_weights or any(parameter.requires_grad for parameter in self.parameters()):
            self.network.save_pretrained(Path(save_directory) / NETWORK)

    @torch.no_grad()
    def _blank_image(self, side: int) -> PackedImages:
        """Prepare a blank image as the model's processor would, from the configuration alone."""
        with with_values():
            processor = image_processor(self.network.config)
            output = processor([Image.new("RGB", (side, side))], return_tensors="pt")
        inputs = {}
        for name, value in output.items():
            is_pixels = value.is_floating_point()
            inputs[name] = (
                torch.zeros(value.shape, dtype=self.dtype, device=self.device) if is_pixels else value.to(self.device)
            )
        training = self.network.training
        features = self.network.eval().get_image_features(**inputs).pooler_output
        self.network.train(training)
        tokens = sum(feature.numel() for feature in features) // self.width
        counts = {name: [len(tensor)] for name, tensor in inputs.items()}
        return PackedImages(inputs, counts, [[self.network.config.image_token_id] * tokens])


def language_config(source: str | Path) -> PretrainedConfig:
    """Return the configuration of a transformers folder or hub id.

    Raises:
        ValueError: there is none, or in a dry run (under FakeTensorMode) the sizes of the hub id are unknown.
    """
    if Path(source).is_dir():  # a folder takes precedence over a hub id of the same name, as in transformers
        return read_config(source)
    if str(source) in LANGUAGE_MODELS:
        return AutoConfig.for_model(**LANGUAGE_MODELS[str(source)])
    if type(torch.empty(0)) is not Tensor:
        known = ", ".join(f"'{name}'" for name in LANGUAGE_MODELS)
        raise ValueError(
            f"model.language_model is '{source}', whose sizes a dry run does not know; allowed: a folder, or {known}"
        )
    return read_config(source)


def read_config(source: str | Path) -> PretrainedConfig:
    """Load the configuration of a transformers folder or hub id.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.language_model='{source}' cannot be read: {error}") from error


def require_images(config: PretrainedConfig, source: str | Path) -> PretrainedConfig:
    """Return the configuration unchanged.

    Raises:
        ValueError: the model does not read images and text.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model.language_model='{source}' is a {config.model_type}; allowed: models of transformers that read "
            "images and text, such as qwen2_5_vl, qwen3_vl and llava_onevision."
        )
    return config


def start_id(config: PretrainedConfig) -> int:
    """Return the id of the start token, which is also the unconditional prompt and the padding.

    Raises:
        ValueError: the configuration names no such token.
    """
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        for part in (config.get_text_config(), config):
            token = getattr(part, name, None)
            if token is not None:
                return token[0] if isinstance(token, list) else token
    raise ValueError(f"the configuration of {config.model_type} names no start token for prompts (bos_token_id).")


def image_processor(config: PretrainedConfig) -> Any:
    """Build an image processor with the model's sizes, for blank images."""
    vision = config.vision_config
    sizes = {
        "patch_size": getattr(vision, "patch_size", None),
        "merge_size": getattr(vision, "spatial_merge_size", None),
        "temporal_patch_size": getattr(vision, "temporal_patch_size", None),
        "image_grid_pinpoints": getattr(config, "image_grid_pinpoints", None),
    }
    if (side := getattr(vision, "image_size", None)) is not None:
        sizes["size"] = {"height": side, "width": side}
    kinds: Any = IMAGE_PROCESSOR_MAPPING[type(config)]
    return kinds["pil"](**{name: value for name, value in sizes.items() if value is not None})


def layer_list(module: nn.Module) -> nn.ModuleList:
    """Return the longest list of layers in a network."""

    def lists(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            yield from [child] if isinstance(child, nn.ModuleList) else lists(child)

    return max(lists(module), key=len)
