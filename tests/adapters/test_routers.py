"""Every router with every form of experts, and the options that do not go together."""

import json
from typing import Any

import pytest
import torch
from peft import get_peft_model

import routerlab as rl
from routerlab.adapters import MixtureOfLoraConfig
from routerlab.core.routing import RoutingContext
from tests.adapters.forms import adapted, config_of, gradients, logits_of, run, some_ids, spec_of
from tests.helpers.language_models import tiny_llama

ROUTED_FORMS = ("lora", "feed_forward", "core", "shared_a")
LEARN_BY_POLICY = {"subset_sampling"}
LEARN_NOTHING = {"hash", "random", "round_robin", "by_task"}


def eight(form: str, router: str, **changes: Any) -> Any:
    """Eight experts, since some routers group them."""
    return adapted(form, router=router, num_experts=8, plain_modules=None, **changes)


@pytest.mark.parametrize("form", ROUTED_FORMS)
@pytest.mark.parametrize("router", rl.available("router"))
def test_every_router_trains_every_form(router: str, form: str) -> None:
    model = eight(form, router).train()
    ids, state = some_ids(), model.base_model.state
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    out = run(model, ids, labels=ids.masked_fill(mask == 0, -100), attention_mask=mask)
    loss = out.loss
    for record in state.records.values():
        assert record.router_logits.dtype == torch.float32
        assert record.num_experts == 8
        assert not record.dispatch_mask[:2].any()  # padding
        if record.log_prob is not None:
            loss = loss + record.log_prob.sum()
    loss.backward()
    found = gradients(model)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in found.values())
    assert any(g.any() for n, g in found.items() if "mix_experts" in n)
    learns = any(g.any() for n, g in found.items() if "mix_router" in n)
    assert learns == (router not in LEARN_NOTHING)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".default." in name for name in changed)
    assert logits_of(model.eval(), ids).isfinite().all()


@pytest.mark.parametrize("router", rl.available("router"))
def test_every_router_comes_back_from_its_config(router: str) -> None:
    config = config_of("lora", router=router, num_experts=8)
    text = json.dumps(config.to_dict(), default=sorted)
    options = {k: v for k, v in json.loads(text).items() if k in config.__dataclass_fields__}
    again = MixtureOfLoraConfig(**options)
    assert again.router == config.router == spec_of(router)
    assert str(again.make_router(16)) == str(config.make_router(16))


def test_hash_routing_reads_the_ids_of_the_pass() -> None:
    model = eight("lora", "hash")
    ids = torch.tensor([[5, 9, 5, 9]])
    model(ids)
    for record in model.base_model.state.records.values():
        mask = record.dispatch_mask
        assert torch.equal(mask[0], mask[2])
        assert torch.equal(mask[1], mask[3])
    with pytest.raises(ValueError, match="hash routing reads context.token_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


def test_routing_by_task_reads_the_tasks_of_the_pass() -> None:
    model = eight("lora", "by_task")
    run(model, some_ids(3, 2))
    for record in model.base_model.state.records.values():
        assert record.expert_indices.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="by_task routing reads context.task_ids"):
        model(some_ids())


def test_a_balancer_is_told_of_the_records() -> None:
    model = eight("lora", "deepseek_v3").train()
    model(some_ids())
    for name, layer in model.base_model.state.layers.items():
        record = model.base_model.state.records[name]
        layer.router.update(record.requests_per_expert, record.proposal)
        assert layer.router.balancer.bias.any()


def test_the_gate_can_start_as_wide_as_a_linear() -> None:
    model = get_peft_model(tiny_llama(), config_of(router_init="kaiming_uniform", num_experts=64))
    for layer in model.base_model.state.layers.values():
        weight, bound = layer.router.gate.weight, layer.in_features**-0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / bound - 3**-0.5) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k=5: must be at least 1 and at most 4"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"router": "soft", "top_k": 2}, "top_k=2: .* has no such knob"),
        ({"granularity": "sequence"}, "granularity='sequence': TokenChoice has no such knob"),
        ({"granularity": "batch"}, "granularity='batch': must be one of 'token', 'sequence'"),
        ({"omega": "lora"}, "omega='lora': TokenChoice has no constant weights"),
        ({"omega": "big", "router": "subset_sampling"}, "omega='big': must be one of"),
        ({"router": "mixtrel"}, "mixtrel.*mixtral"),
        ({"router": {"_target_": "routerlab.routers.token_choice.TokenChoice", "topk": 2}},
         "no knob 'topk'; did you mean 'top_k'"),
        ({"router": {"_target_": "routerlab.routers.token_choise.TokenChoice"}}, "token_choise"),
        ({"router": {"top_k": 2}}, "must be a name in configs/router, a dict with _target_"),
        ({"router": 3}, "must be a name in configs/router, a dict with _target_"),
        ({"router": None}, "num_experts=4 experts need a router"),
        ({"router": None, "num_experts": 1, "top_k": 1}, "top_k=1"),
        ({"router": None, "num_experts": 1, "omega": "lora"}, "omega='lora'"),
        ({"router": None, "num_experts": 1, "experts": "feed_forward"}, "need a router"),
        ({"num_experts": 0}, "num_experts=0: must be at least 1"),
        ({"r": 0}, "r=0: must be at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0: must be above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0: must be .* below 1"),
        ({"experts": "loras"}, "experts='loras': must be one of"),
        ({"router_scope": "model"}, "router_scope='model': must be one of"),
        ({"router_init": "zeros"}, "router_init='zeros': must be one of"),
        ({"experts": "core", "router_scope": "block"}, "does not go with experts='core'"),
        ({"num_heads": 2}, "num_heads is of experts='skills'"),
        ({"core_dropout": True}, "core_dropout is of experts='core'"),
        ({"core_router": False}, "core_router is of experts='core'"),
        ({"dropout_per_expert": True}, "dropout_per_expert is of experts='shared_a'"),
        ({"gate_noise": False}, "gate_noise is of experts='skills'"),
        ({"num_tasks": 3}, "num_tasks is of experts='skills'"),
        ({"experts": "skills", "num_tasks": 3}, "no other fits"),
        ({"experts": "skills", "router": None}, "num_tasks: experts='skills' route by task"),
        ({"experts": "skills", "router": None, "num_tasks": 0}, "num_tasks=0: must be at least 1"),
        ({"experts": "skills", "router": None, "num_tasks": 2, "lora_dropout": 0.1}, "no dropout"),
        ({"experts": "skills", "router": None, "adapt": "z"}, "adapt_from must name"),
        ({"experts": "skills", "router": None, "adapt": "most", "adapt_from": "x"}, "adapt='most'"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureOfLoraConfig(**{"router": "mixtral", "num_experts": 4} | changes)


@pytest.mark.parametrize("tasks", [[0, 3], [-1, 0]])
def test_unknown_tasks_are_refused(tasks: list[int]) -> None:
    model = adapted("skills")
    model.base_model.state.context = RoutingContext(2, 7, task_ids=torch.tensor(tasks))
    with pytest.raises(ValueError, match=r"task_ids: .*num_tasks=3"):
        model(some_ids(2))
