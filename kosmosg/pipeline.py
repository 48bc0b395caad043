"""KosmosGPipeline: draw images from prompts of interleaved text and images, as a diffusers pipeline.

    pipe = KosmosGPipeline.from_pretrained("kosmos-g", torch_dtype=torch.bfloat16).to("cuda")
    pipe(["a ", dog, " in the suit of ", hero], num_images_per_prompt=4).images
    pipe("<i> swimming underwater", images=[dog], negative_prompt="blurry", seeds=[0]).images

Loading, saving, device placement, offloading and the hub work as in any diffusers pipeline. Images are drawn by the
diffusers pipeline of the image decoder. Other pipelines of its family, such as ControlNet, read the prompt embeddings
of this one (paper section 4.4):

    control = pipe.compose(StableDiffusionControlNetPipeline, controlnet=controlnet)
    control(**pipe.embeddings("<i> in the snow", images=[dog]), image=edges).images

Shapes: `B` prompts, `n` images per prompt, `Q` condition tokens, `C` condition width, `P` pooled width.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, TypeVar

import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput, StableDiffusionMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import snapshot_download
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from kosmosg.condition import Condition, ConditionSpec
from kosmosg.config import RUN_CONFIG
from kosmosg.files import write_json, write_text
from kosmosg.models.aligner import Aligner, load_aligner
from kosmosg.models.build import IMAGE_DECODERS, image_decoder_index
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.kosmosg import KosmosG, load_mllm, load_tokenizer
from kosmosg.models.mllm import MLLM
from kosmosg.models.packing import PACKED, unpacked
from kosmosg.models.storage import check_weights, find_model, load_network
from kosmosg.models.vision_language_model import LanguageProcessor, VisionLanguageModel
from kosmosg.prompt import ImageInput, Prompt, PromptEncoder, Segment, check_negative_prompt, read_prompts
from kosmosg.sampling import DiffusionSampler, build_scheduler
from kosmosg.steering import weighted_condition, with_masks
from kosmosg.tokenizer import Tokenizer

Composed = TypeVar("Composed", bound=DiffusionPipeline)
Dtype = torch.dtype | dict[str, torch.dtype]
MODEL_INDEX, MODEL_CODE = "model_index.json", "pipeline.py"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
DENOISERS = {"unet", "transformer"}  # component names of the denoiser in diffusers' pipelines
logger = logging.getLogger(__name__)


def inner_attribute(name: str) -> property:
    """Forward an attribute of KosmosGPipeline to the inner pipeline."""
    return property(lambda pipe: getattr(pipe._inner, name), lambda pipe, value: setattr(pipe._inner, name, value))


class KosmosGPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    """Draw images with an MLLM, an AlignerNet and an image decoder.

    Components that are not needed may be None: `encode_prompt` uses `mllm`, `aligner` and `tokenizer`; drawing from
    `prompt_embeds` and `negative_prompt_embeds` uses the others.

    Args:
        unet, transformer: the denoiser, under the name used by its family; the other one is None.
        scheduler: a diffusers scheduler. Replace it as in other pipelines, or pass a `sampler` to the call.
        family: family of the image decoder: a key of `IMAGE_DECODERS`, the name of diffusers' pipeline.
        unconditional: what guidance steers away from without a negative prompt, see `ConditionSpec`; None for the
            family's default.

    Raises:
        ValueError: the family is unknown, or components do not match.
    """

    model_cpu_offload_seq = "mllm->aligner->unet->transformer->vae"
    _lora_loadable_modules: ClassVar = ["unet", "transformer"]
    _optional_components: ClassVar = ["mllm", "aligner", "tokenizer", "unet", "vae", "scheduler", "transformer"]
    # Callbacks read and set these attributes; they belong to the inner pipeline.
    guidance_scale, _guidance_scale = inner_attribute("guidance_scale"), inner_attribute("_guidance_scale")
    interrupt, _interrupt = inner_attribute("interrupt"), inner_attribute("_interrupt")
    num_timesteps, _num_timesteps = inner_attribute("num_timesteps"), inner_attribute("_num_timesteps")
    cross_attention_kwargs = property(lambda pipe: getattr(pipe._inner, pipe.decoder_class.attention_argument))
    do_classifier_free_guidance = inner_attribute("do_classifier_free_guidance")

    def __init__(
        self,
        mllm: MLLM | VisionLanguageModel | None,
        aligner: Aligner | None,
        tokenizer: Tokenizer | LanguageProcessor | None,
        unet: Any,
        vae: Any,
        scheduler: SchedulerMixin | None,
        transformer: Any = None,
        family: str = next(iter(IMAGE_DECODERS)),
        unconditional: str | None = None,  # diffusers' type check of arguments does not support Literal
    ):
        super().__init__()
        if family not in IMAGE_DECODERS:
            raise ValueError(f"family={family!r} is not allowed; allowed: {', '.join(IMAGE_DECODERS)}.")
        if isinstance(tokenizer, Tokenizer) and isinstance(mllm, MLLM) and len(tokenizer) != mllm.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} ids but the MLLM has a vocabulary of {mllm.config.vocab_size}."
            )
        unconditional = unconditional or IMAGE_DECODERS[family].unconditional_of({})
        self.register_to_config(family=family, unconditional=unconditional)
        self.register_modules(mllm=mllm, aligner=aligner, tokenizer=tokenizer, unet=unet, vae=vae, scheduler=scheduler)
        self.register_modules(transformer=transformer)
        if aligner is not None and self.denoiser is not None:
            spec = self._decoder().spec
            for name, written, read in (
                ("conditions are {} wide", aligner.config.width, spec.width),
                ("pooled vector has the width {}", aligner.config.get("pooled_width"), spec.pooled),
            ):
                if written != read:
                    raise ValueError(
                        f"the aligner's {name.format(written)} but the image decoder reads {read}: the model was "
                        "aligned with another image decoder."
                    )
        self._null_condition: tuple[Any, Condition] | None = None
        self._inner: Any = SimpleNamespace()  # diffusers' pipeline of the current or last call

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        image_decoder: str | Path | None = None,
        torch_dtype: Dtype | None = None,
        **options: Any,
    ) -> "KosmosGPipeline":
        """Load a pipeline folder or hub id, or the model folder of a training run together with its image decoder.

        Code in the folder is never run.

        Args:
            image_decoder: diffusers folder or hub id. Its denoiser and VAE replace those of the folder. For a run
                folder, the default is the image decoder of the run.
            torch_dtype: dtype of all weights, or a dictionary as in diffusers; float32 by default.
            options: options of `diffusers.DiffusionPipeline.from_pretrained`. A component passed here is not loaded
                from the folder and may be None.

        Raises:
            FileNotFoundError: a component is missing.
            ValueError: `torch_dtype` is not a dtype, weights are not finite or do not match the configuration,
                components do not match, or the scheduler needs a package that is not installed.
        """
        dtype = torch_dtype or options.pop("dtype", torch.float32)
        if not isinstance(dtype, (torch.dtype, dict)):
            raise ValueError(f"torch_dtype={dtype!r} is not allowed; allowed: a torch.dtype, such as torch.float16.")
        if not Path(folder).is_dir():  # diffusers refuses to download components whose classes it does not know
            hub_options = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
            folder = snapshot_download(str(folder), ignore_patterns=list(PICKLES), **hub_options)
        image_decoder = image_decoder or decoder_of_run(folder)
        if (Path(folder) / PACKED).is_file():
            with unpacked(Path(folder)) as temporary:
                return cls.from_pretrained(temporary, image_decoder, dtype, **options)
        is_pipeline = (Path(folder) / MODEL_INDEX).is_file()
        folder = Path(folder) if is_pipeline else find_model(folder)
        if image_decoder is not None:
            options |= decoder_parts(image_decoder, dtype, options)
        if not (folder / MODEL_INDEX).is_file():
            if not ({"vae", "scheduler"} <= options.keys() and DENOISERS & options.keys()):
                raise FileNotFoundError(
                    f"'{folder}' holds no {MODEL_INDEX} and no image decoder; pass image_decoder=, the one that the "
                    "model was trained with."
                )
            absent: dict[str, Any] = dict.fromkeys(DENOISERS)
            pipeline = cls(**absent | model_parts(folder, dtype, options) | options)
        else:
            try:
                pipeline = super().from_pretrained(str(folder), dtype=dtype, **options)
            except ImportError as error:  # the package of a scheduler is not installed
                raise ValueError(f"'{folder}' cannot be loaded: {str(error).strip()}") from error
            # `StrictWeights` checks the other networks while it loads them.
            for name in pipeline.decoder_class.networks.keys() - options.keys():
                if (part := getattr(pipeline, name)) is not None:
                    check_weights(part, f"{folder}/{name}")
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        return pipeline

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """Read model_index.json, with this class in place of the code that `write_index` wrote, which is not run.

        Raises:
            ValueError: the folder holds another pipeline.
        """
        config = super().load_config(*arguments, **options)
        index = config[0] if isinstance(config, tuple) else config
        if "mllm" not in index:
            raise ValueError(f"the folder holds a {index.get('_class_name')}, which is not a {cls.__name__}.")
        index["_class_name"] = cls.__name__
        return config

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write model_index.json and the module that it names, see `write_index`."""
        write_index(Path(json_file_path).parent, json.loads(self.to_json_string()))

    @property
    def model(self) -> KosmosG:
        """The MLLM and the aligner as one network."""
        self._require("mllm", "aligner")
        return KosmosG(self.mllm, self.aligner)

    @property
    def encoder(self) -> PromptEncoder:
        """The prompt encoder, limited to the longest prompt that MLLM and aligner can read."""
        self._require("mllm", "aligner", "tokenizer")
        max_tokens = self.mllm.max_tokens
        return self.mllm.encoder(self.tokenizer, min(max_tokens, self.aligner.max_length or max_tokens))

    @property
    def decoder_class(self) -> type[ImageDecoder]:
        """The `ImageDecoder` class of the family."""
        return IMAGE_DECODERS[self.config["family"]]

    @property
    def denoiser(self) -> Any:
        """The U-Net or the transformer."""
        return getattr(self, next(iter(self.decoder_class.networks)))

    @property
    def image_decoder(self) -> ImageDecoder:
        """Denoiser, VAE and scheduler as an `ImageDecoder`."""
        self._require_decoder()
        return self._decoder()

    @property
    def sampler(self) -> DiffusionSampler:
        """The sampler that draws images from conditions, without a progress bar."""
        return DiffusionSampler(self.image_decoder)

    @property
    def _callback_tensor_inputs(self) -> list[str]:  # tensors that callbacks may request
        return self.sampler.pipeline._callback_tensor_inputs

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        images: Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        image_weights: Sequence[float] | Sequence[Sequence[float]] | None = None,
        image_masks: Sequence[Any] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        sampler: str | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw B·n images; those of one prompt are adjacent.

        Args:
            prompt: a text with one `<i>` per image, a list of texts and images, or a list of prompts (a batch).
            images: one image per placeholder, in order; for a batch, one list per prompt.
            negative_prompt: text to steer away from, one for all prompts or one per prompt; empty means the null
                condition.
            image_weights: factor on each image's contribution to the condition, at least 0; for a batch, one list per
                prompt. 1 changes nothing, 0 removes the image from the prompt.
            image_masks: for each image a PIL image of the same size, white on the subject, or None. The background
                becomes white and the image is cropped to a square around the subject.
            prompt_embeds, negative_prompt_embeds: conditions B×Q×C instead of prompts, see `embeddings`, with pooled
                vectors B×P and masks B×Q if the image decoder reads them.
            sampler: sampler of this call: "dpm", "ddim" or "pndm" with the settings of the released code, or the name
                of a diffusers scheduler. By default the pipeline's `scheduler`. Flow matching supports only "dpm".
            seeds: one per image. Each image then depends only on its prompt and seed.
            others: as in `diffusers.StableDiffusionPipeline`.

        Returns:
            An output with B·n `images`, or a tuple of them without `return_dict`.

        Raises:
            ValueError: placeholders and images, or seeds and images, differ in number; a prompt is empty or too long;
                an image has no pixels or cannot be converted to RGB; a value is not allowed; a component is None.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt= or prompt_embeds=.")
        self._require_decoder(*(["vae"] if output_type != "latent" else []))
        diffusion_sampler = self.sampler
        if prompt is not None:
            condition, unconditional = self._conditions(prompt, images, negative_prompt, image_weights, image_masks)
        elif any(value is not None for value in (images, negative_prompt, image_weights, image_masks)):
            raise ValueError(
                "images=, image_weights=, image_masks= and negative_prompt= belong to prompt= and cannot be combined "
                "with prompt_embeds=."
            )
        else:
            condition = embedded_condition(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
            if negative_prompt_embeds is not None:
                unconditional = embedded_condition(
                    negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
                )
            else:  # not read without guidance
                unconditional = self.null_condition if guidance_scale > 1 else condition
        self._inner = diffusion_sampler.pipeline
        self._inner.set_progress_bar_config(**getattr(self, "_progress_bar_config", {"disable": False}))
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback = None if callback_on_step_end is None else partial(call_with, self, callback_on_step_end)
        drawn = diffusion_sampler(
            condition,
            unconditional,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            seeds=seeds,
            generator=generator,
            latents=latents,
            height=height,
            width=width,
            output_type=output_type,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    def encode_prompt(
        self,
        prompt: Prompt | Sequence[Prompt],
        images: Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        **steering: Any,
    ) -> tuple[Tensor, ...]:
        """Return the conditions of prompts and of negative prompts, each B×Q×C; for arguments see `__call__`.

        Pooled vectors and masks are included in the order of `encode_prompt` in diffusers' pipeline of the family.
        """
        conditions = self._conditions(prompt, images, negative_prompt, **steering)
        arguments = self.decoder_class.pipeline_arguments(*conditions).values()
        return tuple(tensor for tensor in arguments if isinstance(tensor, Tensor))

    def embeddings(self, *prompt: Any, **options: Any) -> dict[str, Any]:
        """Return the result of `encode_prompt` as keyword arguments for diffusers' pipelines of the family."""
        self._require_decoder(scheduler=False)
        placement = {"device": self._execution_device, "dtype": self.denoiser.dtype}
        conditions = (condition.to(**placement) for condition in self._conditions(*prompt, **options))
        return self.decoder_class.pipeline_arguments(*conditions)

    def compose(self, kind: Callable[..., Composed], **parts: Any) -> Composed:
        """Build a diffusers pipeline with the same denoiser, VAE and scheduler; call it with `**pipe.embeddings(…)`.

        The networks are shared, not copied: a LoRA loaded into one pipeline applies to all of them.

        Args:
            kind: pipeline class of the image decoder's family, such as StableDiffusionControlNetPipeline.
            parts: further components of that pipeline, such as controlnet=.
        """
        self._require_decoder("vae")
        # Schedulers are stateful, so each pipeline gets its own.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        networks = {name: getattr(self, name) for name in self.decoder_class.networks}
        absent = self.decoder_class.absent_parts()
        return kind(**networks, scheduler=parts.pop("scheduler", scheduler), **absent, **parts)

    @property
    def null_condition(self) -> Condition:
        """The null condition, one row: the condition of `<s>` alone, or zeros (see `ConditionSpec`).

        It is cached while the weights are frozen, as they are after `from_pretrained`.
        """
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            return self._null(self._condition([[]]))
        state = weights_state(self.mllm), weights_state(self.aligner), str(self._execution_device)
        if self._null_condition is None or self._null_condition[0] != state:
            self._null_condition = state, self._null(self._condition([[]]))
        return self._null_condition[1]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Load LoRA weights into the denoiser, as in diffusers; weights for text models are skipped with a warning.

        Raises:
            ValueError: the file is not a LoRA file or holds no weights for the denoiser.
        """
        reader, denoiser = self.image_decoder.diffusers_pipeline(), next(iter(self.decoder_class.networks))
        source = pretrained_model_name_or_path_or_dict
        source = dict(source) if isinstance(source, dict) else source
        low_cpu_mem_usage = options.pop("low_cpu_mem_usage", True)
        options |= {"return_lora_metadata": True, "unet_config": self.denoiser.config}  # XL needs it to map block names
        state, *alphas, metadata = reader.lora_state_dict(source, **options)
        name = "the dictionary" if isinstance(source, dict) else f"'{source}'"
        if others := [key for key in state if "lora" not in key]:
            raise ValueError(f"{name} is not a LoRA file: {others[0]!r} is not a LoRA weight.")
        weights = {key: tensor for key, tensor in state.items() if key.startswith(f"{denoiser}.")}
        if not weights:
            first = next(iter(state), None)
            raise ValueError(f"{name} holds no LoRA weights for the {denoiser}; its first weight is {first!r}.")
        if len(weights) < len(state):
            logger.warning(
                f"{len(state) - len(weights)} of {len(state)} LoRA weights are for text models, which the MLLM "
                "replaces; they are skipped."
            )
        self.denoiser.load_lora_adapter(
            weights,
            prefix=denoiser,
            network_alphas=alphas[0] if alphas else None,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    def fuse_lora(self, components: Sequence[str] = ("unet", "transformer"), **options: Any) -> None:
        """Fuse LoRA weights as in diffusers, which by default expects a text encoder too."""
        super().fuse_lora(list(components), **options)

    def unfuse_lora(self, components: Sequence[str] = ("unet", "transformer"), **options: Any) -> None:
        """See `fuse_lora`."""
        super().unfuse_lora(list(components), **options)

    def _require_decoder(self, *parts: str, scheduler: bool = True) -> None:
        self._require(next(iter(self.decoder_class.networks)), *(["scheduler"] if scheduler else []), *parts)

    def _require(self, *parts: str) -> None:
        if missing := [part for part in parts if getattr(self, part) is None]:
            raise ValueError(f"this pipeline has no {', '.join(missing)}, which this call needs; load it with them.")

    def _decoder(self) -> ImageDecoder:
        decoder = self.decoder_class(**{n: getattr(self, n) for n in (*self.decoder_class.networks, "scheduler")})
        decoder.spec = replace(decoder.spec, unconditional=self.config["unconditional"])
        return decoder

    def _conditions(
        self,
        prompt: Prompt | Sequence[Prompt],
        images: Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image_weights: Any = None,
        image_masks: Any = None,
    ) -> tuple[Condition, Condition]:
        """Return the conditions of the prompts and what guidance steers away from, B rows each."""
        prompts = read_prompts(prompt, images)
        if image_masks is not None:
            prompts = with_masks(prompts, for_each(image_masks, prompts, "image_masks"))
        if image_weights is not None:
            condition = weighted_condition(prompts, for_each(image_weights, prompts, "image_weights"), self._condition)
        else:
            condition = self._condition(prompts)
        count = len(condition.states)
        negative = self._negative(negative_prompt, count)
        return condition, negative if len(negative.states) == count else negative.repeat_interleave(count)

    def _null(self, unconditional: Condition) -> Condition:
        """Return the null condition, given that of the unconditional prompt."""
        _, tokens, width = unconditional.states.shape
        return ConditionSpec(tokens, width, unconditional=self.config["unconditional"]).null(unconditional)

    def _negative(self, negative_prompt: str | Sequence[str] | None, count: int) -> Condition:
        """Return the condition of the negative prompts: one row, or B rows if each prompt has its own."""
        if not negative_prompt:
            return self.null_condition
        texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        if not isinstance(negative_prompt, str) and len(texts) != count:
            raise ValueError(f"got {len(texts)} negative prompts for {count} prompts; allowed: one, or one per prompt.")
        condition = self._condition([[check_negative_prompt(text)] for text in texts])
        empty = torch.tensor([not text for text in texts], device=condition.states.device)
        return condition.replace_where(empty, self._null(condition))

    @torch.no_grad()
    def _condition(self, prompts: Sequence[Sequence[Segment]]) -> Condition:
        encoder, model = self.encoder, self.model
        batch = encoder.collate([encoder(segments) for segments in prompts])
        with evaluating(model):
            return model.condition(batch.to(self._execution_device))


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write model_index.json, and a module through which `DiffusionPipeline.from_pretrained(folder,
    trust_remote_code=True)` finds the class if kosmosg is installed."""
    kind = KosmosGPipeline.__name__
    write_text(folder / MODEL_CODE, f"from kosmosg.pipeline import {kind}\n")
    write_json(folder / MODEL_INDEX, {**index, "_class_name": [Path(MODEL_CODE).stem, kind]})


def decoder_of_run(folder: str | Path) -> str | None:
    """Return the image decoder named in the configuration of a run folder; None for other folders."""
    file = Path(folder) / RUN_CONFIG
    try:
        return OmegaConf.select(OmegaConf.load(file), "model.image_decoder") if file.is_file() else None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error


def decoder_parts(image_decoder: str | Path, dtype: Dtype, skip: Collection[str]) -> dict[str, Any]:
    """Load the denoiser and VAE of an image decoder and build its "dpm" scheduler; skip components in `skip`."""
    index = image_decoder_index(image_decoder)
    kind = IMAGE_DECODERS[index["_class_name"]]
    parts: dict[str, Any] = dict.fromkeys(DENOISERS - set(skip))
    for name, network in kind.networks.items():
        if name not in skip:
            parts[name] = load_network(network, image_decoder, name, dtype=dtype_of(name, dtype))
    if "scheduler" not in skip:
        parts["scheduler"] = build_scheduler("dpm", kind.read_scheduler(image_decoder))
    return {**parts, "family": index["_class_name"], "unconditional": kind.unconditional_of(index)}


def model_parts(folder: Path, dtype: Dtype, skip: Collection[str]) -> dict[str, Any]:
    """Load mllm/, aligner/ and tokenizer/ of a training run; skip components in `skip`."""
    load: dict[str, Callable[[], Any]] = {
        "mllm": lambda: load_mllm(folder / "mllm", dtype_of("mllm", dtype)),
        "aligner": lambda: load_aligner(folder / "aligner", dtype_of("aligner", dtype)),
        "tokenizer": lambda: load_tokenizer(folder / "tokenizer"),
    }
    return {name: read() for name, read in load.items() if name not in skip}


def for_each(values: Sequence[Any], prompts: Sequence[Any], name: str) -> list[Sequence[Any]]:
    """Return one list per prompt; a flat list belongs to a single prompt.

    Raises:
        ValueError: the number of lists is not the number of prompts.
    """
    values = list(values)
    nested = bool(values) and all(isinstance(item, (list, tuple)) for item in values)
    lists: list[Sequence[Any]] = values if nested else [values]
    if len(lists) != len(prompts):
        raise ValueError(f"{name} holds {len(lists)} lists for {len(prompts)} prompts; give one list per prompt.")
    return lists


def embedded_condition(states: Any, mask: Tensor | None, pooled: Tensor | None) -> Condition:
    return Condition(states, None if mask is None else mask.bool(), pooled)


def dtype_of(part: str, dtype: Dtype) -> torch.dtype:
    """Return the dtype of one component; a dictionary may give each its own."""
    return dtype.get(part, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype


def call_with(pipeline: DiffusionPipeline, callback: Callable[..., dict], inner: Any, *arguments: Any) -> dict:
    """Call a callback with the pipeline that the user called instead of the inner one."""
    return callback(pipeline, *arguments)


def weights_state(network: nn.Module) -> tuple:
    """Return a value that changes when weights are changed in place, moved or replaced."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in network.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode, and restore the mode of each submodule on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
