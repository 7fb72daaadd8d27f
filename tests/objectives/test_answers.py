"""Right answers, counted by hand."""

import math

import pytest
import torch

from routerlab.objectives.answers import (
    AnswerScores,
    exact_matches,
    first_token_right,
    option_logits,
    right_items,
    wilson_interval,
)
from tests.helpers.questions import rows


def test_wilson_interval() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    for right, items in ((1, 7), (500, 1000)):  # the shares 1.96 standard errors away
        for share in wilson_interval(right, items):
            error = math.sqrt(share * (1 - share) / items)
            assert abs(right / items - share) == pytest.approx(1.959964 * error)
    assert wilson_interval(3, 3)[1] == 1


def test_items_by_hand() -> None:
    scores = torch.tensor([-1.0, -2, -3, -1, -5, -5, torch.nan, -4, -9, -8])
    item = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
    gold = torch.tensor([True, False, True, False, True, False, False, True, True, True])
    chooses = torch.tensor([True] * 8 + [False] * 2)
    matches = torch.tensor([False] * 8 + [True, False])
    right, first = right_items(scores, matches, item, gold, chooses)
    # best; not best; the first of equals; what is not a number never wins; matched; not matched
    assert right.tolist() == [True, False, True, True, True, False]
    assert first.tolist() == [0, 2, 4, 6, 8, 9]


def test_a_model_that_says_nan_is_never_right() -> None:
    nan, yes = torch.full((2,), torch.nan), torch.tensor([True, True])
    item, chooses = torch.tensor([0, 1]), torch.tensor([True, False])
    right, _ = right_items(nan, yes, item, yes, chooses)
    assert right.tolist() == [False, False]


def test_exact_matches_by_hand() -> None:
    logits = torch.eye(4)[torch.tensor([[1, 2], [3, 3], [0, 1]])]
    labels = torch.tensor([[-100, 1, 2], [-100, 3, 0], [-100, -100, 1]])
    assert exact_matches(logits, labels).tolist() == [True, False, True]


@pytest.mark.parametrize(("option_score", "right"), [("sum", 1), ("mean", 0)])
def test_scores_by_hand(option_score: str, right: int) -> None:
    # option nats: 3 (1 token) or 4 (2 tokens): the sum prefers the first, the mean the second
    scores = AnswerScores(["a", "b"], option_score, torch.device("cpu"))
    batch = rows([([5], [6]), ([5], [6, 7])], task=[1, 1], item=[0, 0], gold=[True, False],
                 chooses=[True, True])  # fmt: skip
    losses = torch.tensor([[0.0, 3.0], [1.0, 3.0]])
    scores.add(batch, torch.zeros(2, 2, 8), losses, torch.tensor([1, 2]))
    found = scores.values()
    assert found["val/loss"] == 3.0
    assert found["val/items"] == found["val/items/b"] == 1
    assert found["val/accuracy"] == found["val/accuracy/b"] == right
    assert "val/accuracy/a" not in found
    assert "val/sampled_loss" not in found
    low, high = wilson_interval(right, 1)
    assert (found["val/accuracy_low"], found["val/accuracy_high"]) == (low, high)


def test_options_by_their_first_tokens_by_hand() -> None:
    # Two columns of logits; answers begin at the first and at the second of them.
    logits = torch.tensor([[[0.0, 1, 2, 3], [9, 9, 9, 9]], [[9, 9, 9, 9], [3, 1, 2, 0]]])
    labels = torch.tensor([[-100, 1, 0], [-100, -100, 0]])
    choices = torch.tensor([[2, 1, -1], [1, 3, 0]])
    found, gold = option_logits(logits, labels, choices)
    assert found.tolist() == [[2, 1, -torch.inf], [1, 0, 3]]
    assert gold.tolist() == [1, 2]
    assert first_token_right(logits, labels, choices).tolist() == [False, True]
    equal, unknown = torch.zeros_like(logits), torch.full_like(logits, torch.nan)
    assert first_token_right(equal, labels, choices).tolist() == [False, False]
    assert first_token_right(equal, labels, choices.flip(1)).tolist() == [True, True]
    assert first_token_right(unknown, labels, choices).tolist() == [False, False]


@pytest.mark.parametrize("every_option", [False, True])
def test_first_tokens_need_right_answers_alone(every_option: bool) -> None:
    scores = AnswerScores(["a", "b"], "first_token", torch.device("cpu"))
    items = [([5], [6]), ([5], [7])]
    kept = slice(None) if every_option else slice(1)
    batch = rows(items[kept], task=[1, 1][kept], item=[0, 0][kept], gold=[True, False][kept],
                 chooses=[True, True][kept], choices=[[6, 7], [6, 7]][kept])  # fmt: skip
    count = len(batch["gold"])
    logits = torch.zeros(count, 1, 8)
    logits[..., 6], logits[..., 0] = 1, 5  # what is no option does not count
    scores.add(batch, logits, torch.full((count, 1), 2.0), torch.ones(count, dtype=torch.long))
    found = scores.values()
    assert found["val/accuracy"] == found["val/accuracy/b"] == found["val/items"] == 1
    assert found["val/loss"] == 2.0
