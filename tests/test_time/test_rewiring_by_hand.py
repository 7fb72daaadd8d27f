"""Rewiring: numbers by hand, and two steps by finite differences."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.backbones.decoder import Decoder
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.token_choice import TokenChoice
from routerlab.test_time.layer_scores import confidence, layer_scores, layer_shares
from routerlab.test_time.offsets import Offsets, descend
from routerlab.test_time.plug_in import edited
from routerlab.test_time.rewiring import Rewiring
from tests.helpers.models import VOCAB, tiny_decoder
from tests.helpers.records import record


class OneLayer(nn.Module):
    """One token with logits (2, 1, 0), experts that say 1, 0 and 5, two of them picked."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__()
        router = TokenChoice(3, 3, top_k=2, **knobs).double()
        router.gate.weight.data = torch.eye(3, dtype=torch.float64)
        self.router, self.layer_names = router, ["layers.00.moe"]
        self.moe_layers = {"layers.00.moe": SimpleNamespace(router=router)}

    def output(self) -> tuple[Tensor, RouterOutput]:
        found = self.router(torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64))
        said = torch.tensor([1.0, 0.0, 5.0], dtype=torch.float64)
        return (found.combine_weights * said[found.expert_indices]).sum(), found


def offset(*values: float) -> Offsets:
    vector = torch.tensor([values], dtype=torch.float64)
    return Offsets({"layers.00.moe": vector}, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("normalize", "value", "gradient"),
    [
        (True, 0.731059, (0.196612, -0.196612, 0.0)),
        (False, 0.665241, (0.222695, -0.162803, -0.059892)),
    ],
)
def test_the_gradient_of_one_layer(
    normalize: bool, value: float, gradient: tuple[float, ...]
) -> None:
    model, edit = OneLayer(normalize_weights=normalize), offset(0.0, 0.0, 0.0)
    edit.by_layer["layers.00.moe"].requires_grad_()
    with edited(model, edit):
        output, _ = model.output()
    (found,) = torch.autograd.grad(output, [edit.by_layer["layers.00.moe"]])
    assert float(output.detach()) == pytest.approx(value, abs=1e-6)
    assert found[0].tolist() == pytest.approx(gradient, abs=1e-6)
    assert float(found.sum()) == pytest.approx(0, abs=1e-12)


def test_one_step_of_descent() -> None:
    model = OneLayer(normalize_weights=False)

    def run() -> tuple[Tensor, dict[str, RouterOutput]]:
        output, found = model.output()
        return (0.5 * output**2).view(1), {"layers.00.moe": found}

    asked = []

    def shares_of(records: Any) -> dict[str, Tensor]:
        asked.append(records)
        return {"layers.00.moe": torch.ones(1)}

    after, losses = descend(model, offset(0.0, 0.0, 0.0), run, 1, 0.05, shares_of)
    expected = (-0.007407, 0.005415, 0.001992)
    assert after.by_layer["layers.00.moe"][0].tolist() == pytest.approx(expected, abs=1e-6)
    assert float(losses) == pytest.approx(0.2212728, abs=1e-7)
    with torch.no_grad(), edited(model, after):
        assert float(run()[0]) == pytest.approx(0.2195094, abs=1e-7)
    descend(model, offset(0.0, 0.0, 0.0), run, 3, 0.05, shares_of)
    assert len(asked) == 2  # once a phase


@pytest.mark.parametrize(("normalize", "selection"), [(True, "hard"), (False, "soft")])
def test_two_steps_by_finite_differences(normalize: bool, selection: str) -> None:
    router = partial(TokenChoice, top_k=2, init_std=0.5, normalize_weights=normalize)
    model = tiny_decoder(router=router, num_layers=3).eval()
    ids = torch.randint(VOCAB, (5,), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.zeros(2, dtype=torch.long), ids, ids[:1]])[None]  # and an answer
    places = torch.arange(8)
    context = RoutingContext(1, 8, valid=places > 1, prompt=(places > 1) & (places < 7))
    plug_in = Rewiring(num_steps=2, eta=0.5, selection=selection)
    found = plug_in.adapt(model, {"input_ids": padded}, context)
    assert plug_in.phase is not None
    delta = torch.zeros(3, 4, dtype=torch.float64)
    shares = None
    for step in range(2):
        loss, scores = plain_loss(model, ids, delta)
        assert float(plug_in.phase.losses[step]) == pytest.approx(loss, rel=1e-9)
        if shares is None:
            assert plug_in.phase.scores[0].tolist() == pytest.approx(scores.tolist(), rel=1e-6)
            shares = 3 * scores / scores.sum()
            if selection == "hard":
                shares = (scores > scores.min()).double()  # two of three
        slopes = torch.zeros_like(delta)
        for place in [(layer, expert) for layer in range(3) for expert in range(4)]:
            moved = torch.zeros_like(delta)
            moved[place] = 1e-5
            ends = [plain_loss(model, ids, delta + sign * moved)[0] for sign in (1, -1)]
            slopes[place] = (ends[0] - ends[1]) / 2e-5
        delta = delta - 0.5 * shares[:, None] * slopes
    torch.testing.assert_close(torch.cat(list(found.by_layer.values())), delta, atol=1e-9, rtol=0)
    assert delta.abs().max() > 1e-5


@torch.no_grad()
def plain_loss(model: Decoder, ids: Tensor, delta: Tensor) -> tuple[float, Tensor]:
    """The next-token loss of a sequence with these vectors [L E] added, and C of each layer."""
    gates = [layer.router.gate for layer in model.moe_layers.values()]
    hooks = [
        gate.register_forward_hook(lambda module, args, z, row=row: z + row)
        for gate, row in zip(gates, delta, strict=True)
    ]
    out = model(ids[None])
    for hook in hooks:
        hook.remove()
    said = out.logits[0].log_softmax(-1)
    loss = -sum(float(said[t, ids[t + 1]]) for t in range(len(ids) - 1)) / (len(ids) - 1)
    scores = [
        sum(-math.log(p) for row in found.router_probs for p in row.topk(2).values.tolist())
        for found in out.router_outputs.values()
    ]
    return loss, torch.tensor(scores, dtype=torch.float64) / (2 * len(ids))


def test_a_constant_changes_nothing_but_sigmoids() -> None:
    for knobs, equal in (
        ({"normalize_weights": False}, True),
        ({"normalize_weights": True}, True),
        ({"score_fn": "sigmoid"}, False),
    ):
        model = OneLayer(**knobs)
        with edited(model, offset(3.0, 3.0, 3.0)):
            moved, _ = model.output()
        assert (moved.item() == pytest.approx(model.output()[0].item())) == equal


def test_confidence_of_three_distributions() -> None:
    probs = [[0.25] * 4, [0.48, 0.48, 0.02, 0.02], [0.94, 0.02, 0.02, 0.02]]
    found = confidence(record(probs, [[0, 1]] * 3))
    assert found.tolist() == pytest.approx([1.386294, 0.733969, 1.986949], abs=1e-6)


def test_scores_are_means_over_real_tokens() -> None:
    probs = [[0.25] * 4, [0.48, 0.48, 0.02, 0.02], [0.94, 0.02, 0.02, 0.02], [0.25] * 4]
    valid = torch.tensor([True, True, True, False])
    context = RoutingContext(2, 2, valid=valid)
    records = {"a": record(probs, [[0, 1]] * 4, valid=valid)}
    scores = {kind: layer_scores(kind, records, context) for kind in ("confidence", "top_k_mass")}
    expected = [(1.386294 + 0.733969) / 2, 1.986949]
    assert scores["confidence"][:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert scores["top_k_mass"][:, 0].tolist() == pytest.approx([(0.5 + 0.96) / 2, 0.96])
    entropies = layer_scores("negative_entropy", records, context)[:, 0].tolist()
    assert entropies == pytest.approx([-1.1242, -0.2927], abs=1e-3)


def test_shares_of_layers() -> None:
    scores = torch.tensor([[2.0, 3.0, 5.0]])
    assert layer_shares("soft", scores, 1)[0].tolist() == pytest.approx([0.6, 0.9, 1.5])
    assert layer_shares("hard", scores, 0.5).tolist() == [[0.0, 1.0, 1.0]]
    assert layer_shares("hard", scores, 1 / 3).tolist() == [[0.0, 0.0, 1.0]]
    assert torch.equal(layer_shares("hard", scores, 1), layer_shares("all", scores, 0.1))
    assert torch.equal(
        layer_shares("soft", torch.full((1, 3), 7.0), 1), layer_shares("all", scores, 1)
    )


def test_last_and_random_layers() -> None:
    records = dict.fromkeys("abcd", record([[0.5, 0.5]], [[0]]))
    context = RoutingContext(1, 1)
    deep = layer_shares("hard", layer_scores("last", records, context), 0.5)
    assert deep.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    drawn = [layer_scores("random", records, context, seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
