"""Fine-tuning: what the loss counts, and answers judged as generation would judge them."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from routerlab.adapters import MixtureOfLoraConfig
from routerlab.backbones.pretrained import PretrainedLM
from routerlab.core.config import compose
from routerlab.core.instantiate import build
from routerlab.losses.router_z import RouterZLoss
from routerlab.objectives.finetune import FineTune, answer_columns
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.objectives.rehearsal import rehearse
from routerlab.objectives.sample_forms import FORMS
from tests.helpers.language_models import VOCAB, save_tiny
from tests.helpers.models import all_diagnostics
from tests.helpers.questions import END, rows, tokens, training_batch
from tests.helpers.training import Remember, fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


def backbone(folder: Path, adapter: Any = None, **changes: Any) -> PretrainedLM:
    torch.manual_seed(0)
    return PretrainedLM(str(folder), folder / "cache", adapter or plain(), **changes)


def plain() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)


def remix(**changes: Any) -> MixtureOfLoraConfig:
    knobs = {"router": "subset_sampling", "num_experts": 4, "top_k": 2, "r": 2, "omega": "rslora"}
    return MixtureOfLoraConfig(**knobs | {"target_modules": ["up_proj", "down_proj"]} | changes)


def objective(model: nn.Module, **changes: Any) -> FineTune:
    arguments: dict[str, Any] = {
        "optimizer": OptimizerRecipe(partial(torch.optim.AdamW, lr=0.05), warmup_steps=0),
        "losses": {},
        "diagnostics": all_diagnostics(),
        "domains": ["a", "b"],
    }
    return FineTune(model, **(arguments | changes))


def validate(model: FineTune, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    model.eval()
    model.on_validation_epoch_start()
    with torch.inference_mode():  # as Lightning does
        for index, batch in enumerate(batches):
            model.validation_step(batch, index)
    model.on_validation_epoch_end()
    return model.validation_result[0]


# -- the loss -------------------------------------------------------------------------------------


def test_answer_tokens_alone_count(folder: Path) -> None:
    model, batch = objective(backbone(folder)), training_batch()
    out = model.run(batch, model.context(batch, 0, 0))
    assert out.logits.shape == (4, 5, VOCAB)  # of the columns that hold targets
    losses = model.task_loss(out.logits, batch)
    assert losses.shape == batch["labels"].shape
    assert torch.equal(losses != 0, batch["labels"] != -100)
    for row in range(4):  # alone and without padding
        real = batch["valid"][row]
        ids, labels = batch["input_ids"][row, real], batch["labels"][row, real]
        log_probs = model.backbone(ids[None]).logits[0].log_softmax(-1)
        wanted = labels != -100
        expected = -log_probs[wanted].gather(1, labels[wanted, None])[:, 0]
        torch.testing.assert_close(losses[row, real][wanted], expected, rtol=1e-4, atol=1e-5)
    assert model.num_targets(batch).tolist() == [4, 2, 3, 5]


def test_a_loss_on_choices_is_a_choice_among_first_tokens(folder: Path) -> None:
    model, batch = objective(backbone(folder), loss_on="choices"), training_batch()
    first = (batch["labels"] != -100).int().argmax(1)
    gold = batch["labels"].gather(1, first[:, None])[:, 0]
    others = (gold + 5) % VOCAB
    batch["choices"] = torch.stack([others, gold, torch.full_like(gold, -1)], dim=1)
    logits = model.run(batch, model.context(batch, 0, 0)).logits
    assert logits.shape == (4, 5, VOCAB)
    losses = model.task_loss(logits, batch)
    for row in range(4):
        at = model.backbone(batch["input_ids"][row, batch["valid"][row]][None]).logits[0]
        asked = int(batch["prompt"][row].sum()) - 1  # the last token of the prompt
        chance = at[asked, [others[row], gold[row]]].softmax(0)[1]
        torch.testing.assert_close(losses[row].sum(), -chance.log(), rtol=1e-4, atol=1e-5)
        assert losses[row].nonzero().tolist() == [[int(first[row])]]
    assert model.num_targets(batch).tolist() == [1, 1, 1, 1]
    right = model.correct(logits, batch)
    assert right.dtype == torch.bool
    terms, *_ = model.accumulate([batch], [model.context(batch, 0, 0)], due=False)
    assert terms["task"] == pytest.approx(float(losses.detach().sum() / 4))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    batch["labels"][:] = -100
    assert model.task_loss(logits, batch).sum() == 0


def test_being_right_follows_the_score_of_options(folder: Path) -> None:
    batch = training_batch()
    generated, chosen = (
        objective(backbone(folder), option_score=score) for score in ("sum", "first_token")
    )
    logits = generated.run(batch, generated.context(batch, 0, 0)).logits
    first = (batch["labels"] != -100).int().argmax(1)
    gold = batch["labels"].gather(1, first[:, None])
    alone = batch | {"choices": torch.cat([gold, torch.full_like(gold, -1)], dim=1)}
    assert chosen.correct(logits, alone).all()  # of one option
    assert not generated.correct(logits, batch).any()  # of all that could be said
    assert (generated.needs_choices, chosen.needs_choices) == ([], ["option_score=first_token"])


def test_columns() -> None:
    labels = torch.tensor([[-100, -100, 3, -100], [-100, -100, -100, 4]])
    assert answer_columns(labels) == 2
    assert answer_columns(labels[:1, :2]) == 1  # none: the model still has to give something


def test_a_micro_batch_without_answers_costs_nothing(folder: Path) -> None:
    model, batch = objective(backbone(folder)), training_batch()
    batch["labels"][:] = -100
    terms, *_ = model.accumulate([batch], [model.context(batch, 0, 0)], due=False)
    assert terms["task"] == 0


def test_context_tells_prompts_and_tasks(folder: Path) -> None:
    model, batch = objective(backbone(folder)), training_batch()
    context = model.context(batch, 0, 0)
    assert torch.equal(context.prompt, batch["prompt"].flatten())
    assert context.task_ids is batch["task"]


# -- answers --------------------------------------------------------------------------------------


def test_accuracy_is_that_of_generation(folder: Path) -> None:
    model = objective(backbone(folder)).eval()
    prompts = [tokens(3 + i % 4, 20 + i) for i in range(12)]
    written = [generate(model, prompt) for prompt in prompts]
    asked = [answer if i % 3 else [*answer[:-1], 9] for i, answer in enumerate(written)]
    batches = [
        rows(list(zip(prompts[i : i + 4], asked[i : i + 4], strict=True)),
             item=[0, 1, 2, 3], gold=[True] * 4, chooses=[False] * 4, task=[0, 0, 1, 1])
        for i in (0, 4, 8)
    ]  # fmt: skip
    found = validate(model, batches)
    same = [answer == wanted for answer, wanted in zip(written, asked, strict=True)]
    assert found["val/items"] == 12
    assert found["val/accuracy"] == sum(same) / 12 == 8 / 12
    for task, name in enumerate(("a", "b")):
        mine = [ok for i, ok in enumerate(same) if i // 2 % 2 == task]
        assert found[f"val/accuracy/{name}"] == pytest.approx(sum(mine) / len(mine))


@torch.no_grad()
def generate(model: FineTune, prompt: list[int], count: int = 4) -> list[int]:
    """What greedy generation of transformers writes, cut after so many tokens."""
    model.backbone.model.generation_config.eos_token_id = None  # random weights would stop at once
    made = model.backbone.model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=1
    )
    return made[0, len(prompt) :].tolist()


def test_multiple_choice_by_hand(folder: Path) -> None:
    model = objective(backbone(folder)).eval()
    items, gold, item = [], [], []
    for number in range(3):
        options = [[*tokens(1 + place, 50 + 7 * number + place), END] for place in range(3)]
        items += [(tokens(4, number), option) for option in options]
        gold += [place == number for place in range(3)]
        item += [number] * 3
    batch = rows(items, gold=gold, item=item, chooses=[True] * 9, task=[0] * 9)
    found = validate(model, [batch])
    scores, nats, count = [], 0.0, 0
    with torch.no_grad():
        for (prompt, option), right in zip(items, gold, strict=True):
            log_probs = model.backbone(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(option) - 1)
            likely = sum(float(log_probs[p, t]) for p, t in zip(places, option, strict=True))
            scores.append(likely)
            if right:
                nats, count = nats - likely, count + len(option)
    best = [max(range(3), key=lambda place: scores[3 * n + place]) for n in range(3)]
    assert found["val/accuracy"] == pytest.approx(sum(b == n for n, b in enumerate(best)) / 3)
    assert found["val/loss"] == pytest.approx(nats / count, rel=1e-5)


# -- routers --------------------------------------------------------------------------------------


def test_sampled_loss(folder: Path) -> None:
    model = objective(backbone(folder, remix()), num_samples=2)
    for layer in model.backbone.moe_layers.values():
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.3)
    batch = training_batch()
    marks = {"item": torch.tensor([0, 0, 1, 2]), "gold": torch.tensor([True, False, True, True])}
    batch |= marks | {"chooses": torch.tensor([True, True, False, False])}
    found = validate(model, [batch])
    gold = {key: value[batch["gold"]] for key, value in batch.items()}
    expected = {}
    for sampled in (False, True):
        for layer in model.backbone.moe_layers.values():
            layer.router.train(sampled)
        with torch.no_grad():
            out = model.run(gold, model.context(gold, 0, 0))
        losses = model.task_loss(out.logits, gold)
        expected[sampled] = float(losses.sum() / model.num_targets(gold).sum())
    assert found["val/loss"] == pytest.approx(expected[False], rel=1e-5)
    assert found["val/sampled_loss"] == pytest.approx(expected[True], rel=1e-5)
    assert expected[True] != expected[False]
    assert found["val/items"] == 3


@pytest.mark.parametrize(
    "changes", [{"granularity": "token"}, {"granularity": "sequence"}, {"train_experts": False}]
)
def test_all_sample_forms_agree_on_an_adapter(folder: Path, changes: dict[str, Any]) -> None:
    found = {}
    for form in FORMS:
        model = objective(
            backbone(folder, remix(**changes), activation_checkpointing=True),
            num_samples=3, sample_form=form,
        ).double().train()  # fmt: skip
        torch.manual_seed(1)
        for layer in model.backbone.moe_layers.values():
            for parameter in layer.experts.parameters():
                nn.init.normal_(parameter, std=0.3)
        batch = training_batch()
        terms, *_ = model.accumulate([batch], [model.context(batch, 0, 0)], due=False)
        found[form] = (terms, torch.cat([p.grad.flatten() for p in model.policy]))
    terms, policy = found["replicated"]
    assert policy.any()
    for form in ("looped", "cheap"):
        assert found[form][0] == pytest.approx(terms, rel=1e-6)
        assert (found[form][1] - policy).norm() < 1e-5 * policy.norm()  # norms are in float32


def test_a_choice_of_the_whole_sequence_is_taken_from_the_prompt(folder: Path) -> None:
    model = objective(backbone(folder, remix(granularity="sequence")), num_samples=2)
    assert model.looks_ahead == "no"
    with pytest.raises(ValueError, match="allow_noncausal=true"):
        objective(backbone(folder, MixtureOfLoraConfig(router="expert_choice", num_experts=4)))


def test_rehearsal(folder: Path) -> None:
    for adapter in (plain(), remix(), MixtureOfLoraConfig(router="mixtral", num_experts=4)):
        rehearse(objective(backbone(folder, adapter)))
    with pytest.raises(ValueError, match=r"loss=\[z\]: the model has no router.*use loss=\[\]"):
        rehearse(objective(backbone(folder), losses={"z": RouterZLoss()}))
    batch = objective(backbone(folder)).example(8)
    assert batch["prompt"].sum(1).tolist() == [4, 4]
    assert torch.equal(batch["labels"] == -100, batch["prompt"])


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["none", "cheap"])
def test_training_learns_the_answers(folder: Path, form: str, tmp_path: Path) -> None:
    sampled = {"num_samples": 2, "sample_form": form} if form != "none" else {}
    model = objective(backbone(folder, remix() if sampled else plain()), log_every=5, **sampled)
    batch, remember = training_batch(), Remember()
    marks = {"item": torch.arange(4), "gold": torch.ones(4, dtype=torch.bool)}
    marks["chooses"] = torch.zeros(4, dtype=torch.bool)
    fit(model, [batch] * 30, tmp_path, validation=[batch | marks], callbacks=[remember])
    scalars = model.validation_result[0]
    assert scalars["val/accuracy"] >= 0.75
    assert scalars["val/loss"] < 0.5 * remember.results[0]["loss"]
    assert scalars["val/items"] == 4
    logged = remember.results[4]["scalars"]
    assert not any("bits_per_byte" in key for key in logged | scalars)
    assert ("policy/snr" in logged) is (form == "cheap")
    assert ("val/sampled_loss" in scalars) is (form == "cheap")


# -- configs and mistakes -------------------------------------------------------------------------


def test_configs(folder: Path) -> None:
    cfg = compose("objective=finetune", "optimizer=adapter", "objective.option_score=mean")
    recipe = build(cfg.optimizer)
    model = build(
        cfg.objective, backbone=backbone(folder), optimizer=recipe, losses={}, diagnostics={}
    )
    assert (model.option_score, model.num_samples, model.domains) == ("mean", 1, ["all"])
    optimizer, scheduler = recipe.build(model, 100)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert scheduler.get_last_lr()[0] == pytest.approx(2e-4 / 21)
    assert math.isclose(recipe.factor(100, 100), 0.1)


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="option_score='max'.*'sum', 'mean'"):
        objective(backbone(folder), option_score="max")
    with pytest.raises(ValueError, match="num_samples=3: no router samples"):
        objective(backbone(folder), num_samples=3)
