"""Stage 2, image decoder alignment (paper section 2.2): AlignerNet learns the text space of the image decoder.

For a caption with hidden states s of the MLLM and t of the decoder's text model, the loss is w_mse·L_mse + w_rec·L_rec:
the aligner M predicts t from s (eq. 5), and its decoder N reconstructs s from M(s) (eq. 6). M and N are trained; MLLM
and text model are frozen. The data are captions alone.

With `recipe.trainable: all`, which is not in the paper, the MLLM is trained as well and prompts may contain images; t
is still that of the whole caption, with words in place of the images. L_rec must be off, since it would teach the MLLM
to discard whatever N cannot reconstruct.

If the loss ignores padding (`recipe.variant` masked or paper), a caption's loss does not depend on its batch. Batches
may then be split into length buckets, and s and t may be cached (`data.cached_states`), which leaves M and N as the
only networks in memory.

Shapes: `B` batch, `L` tokens, `D` MLLM width, `Q` queries, `C` condition width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from kosmosg.batches import AlignmentBatch
from kosmosg.condition import Condition, ConditionSpec
from kosmosg.losses import AlignmentVariant, reconstruction_loss, text_losses
from kosmosg.models.aligner import Aligner, AlignerDecoder
from kosmosg.models.build import (
    build_aligner,
    build_aligner_decoder,
    build_mllm,
    image_decoder_class,
    load_image_decoder,
    mllm_fingerprint,
)
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MultimodalLM, VisionTraining
from kosmosg.models.storage import fingerprint
from kosmosg.prompt import EncodedPrompt, PromptBatch
from lightning_modules.base import (
    CacheEncoder,
    LoadDecoder,
    PromptShape,
    PromptTokenizer,
    Sample,
    StageExperiment,
    StageModule,
    fake_prompts,
    typical_shape,
)
from lightning_modules.length_buckets import length_buckets
from lightning_modules.optimizer import OptimizerConfig

CAPTION_TOKENS = 75
PROMPT_TOKENS, PROMPT_IMAGES = 160, 2


@dataclass
class AlignmentRecipe:
    mse_weight: float = 1.0
    """Weight of L_mse, eq. 5."""
    rec_weight: float = 1.0
    """Weight of L_rec, eq. 6; 0 trains without N."""
    variant: AlignmentVariant = "released"
    """Normalisation of eqs. 5 and 6, see kosmosg/losses.py. released includes padding; masked and paper ignore it."""
    length_buckets: int = 1
    """Number of parts of similar length that a micro-batch is split into, to save padding; 1 with variant=released."""
    trainable: Literal["aligner", "all"] = "aligner"
    """aligner: M and N; all: the MLLM, too, for prompts with images (`data.constructed`), which needs rec_weight=0."""
    new_aligner: bool = True
    """Start M from random weights; false: load it from init_from."""
    vision_training: VisionTraining = field(default_factory=VisionTraining)
    """Trainable part of the vision encoder, if the MLLM is trained."""
    frozen_dropout: bool = False
    """Keep dropout active in the frozen MLLM, as the released code does."""

    def __post_init__(self) -> None:
        for name, minimum in (("mse_weight", 0), ("rec_weight", 0), ("length_buckets", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; allowed: {minimum} or more")
        if self.length_buckets > 1 and self.variant == "released":
            raise ValueError(
                f"recipe.length_buckets is {self.length_buckets}, but recipe.variant=released depends on the padding "
                "of the whole micro-batch; allowed: 1, or recipe.variant=masked or paper"
            )
        if self.mse_weight == self.rec_weight == 0:
            raise ValueError("recipe.mse_weight and recipe.rec_weight are both 0; at least one must be above 0")
        if self.trainable == "all" and self.rec_weight:
            raise ValueError(f"recipe.rec_weight is {self.rec_weight}; allowed with recipe.trainable=all: 0")

    def require_constant_states(self) -> None:
        """Check that s and t can be cached: they are constant during training and do not depend on padding.

        Raises:
            ValueError: a recipe key has a value that is not allowed with `data.cached_states`.
        """
        for key, value, allowed in (
            ("trainable", self.trainable, self.trainable == "aligner"),
            ("frozen_dropout", self.frozen_dropout, not self.frozen_dropout),
            ("variant", self.variant, self.variant != "released"),
        ):
            if not allowed:
                raise ValueError(
                    f"recipe.{key} is {value}; allowed with data.cached_states: recipe.trainable=aligner, "
                    "recipe.frozen_dropout=false and recipe.variant=masked or paper"
                )


class AlignmentModule(StageModule):
    """Stage 2: see the module docstring and `AlignmentBatch`.

    Args:
        mllm, image_decoder: None if their hidden states are cached.
        spec: form of the image decoder's condition; needed if `image_decoder` is None.

    Raises:
        ValueError: M's number of queries, width or pooled width differs from the text model's.
    """

    Recipe = AlignmentRecipe
    draws_images = True
    mllm: MultimodalLM
    image_decoder: ImageDecoder

    def __init__(
        self,
        mllm: MultimodalLM | None,
        aligner: Aligner,
        aligner_decoder: AlignerDecoder | None,
        image_decoder: ImageDecoder | None,
        recipe: AlignmentRecipe,
        optimizer: OptimizerConfig,
        seed: int,
        spec: ConditionSpec | None = None,
    ):
        super().__init__(optimizer, seed)
        self.spec = spec = spec or image_decoder.spec  # type: ignore[union-attr]
        queries = aligner.config.num_queries
        for key, value, expected in (
            # Masked text states are spread over any number of queries, see `Condition.spread`.
            ("num_queries", queries, queries if spec.masked else spec.tokens),
            ("width", aligner.config.width, spec.width),
            ("pooled_width", getattr(aligner.config, "pooled_width", None), spec.pooled),
        ):
            if value != expected:
                raise ValueError(
                    f"model.aligner.{key} is {value}, but the text model of model.image_decoder has {expected}"
                )
        self.mllm, self.aligner, self.aligner_decoder = mllm, aligner, aligner_decoder  # type: ignore[assignment]
        self.image_decoder, self.recipe = image_decoder, recipe  # type: ignore[assignment]
        if mllm is not None and recipe.trainable == "all":
            mllm.set_trainable(recipe.vision_training)
        elif mllm is not None:
            mllm.requires_grad_(False)
        aligner.requires_grad_(True)

    @classmethod
    def build(
        cls, experiment: StageExperiment, tokenizer: PromptTokenizer, load_decoder: LoadDecoder = load_image_decoder
    ) -> "AlignmentModule":
        model, recipe, mllm, decoder, spec = experiment.model, experiment.recipe, None, None, None
        # M and N come first, so that their initial weights do not depend on which other networks are built.
        aligner = build_aligner(model, None if recipe.new_aligner else experiment.init_from)
        aligner_decoder = build_aligner_decoder(model) if recipe.rec_weight else None
        if experiment.data.cached_states:
            recipe.require_constant_states()
            with torch.device("meta"):
                spec = image_decoder_class(model.image_decoder).from_config(model.image_decoder, "text").spec
        else:
            mllm = build_mllm(model, tokenizer, experiment.init_from)
            decoder = load_decoder(model.image_decoder, "text")
        return cls(mllm, aligner, aligner_decoder, decoder, recipe, experiment.optimizer, experiment.seed, spec)

    @classmethod
    def cached_networks(cls, experiment: StageExperiment) -> dict[str, dict[str, str]]:
        if not experiment.data.cached_states:
            return {}
        experiment.recipe.require_constant_states()
        kind, model = image_decoder_class(experiment.model.image_decoder), experiment.model
        return {
            "states": mllm_fingerprint(model, experiment.init_from),
            "text": {"network": fingerprint(model.image_decoder, *kind.text_parts())},
        }

    def cache_encoders(self) -> dict[str, CacheEncoder]:
        def states(prompts: list[EncodedPrompt]) -> list[dict[str, Tensor]]:
            batch = PromptBatch.stack(prompts, self.mllm.unconditional_prompt().pad_id).to(self.mllm.device)
            hidden, _ = self.mllm.hidden_states(batch)
            return [{"states": row[:length]} for row, length in zip(hidden, batch.lengths, strict=True)]

        def text(captions: list[tuple[Tensor, int]]) -> list[dict[str, Tensor]]:
            ids = torch.stack([ids for ids, _ in captions]).to(next(self.image_decoder.parameters()).device)
            condition = self.image_decoder.text_condition(ids)._asdict()
            return [
                {"length": torch.tensor([length])}
                | {name: value[row] for name, value in condition.items() if value is not None}
                for row, (_, length) in enumerate(captions)
            ]

        return {"states": CacheEncoder(self.mllm, states), "text": CacheEncoder(self.image_decoder, text)}

    @property
    def model(self) -> KosmosG:
        """MLLM and aligner as one network."""
        return KosmosG(self.mllm, self.aligner)

    def frozen_modules(self) -> Sequence[nn.Module]:
        mllm_in_train_mode = self.recipe.trainable == "all" or self.recipe.frozen_dropout
        networks = (self.image_decoder,) if mllm_in_train_mode else (self.mllm, self.image_decoder)
        return [network for network in networks if network is not None]

    def sharded_modules(self) -> Sequence[nn.Module]:
        networks = (self.mllm, self.aligner, self.aligner_decoder)
        return [network for network in networks if network is not None]

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """`loss`, `mse_loss` (eq. 5) and, with N, `rec_loss` (eq. 6), means over the captions."""
        if batch.target is None:
            batch = replace(batch, target=self.image_decoder.text_condition(batch.text_ids))
        buckets = length_buckets(batch.prompt.lengths, self.recipe.length_buckets)
        parts = [batch] if len(buckets) == 1 else [batch.rows(rows) for rows in buckets]
        dummy_image = self.recipe.trainable == "all" and batch.prompt.images is None
        means = [
            torch.stack(self._bucket_losses(part, dummy_image and not number)) * (len(part) / len(batch))
            for number, part in enumerate(parts)
        ]
        mse, *rec = torch.stack(means).sum(dim=0)
        loss = self.recipe.mse_weight * mse
        if not rec:
            return {"loss": loss, "mse_loss": mse}
        return {"loss": loss + self.recipe.rec_weight * rec[0], "mse_loss": mse, "rec_loss": rec[0]}

    def _bucket_losses(self, batch: Any, dummy_image: bool) -> tuple[Tensor, ...]:
        """L_mse and, with N, L_rec, means over the captions of a bucket."""
        variant, prompt, target = self.recipe.variant, batch.prompt, batch.target
        if self.recipe.trainable == "all":
            condition = self.condition(prompt, self.mllm, self.aligner, dummy_image or self.is_sharded)
            return (text_losses(condition, target, variant).mean(),)
        if batch.states is None:
            with torch.no_grad():
                hidden, padding = self.mllm.hidden_states(prompt)
        else:
            hidden, padding = batch.states, prompt.padding
        condition = self.aligner(hidden, padding)  # M(s)
        mse = text_losses(condition, target, variant).mean()
        if self.aligner_decoder is None:
            return (mse,)
        length, queries = hidden.shape[1], condition.states.shape[1]
        reconstruction = self.aligner_decoder(condition, length, None if variant == "released" else padding)
        return mse, reconstruction_loss(hidden, reconstruction, queries, padding, variant)

    def validation_losses(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        return {name: (value, len(batch)) for name, value in self.losses(batch).items()}

    def prompt_shape(self, experiment: StageExperiment) -> PromptShape:
        constructed = experiment.data.constructed
        with_images = bool(constructed.shards and constructed.weight)
        return typical_shape(self.mllm, PROMPT_TOKENS, PROMPT_IMAGES) if with_images else PromptShape(CAPTION_TOKENS, 0)

    def fake_batch(self, rows: int, shape: PromptShape, image_size: int) -> AlignmentBatch:
        if self.mllm is None:
            return self._fake_cached(rows, shape.tokens)
        prompt = fake_prompts(self.mllm, rows, shape)
        text_ids = torch.zeros(rows, self.image_decoder.spec.tokens, dtype=torch.int64, device=prompt.ids.device)
        return AlignmentBatch(prompt=prompt, text_ids=text_ids, indices=list(range(rows)))

    def _fake_cached(self, rows: int, tokens: int) -> AlignmentBatch:
        spec, make = self.spec, partial(torch.zeros, rows, device=self.aligner.device)
        masked, pooled = spec.masked, spec.pooled
        target = Condition(
            make(spec.tokens, spec.width),
            make(spec.tokens, dtype=torch.bool) if masked else None,
            None if pooled is None else make(pooled),
        )
        prompt = PromptBatch.stack([EncodedPrompt([0] * tokens, None, [])] * rows, 0).to(self.aligner.device)
        states = make(tokens, self.aligner.config.input_width)
        return AlignmentBatch(prompt=prompt, states=states, target=target, indices=list(range(rows)))

    def reference_images(self, batch: Any, sample: Sample) -> list[Image.Image]:
        """Images that the image decoder draws for the captions with its own text model."""
        decoder = self.image_decoder
        ids = torch.cat([batch.text_ids, decoder.tokenize([""])]).to(self.device)
        conditions = decoder.text_condition(ids)
        return sample(conditions.rows(slice(0, -1)), decoder.spec.null(conditions.rows(slice(-1, None))))

    def save_model(self, folder: Path, tokenizer: PromptTokenizer) -> None:
        """Write mllm/, aligner/, tokenizer/ and, with N, aligner_decoder/."""
        self.model.save_pretrained(folder, tokenizer, aligner_decoder=self.aligner_decoder)
