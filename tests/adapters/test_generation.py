"""Generation: what a cached step decides is what a full forward pass would decide."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.forms import FORMS, TASKS, adapted, logits_of, some_ids
from tests.helpers.language_models import tiny_gpt2, tiny_llama, tiny_qwen3

PROMPT, NEW, PAD = 5, 4, 1


def greedy(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The tokens that ``generate`` adds."""
    tasks = torch.arange(len(ids)) % TASKS
    mask = torch.ones_like(ids) if mask is None else mask
    fixed = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": PAD}
    with model.base_model.state.tasks(tasks):
        new = model.generate(input_ids=ids, attention_mask=mask, **fixed | options)
    return new[:, ids.shape[1] :]


def step_by_step(model: Any, ids: Tensor) -> Tensor:
    """The same with a full forward pass for each token; token 0 ends a text and is left out."""
    start = ids.shape[1]
    for _ in range(NEW):
        logits = logits_of(model, ids, use_cache=False)[:, -1].clone()
        logits[:, 0] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, start:]


@pytest.mark.parametrize("form", FORMS)
def test_greedy_is_step_by_step(form: str) -> None:
    model, ids = adapted(form), some_ids(3, PROMPT)
    want = step_by_step(model, ids)
    assert torch.equal(greedy(model, ids), want)
    assert torch.equal(greedy(model, ids, use_cache=False), want)
    plain = tiny_llama().generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)
    assert not torch.equal(plain[:, PROMPT:], want)  # the adapter matters


@pytest.mark.parametrize("form", FORMS)
def test_a_static_cache_changes_nothing(form: str) -> None:
    model, ids = adapted(form), some_ids(3, PROMPT)
    got = greedy(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, greedy(model, ids))


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gpt2])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("router", ["mixtral", "hash"])
def test_left_padding_changes_nothing(make: Any, cache: str | None, router: str) -> None:
    model, ids = adapted("lora", make(), router=router), some_ids(2, PROMPT)
    padded = torch.cat([torch.full((2, 3), PAD), ids], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, PROMPT)], 1).long()
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    got = greedy(model, padded, mask, **options)
    assert torch.equal(got, greedy(model, ids))


def test_a_choice_for_the_whole_sequence_is_that_of_its_prompt() -> None:
    model = adapted(router="subset_sampling", top_k=2, granularity="sequence")
    ids, state, seen = some_ids(3, PROMPT), model.base_model.state, []
    model.base_model.model.register_forward_hook(
        lambda *_: seen.append(
            {n: r.dispatch_mask.view(3, -1, 4)[:, -1] for n, r in state.records.items()}
        )
    )
    greedy(model, ids)
    assert len(seen) == NEW
    for name, first in seen[0].items():
        assert all(torch.equal(step[name], first) for step in seen)
        assert (first.sum(1) == 2).all()
    masked = torch.cat([torch.full((3, 2), PAD), ids], 1)
    mask = (torch.arange(2 + PROMPT) >= 2).long().expand(3, -1)
    assert torch.equal(greedy(model, masked, mask), greedy(model, ids))


def test_going_on_without_a_prompt_is_refused() -> None:
    model = adapted(router="subset_sampling", top_k=2, granularity="sequence")
    cache = tiny_llama()(some_ids(2, PROMPT), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="whose prompt this model has not read"):
        model(input_ids=some_ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("form", ["lora", "skills"])
def test_beams_follow_their_sequence(form: str) -> None:
    model, ids = adapted(form), some_ids(3, PROMPT)
    together = greedy(model, ids, num_beams=3)
    for row in range(3):
        with model.base_model.state.tasks(torch.tensor([row])):
            alone = model.generate(
                input_ids=ids[row : row + 1],
                attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
                do_sample=False,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                num_beams=3,
                pad_token_id=PAD,
            )
        assert torch.equal(alone[0, PROMPT:], together[row])


def test_tasks_last_as_long_as_their_block() -> None:
    model, ids = adapted("skills"), some_ids(2, PROMPT)
    state = model.base_model.state
    with state.tasks(torch.tensor([0, 1])):
        with state.tasks(torch.tensor([2, 2])):
            inner = model(ids).logits
        outer = model(ids).logits
    assert not torch.allclose(inner, outer)
    with pytest.raises(ValueError, match="task_ids: experts='skills' route by task"):
        model(ids)
    with (
        state.tasks(torch.tensor([0, 1, 2])),
        pytest.raises(ValueError, match="3 for a batch of 2"),
    ):
        model(ids)
