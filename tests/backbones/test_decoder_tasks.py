"""Decoders on batches of tasks: padding in front, logits of the last positions, dense layers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from routerlab.backbones.decoder import Decoder
from routerlab.core.routing import RoutingContext
from routerlab.objectives.finetune import FineTune
from routerlab.objectives.optimizer import OptimizerRecipe
from tests.helpers.language_models import VOCAB
from tests.helpers.models import all_diagnostics, tiny_decoder
from tests.helpers.questions import END, rows, tokens

SIZES = [(5, 3), (2, 1), (9, 2), (4, 4)]


def decoder(**changes: Any) -> Decoder:
    sizes = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 3, "num_experts": [4, 0, 3]}
    return tiny_decoder(**sizes | changes)


def tuning(model: Decoder) -> FineTune:
    recipe = OptimizerRecipe(partial(torch.optim.SGD, lr=0.1))
    return FineTune(model, optimizer=recipe, losses={}, diagnostics=all_diagnostics())


def items() -> list[tuple[list[int], list[int]]]:
    return [(tokens(p, i), [*tokens(a, 9 + i), END]) for i, (p, a) in enumerate(SIZES)]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_padded_answers_have_the_losses_and_routings_of_lone_sequences(qk_norm: bool) -> None:
    model = decoder(qk_norm=qk_norm, activation_checkpointing=True)
    objective, batch = tuning(model), rows(items())
    out = objective.run(batch, objective.context(batch, 0, 0))
    losses = objective.task_loss(out.logits, batch)
    length, counts = batch["input_ids"].shape[1], dict.fromkeys(out.router_outputs, 0)
    for row, (prompt, answer) in enumerate(items()):
        ids = torch.tensor([(prompt + answer)[:-1]])
        lone = model(ids)
        start = length - ids.shape[1]
        wanted = lone.logits.log_softmax(-1)[0, len(prompt) - 1 :]
        expected = -wanted.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(losses[row, -len(answer) :], expected, rtol=0, atol=1e-6)
        assert losses[row, : -len(answer)].abs().max() == 0
        for name, record in out.router_outputs.items():
            logits = record.router_logits.view(len(SIZES), length, -1)[row, start:]
            expected = lone.router_outputs[name].router_logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
            counts[name] += lone.router_outputs[name].tokens_per_expert
    for name, record in out.router_outputs.items():
        assert torch.equal(record.tokens_per_expert, counts[name])


def test_padding_in_front_changes_no_gradient() -> None:
    found: list[dict[str, Tensor]] = []
    for padded in (True, False):
        model = decoder()
        objective = tuning(model)
        batches = [rows(items())] if padded else [rows([item]) for item in items()]
        contexts = [objective.context(batch, 0, 0) for batch in batches]
        objective.accumulate(batches, contexts, due=True)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == len(list(decoder().parameters()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_what_padding_holds_does_not_matter() -> None:
    model, batch = decoder(), rows(items())
    other = batch["input_ids"].masked_fill(~batch["valid"], 7)
    context = RoutingContext(*other.shape, valid=batch["valid"].flatten())
    with torch.no_grad():
        first, second = (model(ids, context).logits for ids in (batch["input_ids"], other))
    assert first.isfinite().all()
    assert torch.equal(first[batch["valid"]], second[batch["valid"]])


@pytest.mark.parametrize("keep", [1, 4])
def test_logits_of_the_last_positions(keep: int) -> None:
    model, batch = decoder(), rows(items())
    context = RoutingContext(*batch["input_ids"].shape, valid=batch["valid"].flatten())
    last = model(batch["input_ids"], context, logits_to_keep=keep)
    assert torch.equal(last.logits, model(batch["input_ids"], context).logits[:, -keep:])
    assert list(last.router_outputs) == ["layers.00.moe", "layers.02.moe"]
    with pytest.raises(ValueError, match=r"logits_to_keep=99: must be at least 0 and at most"):
        model(batch["input_ids"], context, logits_to_keep=99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": [0, 0, 0]}, r"num_experts=\[0, 0, 0\]: one number for each .* not all 0"),
        ({"dense_d_ff": 0}, r"dense_d_ff=0: must be at least 1"),
        ({"head_dim": 3}, r"head_dim=3: heads must have an even width"),
    ],
)
def test_layers_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(**changes)
