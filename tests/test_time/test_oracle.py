"""The oracle: it uses the answer, at one token and in the last layers."""

import pytest
import torch
from torch import Tensor

from routerlab.core.routing import RoutingContext
from routerlab.test_time.oracle import Oracle, answer_losses
from routerlab.test_time.plug_in import rerouting
from tests.helpers.language_models import VOCAB
from tests.helpers.models import tiny_decoder
from tests.helpers.questions import END, rows, tokens


def questions() -> dict[str, Tensor]:
    """Two items of two options each."""
    first, second = tokens(6, 0), tokens(3, 1)
    answers = [[*tokens(2, 10 + i), END] for i in range(4)]
    pairs = list(zip((first, first, second, second), answers, strict=True))
    return rows(pairs, item=[0, 0, 1, 1], gold=[False, True, True, False], chooses=[True] * 4)


def context_of(batch: dict[str, Tensor]) -> RoutingContext:
    flat = {name: batch[name].flatten() for name in ("valid", "prompt")}
    return RoutingContext(*batch["input_ids"].shape, **flat)


def test_right_answers_become_likelier() -> None:
    model, batch = tiny_decoder(vocab_size=VOCAB, num_layers=3).eval(), questions()
    context, plug_in = context_of(batch), Oracle(num_steps=10, eta=2.0, layers=2)
    assert plug_in.uses_answer

    def losses() -> Tensor:
        return answer_losses(model(batch["input_ids"], context).logits, batch["labels"])

    plain = losses()
    with rerouting(plug_in, model, batch, context):
        moved = losses()
    gold = batch["gold"]
    assert (moved[gold] < plain[gold]).all()
    assert torch.equal(losses(), plain)
    assert (plug_in.cost.forward_passes, plug_in.cost.backward_passes) == (10, 10)
    assert plug_in.cost.tokens == 10 * int(batch["valid"][[1, 2]].sum())


def test_only_the_last_prompt_token_of_the_last_layers_moves() -> None:
    model, batch = tiny_decoder(vocab_size=VOCAB, num_layers=3).eval(), questions()
    context = context_of(batch)
    edit = Oracle(num_steps=3, eta=2.0, layers=2).adapt(model, batch, context)
    assert list(edit.by_layer) == ["layers.01.moe", "layers.02.moe"]
    assert edit.owner.tolist() == [0, 0, 1, 1]
    length = batch["input_ids"].shape[1]
    logits = torch.zeros(4 * length, 4, dtype=torch.float64)
    changed = (edit("layers.01.moe", logits) != 0).any(1).nonzero().flatten().tolist()
    assert changed == [row * length + length - 3 for row in range(4)]
    assert edit("layers.00.moe", logits) is logits
    assert edit("layers.01.moe", logits[:4]) is not None
    assert (edit("layers.01.moe", logits[:4]) == 0).all()


def test_items_do_not_know_of_each_other() -> None:
    model, batch = tiny_decoder(vocab_size=VOCAB).eval(), questions()
    both = Oracle(num_steps=3, layers=2).adapt(model, batch, context_of(batch))
    second = {name: values[2:] for name, values in batch.items()}
    alone = Oracle(num_steps=3, layers=2).adapt(model, second, context_of(second))
    for name, vectors in alone.by_layer.items():
        torch.testing.assert_close(both.by_layer[name][1:], vectors)


def test_loss_over_choices() -> None:
    logits = torch.randn(2, 3, 9, dtype=torch.float64)
    labels = torch.tensor([[-100, 4, 0], [-100, 7, 0]])
    choices = torch.tensor([[2, 4, -1], [7, 1, 3]])
    found = answer_losses(logits, labels, choices)
    first = logits[0, 1, [2, 4]].log_softmax(0)[1]
    second = logits[1, 1, [7, 1, 3]].log_softmax(0)[0]
    torch.testing.assert_close(found, -torch.stack([first, second]))


def test_what_it_needs() -> None:
    model, batch = tiny_decoder(vocab_size=VOCAB).eval(), questions()
    context = context_of(batch)
    with pytest.raises(ValueError, match="layers=5: must be from 1 to the 2 "):
        Oracle().adapt(model, batch, context)
    del batch["labels"]
    with pytest.raises(ValueError, match="needs the right answers"):
        Oracle(layers=1).adapt(model, batch, context)
