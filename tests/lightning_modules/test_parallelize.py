"""Activation checkpointing, compilation and precision of sharded layers, put on from outside."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import VisionTraining
from kosmosg.prompt import PromptBatch
from lightning_modules import parallelize
from lightning_modules.parallelize import DATA_PARALLEL, apply_activation_checkpointing, apply_compile, layers, shard
from tests import tiny


def fresh_mllm(tiny_model: Path) -> nn.Module:
    mllm = KosmosG.from_pretrained(tiny_model).mllm.train()
    mllm.set_trainable(VisionTraining())
    return mllm


@pytest.fixture
def prompt() -> PromptBatch:
    ids = torch.randint(5, 50, (2, 12))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 1 : 1 + tiny.IMAGE_TOKENS] = True
    images = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return PromptBatch(ids, mask, images, torch.zeros_like(mask))


def graph(mllm: nn.Module, prompt: PromptBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Output, gradients, and bytes kept for the backward pass."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(0)  # for dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = mllm(prompt)
    hidden.square().mean().backward()
    gradients = {name: weight.grad for name, weight in mllm.named_parameters() if weight.grad is not None}
    return hidden.detach(), gradients, kept


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_layers_give_the_same_gradients_and_keep_less(
    mode: str, tiny_model: Path, prompt: PromptBatch
) -> None:
    plain, again = fresh_mllm(tiny_model), fresh_mllm(tiny_model)
    apply_activation_checkpointing(again, mode)
    expected, gradients, kept = graph(plain, prompt)
    found, others, kept_now = graph(again, prompt)
    assert torch.equal(found, expected) and kept_now < kept
    assert again.state_dict().keys() == plain.state_dict().keys() and others.keys() == gradients.keys()
    assert any("vision.clip.encoder.layers.1" in name for name in others), "CLIP's last block trains"
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "backend"), [("none", "aot_eager"), ("selective", "inductor")])
def test_compiled_layers_give_the_same(
    mode: str, backend: str, tiny_model: Path, prompt: PromptBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what another process left half written
    plain, compiled = fresh_mllm(tiny_model), fresh_mllm(tiny_model)
    for module in (*plain.modules(), *compiled.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled dropout draws other numbers
    apply_activation_checkpointing(compiled, mode)
    apply_compile(compiled.decoder, backend=backend)
    expected, gradients, _ = graph(plain, prompt)
    found, others, _ = graph(compiled, prompt)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("language_modelling", []),
        ("alignment", ["recipe.variant=masked", "recipe.length_buckets=2"]),
        ("instruction_tuning", ["recipe.length_buckets=2"]),
    ],
)
def test_no_layer_of_a_stage_is_left_uncompiled(
    stage: str, options: list[str], configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(train, "apply_compile", partial(apply_compile, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        steps = [f"trainer.{name}=8" for name in ("max_steps", "val_every", "checkpoint_every")]
        assert train.main([str(configs[stage]), "trainer.compile=true", *steps, *options]) == 0


@pytest.mark.parametrize(
    ("precision", "device", "half"),
    [
        ("bf16-mixed", "cuda", torch.bfloat16),
        ("16-mixed", "cuda", torch.float16),
        ("bf16-mixed", "cpu", None),
        ("32-true", "cuda", None),
        ("bf16-true", "cuda", None),
    ],
)
def test_layers_travel_in_half_precision_on_a_gpu_alone_and_gradients_are_summed_in_float32(
    precision: str, device: str, half: torch.dtype | None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = {}
    monkeypatch.setattr(
        parallelize, "fully_shard", lambda module, mesh, mp_policy: policies.update({module: mp_policy})
    )
    mllm = KosmosG.from_pretrained(tiny_model).mllm
    shard([mllm], {DATA_PARALLEL: SimpleNamespace(device_type=device)}, precision)
    assert policies.keys() == {*layers(mllm), mllm}
    assert all(policy.reduce_dtype == torch.float32 for policy in policies.values())
    assert policies.pop(mllm).param_dtype is None, "embeddings and final norms stay as they are"
    assert {policy.param_dtype for policy in policies.values()} == {half}
