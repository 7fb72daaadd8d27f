"""Routers that each break one promise, and one that breaks none."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from routerlab.core.routing import RouterOutput, RoutingContext
from routerlab.routers.gate import Gate, full_precision


class Good(nn.Module):
    """Two experts a token, each step in a method so that it can be broken by itself."""

    causal = True
    top_k = 2

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = Gate(d_model, num_experts)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> RouterOutput:
        """The record, after whatever subclasses do to it."""
        with full_precision(x):
            logits = self.logits(x, context)
            probs = self.probs(logits)
            experts = self.experts(logits)
            weights = self.weights(logits, probs, experts)
        valid = None if context is None else context.valid
        return self.record(RouterOutput.from_top_k(logits, probs, experts, weights, valid=valid))

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return self.gate(x)

    def probs(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def experts(self, logits: Tensor) -> Tensor:
        return logits.topk(2, dim=-1).indices

    def weights(self, logits: Tensor, probs: Tensor, experts: Tensor) -> Tensor:
        return probs.gather(-1, experts)

    def record(self, output: RouterOutput) -> RouterOutput:
        return output


# -- one record -----------------------------------------------------------------------------------


class OneExpertTwice(Good):
    def experts(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1, keepdim=True).repeat(1, 2)


class NoSuchExpert(Good):
    def record(self, output: RouterOutput) -> RouterOutput:
        return replace(output, expert_indices=output.expert_indices + 1)


class ProbabilitiesOfAHalf(Good):
    def probs(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


class DispatchesPadding(Good):
    def record(self, output: RouterOutput) -> RouterOutput:
        picks = output.router_logits.topk(2).indices
        weights = output.router_probs.gather(-1, picks)
        full = RouterOutput.from_top_k(output.router_logits, output.router_probs, picks, weights)
        return replace(full, valid=output.valid)


class ForgetsValid(Good):
    def record(self, output: RouterOutput) -> RouterOutput:
        return replace(output, valid=None)


class HalfPrecision(Good):
    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return self.gate(x).bfloat16()


class Overflows(Good):
    def probs(self, logits: Tensor) -> Tensor:
        return logits.exp() / logits.exp().sum(-1, keepdim=True)


class NoGradientAtZero(Good):
    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return self.gate(x / (x.square().sum(-1, keepdim=True).sqrt() + 1e-6))


class NegativeWeights(Good):
    def weights(self, logits: Tensor, probs: Tensor, experts: Tensor) -> Tensor:
        return (probs - 0.2).gather(-1, experts)


class SaysThree(Good):
    top_k = 3


class ExpertByExpert(Good):
    """Keeps ``top_k`` set while its rows are sorted by expert."""

    def record(self, output: RouterOutput) -> RouterOutput:
        order = output.expert_indices.argsort(stable=True)
        rows = ("token_indices", "expert_indices", "combine_weights")
        return replace(output, **{name: getattr(output, name)[order] for name in rows})


# -- related inputs -------------------------------------------------------------------------------


class PrefersEarlyTokens(Good):
    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        place = torch.arange(len(x))[:, None] % self.num_experts
        return self.gate(x) + 3 * (place == torch.arange(self.num_experts))


class PrefersExpertZero(Good):
    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return self.gate(x) + 3 * (torch.arange(self.num_experts) == 0)


class ExpertsTie(Good):
    def experts(self, logits: Tensor) -> Tensor:
        return (logits / 4).round().argsort(dim=-1, descending=True, stable=True)[:, :2]


class Counts(Good):
    """Counts tokens while it forwards."""

    count: Tensor

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.register_buffer("count", torch.zeros(()))

    def record(self, output: RouterOutput) -> RouterOutput:
        if self.training:
            self.count += len(output.router_logits)
        return output


class UpdatesWeights(Good):
    def record(self, output: RouterOutput) -> RouterOutput:
        return replace(output, proposal=output.router_logits.new_zeros(1))

    @torch.no_grad()
    def update(self, requests_per_expert: Tensor, proposal: Tensor) -> None:
        self.gate.weight += 0.01


class PlainLinear(Good):
    """A float32 cast alone does not keep autocast away."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> RouterOutput:
        logits = self.gate(x.float()).float()
        valid = None if context is None else context.valid
        return RouterOutput.from_dispatch_mask(
            logits, logits.softmax(-1), logits > 0, logits.relu(), valid=valid
        )


class NoGradient(Good):
    def weights(self, logits: Tensor, probs: Tensor, experts: Tensor) -> Tensor:
        return super().weights(logits, probs, experts).detach()


class IdleParameter(Good):
    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.idle = nn.Parameter(torch.ones(3))


class AveragesPadding(Good):
    causal = False

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return self.gate(x - x.mean(0))


class CountsPadding(Good):
    """The content of padding is nothing to it, the number of rows is."""

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return self.gate(x) / len(x)


class LosesState(Good):
    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.bias = 3 * torch.randn(self.num_experts)

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return self.gate(x) + self.bias


class GlobalDraws(Good):
    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        logits = self.gate(x)
        return logits + torch.rand_like(logits) if self.training else logits


class HiddenCounter(Good):
    """Its state is a plain attribute that no state_dict shows."""

    calls = 0

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        self.calls += 1
        return self.gate(x) * (1 + self.calls)


class NeedsContext(Good):
    def logits(self, x: Tensor, context: Any) -> Tensor:
        return self.gate(x) + 0 * context.progress


# -- leaks ----------------------------------------------------------------------------------------


class LooksAhead(Good):
    """Each token sees the mean of its sequence."""

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return self.gate(x) - self.gate(self._mean(x, context))

    def _mean(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        shape = (1, len(x)) if context is None else (context.batch_size, context.sequence_length)
        real = torch.ones(shape)
        if context is not None and context.valid is not None:
            real = context.valid.view(shape).float()
        total = (x.view(*shape, -1) * real[..., None]).sum(1, keepdim=True)
        mean = total / real.sum(1)[:, None, None].clamp(min=1)
        return mean.expand(*shape, -1).reshape(x.shape)


class LooksAheadInTraining(LooksAhead):
    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return super().logits(x, context) if self.training else self.gate(x)


class LooksAheadNowAndThen(LooksAhead):
    """In one training step of three."""

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        looks = self.training and context is not None and context.step_seed % 3 == 0
        return super().logits(x, context) if looks else self.gate(x)


class LooksAround(LooksAhead):
    """Each token sees the mean of all sequences."""

    def _mean(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        valid = None if context is None else context.valid
        real = torch.ones(len(x)) if valid is None else valid.float()
        return (real @ x / real.sum().clamp(min=1)).expand_as(x)


class SaysThatItLooksAhead(LooksAhead):
    causal = False


class SaysThatTrainingLooksAhead(LooksAheadInTraining):
    causal_training = False


class SaysThatPlaceMatters(PrefersEarlyTokens):
    order_dependent = True


class SaysThatExpertsTie(ExpertsTie):
    ties = True


class SeededDraws(Good):
    """Random in evaluation, too."""

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        if context is None:
            raise ValueError("draws from context.seed: pass a RoutingContext")
        logits = self.gate(x)
        return logits + torch.randn(logits.shape, generator=context.generator(x.device))


class NoParameters(Good):
    def __init__(self, d_model: int, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def logits(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        return x[:, : self.num_experts].float()
