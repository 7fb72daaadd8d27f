"""Router tuning with manifold alignment on a small decoder, by the method's own checks."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from routerlab.analysis.neighbour_bank import NeighbourBank
from routerlab.backbones.decoder import Decoder
from routerlab.backbones.frozen import train_part
from routerlab.backbones.hugging_face import HuggingFaceMoE
from routerlab.core.config import compose
from routerlab.core.instantiate import build
from routerlab.losses.manifold_alignment import ManifoldAlignment
from routerlab.losses.routing_vector_penalty import RoutingVectorPenalty
from routerlab.objectives.causal_lm import CausalLM
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.objectives.rehearsal import rehearse
from routerlab.objectives.routing_alignment import RoutingAlignment, measured, warm_up
from routerlab.routers.subset_sampling import SubsetSampling
from routerlab.routers.token_choice import TokenChoice
from routerlab.schedules.progress import Constant
from tests.helpers.language_models import VOCAB
from tests.helpers.moe_models import stirred, tiny_config
from tests.helpers.questions import END, rows, tokens
from tests.helpers.training import Remember, fit

LAYERS, TUNED, EXPERTS = 4, 2, 6
SAMPLES, CLUSTERS = 16, 2
NAMES = [f"layers.{i:02d}.moe" for i in range(LAYERS)]
DATA, EMBEDDER = {"tasks": "toy"}, {"files": "none"}


def backbone(trainable: str = "routers", layers: Any = TUNED, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "router": partial(TokenChoice, top_k=2, init_std=0.5), "vocab_size": VOCAB, "d_model": 16,
        "num_layers": LAYERS, "num_heads": 2, "num_kv_heads": 1, "d_ff": 12,
        "num_experts": EXPERTS, "max_positions": 32,
    }  # fmt: skip
    model = Decoder(**sizes | changes)
    train_part(model, trainable, layers)
    return model


def objective(model: Any = None, losses: Any = None, **changes: Any) -> RoutingAlignment:
    arguments: dict[str, Any] = {
        "optimizer": OptimizerRecipe(partial(torch.optim.AdamW, lr=0.01), warmup_steps=0),
        "losses": {} if losses is None else losses, "diagnostics": {}, "domains": ["a", "b"],
        "log_every": 1, "gradient_clip_norm": None,
    }  # fmt: skip
    return RoutingAlignment(backbone() if model is None else model, **arguments | changes)


def aligned(weight: float = 0.8, **knobs: Any) -> dict[str, ManifoldAlignment]:
    return {"manifold_alignment": ManifoldAlignment(weight, **{"layers": TUNED} | knobs)}


def batch(numbers: list[int] | None = None) -> dict[str, Tensor]:
    """Questions of two kinds, of unequal length: even samples ask in other words than odd ones."""
    numbers = list(range(SAMPLES)) if numbers is None else numbers
    items = []
    for number in numbers:
        kind = number % CLUSTERS
        prompt = [3 + 30 * kind + token % 30 for token in tokens(4 + number % 5, number)]
        items.append((prompt, [3 + kind, END]))
    return rows(items, sample=numbers, task=[number % CLUSTERS for number in numbers])


def embeddings() -> Tensor:
    """Two clusters on the sphere."""
    torch.manual_seed(5)
    centres = torch.eye(4)[torch.arange(SAMPLES) % CLUSTERS]
    return F.normalize(centres + 0.1 * torch.randn(SAMPLES, 4), dim=1)


def bank(model: RoutingAlignment, correct: Any = None) -> NeighbourBank:
    """The bank of a model, which is taken to be right about everything, or as told."""
    batches = [batch([3, 1, 2, 0]), batch(list(range(4, SAMPLES)))]
    made = model.build_bank(batches, embeddings(), model.fingerprint(DATA, EMBEDDER))
    made.correct[:] = True if correct is None else correct
    return made


def accumulate(model: RoutingAlignment, one: dict[str, Tensor]) -> dict[str, float]:
    return model.accumulate([one], [model.context(one, 0, 0)], due=False)[0]


def run(model: RoutingAlignment, steps: int, path: Path) -> list[dict[str, Any]]:
    remember = Remember()
    fit(model, [batch()] * steps, path, callbacks=[remember])
    return remember.results


# -- the gradient ---------------------------------------------------------------------------------


def test_alignment_alone_reaches_every_tuned_router_and_nothing_else() -> None:
    model = objective(losses=aligned())
    held = bank(model, torch.arange(SAMPLES) % 3 > 0)
    model.use_bank(held)
    one = batch()
    context = model.context(one, 0, 0)
    records = model.run(one, context).router_outputs
    model.alignment.of_records(records, context).backward()
    found = {name: p.grad for name, p in model.backbone.named_parameters()}
    tuned = {f"layers.{i}.moe.router.gate.weight" for i in (2, 3)}
    assert {name for name, grad in found.items() if grad is not None} == tuned
    assert all(found[name].abs().sum() > 0 for name in tuned)
    assert held.routing.grad is None
    assert held.embeddings.grad is None
    assert [records[name].router_probs.requires_grad for name in NAMES] == [False] * 2 + [True] * 2


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_wrapped_models_align_too(family: str) -> None:
    torch.manual_seed(0)
    wrapped = HuggingFaceMoE(
        config=tiny_config(family), trainable="routers", trainable_layers=2,
        activation_checkpointing=True,
    )  # fmt: skip
    stirred(wrapped.model)
    model = objective(wrapped, aligned())
    model.use_bank(bank(model))
    one = batch()
    context = model.context(one, 0, 0)
    records = model.run(one, context).router_outputs
    assert [r.router_probs.requires_grad for r in records.values()][-2:] == [True, True]
    model.alignment.of_records(records, context).backward()
    learning = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    reached = {n: p for n, p in learning.items() if "weight" in n}
    assert len(reached) == 2
    assert all(p.grad.abs().sum() > 0 for p in reached.values())
    assert all(p.grad is None for n, p in wrapped.named_parameters() if n not in learning)


def test_finite_differences_agree() -> None:
    model = objective(losses=aligned())
    held = bank(model)
    model.double().use_bank(held)
    one = batch()

    def value() -> Tensor:
        context = model.context(one, 0, 0)
        return model.alignment.of_records(model.run(one, context).router_outputs, context)

    with torch.no_grad():  # away from where the bank was made, where pulls are small
        for moe in list(model.backbone.moe_layers.values())[-TUNED:]:
            moe.router.gate.weight += 0.05
    value().backward()
    weight = model.backbone.moe_layers[NAMES[-1]].router.gate.weight
    for place in [(0, 0), (2, 5), (5, 15)]:
        with torch.no_grad():
            kept = float(weight[place])
            ends = []
            for step in (1e-6, -1e-6):
                weight[place] = kept + step
                ends.append(float(value()))
            weight[place] = kept
        slope = (ends[0] - ends[1]) / 2e-6
        assert float(weight.grad[place]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


# -- what must not change anything ----------------------------------------------------------------


def trained(losses: Any, correct: Any, path: Path, with_bank: bool = True) -> dict[str, Tensor]:
    model = objective(losses=losses)
    if with_bank:
        model.use_bank(bank(model, correct))
    run(model, 6, path)
    return dict(model.backbone.named_parameters())


def test_zero_weight_is_plain_router_tuning_bit_for_bit(tmp_path: Path) -> None:
    plain = trained({}, None, tmp_path, with_bank=False)
    zero = trained(aligned(0.0), None, tmp_path)
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    with pytest.warns(UserWarning, match="none of the 16 samples rightly"):
        nobody = trained(aligned(0.8), False, tmp_path)
    assert all(torch.equal(plain[name], nobody[name]) for name in plain)
    pulled = trained(aligned(0.8), True, tmp_path)
    moved = {name for name in plain if not torch.equal(plain[name], pulled[name])}
    assert moved == {f"layers.{i}.moe.router.gate.weight" for i in (2, 3)}


def test_only_tuned_gates_differ_afterwards(tmp_path: Path) -> None:
    base, model = backbone("all", None), objective(losses=aligned())
    model.use_bank(bank(model))
    run(model, 3, tmp_path)
    before, after = dict(base.named_parameters()), dict(model.backbone.named_parameters())
    assert {n: p.shape for n, p in before.items()} == {n: p.shape for n, p in after.items()}
    gates = {f"layers.{i}.moe.router.gate.weight" for i in (2, 3)}
    assert {n for n in before if not torch.equal(before[n], after[n])} == gates
    assert gates <= set(model.backbone.state_dict())
    counts = [m.count_parameters() for m in (base, model.backbone)]
    assert counts[0]["active"] == counts[1]["active"]


def test_a_wrong_sample_is_nobodys_neighbour(tmp_path: Path) -> None:
    found = []
    for shift in (0.0, 1.0):
        model = objective(losses=aligned())
        held = bank(model, torch.arange(SAMPLES) % 4 > 0)
        held.routing[~held.correct] += shift
        model.use_bank(held)
        found.append(accumulate(model, batch())["loss/manifold_alignment"])
    assert found[0] == found[1] > 0


# -- training -------------------------------------------------------------------------------------


def test_the_weight_warms_up() -> None:
    assert 0.8 * warm_up(0, 2000) == pytest.approx(0.0004)
    assert 0.8 * warm_up(999, 2000) == pytest.approx(0.4)
    assert 0.8 * warm_up(1999, 2000) == 0.8 * warm_up(5000, 2000) == 0.8


@pytest.mark.parametrize(
    ("knobs", "steps"),
    [({}, 2), ({"alignment_warmup": 0.0}, 1), ({"alignment_warmup_steps": 5}, 5)],
)
def test_the_warm_up_is_logged(knobs: dict[str, Any], steps: int, tmp_path: Path) -> None:
    model = objective(losses=aligned(0.5), **knobs)
    model.use_bank(bank(model))
    results = run(model, 7, tmp_path)  # a fifth of 7, rounded up, is 2
    for step, result in enumerate(results):
        scalars, weight = result["scalars"], 0.5 * min(1, (step + 1) / steps)
        assert scalars["loss/manifold_alignment/weight"] == pytest.approx(weight)
        pull = scalars["loss/manifold_alignment"]
        assert scalars["loss/manifold_alignment/weighted"] == pytest.approx(weight * pull)
        total = scalars["train/loss"] + weight * pull
        assert scalars["train/total_loss"] == pytest.approx(total, rel=1e-6)


def test_alignment_draws_clusters_together(tmp_path: Path) -> None:
    """The mean routing distance within a cluster falls further than by router tuning alone."""
    spread = {}
    for weight in (0.0, 0.8):
        model = objective(losses=aligned(weight))
        model.use_bank(bank(model))
        before = within_clusters(model)
        run(model, 40, tmp_path)
        spread[weight] = within_clusters(model) / before
    assert spread[0.8] < 0.7 * spread[0.0]
    assert spread[0.8] < 0.5


def within_clusters(model: RoutingAlignment) -> float:
    found, _ = model.observe(batch())
    kinds = torch.arange(SAMPLES) % CLUSTERS
    pairs = (found[:, None] - found).square().sum(-1)
    return float(pairs[kinds[:, None] == kinds].mean())


# -- the bank -------------------------------------------------------------------------------------


def test_the_bank_is_what_the_model_does() -> None:
    model = objective(losses=aligned())
    made = model.build_bank([batch()], embeddings(), model.fingerprint(DATA, EMBEDDER))
    assert made.layers == dict.fromkeys(NAMES[-TUNED:], EXPERTS)
    assert made.routing.shape == (SAMPLES, TUNED * EXPERTS)
    one = batch()
    for number in (0, 7, 13):  # alone and without padding
        real = one["valid"][number]
        ids = one["input_ids"][number, real]
        last = int(one["prompt"][number, real].sum()) - 1
        with torch.no_grad():
            out = model.backbone(ids[None])
        expected = [out.router_outputs[name].router_probs[last] for name in NAMES[-TUNED:]]
        torch.testing.assert_close(made.routing[number], torch.cat(expected), rtol=1e-4, atol=1e-5)
        labels = one["labels"][number, real]
        wanted = labels != -100
        right = bool((out.logits[0].argmax(-1)[wanted] == labels[wanted]).all())
        assert bool(made.correct[number]) is right


def test_the_model_is_observed_as_in_evaluation_and_left_as_it_was() -> None:
    model = objective(losses=aligned()).train()
    model.backbone.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    with torch.inference_mode():
        model.use_bank(bank(model))
    assert seen == [False, False]
    assert [module.training for module in model.modules()] == modes
    assert accumulate(model, batch())["loss"] > 0


def test_measures_before_and_after(tmp_path: Path) -> None:
    model = objective(losses=aligned())
    held = bank(model)
    model.use_bank(held)
    before = model.measure([batch()])
    assert before | {"accuracy": 1.0} == pytest.approx(measured(held), rel=1e-4)
    run(model, 30, tmp_path)
    after = model.measure([batch()])
    assert after["distance"] < 0.7 * before["distance"]
    assert set(after) == {"distance", "similarity", "load_entropy", "accuracy"}
    assert after["accuracy"] >= before["accuracy"]


def test_router_tuning_alone_can_be_measured() -> None:
    model = objective()
    model.use_bank(bank(model))
    assert model.measure([batch()])["distance"] > 0
    assert model.bank_layers == dict.fromkeys(NAMES[-TUNED:], EXPERTS)
    other = objective(losses={"penalty": RoutingVectorPenalty(layers=TUNED, token="last3")})
    assert other.bank_token == "last3"
    with pytest.raises(ValueError, match="bank: there is none"):
        other.measure([batch()])


def test_a_bank_of_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    model = objective(losses=aligned())
    bank(model).save(tmp_path / "bank")
    assert NeighbourBank.load(tmp_path / "bank", model.fingerprint(DATA, EMBEDDER)).num_correct
    with pytest.raises(ValueError, match=r'other data.tasks \("toy", not "other"\)'):
        NeighbourBank.load(tmp_path / "bank", model.fingerprint({"tasks": "other"}, EMBEDDER))
    with torch.no_grad():
        model.backbone.layers[0].moe.experts.down_proj += 0.1
    with pytest.raises(ValueError, match="was made from other model"):
        NeighbourBank.load(tmp_path / "bank", model.fingerprint(DATA, EMBEDDER))


# -- configs and mistakes -------------------------------------------------------------------------


def test_it_is_rehearsed_without_a_bank() -> None:
    rehearse(objective(losses=aligned()))
    rehearse(objective(losses={"penalty": RoutingVectorPenalty(layers=TUNED)}))
    parts = {"optimizer": OptimizerRecipe(torch.optim.AdamW), "diagnostics": {}}
    with pytest.raises(ValueError, match="goes with objective=routing_alignment"):
        rehearse(CausalLM(backbone(), losses=aligned(), **parts))


def test_config() -> None:
    cfg = compose("objective=routing_alignment", "objective.alignment_warmup=0.1")
    parts = {"backbone": backbone(), "optimizer": OptimizerRecipe(torch.optim.AdamW)}
    model = build(cfg.objective, **parts, losses={}, diagnostics={})
    assert isinstance(model, RoutingAlignment)
    assert (model.alignment_warmup, model.trained_layers) == (0.1, NAMES[-TUNED:])


def test_a_schedule_overrules_the_warm_up(tmp_path: Path) -> None:
    constant = {"fixed": Constant("loss.manifold_alignment.weight", 0.3)}
    model = objective(losses=aligned(), schedules=constant)
    model.use_bank(bank(model))
    results = run(model, 2, tmp_path)
    assert [one["scalars"]["loss/manifold_alignment/weight"] for one in results] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("model", "losses", "message"),
    [
        (partial(backbone, "moe"), {}, r"layers.2.moe.experts.\w+ \(4 tensors\) would learn too; "
         "use backbone.trainable=routers"),
        (partial(backbone, "all", None), {}, "embed_tokens.weight .* would learn too"),
        (partial(backbone, "none", None), {}, "no router of this model learns"),
        (partial(backbone, router=partial(SubsetSampling, top_k=2)), {}, "samples its choice"),
        (backbone, aligned(layers=3), r"loss.manifold_alignment.layers=3: are layers.01.moe, .*"
         "routers learn in layers.02.moe, layers.03.moe .*same_layers=false"),
        (backbone, aligned() | {"two": ManifoldAlignment(layers=TUNED)}, "at most one may align"),
        (backbone, aligned(layers=5), r"loss.manifold_alignment.layers=5: must be from 1 to the 4"),
    ],
)  # fmt: skip
def test_mistakes_are_named(model: Any, losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(model(), losses)


def test_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match="alignment_warmup=2: must be at least 0 and at most 1"):
        objective(alignment_warmup=2)
    with pytest.raises(ValueError, match="alignment_warmup_steps=0: must be at least 1"):
        objective(alignment_warmup_steps=0)


def test_other_layers_if_told() -> None:
    model = objective(losses=aligned(layers=3), same_layers=False)
    model.use_bank(bank(model))
    assert len(model.bank_layers) == 3
    assert accumulate(model, batch())["loss/manifold_alignment"] > 0
