"""Tiny adapted models of every form, with trained-looking weights."""

import copy
import functools
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from routerlab.adapters import MixtureOfLoraConfig
from tests.helpers.language_models import VOCAB, tiny_llama

TASKS = 3
COMMON: dict[str, Any] = {"num_experts": 4, "r": 2, "lora_alpha": 4.0, "task_type": "CAUSAL_LM"}
FORMS: dict[str, dict[str, Any]] = {
    "lora": {"router": "mixtral"},
    "shared_a": {"experts": "shared_a", "router": "soft"},
    "core": {"experts": "core", "router": "soft"},
    "feed_forward": {
        "experts": "feed_forward",
        "router": "mixtral",
        "plain_modules": ["q_proj", "v_proj"],
    },
    "skills": {"experts": "skills", "router": None, "num_tasks": TASKS, "num_heads": 2},
    "plain": {"router": None, "num_experts": 1},
}


def config_of(form: str = "lora", **changes: Any) -> MixtureOfLoraConfig:
    """The config of a form, with any changes."""
    options = COMMON | FORMS[form] | changes
    if isinstance(options["router"], str):
        options["router"] = copy.deepcopy(spec_of(options["router"]))
    return MixtureOfLoraConfig(**options)


@functools.cache
def spec_of(router: str) -> dict[str, Any]:
    """What the name of a router stands for; composing it takes a tenth of a second."""
    return MixtureOfLoraConfig(router=router, num_experts=8).router


def adapted(form: str = "lora", base: Any = None, **changes: Any) -> PeftModel:
    """A model in evaluation mode whose adapter does something."""
    model = get_peft_model(tiny_llama() if base is None else base, config_of(form, **changes))
    return stir(model.eval())


def stir(model: Any, adapter: str = "default", size: float = 0.2) -> Any:
    """Adds noise to all weights of an adapter: a fresh one does nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += size * noise.to(parameter.dtype)
    return model


def some_ids(batch_size: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch_size, length), generator=generator)


def run(model: Any, ids: Tensor, **options: Any) -> Any:
    """A forward pass in which sequence b has task b modulo `TASKS`."""
    with model.base_model.state.tasks(torch.arange(len(ids)) % TASKS):
        return model(input_ids=ids, **options)


def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Its logits, without a graph."""
    with torch.no_grad():
        return run(model, ids, **options).logits


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of the parameters that have one."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
