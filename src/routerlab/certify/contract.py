"""What one record must be. Each check returns None (it holds), or what the router declares to be
otherwise, and raises AssertionError with the reason where it fails.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from routerlab.certify.probes import Probe, hard_probes, probe, probes
from routerlab.certify.subject import NUM_EXPERTS, Subject, run
from routerlab.core.routing import RouterOutput


def require(holds: bool | Tensor, reason: str) -> None:
    """Raises with the reason unless it holds (also under ``python -O``)."""
    if not holds:
        raise AssertionError(reason)


def check_record(subject: Subject) -> None:
    """Shapes, dtypes and index ranges; no pair twice; no padding; rows of probabilities."""
    for router, shown, where in _everywhere(subject):
        output = run(router, shown)
        num_tokens = len(shown.x)
        for name in ("router_logits", "router_probs", "selection_probs"):
            value = getattr(output, name)
            if value is not None:
                shape = (num_tokens, NUM_EXPERTS)
                require(value.shape == shape, f"{name} is {list(value.shape)} {where}")
                require(value.dtype == torch.float32, f"{name} is {value.dtype} {where}")
        tokens, experts = output.token_indices, output.expert_indices
        require(tokens.shape == experts.shape == output.combine_weights.shape, f"N differs {where}")
        require(tokens.dtype == experts.dtype == torch.int64, f"indices are not int64 {where}")
        require(output.combine_weights.dtype == torch.float32, f"weights not float32 {where}")
        for name, index, end in (("token", tokens, num_tokens), ("expert", experts, NUM_EXPERTS)):
            inside = bool(((index >= 0) & (index < end)).all())
            require(inside, f"{name}_indices are out of range {where}")
        pairs = tokens * NUM_EXPERTS + experts
        require(len(pairs.unique()) == len(pairs), f"a (token, expert) pair occurs twice {where}")
        valid = shown.context.valid
        if valid is not None:
            require(valid[tokens].all(), f"padding is dispatched {where}")
            kept = output.valid is not None and torch.equal(output.valid, valid)
            require(kept, f"the record does not pass on which tokens are valid {where}")
        probs = output.without_padding(output.router_probs)
        sums = bool(((probs.sum(-1) - 1).abs() < 1e-4).all() and (probs >= -1e-6).all())
        require(sums, f"router_probs are no distributions {where}")
        _check_extras(output, num_tokens, where)


def check_finite(subject: Subject) -> None:
    """A finite record and finite gradients for any finite input."""
    for training in (True, False):
        router = subject.router(training)
        logit = run(router, probe(3, 8)).router_logits.abs().amax()
        for name, shown in hard_probes(logit.item()):
            require_finite(router, shown, f"for {name} {mode(training)}")


def check_weights(subject: Subject) -> None:
    """Combine weights are finite and not negative."""
    for router, shown, where in _everywhere(subject):
        weights = run(router, shown).combine_weights
        require(weights.isfinite().all(), f"a combine weight is not finite {where}")
        require((weights >= 0).all(), f"a combine weight is negative {where}")


def check_counts(subject: Subject) -> None:
    """Kept and dropped add up to requests, and ``top_k`` means what it says."""
    for router, shown, where in _everywhere(subject):
        output = run(router, shown)
        num_tokens, kept = len(shown.x), len(output.token_indices)
        dropped = output.dropped_per_expert
        require(dropped.shape == (NUM_EXPERTS,), f"dropped_per_expert is not [E] {where}")
        require(dropped.dtype == torch.int64, f"dropped_per_expert is {dropped.dtype} {where}")
        require((dropped >= 0).all(), f"dropped_per_expert is negative {where}")
        require(output.tokens_per_expert.sum() == kept, f"tokens_per_expert is not N {where}")
        require(
            output.requests_per_expert.sum() == kept + output.num_dropped,
            f"kept and dropped are not the requests {where}",
        )
        if output.top_k is not None:
            stored = torch.arange(num_tokens).repeat_interleave(output.top_k)
            token_by_token = torch.equal(output.token_indices, stored)
            require(token_by_token, f"top_k is set, rows are not K for each token {where}")
        fixed, whole = getattr(router, "top_k", None), num_tokens % NUM_EXPERTS == 0
        if isinstance(fixed, int) and whole and output.valid is None and not router.training:
            asked = int(output.requests_per_expert.sum())
            require(
                asked == fixed * num_tokens,
                f"{asked} requests of {num_tokens} tokens with top_k={fixed} {where}",
            )


# -- for tests and other checks --------------------------------------------------------------------


def require_finite(router: Any, shown: Probe, where: str) -> None:
    """Record and gradients hold neither NaN nor infinity."""
    x = shown.x.clone().requires_grad_()
    output = router(x, shown.context)
    names = ("router_logits", "router_probs", "combine_weights", "log_prob", "selection_probs")
    for name in (*names, "proposal"):
        value = getattr(output, name)
        if value is not None:
            require(value.isfinite().all(), f"{name} not finite {where}")
    router.zero_grad()
    terms = [output.combine_weights.square().sum()]
    terms += [] if output.log_prob is None else [output.log_prob.sum()]
    loss = torch.stack(terms).sum()
    if loss.requires_grad:
        loss.backward()
        for name, leaf in (("the tokens", x), *router.named_parameters()):
            if leaf.grad is not None:
                require(leaf.grad.isfinite().all(), f"gradient of {name} not finite {where}")


# -- readings -------------------------------------------------------------------------------------


def _everywhere(subject: Subject) -> Iterator[tuple[Any, Probe, str]]:
    for training in (True, False):
        router = subject.router(training)
        for shown in probes():
            padded = "" if shown.context.valid is None else " with padding"
            yield router, shown, f"for T={len(shown.x)}{padded} {mode(training)}"


def mode(training: bool) -> str:
    """The mode, in words."""
    return "in training" if training else "in evaluation"


def _check_extras(output: RouterOutput, num_tokens: int, where: str) -> None:
    if output.log_prob is not None:
        require(output.log_prob.shape == (num_tokens,), f"log_prob is not [T] {where}")
        real = output.without_padding(output.log_prob)
        require((real <= 1e-5).all(), f"log_prob of a choice is above 0 {where}")
    if output.selection_probs is not None:
        chances = output.without_padding(output.selection_probs)
        require(((chances >= 0) & (chances <= 1 + 1e-5)).all(), f"selection_probs {where}")
    if output.proposal is not None:
        require(output.proposal.ndim == 1, f"proposal is no vector {where}")
        require(output.proposal.isfinite().all(), f"proposal is not finite {where}")
