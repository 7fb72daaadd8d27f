"""The proof that another package's kernel computes our mixture of SwiGLU experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from routerlab.core.routing import RouterOutput
from routerlab.ops.grouped_mm import grouped_mm
from routerlab.ops.permute import combine, gather, sort_by_expert

# (x [T, D], gate_up_proj [E, 2F, D], down_proj [E, D, F], expert_indices [T, K],
# combine_weights [T, K]) -> [T, D], all floats of one type
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# Of the largest entry: two to five times the error of `readable` itself against float64, on sizes
# from D=8, F=8 to D=2048, F=256.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_TF32_TOLERANCE = 5e-3  # of float32 where torch allows products of 11 bits
_NUM_TOKENS = (160, 7)  # more than the rows that one program of a kernel takes, and fewer


class Kind(NamedTuple):
    """What one proof is about."""

    dtype: torch.dtype
    device: torch.device
    num_experts: int
    d_model: int
    d_ff: int
    top_k: int

    def __str__(self) -> str:
        sizes = f"E={self.num_experts}, D={self.d_model}, F={self.d_ff}, K={self.top_k}"
        return f"{sizes}, {self.dtype} on {self.device}"


def readable(
    x: Float[Tensor, "T D"],
    gate_up_proj: Float[Tensor, "E F2 D"],
    down_proj: Float[Tensor, "E D F"],
    expert_indices: Int[Tensor, "T K"],
    combine_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """What a kernel has to compute."""
    none = x.new_zeros(len(x), len(gate_up_proj))
    by = sort_by_expert(RouterOutput.from_top_k(none, none, expert_indices, combine_weights))
    gate_up = grouped_mm(gather(x, by), gate_up_proj, by.tokens_per_expert)
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate) * up * by.sort(combine_weights.reshape(-1))[:, None]
    return combine(grouped_mm(hidden, down_proj, by.tokens_per_expert), by)


def differences(kernel: Kernel, kind: Kind) -> list[str]:
    """Where a kernel differs from `readable` by more than `TOLERANCE` on random problems of that
    kind, in words: in its output, or in the gradient of an input.

    Each is compared on the scale of its largest entry, a weight on that of its expert, so that an
    expert with few tokens counts as much. Gradients are taken twice: a kernel may reuse what it
    saved.
    """
    wrong: list[str] = []
    with torch.inference_mode(False), torch.enable_grad(), _plain_saving():
        for num_tokens in _NUM_TOKENS:
            inputs, picks, grad = _problem(kind, num_tokens)
            found = [_twice(run, list(inputs.values()), picks, grad) for run in (kernel, readable)]
            names = ("output", *(f"gradient of {name}" for name in inputs))
            errors = [_error(*pair) for pair in zip(*found, strict=True)]
            wrong += [
                f"{name} of {num_tokens} tokens by {error:.1e} of its largest entry"
                for name, error in zip(names, errors, strict=True)
                if not error <= _tolerance(kind.dtype)  # NaN is wrong, too
            ]
    return wrong


def _twice(run: Kernel, inputs: list[Tensor], picks: Tensor, grad: Tensor) -> list[Tensor]:
    x, gate_up, down, weights = leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(x, gate_up, down, picks, weights)
    torch.autograd.grad(y, leaves, grad, retain_graph=True, allow_unused=True)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad, materialize_grads=True)]


def _error(got: Tensor, wanted: Tensor) -> float:
    dims = (1, 2) if wanted.ndim == 3 else (0, 1)
    error = (got.float() - wanted.float()).abs().amax(dims)
    return float(torch.where(error == 0, 0.0, error / wanted.abs().amax(dims)).max())


def _plain_saving() -> Any:
    """No hook of activation checkpointing sees what is saved here."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _TF32_TOLERANCE
    return TOLERANCE[dtype]


def _problem(kind: Kind, num_tokens: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The float arguments, the picks and the gradient of the output. The first expert has every
    token; the last none, unless K = E.
    """
    dtype, device, num_experts, d_model, d_ff, top_k = kind
    draws = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draws, device=device) * scale).to(dtype)

    inputs = {
        "x": normal(num_tokens, d_model),
        "gate_up_proj": normal(num_experts, 2 * d_ff, d_model, scale=d_model**-0.5),
        "down_proj": normal(num_experts, d_model, d_ff, scale=d_ff**-0.5),
        "combine_weights": normal(num_tokens, top_k).float().softmax(-1).to(dtype),
    }
    preference = torch.rand(num_tokens, num_experts, generator=draws, device=device)
    preference[:, -1], preference[:, 0] = -1, 2
    return inputs, preference.topk(top_k).indices, normal(num_tokens, d_model)
