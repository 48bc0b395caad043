"""Interleaved prompts to images, with a trained model: a diffusers pipeline like any other.

    pipe = KosmosGPipeline.from_pretrained("kosmos-g", torch_dtype=torch.bfloat16).to("cuda")
    pipe(["a ", dog, " in the suit of ", hero], num_images_per_prompt=4).images
    pipe("<i> swimming underwater", images=[dog], negative_prompt="blurry", seeds=[0]).images

Loading, saving, moving, offloading and the hub are diffusers' own, and images are drawn by diffusers' own pipeline of
the image decoder. Other pipelines of its family, as those of ControlNet, are composed with this one through prompt
embeddings (paper section 4.4):

    control = pipe.compose(StableDiffusionControlNetPipeline, controlnet=controlnet)
    control(**pipe.embeddings("<i> in the snow", images=[dog]), image=edges).images

Shapes: `B` prompts, `n` images for each, `Q` condition tokens, `C` condition width.
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
DENOISERS = {"unet", "transformer"}  # diffusers' names for it
logger = logging.getLogger(__name__)


def drawing_state(name: str) -> property:
    """An attribute of the diffusers pipeline that draws, as one of KosmosGPipeline."""
    return property(lambda pipe: getattr(pipe._drawing, name), lambda pipe, value: setattr(pipe._drawing, name, value))


class KosmosGPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    """MLLM, AlignerNet and the image decoder that they steer.

    A part may be None where it is not needed: `encode_prompt` needs `mllm`, `aligner` and `tokenizer`, and drawing from
    `prompt_embeds` and `negative_prompt_embeds` the others.

    Args:
        unet, transformer: the denoiser, by the name that its family has for it; the other is None.
        scheduler: of diffusers; replace it as in other pipelines, or name a `sampler` at the call.
        family: of the image decoder, a key of `IMAGE_DECODERS`: the name of diffusers' pipeline.
        unconditional: what guidance steers away from without a negative prompt, see `ConditionSpec`; None for what is
            usual in the family.

    Raises:
        ValueError: parts that do not fit each other, or an unknown family.
    """

    model_cpu_offload_seq = "mllm->aligner->unet->transformer->vae"
    _lora_loadable_modules: ClassVar = ["unet", "transformer"]
    _optional_components: ClassVar = ["mllm", "aligner", "tokenizer", "unet", "vae", "scheduler", "transformer"]
    # What callbacks read and set on the pipeline that draws.
    guidance_scale, _guidance_scale = drawing_state("guidance_scale"), drawing_state("_guidance_scale")
    interrupt, _interrupt = drawing_state("interrupt"), drawing_state("_interrupt")
    num_timesteps, _num_timesteps = drawing_state("num_timesteps"), drawing_state("_num_timesteps")
    cross_attention_kwargs = property(lambda pipe: getattr(pipe._drawing, pipe.decoder_class.attention_argument))
    do_classifier_free_guidance = drawing_state("do_classifier_free_guidance")

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
        unconditional: str | None = None,  # diffusers checks types, but takes no Literal
    ):
        super().__init__()
        if family not in IMAGE_DECODERS:
            raise ValueError(f"family={family!r} is not allowed; allowed: {', '.join(IMAGE_DECODERS)}.")
        if isinstance(tokenizer, Tokenizer) and isinstance(mllm, MLLM) and len(tokenizer) != mllm.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} ids but the MLLM's vocabulary {mllm.config.vocab_size}."
            )
        unconditional = unconditional or IMAGE_DECODERS[family].unconditional_of({})
        self.register_to_config(family=family, unconditional=unconditional)
        self.register_modules(mllm=mllm, aligner=aligner, tokenizer=tokenizer, unet=unet, vae=vae, scheduler=scheduler)
        self.register_modules(transformer=transformer)
        if aligner is not None and self.denoiser is not None:
            spec = self._decoder().spec
            for what, ours, theirs in (
                ("conditions are {} wide", aligner.config.width, spec.width),
                ("pooled vector has the width {}", aligner.config.get("pooled_width"), spec.pooled),
            ):
                if ours != theirs:
                    raise ValueError(
                        f"the aligner's {what.format(ours)} but the image decoder reads {theirs}: the model was "
                        "aligned with another one."
                    )
        self._null_condition: tuple[Any, Condition] | None = None
        self._drawing: Any = SimpleNamespace()  # the pipeline of the call in progress, or of the last one

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        image_decoder: str | Path | None = None,
        torch_dtype: Dtype | None = None,
        **options: Any,
    ) -> "KosmosGPipeline":
        """Read a pipeline folder or hub id; or the model folder of a training run, and the image decoder it steers.

        Code in the folder is not run.

        Args:
            image_decoder: diffusers folder or hub id; its denoiser and VAE take the place of the folder's. Of a run
                folder, what the run was trained with is taken if none is given.
            torch_dtype: of all weights, or a dictionary as diffusers takes it; float32 if not given.
            options: of `diffusers.DiffusionPipeline.from_pretrained`; a part given here is not read, and may be None.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a part's weights are not those of its sizes or not finite, or parts do not fit each other; a
                scheduler that needs a package which is not installed; a `torch_dtype` that is none.
        """
        dtype = torch_dtype or options.pop("dtype", torch.float32)
        if not isinstance(dtype, (torch.dtype, dict)):
            raise ValueError(f"torch_dtype={dtype!r} is not allowed; allowed: a torch.dtype, as torch.float16.")
        if not Path(folder).is_dir():  # diffusers' own download refuses parts whose classes are of another package
            chosen = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
            folder = snapshot_download(str(folder), ignore_patterns=list(PICKLES), **chosen)
        image_decoder = image_decoder or decoder_of_run(folder)
        if (Path(folder) / PACKED).is_file():
            with unpacked(Path(folder)) as temporary:
                return cls.from_pretrained(temporary, image_decoder, dtype, **options)
        whole = (Path(folder) / MODEL_INDEX).is_file()
        folder = Path(folder) if whole else find_model(folder)
        if image_decoder is not None:
            options |= decoder_parts(image_decoder, dtype, options)
        if not (folder / MODEL_INDEX).is_file():
            if not ({"vae", "scheduler"} <= options.keys() and DENOISERS & options.keys()):
                raise FileNotFoundError(
                    f"'{folder}' holds no {MODEL_INDEX} and no image decoder; name the one that the model was trained "
                    "with as image_decoder=."
                )
            absent: dict[str, Any] = dict.fromkeys(DENOISERS)
            pipeline = cls(**absent | model_parts(folder, dtype, options) | options)
        else:
            try:
                pipeline = super().from_pretrained(str(folder), dtype=dtype, **options)
            except ImportError as error:  # of a scheduler whose package is not installed
                raise ValueError(f"'{folder}' cannot be loaded: {str(error).strip()}") from error
            # The others are checked where they are read.
            for name in pipeline.decoder_class.networks.keys() - options.keys():
                if (part := getattr(pipeline, name)) is not None:
                    check_weights(part, f"{folder}/{name}")
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        return pipeline

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """model_index.json, naming this class in place of the folder's own code (`write_index`), which is not run.

        Raises:
            ValueError: it is another pipeline's.
        """
        config = super().load_config(*arguments, **options)
        index = config[0] if isinstance(config, tuple) else config
        if "mllm" not in index:
            raise ValueError(f"the folder holds a {index.get('_class_name')}, which is no {cls.__name__}.")
        index["_class_name"] = cls.__name__
        return config

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """model_index.json and the file beside it, see `write_index`."""
        write_index(Path(json_file_path).parent, json.loads(self.to_json_string()))

    @property
    def model(self) -> KosmosG:
        """MLLM and aligner as one network."""
        self._require("mllm", "aligner")
        return KosmosG(self.mllm, self.aligner)

    @property
    def encoder(self) -> PromptEncoder:
        """Segments → ids and preprocessed images."""
        self._require("mllm", "aligner", "tokenizer")
        longest = self.mllm.max_tokens
        return self.mllm.encoder(self.tokenizer, min(longest, self.aligner.max_length or longest))

    @property
    def decoder_class(self) -> type[ImageDecoder]:
        """What the project knows of the family."""
        return IMAGE_DECODERS[self.config["family"]]

    @property
    def denoiser(self) -> Any:
        """U-Net or transformer."""
        return getattr(self, next(iter(self.decoder_class.networks)))

    @property
    def image_decoder(self) -> ImageDecoder:
        """Denoiser, VAE and scheduler behind the interface that the project knows."""
        self._require_decoder()
        return self._decoder()

    @property
    def sampler(self) -> DiffusionSampler:
        """Conditions → images, without a progress bar."""
        return DiffusionSampler(self.image_decoder)

    @property
    def _callback_tensor_inputs(self) -> list[str]:  # what callbacks may ask for
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
        """B·n images in `.images`, those of one prompt together.

        Args:
            prompt: text with a `<i>` for each image; or segments of text and images, one prompt, known by an image
                in the list; or a list of either, a batch.
            images: those of the placeholders, in order; for a batch of prompts, a list of lists.
            negative_prompt: what to steer away from, one for all or one each; empty means the null condition.
            image_weights: how much each image counts, 0 or more; for a batch, a list of lists. Its share of the
                condition is scaled: 1 changes nothing, 0 is the prompt without the image.
            image_masks: for each image a PIL image of its size, white where the subject is, or None. The rest becomes
                white, and a square around the subject is read, as in constructed samples.
            prompt_embeds, negative_prompt_embeds: conditions B×Q×C in place of prompts, see `embeddings`; with their
                pooled vectors B×P and masks B×Q where the image decoder reads them.
            sampler: "dpm", "ddim", "pndm" (set as the released code's) or the name of any diffusers scheduler, for
                this call; the pipeline's `scheduler` if not given. For flow matching "dpm" alone.
            seeds: one for each image, which then depends on its prompt and seed alone.
            others: as in `diffusers.StableDiffusionPipeline`.

        Raises:
            ValueError: placeholders unlike images, an empty or too long prompt, an image without pixels or of a mode
                without a meaning in RGB, seeds unlike images, a sampler or number that is not allowed; a part that is
                needed and None.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt= or prompt_embeds=.")
        self._require_decoder(*(["vae"] if output_type != "latent" else []))
        drawing = self.sampler
        unconditional = None
        if prompt is not None:
            steering = {"image_weights": image_weights, "image_masks": image_masks}
            condition, unconditional = self._conditions(prompt, images, negative_prompt, **steering)
        elif any(given is not None for given in (images, negative_prompt, image_weights, image_masks)):
            raise ValueError(
                "images=, image_weights=, image_masks= and negative_prompt= belong to prompt=; prompt_embeds= holds "
                "what they said."
            )
        else:
            condition = given_condition(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
            if negative_prompt_embeds is not None:
                unconditional = given_condition(
                    negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
                )
            else:  # without guidance it is not read
                unconditional = self.null_condition if guidance_scale > 1 else condition
        self._drawing = drawing.pipeline
        self._drawing.set_progress_bar_config(**getattr(self, "_progress_bar_config", {"disable": False}))
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        called = None if callback_on_step_end is None else partial(call_with, self, callback_on_step_end)
        drawn = drawing(
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
            callback_on_step_end=called,
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
        """(conditions, what guidance steers away from), B×Q×C both; see `__call__`.

        With pooled vectors or masks, they and those are given in the order of the family's own `encode_prompt`.
        """
        conditions = self._conditions(prompt, images, negative_prompt, **steering)
        found = self.decoder_class.pipeline_arguments(*conditions).values()
        return tuple(tensor for tensor in found if isinstance(tensor, Tensor))

    def embeddings(self, *prompt: Any, **options: Any) -> dict[str, Any]:
        """`encode_prompt` as keyword arguments of diffusers' pipelines of the family."""
        self._require_decoder(scheduler=False)
        placed = {"device": self._execution_device, "dtype": self.denoiser.dtype}
        conditions = (condition.to(**placed) for condition in self._conditions(*prompt, **options))
        return self.decoder_class.pipeline_arguments(*conditions)

    def compose(self, kind: Callable[..., Composed], **parts: Any) -> Composed:
        """A pipeline of diffusers over the same denoiser, VAE and scheduler; feed it `**pipe.embeddings(…)`.

        The networks are shared, not copied: a LoRA file loaded into one pipeline is in all of them.

        Args:
            kind: of the image decoder's family, as StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline.
            parts: what else it needs, as controlnet=.
        """
        self._require_decoder("vae")
        # A scheduler keeps the state of its run, so each pipeline has its own.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        networks = {name: getattr(self, name) for name in self.decoder_class.networks}
        absent = self.decoder_class.absent_parts()
        return kind(**networks, scheduler=parts.pop("scheduler", scheduler), **absent, **parts)

    @property
    def null_condition(self) -> Condition:
        """What guidance steers away from without a negative prompt, one row: the condition of `<s>` alone, or zeros.

        It is computed once for frozen weights, as `from_pretrained` leaves them.
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
        """diffusers' own of the family, but weights for text models are left out, with a warning: there is none here.

        Raises:
            ValueError: the file is no LoRA file, or nothing in it is for the denoiser.
        """
        reader, denoiser = self.image_decoder.diffusers_pipeline(), next(iter(self.decoder_class.networks))
        source = pretrained_model_name_or_path_or_dict
        source = dict(source) if isinstance(source, dict) else source
        low_cpu_mem_usage = options.pop("low_cpu_mem_usage", True)
        options |= {"return_lora_metadata": True, "unet_config": self.denoiser.config}  # by which XL's blocks are named
        state, *alphas, metadata = reader.lora_state_dict(source, **options)
        name = "the dictionary" if isinstance(source, dict) else f"'{source}'"
        if others := [key for key in state if "lora" not in key]:
            raise ValueError(f"{name} is no LoRA file: it has {others[0]!r}, which is no LoRA weight.")
        ours = {key: tensor for key, tensor in state.items() if key.startswith(f"{denoiser}.")}
        if not ours:
            raise ValueError(f"{name} holds no LoRA weights for the {denoiser}, as {next(iter(state), 'none')!r}.")
        if len(ours) < len(state):
            logger.warning(
                f"{len(state) - len(ours)} of {len(state)} LoRA weights are for text models, whose place the MLLM "
                "takes; they are left out."
            )
        self.denoiser.load_lora_adapter(
            ours,
            prefix=denoiser,
            network_alphas=alphas[0] if alphas else None,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    def fuse_lora(self, components: Sequence[str] = ("unet", "transformer"), **options: Any) -> None:
        """diffusers' own, which would look for a text encoder too."""
        super().fuse_lora(list(components), **options)

    def unfuse_lora(self, components: Sequence[str] = ("unet", "transformer"), **options: Any) -> None:
        """See `fuse_lora`."""
        super().unfuse_lora(list(components), **options)

    def _require_decoder(self, *parts: str, scheduler: bool = True) -> None:
        self._require(next(iter(self.decoder_class.networks)), *(["scheduler"] if scheduler else []), *parts)

    def _require(self, *parts: str) -> None:
        if missing := [part for part in parts if getattr(self, part) is None]:
            raise ValueError(f"this pipeline has no {', '.join(missing)}, which is needed here; load it with the part.")

    def _decoder(self) -> ImageDecoder:
        """Of the parts that there are."""
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
        """See `encode_prompt`."""
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
        """The null condition, of the rows of the unconditional prompt's."""
        _, tokens, width = unconditional.states.shape
        return ConditionSpec(tokens, width, unconditional=self.config["unconditional"]).null(unconditional)

    def _negative(self, negative_prompt: str | Sequence[str] | None, count: int) -> Condition:
        """Of one row, or of B where each prompt has its own."""
        if not negative_prompt:
            return self.null_condition
        texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        if not isinstance(negative_prompt, str) and len(texts) != count:
            raise ValueError(f"{len(texts)} negative prompts were given for {count} prompts; give one, or one each.")
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
    """model_index.json, and the code by which `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` finds
    the class where kosmosg is installed."""
    kind = KosmosGPipeline.__name__
    write_text(folder / MODEL_CODE, f"from kosmosg.pipeline import {kind}\n")
    write_json(folder / MODEL_INDEX, {**index, "_class_name": [Path(MODEL_CODE).stem, kind]})


def decoder_of_run(folder: str | Path) -> str | None:
    """The image decoder that a run was trained with, by its configuration; None for other folders."""
    file = Path(folder) / RUN_CONFIG
    try:
        return OmegaConf.select(OmegaConf.load(file), "model.image_decoder") if file.is_file() else None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error


def decoder_parts(image_decoder: str | Path, dtype: Dtype, given: Collection[str]) -> dict[str, Any]:
    """Denoiser, VAE and the scheduler "dpm" over the noise schedule of an image decoder, but for what is `given`."""
    index = image_decoder_index(image_decoder)
    kind = IMAGE_DECODERS[index["_class_name"]]
    parts: dict[str, Any] = dict.fromkeys(DENOISERS - set(given))
    for name, network in kind.networks.items():
        if name not in given:
            parts[name] = load_network(network, image_decoder, name, dtype=dtype_of(name, dtype))
    if "scheduler" not in given:
        parts["scheduler"] = build_scheduler("dpm", kind.read_scheduler(image_decoder))
    return {**parts, "family": index["_class_name"], "unconditional": kind.unconditional_of(index)}


def model_parts(folder: Path, dtype: Dtype, given: Collection[str]) -> dict[str, Any]:
    """What a training run wrote, mllm/, aligner/ and tokenizer/, but for what is `given`."""
    load: dict[str, Callable[[], Any]] = {
        "mllm": lambda: load_mllm(folder / "mllm", dtype_of("mllm", dtype)),
        "aligner": lambda: load_aligner(folder / "aligner", dtype_of("aligner", dtype)),
        "tokenizer": lambda: load_tokenizer(folder / "tokenizer"),
    }
    return {name: read() for name, read in load.items() if name not in given}


def for_each(values: Sequence[Any], prompts: Sequence[Any], name: str) -> list[Sequence[Any]]:
    """One list for each prompt; a flat list is that of a single one.

    Raises:
        ValueError: another number of lists.
    """
    listed = list(values)
    nested = bool(listed) and all(isinstance(item, (list, tuple)) for item in listed)
    lists: list[Sequence[Any]] = listed if nested else [listed]
    if len(lists) != len(prompts):
        raise ValueError(f"{name} holds {len(lists)} lists for {len(prompts)} prompts; give a list of lists, one each.")
    return lists


def given_condition(states: Any, mask: Tensor | None, pooled: Tensor | None) -> Condition:
    """Of what diffusers' pipelines are given."""
    return Condition(states, None if mask is None else mask.bool(), pooled)


def dtype_of(part: str, dtype: Dtype) -> torch.dtype:
    """Of one part, where a dictionary may give each its own."""
    return dtype.get(part, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype


def call_with(pipeline: DiffusionPipeline, callback: Callable[..., dict], inner: Any, *arguments: Any) -> dict:
    """A callback is called with the pipeline that the user called, not with the one that draws."""
    return callback(pipeline, *arguments)


def weights_state(network: nn.Module) -> tuple:
    """Differs after the weights were changed in place, moved or replaced."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in network.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, every submodule is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
