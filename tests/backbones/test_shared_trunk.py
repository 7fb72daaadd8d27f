"""Copies that start at the first adapted layer equal copies from the start."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.backbones.pretrained import PretrainedLM
from routerlab.core.routing import RoutingContext
from tests.helpers.language_models import IDS, VOCAB, save_tiny, tiny_gpt2, tiny_llama, tiny_qwen3

M, B, S = 3, 2, 8


@pytest.fixture(params=[tiny_llama, tiny_gpt2, tiny_qwen3], ids=["llama", "gpt2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PretrainedLM:
    return _adapted(tmp_path, request.param(seed=0))


def _adapted(folder: Path, base: Any, **changes: Any) -> PretrainedLM:
    save_tiny(folder, base)
    config = MixtureOfLoraConfig(
        router="subset_sampling", omega="lora", num_experts=4, layers_to_transform=[1], **changes
    )
    lm = PretrainedLM(str(folder), folder, config)
    torch.manual_seed(1)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return lm.train()


def _batch() -> tuple[torch.Tensor, RoutingContext]:
    ids = torch.randint(2, 60, (B, S), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, :3] = False
    context = RoutingContext(M * B, S, valid=valid.repeat(M, 1).reshape(-1), num_replicas=M, seed=5)
    return ids, context


def test_copies_equal_passes_of_their_own(model: PretrainedLM) -> None:
    assert model._trunk.fits
    _check_copies(model)


def test_biases_by_head_need_copies_from_the_start(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS}
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(**sizes))
    model = _adapted(tmp_path, bloom, target_modules=["dense_h_to_4h"])
    assert not model._trunk.fits
    _check_copies(model)


def _check_copies(model: PretrainedLM) -> None:
    ids, context = _batch()
    assert context.valid is not None
    together = model(ids.repeat(M, 1), context).logits
    single = replace(context, batch_size=B, valid=context.valid[: B * S], num_replicas=1)
    apart = [model(ids, replace(single, replica=m)).logits for m in range(M)]
    real = context.valid.view(M * B, S)
    torch.testing.assert_close(together[real], torch.cat(apart)[real])
    assert not torch.equal(apart[0][0], apart[1][0])  # the samples differ


def test_the_layers_below_see_each_sequence_once(model: PretrainedLM) -> None:
    rows: dict[int, int] = {}
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
                module.register_forward_hook(
                    lambda m, args, out, index=index: rows.__setitem__(index, args[0].shape[0])
                )
                break
    ids, context = _batch()
    model(ids.repeat(M, 1), context)
    assert rows == {0: B, 1: M * B}


def test_a_pass_without_copies_is_left_alone(model: PretrainedLM) -> None:
    ids, _ = _batch()
    model.eval()
    assert torch.equal(model(ids).logits, model(ids, RoutingContext(B, S)).logits)
