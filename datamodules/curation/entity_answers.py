"""Asking a chat model for the things that a caption names (paper section 3.1: MPT-7B-Instruct)."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.curation.models import GREEDY, find_device, load_model, load_part
from datamodules.curation.rows import Batch
from datamodules.curation.stage_config import Entities
from datamodules.errors import DataError


class AskLanguageModel:
    """`caption` → `answer`, through the model's chat template and greedily."""

    def __init__(self, config: Entities, device: str):
        self.config, self.device = config, find_device(device)
        self.tokenizer = load_part(AutoTokenizer, config)
        if config.chat_template is not None:
            self.tokenizer.chat_template = config.chat_template
        if not self.tokenizer.chat_template:
            raise DataError(
                f"entities.model='{config.model}' has no chat template; give its conversation's form as "
                "entities.chat_template (configs/curation/open_images.yaml has MPT's)."
            )
        self.model = load_model(AutoModelForCausalLM, config, self.device)
        self.tokenizer.padding_side = "left"  # the answer follows the prompt's last token
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Ask about the batch's captions."""
        # Long and short captions together cost padding only; sorting them would tie a batch to its whole chunk.
        prompts = [self.prompt(row["caption"]) for row in batch]
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids, mask = (encoded[name].to(self.device) for name in ("input_ids", "attention_mask"))
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.config.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **GREEDY,
        )
        answers = self.tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
        return [row | {"answer": answer} for row, answer in zip(batch, answers, strict=True)]

    def prompt(self, caption: str) -> str:
        """The conversation up to where the model answers."""
        asked = self.config.prompt.replace("{caption}", caption)
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}],
            tokenize=False,
            add_generation_prompt=True,
            **self.config.template_options,
        )
