"""torch.compile: the layer and a whole model are one graph, equal to eager, and stay compiled."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from routerlab.backbones.decoder import Decoder
from routerlab.core.routing import RoutingContext
from routerlab.core.seeding import stable_seed
from routerlab.moe.layer import MoE
from routerlab.ops.grouped_mm import _outer, _product
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.distributed import run_distributed

Pair = tuple[list[Tensor], list[Tensor]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
CASES = [  # one that F.grouped_mm refuses, one that only its compiler refuses, one that both take
    (torch.float64, (6, 5)),
    (torch.float32, (16, 8)),
    (torch.bfloat16, (16, 8)),
]


def _layer(dtype: torch.dtype, widths: tuple[int, int], backend: str) -> tuple[list[Pair], int]:
    """Results of the compiled and of the eager layer in float64, for several routings, and how many
    graphs were compiled.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    d_model, d_ff = widths
    router = partial(TokenChoice, top_k=2, init_std=1.0)
    moe = MoE(d_model, d_ff, 4, router, num_shared_experts=1).to(dtype)
    exact = MoE(d_model, d_ff, 4, router, num_shared_experts=1, dispatch="loop").double()
    exact.load_state_dict(moe.state_dict())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(moe, fullgraph=True, backend=counter)
    pairs = []
    # the last three have one length that was never seen, then all tokens on two experts
    for seed, num_tokens, spread in ((0, 12, 1.0), (1, 12, 1.0), (2, 20, 1.0), (3, 7, 1e-3)):
        generator = torch.Generator().manual_seed(seed)
        x = (1 + spread * torch.randn(num_tokens, d_model, generator=generator)).to(dtype)
        found = []
        for layer, run in ((moe, compiled), (exact, exact)):
            layer.zero_grad()
            inputs = x.to(layer.router.gate.weight.dtype, copy=True).requires_grad_()
            y, output = run(inputs, None)
            (y.double().square().sum() + output.router_probs.double().square().sum()).backward()
            grads = [p.grad.double() for p in layer.parameters()]
            found.append([y.detach().double(), inputs.grad.double(), *grads])
        pairs.append((found[0], found[1]))
    return pairs, counter.frame_count


def _difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest, in units of the largest entry of its tensor."""
    pairs = zip(some, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def _decoder() -> tuple[list[Pair], int]:
    torch.manual_seed(0)
    model = Decoder(
        partial(TokenChoice, top_k=2, init_std=1.0),
        vocab_size=64,
        d_model=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        d_ff=16,
        num_experts=4,
        max_positions=16,
        qk_norm=True,
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    pairs = []
    for step in range(3):
        ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step))
        context = RoutingContext(
            2,
            16,
            domain_ids=torch.tensor([0, 1]),
            num_domains=2,
            progress=step / 3,
            seed=stable_seed(0, step),
            step_seed=stable_seed(1, step),
        )
        found = []
        for run in (compiled, model):
            model.zero_grad()
            out = run(ids, context)
            records = out.router_outputs.values()
            logits = sum(record.router_logits.square().sum() for record in records)
            (out.logits.square().mean() + logits).backward()
            grads = [p.grad.clone() for p in model.parameters()]
            picks = [record.expert_indices.double() for record in records]
            found.append([out.logits.detach(), *grads, *picks])
        pairs.append((found[0], found[1]))
    return pairs, counter.frame_count


def _everything() -> tuple[list[tuple[list[Pair], int]], tuple[list[Pair], int]]:
    return [_layer(*case, backend="aot_eager") for case in CASES], _decoder()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In a child process, because jaxtyping's import hook, on in this one, cannot be traced."""
    folder = tmp_path_factory.mktemp("compiled")
    return run_distributed(_everything, world_size=1, tmp_path=folder, timeout=240)[0]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case[0]) for case in CASES])
def test_the_layer(found: Any, case: int) -> None:
    pairs, graphs = found[0][case]
    for compiled, exact in pairs:
        assert _difference(compiled, exact) < TOLERANCE[CASES[case][0]]
    assert graphs == 2  # a new length makes lengths symbolic, once; a new routing nothing


def test_a_whole_model_stays_compiled_from_step_to_step(found: Any) -> None:
    pairs, graphs = found[1]
    for compiled, eager in pairs:
        assert _difference(compiled, eager) < 1e-5
    assert graphs == 1


def _swapped(operation: Any, ends: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return operation(left, right, ends)


@pytest.mark.parametrize(
    ("dtype", "inner", "outer", "ends"),
    [
        (torch.float64, 5, 7, [3, 3, 8]),
        (torch.float32, 16, 8, [3, 3, 8]),
        (torch.float32, 16, 8, [0, 0, 8]),
        (torch.float32, 16, 8, [0, 0, 0]),
    ],
)
def test_the_operations_of_the_graph_keep_the_rules_of_torch(
    dtype: torch.dtype, inner: int, outer: int, ends: list[int]
) -> None:
    a, b = (torch.randn(ends[-1], n, dtype=dtype, requires_grad=True) for n in (inner, outer))
    weight = torch.randn(3, outer, inner, dtype=dtype, requires_grad=True)
    offsets = torch.tensor(ends, dtype=torch.int32)
    for operation, left, right in ((_product, a, weight), (_outer, a, b)):
        torch.library.opcheck(operation, (left, right, offsets))
        if dtype == torch.float64:
            run = partial(_swapped, operation, offsets)
            assert torch.autograd.gradgradcheck(run, (left, right))
