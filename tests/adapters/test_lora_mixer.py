"""LoRA-Mixer: trained LoRAs as experts, one a task, then mixed by a router."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from routerlab.adapters import MixtureOfLoraConfig
from tests.helpers.language_models import VOCAB, tiny_llama
from tests.helpers.mixtures import layers_of, records_of, stir

TARGETS = ["q_proj", "k_proj", "v_proj"]
ALL = {"_target_": "routerlab.routers.soft_then_top_k.SoftThenTopK", "eval_top_k": None}
LORAS: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16},
    {"r": 16, "lora_alpha": 8, "use_rslora": True},
    {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]},
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three saved LoRAs with different ranks and scales, the last one without k_proj."""
    folders = []
    for number, options in enumerate(LORAS):
        torch.manual_seed(number)
        lora: Any = get_peft_model(
            tiny_llama(), LoraConfig(**({"target_modules": TARGETS} | options))
        )
        stir(lora)
        folders.append(tmp_path_factory.mktemp(f"lora{number}"))
        lora.save_pretrained(folders[-1])
    return folders


def alone(folder: Path) -> Any:
    model: Any = PeftModel.from_pretrained(tiny_llama(), str(folder))
    return model.double().eval()


def mixed(folders: list[Path], **changes: Any) -> Any:
    made = {
        "router": "lora_mixer",
        "num_experts": len(folders),
        "r": 32,
        "experts_from": [str(folder) for folder in folders],
        "target_modules": TARGETS,
    }
    model: Any = get_peft_model(tiny_llama(), MixtureOfLoraConfig(**made | changes))
    return model.double().eval()


def ids(batch_size: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch_size, 6), generator=torch.Generator().manual_seed(4))


def test_the_hard_stage_is_the_lora_of_the_task(sources: list[Path]) -> None:
    model = mixed(sources[:2], router="by_task").train()
    for task in (0, 1):
        model.zero_grad()
        got = model(ids(), task_ids=torch.tensor([task, task])).logits
        torch.testing.assert_close(got, alone(sources[task])(ids()).logits, rtol=1e-9, atol=1e-10)
        got.square().sum().backward()
        for layer in layers_of(model).values():
            for parameter in layer.experts.parameters():
                assert parameter.grad[1 - task].abs().max() == 0
                assert parameter.grad[task].abs().max() > 0


def test_a_batch_of_tasks_is_each_task_alone(sources: list[Path]) -> None:
    model = mixed(sources[:2], router="by_task")
    got = model(ids(), task_ids=torch.tensor([1, 0])).logits
    for row, task in ((0, 1), (1, 0)):
        expected = alone(sources[task])(ids()[row : row + 1]).logits
        torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_a_router_that_is_sure_gives_the_adapter_as_trained(
    sources: list[Path], training: bool
) -> None:
    model = mixed(sources[:2], router=ALL).train(training)
    for chosen in (0, 1):
        for layer in layers_of(model).values():
            layer.router.exclude([1 - chosen])
        expected = alone(sources[chosen])(ids()).logits
        torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-9, atol=1e-10)


def test_frozen_experts_stay_and_routers_learn(sources: list[Path]) -> None:
    model = mixed(sources, train_experts=False).train()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("gate.weight" in name for name in names)
    assert len(names) == 2 * 3
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(ids()).logits.square().sum().backward()
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == names


def test_experts_of_unequal_ranks_and_one_that_is_absent(sources: list[Path]) -> None:
    model, seen = mixed(sources).train(), {}
    loras = [alone(folder).base_model.model.model.layers[0].self_attn for folder in sources]
    layers = {n: x for n, x in layers_of(model).items() if n.startswith("layers.00")}
    assert len(layers) == 3
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args, y)}))
    model(ids())
    for name, layer in layers.items():
        short = name.rpartition(".")[2]
        (x,), y = seen[name]
        record = records_of(model)[name]
        probs = record.router_probs.unflatten(0, x.shape[:2])
        expected = layer.base_layer(x)
        for number, lora in enumerate(loras):
            if short == "k_proj" and number == 2:
                continue
            one = getattr(lora, short)
            expected = expected + probs[..., number : number + 1] * (one(x) - one.base_layer(x))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 6).double())
        absent = short == "k_proj"
        assert bool((probs[..., 2] == 0).all()) is absent
        assert set(record.expert_indices.tolist()) == ({0, 1} if absent else {0, 1, 2})


def test_evaluation_mixes_the_few_most_probable(sources: list[Path]) -> None:
    model = mixed(sources, router=ALL | {"eval_top_k": 2, "init_std": 0.5})
    model(ids())
    for record in records_of(model).values():
        top = record.router_probs.topk(2)
        assert torch.equal(record.expert_indices.view(-1, 2), top.indices)
        expected = top.values / top.values.sum(-1, keepdim=True)
        torch.testing.assert_close(record.combine_weights.view(-1, 2), expected)
