"""How records of related inputs relate. Each check returns None (it holds), or what the router
declares to be otherwise, and raises AssertionError with the reason where it fails.
"""

from typing import Any

import torch
from torch import Tensor, nn

from routerlab.certify.contract import mode, require
from routerlab.certify.probes import D_MODEL, RAGGED, Probe, permuted, probe, repadded
from routerlab.certify.subject import (
    NUM_EXPERTS,
    TOLERANCE,
    Subject,
    run,
    says,
    update,
    view,
)
from routerlab.moe.layer import MoE

# Keeps together experts whose numbers share leading bits, and so groups of 2 or 4 experts.
RELABELLING = torch.tensor([6, 7, 5, 4, 0, 1, 3, 2])


def check_token_order(subject: Subject) -> str | None:
    """Permuting tokens, inside their sequences and sequences as a whole, permutes the record."""
    if says(subject.router(), "order_dependent"):
        return "order_dependent: the place in the batch matters"
    for training in (False, True):
        if subject.is_random(training):
            if not training:
                return "random in evaluation: draws are by place"
            continue
        router = subject.router(training)
        for batch_size, length in ((1, 13), (3, 8)):
            for lengths in (None, [max(1, length - 3 * i - 1) for i in range(batch_size)]):
                shown = probe(batch_size, length, lengths)
                order, moved = permuted(shown)
                expected, got = view(run(router, shown)).rows(order), view(run(router, moved))
                changed = got.difference(expected)
                require(changed is None, f"{changed} changed with the order {mode(training)}")
    return None


def check_expert_labels(subject: Subject) -> str | None:
    """Renumbering experts in all weights and buffers renumbers them in the record."""
    if subject.is_random(False):
        return "random in evaluation: draws are by expert number"
    state = subject.router().state_dict()
    renumbered = {name: _renumber(value) for name, value in state.items()}
    if all(value is state[name] for name, value in renumbered.items()):
        return "no weights: an expert is known by its number"
    for training in (False, True):
        if training and subject.is_random(training):
            continue
        plain, other = subject.router(training), subject.router(training)
        other.load_state_dict(renumbered)
        for shown in (probe(1, 13), probe(3, 8)):
            expected, got = view(run(plain, shown)).columns(RELABELLING), view(run(other, shown))
            changed = got.difference(expected)
            if changed is not None and says(plain, "ties"):
                return f"ties: the expert number decides the {changed} {mode(training)}"
            require(changed is None, f"{changed} changed with expert numbers {mode(training)}")
    return None


def check_state(subject: Subject) -> None:
    """A forward pass changes no state; ``update`` changes buffers and no parameter."""
    for training in (True, False):
        router = subject.router(training)
        before = _state(router)
        output = router(*_pair(probe(3, 8, RAGGED)))
        for name in _changed(before, _state(router)):
            raise AssertionError(f"{name} changed in forward {mode(training)}")
        update(router, output)
        parameters = {name for name, _ in router.named_parameters()}
        for name in _changed(before, _state(router)):
            require(name not in parameters, f"update changed the parameter {name}")


def check_autocast(subject: Subject) -> None:
    """Under bf16 autocast, logits, probabilities and weights are float32 and lose no bits."""
    for training in (True, False):
        router, shown = subject.router(training), probe(3, 8)
        plain = run(router, shown)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16):
                output = run(router, Probe(shown.x.to(dtype), shown.context))
            for name in ("router_logits", "router_probs", "combine_weights"):
                value = getattr(output, name)
                where = f"under autocast {mode(training)}"
                require(value.dtype == torch.float32, f"{name} are {value.dtype} {where}")
                if dtype == torch.float32:
                    equal = torch.equal(value, getattr(plain, name))
                    require(equal, f"{name} are rounded {where}")


def check_gradient(subject: Subject) -> str | None:
    """The output's gradient reaches the router, through combine weights or ``log_prob``."""
    router = subject.router(training=True)
    names = [name for name, p in router.named_parameters() if p.requires_grad]
    if not names:
        return "no parameters"
    output = router(*_pair(probe(3, 8)))
    reached = _reached(router, [output.combine_weights, output.log_prob])
    require(bool(reached), "no parameter gets a gradient from combine_weights or log_prob")
    others = [output.router_probs, output.router_logits, output.selection_probs]
    through_losses = _reached(router, others) - reached
    lost = [name for name in names if name not in reached | through_losses]
    require(not lost, f"no gradient reaches {', '.join(lost)}")
    if through_losses:
        return f"{', '.join(sorted(through_losses))}: gradient through losses only"
    return None


def check_padding(subject: Subject) -> None:
    """Neither the content nor the amount of padding touches real tokens."""
    junk = probe(3, 8, seed=9)
    for training in (True, False):
        router, shown = subject.router(training), probe(3, 8, RAGGED)
        valid = shown.valid
        plain = view(run(router, shown)).rows(valid)
        for scale in (1.0, 100.0):
            other = view(run(router, shown.with_rows(~valid, junk, scale))).rows(valid)
            changed = other.difference(plain)
            require(changed is None, f"{changed} changed with what padding holds {mode(training)}")
        if subject.is_random(training):
            continue
        pairs = {
            "padded further": (shown, repadded(shown, 3, 11)),
            "padded at all": (probe(3, 5), repadded(probe(3, 5), 3, 8)),
            "joined by a sequence of padding": (shown, repadded(shown, 4, 8)),
        }
        for change, (few, many) in pairs.items():
            views = [view(run(router, each)).rows(each.valid) for each in (few, many)]
            changed = views[1].difference(views[0])
            require(changed is None, f"{changed} changed when {change} {mode(training)}")


def check_round_trip(subject: Subject) -> None:
    """A fresh router with the saved state routes like the old one."""
    for training in (True, False):
        router, other = subject.router(training), subject.router(training, seed=1)
        other.load_state_dict(router.state_dict())
        for shown in (probe(3, 8), probe(3, 8, RAGGED)):
            changed = view(run(other, shown)).difference(view(run(router, shown)))
            require(changed is None, f"{changed} not restored by state_dict {mode(training)}")


def check_deterministic(subject: Subject) -> str | None:
    """The same context gives the same record, bit by bit, and torch's generator stays as it is."""
    for training in (True, False):
        router, shown = subject.router(training), probe(3, 8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first, before = view(run(router, shown)), torch.get_rng_state()
            run(router, shown)
            require(
                torch.equal(before, torch.get_rng_state()),
                f"draws from torch's global generator {mode(training)}",
            )
            torch.manual_seed(2)
            second = view(run(router, shown))
        for name, value in first.fields.items():
            same = torch.equal(value, second.fields[name])
            require(same, f"{name} differ between two equal calls {mode(training)}")
    return "random in evaluation (by context.seed)" if subject.is_random(False) else None


def check_no_context(subject: Subject) -> str | None:
    """Works without a context, or says in a ValueError what is missing."""
    for training in (False, True):
        router = subject.router(training)
        try:
            router(probe(1, 13).x, None)
        except ValueError as error:
            require("context" in str(error), f"without a context: {error}")
            return f"needs a context {mode(training)}: {str(error).splitlines()[0]}"
    return None


def check_dispatch(subject: Subject) -> None:
    """The fast dispatch equals the loop in output and in all gradients."""
    for shown in (probe(1, 5), probe(3, 8), probe(3, 8, RAGGED)):
        found = [_through_layer(subject, shown, dispatch) for dispatch in ("loop", "auto")]
        for name, expected in found[0].items():
            got = found[1][name]
            scale = expected.abs().amax().clamp(min=1.0)  # below it, cancelled terms are noise
            close = bool(((got - expected).abs() <= TOLERANCE * scale).all())
            require(close, f"{name} differs between dispatches (T={len(shown.x)})")


def _through_layer(subject: Subject, shown: Probe, dispatch: str) -> dict[str, Tensor]:
    """Output and gradients of a layer with this router."""
    router = subject.router(training=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = MoE(D_MODEL, 12, NUM_EXPERTS, router, dispatch=dispatch)
    x = shown.x.clone().requires_grad_()
    y, _ = layer(x, shown.context)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    leaves = {"x": x, **dict(layer.named_parameters())}
    grads = {f"the gradient of {n}": p.grad for n, p in leaves.items() if p.grad is not None}
    return {"the output": y.detach(), **grads}


# -- readings -------------------------------------------------------------------------------------


def _pair(shown: Probe) -> tuple[Tensor, Any]:
    return shown.x, shown.context


def _renumber(value: Tensor) -> Tensor:
    for dim, size in enumerate(value.shape):
        if size == NUM_EXPERTS:
            value = value.index_select(dim, RELABELLING)
    return value


def _state(router: nn.Module) -> dict[str, Tensor]:
    named = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    return {name: value.detach().clone() for name, value in named.items()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    if before.keys() != after.keys():
        return sorted(before.keys() ^ after.keys())
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def _reached(router: nn.Module, values: list[Tensor | None]) -> set[str]:
    """Parameters that get a gradient beyond rounding noise from a random sum of these."""
    generator = torch.Generator().manual_seed(4)
    router.zero_grad()
    for value in values:
        if value is not None and value.requires_grad:
            targets = torch.randn(value.shape, generator=generator)
            (value * targets).sum().backward(retain_graph=True)
    grads = {name: p.grad for name, p in router.named_parameters()}
    return {name for name, grad in grads.items() if grad is not None and grad.abs().max() > 1e-5}
