"""ReMix on adapted models: all selections enumerated, and where gradients may go."""

from itertools import permutations, product
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.estimators.rloo import rloo_advantages
from routerlab.ops.plackett_luce import ordered_log_prob
from tests.helpers.language_models import VOCAB, tiny_llama
from tests.helpers.mixtures import layers_of, mixture, records_of

EXPERTS, TOP_K, RANK = 4, 2, 2
SAMPLING = {
    "_target_": "routerlab.routers.subset_sampling.SubsetSampling",
    "init_std": 0.3,
    "top_k": TOP_K,
}
SIZES = {"router": SAMPLING, "num_experts": EXPERTS, "r": RANK, "omega": "rslora"}


def adapted(**changes: Any) -> Any:
    layers = {"num_hidden_layers": changes.pop("num_layers", 2)}
    return mixture(tiny_llama(**layers), **SIZES | changes).train()


def run(model: Any, ids: Tensor, prompt: int | None = None, **context: Any) -> Tensor:
    """Logits of a pass under a context; the first ``prompt`` tokens of each row are its prompt."""
    told = None
    if prompt is not None:
        told = (torch.arange(ids.shape[1]) < prompt).expand(ids.shape).reshape(-1)
    model.base_model.state.context = RoutingContext(*ids.shape, prompt=told, **context)
    return model(input_ids=ids).logits


def log_probs(model: Any, rows: int) -> Tensor:
    """[rows]: summed over layers and tokens."""
    found = [r.log_prob.view(rows, -1).sum(1) for r in records_of(model).values()]
    return torch.stack(found).sum(0)


class Replay(nn.Module):
    """Gives every token the picks it is told, in their order; remembers what it was asked."""

    def __init__(self, picks: Tensor, weight: float) -> None:
        super().__init__()
        self.picks, self.weight, self.num_experts = picks, weight, EXPERTS
        self.seen = torch.zeros(0)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> RouterOutput:
        self.seen = x.detach()
        logits = x.new_zeros(len(x), EXPERTS)
        weights = torch.full_like(self.picks, self.weight, dtype=x.dtype)
        return RouterOutput.from_top_k(logits, logits.softmax(-1), self.picks, weights)


class Enumeration:
    """A model with one router, one sequence of 2 tokens, and every selection J of it."""

    def __init__(self, granularity: str) -> None:
        self.model = adapted(num_layers=1, router_scope="block", granularity=granularity)
        self.ids, self.labels = torch.tensor([[5, 9]]), torch.tensor([7, 3])
        self.sequence = granularity == "sequence"
        self.prompt = 1 if self.sequence else None
        pairs = list(permutations(range(EXPERTS), TOP_K))
        chosen = [(p, p) for p in pairs] if self.sequence else list(product(pairs, pairs))
        self.picks = torch.tensor(chosen)  # [J, S, K]
        [layer] = [x for x in layers_of(self.model).values() if x.router is not None]
        self.gate = layer.router.gate.weight
        replay, real = Replay(self.picks.flatten(0, 1), layer.router.weight), layer.router
        layer.mix_router["default"] = replay
        with torch.no_grad():
            self.losses = self.loss(run(self.model, self.ids.expand(len(chosen), -1)))
        layer.mix_router["default"] = real
        self.tokens = replay.seen[:2]  # the router's input knows nothing of the selection

    def loss(self, logits: Tensor) -> Tensor:
        """[rows]: the mean over both targets."""
        targets = self.labels.expand(len(logits), -1)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)

    def log_prob(self) -> Tensor:
        """[J]: log Q of each selection, with its graph to the gate."""
        tokens = self.tokens[:1] if self.sequence else self.tokens  # the prompt is one token
        logits = (tokens @ self.gate.T).expand(len(self.picks), -1, -1)
        picks = self.picks[:, : len(tokens)]
        each = ordered_log_prob(logits.flatten(0, 1), picks.flatten(0, 1))
        return each.view(len(picks), -1).sum(1)

    def gradients(self) -> Tensor:
        """[J, E D]: of each selection's log Q."""
        every = self.log_prob()
        found = [torch.autograd.grad(x, self.gate, retain_graph=True)[0] for x in every]
        return torch.stack(found).flatten(1)


@pytest.mark.parametrize(("granularity", "number"), [("sequence", 12), ("token", 144)])
def test_the_estimate_is_unbiased_over_all_pairs_of_selections(
    granularity: str, number: int
) -> None:
    found = Enumeration(granularity)
    chance = found.log_prob().exp()
    assert len(chance) == number
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    assert found.losses.std() > 1e-2
    expectation = (chance * found.losses).sum()
    exact = torch.autograd.grad(expectation, found.gate)[0].flatten()
    grads, chance = found.gradients(), chance.detach()
    draws = torch.cartesian_prod(torch.arange(number), torch.arange(number)).T  # [M, J^M]
    weight, variances = chance[draws].prod(0), []
    for coefficients in (rloo_advantages(found.losses[draws]), found.losses[draws] / 2):
        estimates = sum(c[:, None] * grads[d] for c, d in zip(coefficients, draws, strict=True))
        mean = weight @ estimates
        torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-12)
        variances.append((weight @ (estimates - mean).square()).sum().item())
    assert variances[0] < 0.5 * variances[1]  # the second is without a baseline


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_what_the_adapter_draws_is_what_was_enumerated(granularity: str) -> None:
    found, rows = Enumeration(granularity), 24
    logits = run(
        found.model, found.ids.expand(rows, -1), found.prompt, num_replicas=rows, seed=3
    )  # fmt: skip
    [record] = records_of(found.model).values()
    drawn, log_q = record.expert_indices.view(rows, 2, TOP_K), log_probs(found.model, rows)
    same = (drawn[:, None] == found.picks).flatten(2).all(-1)
    assert torch.equal(same.sum(1), torch.ones(rows, dtype=torch.long))
    which = same.long().argmax(1)
    assert len(which.unique()) > 5
    torch.testing.assert_close(found.loss(logits), found.losses[which])
    torch.testing.assert_close(log_q, found.log_prob()[which])
    grads = [torch.autograd.grad(x, found.gate, retain_graph=True)[0] for x in log_q]
    torch.testing.assert_close(torch.stack(grads).flatten(1), found.gradients()[which])


def test_the_two_kinds_of_omega() -> None:
    for omega, expected in (("lora", 0.0625), ("rslora", 0.353553)):
        model = adapted(top_k=4, num_experts=8, r=8, omega=omega)
        run(model, torch.randint(VOCAB, (2, 5)))
        for name, record in records_of(model).items():
            assert record.combine_weights.unique().tolist() == [pytest.approx(expected, abs=1e-6)]
            assert layers_of(model)[name].experts.scaling == 1  # it replaces alpha / r


def test_the_layer_is_a_constant_times_the_sum_of_what_was_drawn() -> None:
    model, ids = adapted(), torch.randint(VOCAB, (2, 5))
    layer, seen = layers_of(model)["layers.01.mlp.up_proj"], {}
    layer.register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y))
    run(model, ids, seed=1)
    picks = records_of(model)["layers.01.mlp.up_proj"].expert_indices.view(10, TOP_K)
    x, experts = seen["x"].flatten(0, 1), layer.experts
    loras = experts.lora_B @ experts.lora_A  # [E O I]
    omega = 2 / (TOP_K * RANK) ** 0.5
    rows = [
        layer.base_layer(t) + omega * loras[p].sum(0) @ t for t, p in zip(x, picks, strict=True)
    ]
    torch.testing.assert_close(seen["y"].flatten(0, 1), torch.stack(rows))


def parameters(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Those of gates, and those of LoRAs."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in named if "gate.weight" in n], [p for n, p in named if "lora_" in n]


def nothing(parameters: list[Tensor]) -> bool:
    return all(p.grad is None or p.grad.abs().max() == 0 for p in parameters)


def test_the_surrogate_and_the_loss_share_no_gradient() -> None:
    for surrogate in (True, False):
        model, ids = adapted(), torch.randint(VOCAB, (3, 5))
        gates, loras = parameters(model)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.base_model.state.context = RoutingContext(3, 5, num_replicas=3, seed=2)
        logits = model(inputs_embeds=embedded).logits
        if surrogate:
            (torch.tensor([0.3, -0.5, 0.2]) * log_probs(model, 3)).sum().backward()
            assert nothing([*loras, embedded])
            assert not any(nothing([gate]) for gate in gates)
        else:
            logits.square().mean().backward()
            assert nothing(gates)
            assert not any(nothing([p]) for p in [*loras, embedded])


@pytest.mark.parametrize("num_samples", [2, 4])
def test_a_fresh_adapter_is_the_base_and_teaches_the_router_nothing(num_samples: int) -> None:
    base, ids = tiny_llama(), torch.randint(VOCAB, (2, 5))
    expected = base(ids).logits
    model: Any = get_peft_model(base, MixtureOfLoraConfig(**SIZES)).train()
    losses, found = [], []
    for replica in range(num_samples):
        logits = run(model, ids, replica=replica, seed=1)
        assert torch.equal(logits, expected)
        losses.append(logits.log_softmax(-1)[:, :, 0].mean(1))
        found.append(log_probs(model, 2))
    (rloo_advantages(torch.stack(losses)) * torch.stack(found)).sum().backward()
    gates, _ = parameters(model)
    assert all(gate.grad is not None and gate.grad.abs().max() == 0 for gate in gates)


def test_evaluation_takes_the_most_probable_experts_and_draws_nothing() -> None:
    model, ids = adapted().eval(), torch.randint(VOCAB, (2, 5))
    assert torch.equal(run(model, ids, seed=1), run(model, ids, seed=2))
    for record in records_of(model).values():
        picks = record.expert_indices.view(10, TOP_K)
        assert torch.equal(picks, record.router_probs.topk(TOP_K).indices)
        weights = record.combine_weights.view(10, TOP_K)
        support = weights.sum(1).square() / weights.square().sum(1)
        torch.testing.assert_close(support, torch.full_like(support, TOP_K))
        assert record.log_prob is None


def test_permuting_loras_with_rows_of_the_router_changes_nothing() -> None:
    model, ids = adapted().eval(), torch.randint(VOCAB, (2, 5))
    before, order = run(model, ids), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for layer in layers_of(model).values():
            for p in (layer.experts.lora_A, layer.experts.lora_B, layer.router.gate.weight):
                p.copy_(p[order])
    torch.testing.assert_close(run(model, ids), before)


def test_a_constant_on_all_logits_changes_nothing() -> None:
    model, ids = adapted(), torch.randint(VOCAB, (3, 5))
    before = run(model, ids, seed=2, num_replicas=3)
    first, log_q = records_of(model), log_probs(model, 3)
    with torch.no_grad():
        for layer in layers_of(model).values():
            gate = layer.router.gate.weight
            gate += torch.randn(gate.shape[1])
    after = run(model, ids, seed=2, num_replicas=3)
    for name, record in records_of(model).items():
        assert not torch.allclose(record.router_logits, first[name].router_logits)
        assert torch.equal(record.expert_indices, first[name].expert_indices)
    torch.testing.assert_close(log_probs(model, 3), log_q)
    torch.testing.assert_close(after, before)


def test_samples_do_not_depend_on_which_others_run_beside_them() -> None:
    model, ids = adapted(), torch.randint(VOCAB, (2, 5))
    both = run(model, ids.repeat(3, 1), seed=4, num_replicas=3)
    assert not torch.allclose(both[:2], both[2:4])
    for replica in range(3):
        alone = run(model, ids, seed=4, replica=replica)
        torch.testing.assert_close(alone, both[2 * replica : 2 * replica + 2])


def test_one_choice_for_a_sequence_reads_its_prompt_alone() -> None:
    model, ids = adapted(granularity="sequence"), torch.randint(VOCAB, (3, 8))
    run(model, ids, prompt=5, seed=1)
    first = records_of(model)
    other = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % VOCAB], 1)
    run(model, other, prompt=5, seed=1)
    for name, record in records_of(model).items():
        picks = record.expert_indices.view(3, 8, TOP_K)
        assert torch.equal(picks, picks[:, :1].expand_as(picks))
        assert torch.equal(record.expert_indices, first[name].expert_indices)
        torch.testing.assert_close(record.log_prob, first[name].log_prob)


def test_padding_is_not_chosen_for() -> None:
    model, ids = adapted(), torch.randint(2, VOCAB, (2, 6))
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, :2] = False
    model.base_model.state.context = RoutingContext(2, 6, valid=valid.reshape(-1), seed=1)
    model(input_ids=ids, attention_mask=valid.long())
    for record in records_of(model).values():
        assert (record.log_prob.view(2, 6)[0, :2] == 0).all()
        assert record.tokens_per_expert.sum() == 10 * TOP_K


def test_omega_of_a_router_that_leaves_its_number_of_experts_to_its_default() -> None:
    bare = {"_target_": SAMPLING["_target_"]}
    made = MixtureOfLoraConfig(router=bare, r=8, omega="lora")
    assert made.router == bare | {"top_k": 2, "weight": 2 / 16}
    with pytest.raises(ValueError, match="omega='lora': is of a router"):
        MixtureOfLoraConfig(router=None, num_experts=1, omega="lora")
