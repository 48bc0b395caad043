"""Ways of running the image decoder that keep its pictures, and fast ones that do not and say so."""

from pathlib import Path

import pytest
import torch
from kosmosg.acceleration import Acceleration, accelerate
from torch import Tensor

from evaluation.config import EvaluationConfig
from kosmosg.config import ConfigError, load_config
from kosmosg.sampling import DiffusionSampler
from tests import tiny
from tests.conftest import REPOSITORY

STEPS = 4


def sampled(sampler: DiffusionSampler, **options) -> Tensor:
    noise = torch.Generator().manual_seed(3)
    condition = torch.randn(2, tiny.QUERIES, tiny.CONDITION_WIDTH, generator=noise)
    return sampler(condition[:1], condition[1:], num_inference_steps=STEPS, seeds=[5], output_type="pt", **options)


@pytest.fixture
def sampler(tiny_stable_diffusion: Path) -> DiffusionSampler:
    return DiffusionSampler.from_pretrained(tiny_stable_diffusion)


def test_channels_last_keeps_the_pictures(sampler: DiffusionSampler) -> None:
    plain = sampled(sampler)
    accelerate(sampler.unet, sampler.vae, Acceleration(channels_last=True))
    weight = sampler.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(sampled(sampler), plain, rtol=0, atol=1e-4)


def test_going_without_guidance_halves_the_work_of_the_last_steps(sampler: DiffusionSampler) -> None:
    rows: list[int] = []
    sampler.unet.register_forward_pre_hook(lambda unet, arguments: rows.append(len(arguments[0])))
    guided = sampled(sampler)
    assert rows == [2] * STEPS
    rows.clear()
    steps: list[int] = []

    def count(pipeline, step, timestep, tensors):
        steps.append(step)
        return {}

    fast = sampled(sampler, fast_unguided_share=0.5, callback_on_step_end=count)
    assert rows == [2, 2, 1, 1] and steps == list(range(STEPS))
    assert not torch.allclose(fast, guided, atol=1e-3)
    with pytest.raises(ValueError, match=r"fast_unguided_share=1\.5"):
        sampled(sampler, fast_unguided_share=1.5)


@pytest.mark.parametrize("table", ["dreambench", "coco"])
def test_no_protocol_takes_a_fast_mode(table: str, tmp_path: Path) -> None:
    arguments = [
        str(REPOSITORY / "configs" / "toyland" / "evaluation.yaml"),
        f"output={tmp_path}",
        f"{table}.sampling.fast_unguided_share=0.5",
    ]
    with pytest.raises(ConfigError, match="fast_unguided_share"):
        load_config(arguments, EvaluationConfig)
