"""A tiny decoder, its batches and its objective: float64, where rounding hides nothing."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from routerlab.backbones.decoder import Decoder
from routerlab.core.protocols import AuxLoss, Diagnostic
from routerlab.diagnostics.expert_by_domain import ExpertByDomain
from routerlab.diagnostics.expert_load import ExpertLoad
from routerlab.diagnostics.router_entropy import RouterEntropy
from routerlab.diagnostics.router_logits import RouterLogits
from routerlab.diagnostics.selection_margin import SelectionMargin
from routerlab.objectives.causal_lm import CausalLM
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.routers.token_choice import TokenChoice

VOCAB, WIDTH, EXPERTS, LENGTH = 11, 8, 4, 6


def tiny_decoder(seed: int = 0, **changes: Any) -> Decoder:
    """Two layers of four experts; the gates' weights are large enough to route unevenly."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "router": partial(TokenChoice, top_k=2, init_std=1.0),
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "d_ff": 6,
        "num_experts": EXPERTS,
        "max_positions": 16,
    }
    return Decoder(**(arguments | changes)).double()


def tiny_batch(batch_size: int = 8, ragged: bool = True, seed: int = 1) -> dict[str, Tensor]:
    """Sequences of unequal length: 1 to LENGTH real tokens, then padding without a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (batch_size, LENGTH + 1), generator=generator)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}
    batch["domain"] = torch.arange(batch_size) % 2
    if ragged:
        lengths = torch.arange(batch_size) * 5 % LENGTH + 1
        batch["valid"] = torch.arange(LENGTH) < lengths[:, None]
        batch["labels"][~batch["valid"]] = -100
    return batch


def all_diagnostics() -> dict[str, Diagnostic]:
    """Every diagnostic that works on any record."""
    return {
        "expert_load": ExpertLoad(),
        "router_entropy": RouterEntropy(),
        "selection_margin": SelectionMargin(),
        "router_logits": RouterLogits(),
        "expert_by_domain": ExpertByDomain(),
    }


def objective(backbone: nn.Module, losses: Mapping[str, AuxLoss], **changes: Any) -> CausalLM:
    """A CausalLM with every diagnostic; it needs no Trainer for `accumulate`."""
    arguments: dict[str, Any] = {
        "optimizer": OptimizerRecipe(partial(torch.optim.SGD, lr=0.1)),
        "diagnostics": all_diagnostics(),
        "domains": ["a", "b"],
    }
    return CausalLM(backbone, losses=losses, **(arguments | changes))
