"""Steering: chosen experts are made likelier, or forced, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from routerlab.core.checks import choice, within
from routerlab.core.layers import layer_number
from routerlab.core.routing import RoutingContext
from routerlab.core.seeding import stable_seed
from routerlab.test_time.plug_in import Cost, Edit

FORMS = ("soft", "activate", "deactivate")
_TIES = 1e-6  # standard deviation of the noise that breaks them


class Steering:
    r"""Router logits of chosen experts moved at every token (Bandarkar et al., arXiv 2510.04694,
    equations 4 and 5), from the token's original logits z:

    - ``soft``: :math:`z_e + \lambda s(z)`, s the standard deviation of the token's E logits; a
      negative ``strength`` makes the experts less likely;
    - ``activate``: :math:`\max_j z_j + \epsilon` (the experts also get the largest weights);
    - ``deactivate``: :math:`\min_j z_j + \epsilon`, :math:`\epsilon \sim N(0, 10^{-6})` (as a
      standard deviation) for each token and expert, to break ties.

    Args:
        experts: numbers of experts by the number of their layer, both from 0 and as in the names of
            records (``layers.03.moe`` is 3). Experts of a task are found by `routerlab.analysis.
            activation`. Forced ones must be fewer than a token has.
        form: ``soft``, ``activate`` or ``deactivate``.
        strength: lambda, from -1 to 1 (where the paper found it stable); of ``soft`` alone.
        sample_std: s divides by E - 1 and not by E; the paper does not say.
        seed: of the noise.
    """

    every: int | None = None
    uses_answer = False

    def __init__(
        self,
        experts: Mapping[int, Sequence[int]],
        form: str = "soft",
        strength: int | float = 0.5,
        sample_std: bool = False,
        seed: int = 0,
    ) -> None:
        choice("form", form, FORMS)
        within("strength", strength, -1, 1)
        self.experts = {layer: sorted(set(chosen)) for layer, chosen in experts.items()}
        self.form, self.strength, self.sample_std = form, strength, sample_std
        self.seed = seed
        self.cost = Cost()

    def adapt(
        self,
        backbone: Any,
        batch: Mapping[str, Tensor],
        context: RoutingContext,
        previous: Edit | None = None,
    ) -> Edit | None:
        """The same edit for every batch. Raises ValueError for layers and experts that the model
        does not have, and for as many forced experts as a token gets.
        """
        chosen = self._by_name(backbone)

        def edit(name: str, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
            return self.steer(logits, chosen[name], name) if name in chosen else logits

        return edit if chosen else None

    def steer(
        self, logits: Float[Tensor, "T E"], chosen: Sequence[int], name: str = ""
    ) -> Float[Tensor, "T E"]:
        """Logits with these experts moved, in float32 or wider; ``name`` seeds the noise."""
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        numbers = torch.tensor(chosen, device=z.device)
        if self.form == "soft":
            std = z.std(-1, correction=int(self.sample_std), keepdim=True)
            moved = z[:, numbers] + self.strength * std
        else:
            seed = stable_seed("steering", self.seed, name)
            generator = torch.Generator(z.device).manual_seed(seed)
            size = (len(z), len(chosen))
            noise = torch.randn(size, generator=generator, device=z.device, dtype=z.dtype)
            end = z.amax(-1, keepdim=True) if self.form == "activate" else z.amin(-1, keepdim=True)
            moved = end + _TIES * noise
        return z.index_copy(1, numbers, moved)

    def _by_name(self, backbone: Any) -> dict[str, list[int]]:
        """The experts of each layer by its name; all layers of a number alike."""
        wanted = {layer: chosen for layer, chosen in self.experts.items() if chosen}
        found = {name: layer_number(name) for name in backbone.layer_names}
        if absent := sorted(set(wanted) - set(found.values())):
            raise ValueError(
                f"experts: layers {absent} are not routed; those that are: "
                f"{sorted(set(found.values()))}"
            )
        chosen = {name: wanted[number] for name, number in found.items() if number in wanted}
        for name, numbers in chosen.items():
            router = backbone.moe_layers[name].router
            outside = [n for n in numbers if not 0 <= n < router.num_experts]
            if outside:
                raise ValueError(
                    f"experts: layer {found[name]} has no experts {outside}; its numbers go from 0 "
                    f"to {router.num_experts - 1}"
                )
            most = int(getattr(router, "top_k", router.num_experts))
            if self.form == "activate" and len(numbers) >= most:
                raise ValueError(
                    f"experts: {len(numbers)} forced in layer {found[name]}, where a token has "
                    f"{most}; force fewer, so that the router still has a say"
                )
        return chosen
