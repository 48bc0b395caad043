"""A vision-language model of transformers in the MLLM's place, as Qwen2.5-VL, Qwen3-VL and LLaVA-OneVision.

Notable: a prompt is text and images in reading order after a start token, without a chat template; the model's own
processor prepares each image by itself, at its own size. AlignerNet reads one of the hidden states as transformers
numbers them, at every position. The weights stay in transformers' format; where they never trained, a model folder
names them in place of a copy.

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

from kosmosg.image_processing import LONGEST_ASPECT, read_image, rgb, to_images
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

NETWORK = "network"  # the folder of weights below a model's mllm/
NETWORKS: Any = AutoModel
WHOLE_MODELS: Any = AutoModelForImageTextToText
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
BLANK_SIDE, USUAL_SIDE = 32, 512  # pixels of the images that stand for others


class LanguageProcessor(FeatureExtractionMixin):
    """Tokenizer and image processor of a vision-language model. What reads videos is left out: it needs torchvision.

    FeatureExtractionMixin lends nothing but its name, by which diffusers' pipelines know what they can save and load.

    Args:
        processor: transformers' own.
        config: of the model.
    """

    def __init__(self, processor: ProcessorMixin, config: PretrainedConfig):
        self.processor, self.config = processor, config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.model_type})"

    @classmethod
    def from_pretrained(cls, source: str | Path, **_: Any) -> "LanguageProcessor":
        """Read a transformers folder or hub id, or the folder that `save_pretrained` writes.

        Raises:
            ValueError: it is no model that reads images.
        """
        config = require_images(read_config(source), source)
        kind = without_videos(PROCESSOR_MAPPING[type(config)])
        parts: dict[str, Any] = {
            "tokenizer": AutoTokenizer.from_pretrained(source),
            # One of several that round differently; the others need torchvision.
            "image_processor": AutoImageProcessor.from_pretrained(source, backend="pil"),
        }
        values, _options = kind.get_processor_dict(source)
        return cls(kind.from_args_and_dict([parts[name] for name in kind.get_attributes()], values), config)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write transformers' files and the model's configuration."""
        self.processor.save_pretrained(folder)
        self.config.save_pretrained(folder)


def without_videos(kind: Any) -> Any:
    """A class of processors that has no video processor, under the same name."""
    names = [name for name in kind.get_attributes() if name != "video_processor"]
    methods = {
        "get_attributes": classmethod(lambda _: names),
        "__reduce__": lambda self: (restored, (kind, self.__dict__)),  # for data workers that are not forked
    }
    return type(kind.__name__, (kind,), methods)


def restored(kind: Any, state: dict[str, Any]) -> Any:
    """A processor of `without_videos`, from a pickle."""
    processor = object.__new__(without_videos(kind))
    processor.__dict__.update(state)
    return processor


class ProcessorEncoder(PromptEncoder):
    """Segments of text and images → ids, and images as the processor prepares them.

    Args:
        max_image_pixels: larger images are made smaller first; None leaves it to the processor.
        max_length: the most tokens a prompt may have, those of images included.
    """

    def __init__(
        self, processor: LanguageProcessor, max_image_pixels: int | None = None, max_length: int | None = None
    ):
        self.processor: Any = processor.processor
        self.max_image_pixels, self.max_length = max_image_pixels, max_length
        self.start_id = start_id(processor.config)
        config = processor.config
        self.image_id = config.image_token_id
        # What goes around an image where the processor does not put it there itself.
        self.before, self.after = (
            [getattr(config, name)] if getattr(config, name, None) is not None else []
            for name in ("vision_start_token_id", "vision_end_token_id")
        )

    def __call__(self, segments: Sequence[Segment], *, eos: bool = False) -> EncodedPrompt:
        """See `PromptEncoder`. Special tokens written in a text are ordinary characters.

        Raises:
            TypeError: a segment that is neither text nor a PIL image.
        """
        ids, mask = [self.start_id], [False]
        images: list[PackedImages] = []
        for segment in segments:
            if isinstance(segment, str):
                own = self._text_ids([segment])[0]
            elif isinstance(segment, Image.Image):
                inputs, own = self._image(segment)
                first, last = own.index(self.image_id), len(own) - own[::-1].index(self.image_id)
                counts = {name: [len(tensor)] for name, tensor in inputs.items()}
                images.append(PackedImages(inputs, counts, [own[first:last]]))
                own = [*self.before, *own, *self.after]
            else:
                raise TypeError(
                    f"a prompt segment is {type(segment).__name__}; allowed are str and PIL images, which the model's "
                    "own processor prepares."
                )
            ids += own
            mask += [token == self.image_id for token in own]
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
            text, place, shown = "", 0, []
            for image in range(first, first + count):
                assert isinstance(batch.images, PackedImages)
                begin = mask.index(True, place)
                text += f"{decode(ids[place:begin], skip_special_tokens=True)} {PLACEHOLDER} "
                place = begin + len(batch.images.ids[image])
                shown += self._pixels(batch.images.take([image]).inputs)
            text += decode(ids[place:], skip_special_tokens=True)
            described.append((" ".join(text.split()), shown))
            first += count
        return described

    def blank_image(self, file: str) -> ImageInput:
        """The image itself: how many tokens it takes depends on its size."""
        return read_image(file)

    def _text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.processor.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def _image(self, image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
        """The network's inputs for one image, and its tokens.

        Raises:
            ValueError: the image has no pixels, is too long for its width, or has no meaning in RGB.
        """
        image = rgb(image)
        width, height = image.size
        if not min(width, height) or max(width, height) > LONGEST_ASPECT * min(width, height):
            raise ValueError(
                f"an image of {width}×{height} pixels is not allowed; allowed: at least one pixel and a longer side of "
                f"at most {LONGEST_ASPECT} times the shorter."
            )
        if self.max_image_pixels is not None and width * height > self.max_image_pixels:
            scale = math.sqrt(self.max_image_pixels / (width * height))
            image = image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
        given = self.processor(
            text=[self.processor.image_token], images=[image], add_special_tokens=False, return_tensors="pt"
        )
        return {name: value for name, value in given.items() if name not in TEXT_INPUTS}, given["input_ids"][0].tolist()

    def _pixels(self, inputs: dict[str, Tensor]) -> list[Image.Image]:
        """One image as it was prepared, to be looked at: of tiles, the one of the whole image."""
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
    """Interleaved ids and images → hidden states.

    Args:
        source: transformers folder or hub id of the weights; where they trained, what they began as.
        hidden_layer: which of transformers' `hidden_states` AlignerNet reads: 0 for the embeddings, -1 for the last,
            after the final norm.
        max_image_pixels: larger images of a prompt are made smaller; None leaves it to the processor.
        network: transformers' base model, without an output matrix.

    Raises:
        ValueError: a layer that the model does not have.
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
        # Before the network may be sharded: it is run without its parent here.
        self.blank = self._blank_image(BLANK_SIDE)

    def forward(self, batch: PromptBatch) -> Tensor:
        """Hidden states B×L×D."""
        inputs: dict[str, Any] = {}
        assert not isinstance(batch.images, Tensor)
        if batch.images is not None:
            inputs |= batch.images.map(
                lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            ).inputs
            if self.takes_token_types:  # without them, Qwen's models number image tokens as if they were words
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
        """The start token alone."""
        return PromptBatch.stack([EncodedPrompt([self.start_id], None, [])], self.start_id)

    def dummy_image_prompt(self, usual: bool = False) -> PromptBatch:
        """The start token and a blank image."""
        image = self.blank
        if usual:
            pixels = self.config.max_image_pixels or USUAL_SIDE**2
            image = self._blank_image(min(USUAL_SIDE, math.isqrt(pixels)))
        tokens = image.ids[0]
        mask = [False, *(token == tokens[0] for token in tokens)]
        return PromptBatch.stack([EncodedPrompt([self.start_id, *tokens], mask, [image])], self.start_id)

    def set_trainable(self, vision: VisionTraining) -> None:
        """All that the states depend on, but the frozen part of the vision encoder. Of that, `vision.final_norm` is not
        read: what follows the blocks projects to the language model's width, and trains."""
        self.requires_grad_(True)
        encoder = self.network.get_encoder(modality="image")
        blocks = layer_list(encoder)
        read = getattr(self.network.config, "vision_feature_layer", -1)
        if isinstance(read, int):  # blocks beyond have no effect
            blocks = blocks[: len(blocks) + read + 1 if read < 0 else read]
        if vision.blocks > len(blocks):
            raise ValueError(
                f"vision_training.blocks is {vision.blocks}, but the vision encoder has {len(blocks)} blocks"
            )
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_("merger" in name or (vision.blocks == -1 and "embed" in name))
        for block in blocks if vision.blocks == -1 else blocks[len(blocks) - vision.blocks :]:
            block.requires_grad_(True)
        if self.layer != self.last_layer:
            for unread in (*layer_list(self.decoder)[self.layer :], self.decoder.norm):
                unread.requires_grad_(False)

    @classmethod
    def load(
        cls, source: str | Path, torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> "VisionLanguageModel":
        """The published weights. Under FakeTensorMode, as in a dry run, none are read.

        Args:
            options: `hidden_layer` and `max_image_pixels`.

        Raises:
            ValueError: it is no model that reads images, or see `load_network`; in a dry run, its sizes are not known.
        """
        if type(torch.empty(0)) is not Tensor:
            with no_init_weights():  # some draw until the values fit, and there are none
                network = NETWORKS.from_config(language_config(source), dtype=torch_dtype)
        else:
            require_images(language_config(source), source)
            # Of the whole model, since base models alone know some of the names that weights have gone by.
            network = load_network(WHOLE_MODELS, source, dtype=torch_dtype).base_model
        return cls(source=str(source), network=network, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "VisionLanguageModel":
        """Read the folder that `save_pretrained` writes, in eval mode.

        Args:
            options: `dtype` or `torch_dtype`; the others of diffusers have no meaning here.

        Raises:
            OSError: the weights that it names are not there.
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
        """Write the configuration, and the weights where they train or did."""
        self.save_config(save_directory)
        if self.has_own_weights or any(parameter.requires_grad for parameter in self.parameters()):
            self.network.save_pretrained(Path(save_directory) / NETWORK)

    @torch.no_grad()
    def _blank_image(self, side: int) -> PackedImages:
        """A blank image as the model's processor would prepare it, from the configuration alone."""
        with with_values():
            processor = image_processor(self.network.config)
            given = processor([Image.new("RGB", (side, side))], return_tensors="pt")
        inputs = {}
        for name, value in given.items():
            blank = value.is_floating_point()
            inputs[name] = (
                torch.zeros(value.shape, dtype=self.dtype, device=self.device) if blank else value.to(self.device)
            )
        training = self.network.training
        features = self.network.eval().get_image_features(**inputs).pooler_output
        self.network.train(training)
        tokens = sum(feature.numel() for feature in features) // self.width
        counts = {name: [len(tensor)] for name, tensor in inputs.items()}
        return PackedImages(inputs, counts, [[self.network.config.image_token_id] * tokens])


def language_config(source: str | Path) -> PretrainedConfig:
    """The configuration of a transformers folder, or of a hub id.

    Raises:
        ValueError: there is none; under FakeTensorMode, as in a dry run, a hub id whose sizes are not known here.
    """
    if Path(source).is_dir():  # also where a folder has the name of a hub id, as its weights are then read from there
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
    """Of a transformers folder or hub id.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.language_model='{source}' cannot be read: {error}") from error


def require_images(config: PretrainedConfig, source: str | Path) -> PretrainedConfig:
    """The configuration as it is.

    Raises:
        ValueError: of a model that does not go from images and text to text.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model.language_model='{source}' is a {config.model_type}; allowed: models of transformers that read "
            "images and text, as qwen2_5_vl, qwen3_vl and llava_onevision."
        )
    return config


def start_id(config: PretrainedConfig) -> int:
    """Of the token before every prompt, which alone is the unconditional prompt, and stands at padding.

    Raises:
        ValueError: the configuration names none.
    """
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        for part in (config.get_text_config(), config):
            found = getattr(part, name, None)
            if found is not None:
                return found[0] if isinstance(found, list) else found
    raise ValueError(f"the configuration of {config.model_type} names no token to begin a prompt with (bos_token_id).")


def image_processor(config: PretrainedConfig) -> Any:
    """An image processor of the model's sizes, for images whose pixels mean nothing."""
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
    """The longest list of layers in a network."""

    def lists(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            yield from [child] if isinstance(child, nn.ModuleList) else lists(child)

    return max(lists(module), key=len)
