"""What is watched in tables of tasks and in gradients of tasks, by hand."""

import pytest
import torch

from routerlab.adapters.monitors import gradient_alignment, table_monitors

LARGE = 40.0


def values(logits: torch.Tensor) -> dict[str, float]:
    return {name: value.item() for name, value in table_monitors(logits).items()}


def test_two_tasks_and_two_skills() -> None:
    got = values(torch.tensor([[[2.0, -2.0]], [[2.0, 2.0]]], requires_grad=True))
    expected = {"discreteness": 0.527065, "sparsity": 0.75, "effective_skills": 0.944420}
    assert got == pytest.approx(expected, abs=1e-6)


def test_extremes() -> None:
    undecided = values(torch.zeros(3, 2, 4))
    assert undecided == pytest.approx({"discreteness": 1, "sparsity": 1, "effective_skills": 1})
    own = values(LARGE * (2 * torch.eye(4)[:, None] - 1))  # each task has one skill of its own
    assert own == pytest.approx({"discreteness": 0, "sparsity": 1 / 4, "effective_skills": 1})
    one = values(LARGE * (2 * torch.eye(4)[:1, None] - 1).expand(3, -1, -1))
    assert one == pytest.approx({"discreteness": 0, "sparsity": 1 / 4, "effective_skills": 0})
    assert values(torch.zeros(2, 1, 1))["effective_skills"] == 1


def test_heads_are_skills_of_their_own() -> None:
    logits = torch.randn(5, 3, 4)
    assert values(logits) == pytest.approx(values(logits.reshape(5, 1, 12)))


def test_monitors_have_no_gradient() -> None:
    got = table_monitors(torch.randn(2, 1, 3, dtype=torch.bfloat16, requires_grad=True))
    assert not any(value.requires_grad for value in got.values())
    assert all(value.dtype == torch.float32 for value in got.values())


def test_alignment_by_hand() -> None:
    three = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])]
    assert gradient_alignment(three) == pytest.approx(0.471405, abs=1e-6)
    assert gradient_alignment([5 * g for g in three]) == pytest.approx(0.471405, abs=1e-6)


def test_alignment_of_equal_opposite_and_absent_gradients() -> None:
    g = torch.randn(50)
    assert gradient_alignment([g, 3 * g]) == pytest.approx(1)
    assert gradient_alignment([g, -g]) == pytest.approx(-1)
    assert gradient_alignment([g, torch.zeros(50)]) == 0
    with pytest.raises(ValueError, match="at least 2"):
        gradient_alignment([g])
