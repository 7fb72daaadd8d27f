"""Banks of training samples: made once in any order, kept in a file, refused for other data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.analysis.neighbour_bank import NeighbourBank, linear_cka, weights_digest
from routerlab.ops.neighbours import Neighbourhood

COUNT, WIDTH = 10, 6
FINGERPRINT = {"data": {"tasks": ["a", "b"], "max_length": 96}, "model": "abc", "token": "last1"}
LAYERS = {"layers.03.moe": 2, "layers.04.moe": 4}


def vectors() -> Tensor:
    draws = torch.Generator().manual_seed(0)
    blocks = [torch.randn(COUNT, size, generator=draws).softmax(-1) for size in LAYERS.values()]
    return torch.cat(blocks, dim=1)


def embeddings() -> Tensor:
    return torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(1))


def observe(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return vectors()[batch["sample"]], batch["sample"] % 3 > 0


def made(*numbers: list[int], **changes: Any) -> NeighbourBank:
    batches = [
        {"sample": torch.tensor(part, dtype=torch.long)}
        for part in numbers or ([7, 2, 0, 9], [1, 3, 8], [4, 5, 6])
    ]
    about = {"layers": LAYERS, "token": "last1", "fingerprint": FINGERPRINT} | changes
    return NeighbourBank.build(observe, batches, embeddings(), **about)


def test_rows_are_in_the_order_of_samples() -> None:
    bank = made()
    assert torch.equal(bank.routing, vectors())
    assert torch.equal(bank.embeddings, embeddings())
    assert bank.correct.tolist() == [number % 3 > 0 for number in range(COUNT)]
    assert bank.num_correct == 6


def test_its_tensors_can_be_learned_from() -> None:
    weights = torch.ones(COUNT, WIDTH, requires_grad=True)
    with torch.inference_mode():
        bank = made()
    assert not bank.routing.requires_grad
    (weights * bank.routing).sum().backward()  # an inference tensor would refuse
    torch.testing.assert_close(weights.grad, bank.routing)


@pytest.mark.parametrize(
    "numbers", [[0, 1, 2], [*range(9), 8], [*range(1, 11)], [*range(9), -1], [*range(11)], []]
)
def test_every_sample_must_be_there_once(numbers: list[int]) -> None:
    with pytest.raises((ValueError, IndexError), match="each of the 10 samples once|out of bounds"):
        made(numbers)


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    bank, path = made(), tmp_path / "bank.safetensors"
    bank.save(path)
    again = NeighbourBank.load(path, FINGERPRINT)
    assert torch.equal(again.routing, bank.routing)
    assert torch.equal(again.embeddings, bank.embeddings)
    assert torch.equal(again.correct, bank.correct)
    assert (again.layers, again.token) == (LAYERS, "last1")
    assert list(again.layers) == list(LAYERS)
    assert again.fingerprint == FINGERPRINT
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


def test_a_bank_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    made().save(tmp_path / "bank")
    other = FINGERPRINT | {"model": "xyz", "embedder": {"files": 1}}
    said = r'from other embedder.files \(null, not 1\); model \("abc", not "xyz"\)$'
    with pytest.raises(ValueError, match=said):
        NeighbourBank.load(tmp_path / "bank", other)
    assert NeighbourBank.load(tmp_path / "bank").fingerprint["model"] == "abc"


def test_files_that_are_no_bank(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no bank")
    save_file({"x": torch.zeros(1)}, tmp_path / "tensors")
    made().save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-40])
    for name in ("nothing", "text", "tensors", "cut"):
        with pytest.raises(ValueError, match=f"{name}': not a readable neighbour bank"):
            NeighbourBank.load(tmp_path / name)


def test_the_mean_distance_by_brute_force() -> None:
    bank, other = made(), vectors().flip(0)
    near = Neighbourhood(k=2, sigma=0.7)
    weights = torch.cat(list(near.blocks(bank.embeddings, bank.correct)))
    for routing in (bank.routing, other):
        pairs = (routing[:, None] - routing).square().sum(-1)
        expected = float((weights * pairs).sum(1).mean())
        assert bank.mean_distance(routing, near) == pytest.approx(expected, rel=1e-5)
    assert bank.mean_distance() == bank.mean_distance(bank.routing, Neighbourhood())
    assert bank.mean_distance(torch.ones(COUNT, WIDTH)) == pytest.approx(0, abs=1e-6)
    none = replace(bank, correct=torch.zeros(COUNT, dtype=torch.bool))
    assert none.mean_distance() == 0


def test_the_entropy_of_the_mean_routing() -> None:
    bank = made()
    means = vectors().double().mean(0).split([2, 4])
    expected = sum(float(-(p * p.log()).sum()) for p in means) / 2
    assert bank.load_entropy() == pytest.approx(expected)


def test_linear_cka_by_definition() -> None:
    a = torch.randn(20, 3, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert linear_cka(a, 5 * a @ turn + 1) == pytest.approx(1)
    b = torch.randn(20, 4, dtype=torch.float64)
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    k, m = (centre @ x @ x.T @ centre for x in (a, b))
    expected = float((k * m).sum() / (k.norm() * m.norm()))  # in the form of Gram matrices
    assert linear_cka(a, b) == pytest.approx(expected)
    assert linear_cka(a, torch.ones(20, 2)) == 0
    bank = made()
    assert bank.similarity() == linear_cka(bank.embeddings, bank.routing)


def test_the_digest_follows_every_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    first = weights_digest(model)
    assert weights_digest(model.to(torch.float32)) == first
    with torch.no_grad():
        model[0].weight[1, 2] += 1e-3
    second = weights_digest(model)
    model[1].running_mean += 1
    assert len({first, second, weights_digest(model), weights_digest(model.bfloat16())}) == 4
