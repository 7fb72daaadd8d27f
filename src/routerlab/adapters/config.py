"""What a mixture of LoRA experts is made of: the config that PEFT saves beside the weights."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from peft import PeftConfig
from torch import nn

from routerlab.core.checks import choice, within
from routerlab.core.config import ConfigError, compose, nearest
from routerlab.core.instantiate import locate, parameters
from routerlab.routers.build import with_balancer

PEFT_TYPE = "ROUTERLAB_MIXTURE"
FORMAT = 1  # of what is saved
FORMS = ("lora", "shared_a", "core", "feed_forward", "skills")


@dataclass
class MixtureOfLoraConfig(PeftConfig):
    """A frozen model's linears (or whole feed-forward networks) with E LoRA experts and a router.

    Args:
        router: a name in ``configs/router``, a dict (``_target_`` and its knobs, maybe
            ``balancer``), or None: one plain LoRA (``num_experts=1``), or ``experts="skills"``.
        num_experts: E.
        top_k: K, where it differs from the router's own.
        granularity: ``token`` or ``sequence``, for routers that know it.
        router_scope: ``linear`` (each adapted linear has a router on its own input) or ``block``
            (one for all targets of a parent module, on that module's input) [reconstructed].
        router_init: ``kaiming_uniform`` draws the gate from U(-1/sqrt(D), 1/sqrt(D)); None leaves
            it as the router makes it.
        experts: what an expert is, with s the scale and w the router's weights.

            - ``lora``: a LoRA of its own, ``y = W x + s sum_i w_i B_i A_i x``;
            - ``shared_a``: heads B_i on one A (HydraLoRA, arXiv 2404.19245);
            - ``core``: r x r matrices M_i between one A and one B (CoMoL, arXiv 2603.00573);
            - ``feed_forward``: LoRAs inside the frozen feed-forward network, whose outputs are
              mixed (MixLoRA, arXiv 2404.15159); targets are then feed-forward modules;
            - ``skills``: factors A_i and B_i that are mixed by task (Poly, arXiv 2202.13914; MHR,
              arXiv 2211.03831); the router is a table of tasks.
        r: rank of one expert.
        lora_alpha: s = lora_alpha / r.
        use_rslora: s = lora_alpha / sqrt(r) instead.
        omega: ReMix's constant weight of a chosen expert in place of s (arXiv 2603.10160):
            ``lora`` 2 / (K r), ``rslora`` 2 / sqrt(K r). The router must have constant weights.
        lora_dropout: on an expert's input; the samples of a policy share one mask.
        dropout_per_expert: a mask for each head of ``shared_a`` (as in HydraLoRA's code).
        core_dropout: ``core`` also drops entries of the merged core and of its output.
        core_router: the router of ``core`` reads A x; False: x.
        train_experts: False freezes the experts and trains routers alone.
        experts_from: directories of trained LoRA adapters that the experts start from.
        num_tasks: rows of the table of ``skills``.
        num_heads: blocks of input and output features that ``skills`` mixes on their own.
        gate_noise: relaxed Bernoulli noise on the gates of ``skills`` in training.
        adapt: how ``skills`` start from ``adapt_from``, a saved adapter of theirs: ``full`` (new
            table, everything learns), ``z`` (new table, which alone learns), ``mu`` (their mean,
            one plain LoRA).
        target_modules: names of modules, as in PEFT; None: the linears of feed-forward networks
            (or these networks, for ``feed_forward``).
        plain_modules: linears that get one plain LoRA of rank r beside the mixture.
        base_model: facts of the base model, filled in; another base model is refused.
    """

    router: Any = "token_choice"
    num_experts: int = 8
    top_k: int | None = None
    granularity: str | None = None
    router_scope: str = "linear"
    router_init: str | None = None
    experts: str = "lora"
    r: int = 8
    lora_alpha: float = 16.0
    use_rslora: bool = False
    omega: str | None = None
    lora_dropout: float = 0.0
    dropout_per_expert: bool = False
    core_dropout: bool = False
    core_router: bool = True
    train_experts: bool = True
    experts_from: list[str] | None = None
    absent_experts: dict[str, list[int]] | None = None
    num_tasks: int | None = None
    num_heads: int = 1
    gate_noise: bool = True
    adapt: str | None = None
    adapt_from: str | None = None
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    plain_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    base_model: dict[str, Any] | None = field(default=None)
    format_version: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        if self.format_version > FORMAT:
            raise ValueError(
                f"format_version={self.format_version}: saved by a newer routerlab; this one reads "
                f"versions up to {FORMAT}"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list | tuple):
                setattr(self, name, set(value))
        self._check()
        self.router = None if self.router is None else self._resolved_router()

    @property
    def scaling(self) -> float:
        """s, or 1 where the router's weights are omega."""
        if self.omega is not None:
            return 1.0
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def make_router(self, d_model: int) -> nn.Module:
        """A fresh router on tokens of width ``d_model``."""
        spec = dict(self.router)
        node = {"balancer": spec.pop("balancer", None), "router": spec}
        router = with_balancer(OmegaConf.create(node))(
            d_model=d_model, num_experts=self.num_experts
        )
        if self.router_init == "kaiming_uniform" and hasattr(router, "gate"):
            nn.init.uniform_(router.gate.weight, -(d_model**-0.5), d_model**-0.5)
        return router

    def _check(self) -> None:
        choice("experts", self.experts, FORMS)
        choice("router_scope", self.router_scope, ("linear", "block"))
        for name, allowed in (
            ("granularity", ("token", "sequence")),
            ("router_init", ("kaiming_uniform",)),
            ("omega", ("lora", "rslora")),
            ("adapt", ("full", "z", "mu")),
        ):
            if getattr(self, name) is not None:
                choice(name, getattr(self, name), allowed)
        for name in ("num_experts", "r", "num_heads"):
            within(name, getattr(self, name), 1)
        within("lora_alpha", self.lora_alpha, 0, above=True)
        within("lora_dropout", self.lora_dropout, 0, 1)
        if self.top_k is not None:
            within("top_k", self.top_k, 1, self.num_experts)
        if self.experts == "skills":
            self._check_skills()
        elif self.router is None and self.num_experts > 1:
            raise ValueError(f"router=None: num_experts={self.num_experts} experts need a router")
        if self.experts != "skills" and (self.adapt or self.num_heads > 1):
            raise ValueError(f"adapt and num_heads are of experts='skills', not {self.experts!r}")
        if self.adapt and not self.adapt_from and self.base_model is None:
            raise ValueError(
                f"adapt={self.adapt!r}: adapt_from must name a saved adapter of skills"
            )
        if self.router_scope == "block" and self.experts in ("core", "feed_forward", "skills"):
            raise ValueError(f"router_scope='block' does not go with experts={self.experts!r}")

    def _check_skills(self) -> None:
        if self.router is not None:
            raise ValueError(
                f"router={_name(self.router)!r}: experts='skills' mixes factors by task, with a "
                "table of tasks for its router; no other fits (router=None)"
            )
        if self.num_tasks is None and self.adapt is None:
            raise ValueError("num_tasks: experts='skills' route by task; say how many there are")
        if self.num_tasks is not None:
            within("num_tasks", self.num_tasks, 1)

    def _resolved_router(self) -> dict[str, Any]:
        """The router as plain data, with the knobs that this config sets."""
        spec = self.router
        if isinstance(spec, str):
            cfg = compose(f"router={spec}")
            spec = OmegaConf.to_container(cfg.router, resolve=True)
            assert isinstance(spec, dict)
            if cfg.get("balancer"):
                spec["balancer"] = OmegaConf.to_container(cfg.balancer, resolve=True)
        spec = {str(key): value for key, value in dict(spec).items()}
        for part in (spec, spec.get("balancer") or {}):
            top = str(part.get("_target_", "routerlab")).split(".")[0]
            if top in ("torch", "peft", "lightning", "transformers"):
                raise ConfigError(f"router: _target_={part['_target_']!r} is not a router")
        target = locate(spec["_target_"])
        accepted = parameters(target)
        knobs = {"top_k": self.top_k, "granularity": self.granularity}
        for name, value in knobs.items():
            if value is not None:
                if name not in accepted:
                    raise ValueError(f"{name}={value!r}: {target.__name__} has no such knob")
                spec[name] = value
        if self.omega is not None:
            if "weight" not in accepted or "top_k" not in accepted:
                raise ValueError(
                    f"omega={self.omega!r}: {target.__name__} has no constant weights; use "
                    "router='subset_sampling', or omega=None with lora_alpha"
                )
            size = spec["top_k"] * self.r
            spec["weight"] = 2 / (size if self.omega == "lora" else size**0.5)
        unknown = [name for name in spec if name not in (*accepted, "_target_", "balancer")]
        if unknown:
            raise ValueError(f"router: no knob {unknown[0]!r}; {nearest(unknown[0], accepted)}")
        return spec


def _name(router: Any) -> str:
    return router if isinstance(router, str) else str(dict(router).get("_target_")).rsplit(".")[-1]
