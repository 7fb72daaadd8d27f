"""The load-balancing rules of several frameworks, and what they all are computed from.

Every rule is E sum_i f_i P_i, with f the load and P the mean probability of expert i. They differ
in which picks f counts, over which tokens both are taken, what they do about layers, and a factor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from routerlab.core.routing import RouterOutput, count_experts, count_tokens


@dataclass(frozen=True)
class Rule:
    """How one framework, or several, take E sum_i f_i P_i."""

    name: str
    picks: str  # that f counts: all, or the first of each token
    tokens: str  # of f and P: batch, micro, or so far (f of the micro-batches up to this one)
    layers: str  # mean, sum, or pool: the layers' tokens are one heap before the product
    factor: str = ""  # K, 1/E^2, or none


OURS = Rule("ours", "all", "batch", "mean")
RULES = (
    OURS,
    Rule("transformers", "all", "micro", "pool", "K"),
    Rule("Megatron aux_loss", "all", "micro", "sum"),
    Rule("Megatron global_aux_loss", "all", "so far", "sum"),
    Rule("OLMo-core/MegaBlocks", "all", "micro", "mean"),
    Rule("flaxformer", "all", "micro", "mean", "K"),
    Rule("DeepSeekMoE", "all", "micro", "sum"),
    Rule("mesh-TF", "first", "micro", "sum"),
    Rule("GShard (paper)", "first", "micro", "sum", "1/E^2"),
    Rule("DeepSpeed/tutel", "first", "micro", "sum"),
)


@dataclass(frozen=True, slots=True, eq=False)
class RoutingSums:
    """Sums over the real tokens of each layer (L) and micro-batch (M), in float64."""

    layers: list[str]
    picks: Float[Tensor, "L M E"]  # requested assignments, before capacity drops
    first_picks: Float[Tensor, "L M E"]  # each token's most probable pick
    probs: Float[Tensor, "L M E"]
    num_tokens: Float[Tensor, "L M 1"]

    @classmethod
    def of(cls, micro_batches: Iterable[Mapping[str, RouterOutput]]) -> "RoutingSums":
        """The sums of records by layer name, one mapping a micro-batch."""
        names: list[str] = []
        rows: list[list[Tensor]] = []  # by sum, then micro-batch: [L E]
        for records in micro_batches:
            names = list(records)
            sizes = {output.num_experts for output in records.values()}
            if len(sizes) > 1:
                raise ValueError(f"layers with {sorted(sizes)} experts: must all have as many")
            sums = [_sums(output) for output in records.values()]
            rows.append([torch.stack(layers) for layers in zip(*sums, strict=True)])
        if not names:
            raise ValueError("no routed layer to look at")
        picks, first, probs, tokens = (torch.stack(m, dim=1) for m in zip(*rows, strict=True))
        if not tokens.all() or not picks.sum(-1).all():
            raise ValueError("a micro-batch has no real token or no assignment: nothing to look at")
        return cls(names, picks, first, probs, tokens)

    @property
    def top_k(self) -> float:
        """Picks a token, on average."""
        return float(self.picks.sum() / self.num_tokens.sum())


def _sums(output: RouterOutput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probs = output.router_probs.detach().double()
    best, expert = torch.where(output.dispatch_mask, probs, -1.0).max(1)
    first = count_experts(expert[best >= 0], output.num_experts)
    total = output.without_padding(probs).sum(0)
    tokens = count_tokens(output)[0].double()[None]
    return output.requests_per_expert.double(), first.double(), total, tokens


def records_of_logits(
    logits: Float[Tensor, "L T E"],
    top_k: int,
    layers: Sequence[str] | None = None,
    valid: Bool[Tensor, "T"] | None = None,
    micro_batches: int = 1,
) -> list[dict[str, RouterOutput]]:
    """Softmax, then the K largest of each token; a mapping of layers for each piece of the tokens.

    Raises:
        ValueError: ``top_k`` is not from 1 to E, ``micro_batches`` does not divide T, or a logit is
            not finite.
    """
    num_layers, num_tokens, num_experts = logits.shape
    names = [f"layers.{i:02d}" for i in range(num_layers)] if layers is None else list(layers)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be from 1 to the {num_experts} experts")
    if micro_batches < 1 or num_tokens % micro_batches:
        raise ValueError(f"micro_batches={micro_batches}: must divide the {num_tokens} tokens")
    real = logits if valid is None else logits[:, valid]
    for name, layer in zip(names, real, strict=True):
        if bad := int((~layer.isfinite()).sum()):
            raise ValueError(f"{name}: {bad} of {layer.numel()} logits are not finite")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    size, found = num_tokens // micro_batches, []
    for start in range(0, num_tokens, size):
        mask = None if valid is None else valid[start : start + size]
        records = {}
        for name, layer in zip(names, logits[:, start : start + size], strict=True):
            if mask is not None:
                layer = torch.where(mask[:, None], layer, 0.0)  # padding may hold anything
            probs, experts = layer.softmax(-1), layer.topk(top_k).indices
            weights = probs.gather(1, experts)
            records[name] = RouterOutput.from_top_k(layer, probs, experts, weights, valid=mask)
        found.append(records)
    return found


def layer_values(rule: Rule, sums: RoutingSums) -> Float[Tensor, "l m"]:
    """E sum_i f_i P_i of each layer (one where they are pooled) and micro-batch (one where the rule
    takes the whole batch), 1 at balance.
    """
    counts = sums.first_picks if rule.picks == "first" else sums.picks
    probs, tokens = sums.probs, sums.num_tokens
    if rule.layers == "pool":
        counts, probs, tokens = (x.sum(0, keepdim=True) for x in (counts, probs, tokens))
    if rule.tokens == "batch":
        counts, probs, tokens = (x.sum(1, keepdim=True) for x in (counts, probs, tokens))
    if rule.tokens == "so far":
        counts = counts.cumsum(1)
    load = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (load * probs / tokens).sum(-1)


def value_at_balance(rule: Rule, sums: RoutingSums) -> float:
    """The rule's value under uniform f and P; our coefficient is theirs times this."""
    num_layers, _, num_experts = sums.picks.shape
    factor = {"": 1.0, "K": sums.top_k, "1/E^2": num_experts**-2.0}[rule.factor]
    return factor * (num_layers if rule.layers == "sum" else 1)
