"""Each link gives back what it was given; the interleaved one turns what must be turned."""

import pytest
import torch
from torch import Tensor

from routerlab.backbones.attention import rotary_tables, rotate
from routerlab.convert import links
from routerlab.convert.links import Link


@pytest.mark.parametrize(
    ("link", "shape"),
    [
        (links.renamed("a", "x"), (6, 4)),
        (links.renamed("a", "x", "y"), (6, 4)),
        (links.gate_and_up("a", "x", "y"), (6, 4)),
        (links.stacked("a", ["x", "y", "z"]), (3, 4, 5)),
        (links.stacked_gate_and_up("a", ["x", "y"], ["z", "w"]), (2, 6, 4)),
        (links.doubled("a", "x"), (6, 4)),
        (links.interleaved("a", "x", 6), (12, 4)),
        (links.one_row("a", "x"), (5,)),
    ],
)
def test_there_and_back_is_bitwise_the_same(link: Link, shape: tuple[int, ...]) -> None:
    own = torch.randn(shape)
    theirs = list(link.to_theirs(own))
    assert len(theirs) == len(link.theirs)
    assert torch.equal(link.to_ours(theirs), own)


def test_gate_rows_come_first() -> None:
    own = torch.arange(8.0).reshape(2, 4, 1)
    link = links.stacked_gate_and_up("a", ["gate 0", "gate 1"], ["up 0", "up 1"])
    theirs = dict(zip(link.theirs, link.to_theirs(own), strict=True))
    assert theirs["gate 1"].flatten().tolist() == [4.0, 5.0]
    assert theirs["up 1"].flatten().tolist() == [6.0, 7.0]


def test_interleaved_rows_turn_alike() -> None:
    """Scores of queries and keys are those of positions that turn neighbouring coordinates."""
    length, head_dim, width = 5, 6, 4
    q, k = torch.randn(2, 2 * head_dim, width).double()
    x = torch.randn(length, width).double()
    cos, sin = (table.double() for table in rotary_tables(length, head_dim, 50.0))

    def neighbours(heads: Tensor) -> Tensor:
        pairs = heads.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1)
        c, s = cos[:, : head_dim // 2, None], sin[:, : head_dim // 2, None]
        return (pairs * c + turned * s).flatten(-2)

    def heads(weight: Tensor) -> Tensor:
        return (x @ weight.T).view(1, length, -1, head_dim).transpose(1, 2)

    link = links.interleaved("a", "x", head_dim)
    ours = [rotate(heads(weight), cos, sin) for weight in (q, k)]
    theirs = [neighbours(heads(next(iter(link.to_theirs(weight))))) for weight in (q, k)]
    scores = [a @ b.transpose(-1, -2) for a, b in (ours, theirs)]
    torch.testing.assert_close(scores[0], scores[1])


def test_zeros_must_be_zeros() -> None:
    link = links.zeros("gate", 1, 4)
    assert link.ours is None
    assert not torch.stack(list(link.to_theirs(torch.empty(0)))).any()
    with pytest.raises(ValueError, match="gate: must be zeros"):
        link.to_ours([torch.ones(1, 4)])


def test_tied_tensors_must_be_equal() -> None:
    link = links.renamed("a", "x", "y")
    with pytest.raises(ValueError, match="x and y: must be equal"):
        link.to_ours([torch.zeros(3), torch.ones(3)])
