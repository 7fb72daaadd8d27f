"""Routers of ours in the blocks of transformers, whose experts then read our records."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.backbones.hugging_face_experts import HuggingFaceExperts
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.core.protocols import Experts
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.losses.expert_orthogonality import ExpertOrthogonalityLoss
from routerlab.losses.expert_router_coupling import ExpertRouterCouplingLoss
from routerlab.routers.expert_choice import ExpertChoice
from routerlab.routers.hash import HashRouter
from routerlab.routers.token_choice import TokenChoice
from routerlab.routers.top_p import TopP
from routerlab.test_time.plug_in import edited
from tests.helpers.language_models import VOCAB, save_tiny
from tests.helpers.moe_models import (
    EXPERTS,
    FAMILIES,
    TOP_K,
    WIDTH,
    gates,
    routed_layers,
    some_ids,
    stirred,
    tiny_config,
    tiny_moe,
)

Wrap = Callable[..., HuggingFaceMoE]
SAME_LAW = {
    "olmoe": partial(TokenChoice, normalize_weights=False),
    "mixtral": TokenChoice,
    "qwen2_moe": partial(TokenChoice, normalize_weights=False),
    "qwen3_moe": TokenChoice,
    "deepseek_v3": partial(
        TokenChoice,
        score_fn="sigmoid",
        route_scale=2.5,
        num_groups=4,
        groups_per_token=2,
        balancer=ExpertBias,
    ),
    "glm4_moe": partial(TokenChoice, score_fn="sigmoid", balancer=ExpertBias),
}


@pytest.fixture(scope="module")
def with_router(tmp_path_factory: pytest.TempPathFactory) -> Wrap:
    """Gives the model of `tiny_moe` other routers, which know what its own have learned."""
    root = tmp_path_factory.mktemp("families")

    def load(family: str, router: Any, **options: Any) -> HuggingFaceMoE:
        if not (root / family).exists():
            save_tiny(root / family, tiny_moe(family))
        torch.manual_seed(1)
        return HuggingFaceMoE(str(root / family), root, router, **options)

    return load


@pytest.mark.parametrize("family", SAME_LAW)
def test_a_router_of_the_same_law_goes_on_where_the_old_one_was(
    with_router: Wrap, family: str
) -> None:
    model, plain, ids = with_router(family, SAME_LAW[family]), tiny_moe(family), some_ids()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for gate in gates(plain):
        gate.register_forward_hook(lambda gate, args, out: found.append(out))
    out = model(ids)
    torch.testing.assert_close(out.logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    assert list(out.router_outputs) == routed_layers(family)
    for record, (logits, _, experts) in zip(out.router_outputs.values(), found, strict=True):
        torch.testing.assert_close(record.router_logits, logits, rtol=1e-5, atol=1e-5)
        picks = record.expert_indices.view(-1, TOP_K)
        assert torch.equal(picks.sort().values, experts.sort().values)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_choose_are_trained_in_every_family(with_router: Wrap, family: str) -> None:
    model, ids = with_router(family, ExpertChoice).train(), some_ids()
    out = model(ids)
    records = out.router_outputs.values()
    assert len({int(n) for r in records for n in r.token_indices.bincount(minlength=27)}) > 1
    out.logits.square().mean().backward()
    for layer in model.moe_layers.values():
        assert layer.router.gate.weight.grad.norm() > 0
        assert all(p.grad.norm() > 0 for p in layer.experts.parameters())
    for rows in (1, 2, 3):
        assert model(ids[:rows]).logits.shape == (rows, 9, VOCAB)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_values_and_gradients_are_those_of_a_loop_over_experts(
    with_router: Wrap, family: str
) -> None:
    model = with_router(family, partial(TopP, top_p=0.5)).double()
    ids, found = some_ids(), []
    layer = model.moe_layers[model.layer_names[-1]]
    block = [m for m in model.modules() if hasattr(m, "experts")][-1]
    seen: list[tuple[Tensor, ...]] = []
    block.experts.register_forward_hook(lambda module, args, out: seen.append((*args, out)))
    model(ids)
    hidden, record, _, out = seen[0]
    assert record.top_k is None  # another number of experts for each token
    weight = torch.randn_like(out)
    for y in (out, _by_hand(family, hidden, record, layer.experts.source)):
        inputs = [hidden, *layer.experts.parameters(), layer.router.gate.weight]
        gradients = torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True)
        found.append([y, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def _by_hand(family: str, hidden: Tensor, record: RouterOutput, experts: Any) -> Tensor:
    rows = [torch.zeros_like(row) for row in hidden]
    picks = zip(record.token_indices, record.expert_indices, record.combine_weights, strict=True)
    for token, expert, weight in picks:
        x = hidden[token]
        if family == "gpt_oss":
            gate_up = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
            gate, up = gate_up[::2].clamp(max=7), gate_up[1::2].clamp(-7, 7)
            inner = (up + 1) * gate * (1.702 * gate).sigmoid()
            y = inner @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        else:
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            y = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
        rows[token] = rows[token] + weight * y
    return torch.stack(rows)


def test_single_experts_are_rows_of_all(with_router: Wrap) -> None:
    model = with_router("gpt_oss", TokenChoice)
    experts = model.moe_layers[model.layer_names[0]].experts
    assert isinstance(experts, Experts)
    x, weights = torch.randn(6, WIDTH), torch.rand(6)
    counts = torch.tensor([0, 2, 0, 0, 1, 0, 0, 3])
    parts = zip(
        counts.tolist(), x.split(counts.tolist()), weights.split(counts.tolist()), strict=True
    )
    alone = [experts.expert(i, rows, w) for i, (n, rows, w) in enumerate(parts) if n]
    torch.testing.assert_close(experts(x, counts, weights), torch.cat(alone))


def test_padding_uses_no_expert(with_router: Wrap) -> None:
    model, ids = with_router("mixtral", TokenChoice), some_ids()
    valid = torch.arange(9) >= torch.tensor([0, 3, 8])[:, None]
    out = model(ids, RoutingContext(3, 9, valid=valid.flatten()))
    for row, real, logits in zip(ids, valid, out.logits, strict=True):
        alone = model(row[real][None]).logits[0]
        torch.testing.assert_close(logits[real], alone, rtol=1e-4, atol=1e-5)
    assert all(len(r.token_indices) == TOP_K * 16 for r in out.router_outputs.values())


def test_routers_know_the_pass(with_router: Wrap) -> None:
    model, ids = with_router("olmoe", HashRouter), some_ids()
    records = model(ids).router_outputs
    first, second = (records[name].expert_indices for name in model.layer_names[:2])
    assert not torch.equal(first, second)  # the layer is told
    by_id = dict(zip(ids.flatten().tolist(), first.view(-1, TOP_K).tolist(), strict=True))
    assert [by_id[i] for i in ids.flatten().tolist()] == first.view(-1, TOP_K).tolist()


def test_checkpointing_and_edits_go_with_our_routers(with_router: Wrap) -> None:
    ids, found = some_ids(), []
    for checkpointing in (False, True):
        options = {"activation_checkpointing": checkpointing}
        model = with_router("qwen3_moe", ExpertChoice, **options).train()
        with edited(model, lambda name, logits: logits + 1):
            out = model(ids)
            loss = out.logits.square().mean()
            loss = loss + sum(r.router_probs.square().mean() for r in out.router_outputs.values())
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)


def test_experts_that_choose_generate(with_router: Wrap) -> None:
    model, ids = with_router("deepseek_v3", partial(ExpertChoice, capacity_factor=4.0)), some_ids()
    written = model.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape == (3, 12)
    assert all(len(record.router_logits) == 3 for record in model.records.values())


def test_bfloat16_models_have_our_routers_in_float32(with_router: Wrap) -> None:
    model = with_router("mixtral", TokenChoice, dtype="bfloat16", trainable="routers")
    out = model(some_ids())
    assert out.logits.dtype == torch.bfloat16
    out.logits.float().square().mean().backward()
    for layer in model.moe_layers.values():
        assert (
            layer.router.gate.weight.dtype == layer.router.gate.weight.grad.dtype == torch.float32
        )
        assert layer.experts.gate_up_proj.dtype == torch.bfloat16


def test_what_is_not_kept_is_told(with_router: Wrap, recwarn: pytest.WarningsRecorder) -> None:
    model = with_router("gpt_oss", TokenChoice)
    with_router("deepseek_v3", TokenChoice)
    with_router("olmoe", partial(TokenChoice, top_k=3))
    with_router("olmoe", ExpertChoice)
    assert [str(warning.message) for warning in recwarn] == [
        "GptOssTopKRouter.bias has no place in TokenChoice and is dropped",
        "DeepseekV3TopkRouter.e_score_correction_bias has no place in TokenChoice and is dropped",
        "OlmoeTopKRouter picked top_k=2 experts, TokenChoice picks 3",
    ]
    old = gates(tiny_moe("gpt_oss"))
    for layer, gate in zip(model.moe_layers.values(), old, strict=True):
        assert torch.equal(layer.router.gate.weight, gate.weight)


def test_frozen_routers_of_ours_are_in_the_state(with_router: Wrap) -> None:
    fresh = partial(HashRouter, top_k=1)
    model = with_router("olmoe", fresh, trainable="experts", trainable_layers=1)
    names = {"gate_up_proj", "down_proj"}
    assert {key.rsplit(".", 1)[-1] for key in model.state_dict()} == names
    model = with_router("olmoe", ExpertChoice, trainable="routers", trainable_layers=1)
    key = "model.model.layers.{}.mlp.gate.router.gate.weight"
    assert set(model.state_dict()) == {key.format(layer) for layer in range(3)}


def test_losses_on_weights_work_where_layouts_are_ours(with_router: Wrap) -> None:
    model = with_router("mixtral", TokenChoice)
    layer, context = model.moe_layers[model.layer_names[0]], RoutingContext(1, 1)
    for loss in (ExpertRouterCouplingLoss(1.0), ExpertOrthogonalityLoss(1.0)):
        assert loss.of_layer(layer, context) > 0
    native = HuggingFaceMoE(config=tiny_config("gpt_oss"))
    stirred(native.model)
    odd = native.moe_layers[native.layer_names[0]]
    assert isinstance(odd.experts, HuggingFaceExperts)
    with pytest.raises(ValueError, match="expert_router_coupling needs a layer with experts"):
        ExpertRouterCouplingLoss(1.0).of_layer(odd, context)


def test_routers_that_do_not_fit_are_refused(with_router: Wrap) -> None:
    class Other(TokenChoice):
        def __init__(self, d_model: int, num_experts: int) -> None:
            super().__init__(d_model, num_experts + 1)

    with pytest.raises(
        ValueError, match="layers.00.moe: the router routes to 9 experts, the layer"
    ):
        with_router("olmoe", Other)
    with pytest.raises(ValueError, match="experts_implementation='eager': goes with router=native"):
        with_router("olmoe", TokenChoice, experts_implementation="eager")
    with pytest.raises(ValueError, match="save_model: its routers were replaced"):
        with_router("olmoe", TokenChoice).save_model("nowhere")
    assert with_router("olmoe", TokenChoice).count_parameters()["experts"] == 3 * EXPERTS
