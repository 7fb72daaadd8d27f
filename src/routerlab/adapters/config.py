"""What a mixture of LoRA experts is made of: the config that PEFT saves beside the weights."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from peft import PeftConfig
from torch import nn

from routerlab.core.checks import choice, within
from routerlab.core.config import ConfigError, compose, nearest
from routerlab.core.instantiate import check_targets, locate, parameters
from routerlab.routers.build import with_balancer

PEFT_TYPE = "ROUTERLAB_MIXTURE"
FORMAT = 1  # of what is saved
_LIBRARIES = ("torch", "peft", "lightning", "transformers")  # they have no routers
_FORM_OF = {  # knobs of one form of experts
    "dropout_per_expert": "shared_a",
    "core_dropout": "core",
    "core_router": "core",
    "gate_noise": "skills",
    "num_tasks": "skills",
    "num_heads": "skills",
    "adapt": "skills",
}
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
        absent_experts: experts without weights, by layer, filled in from ``experts_from``.
        num_tasks: rows of the table of ``skills``.
        num_heads: blocks of input and output features that ``skills`` mixes on their own.
        gate_noise: relaxed Bernoulli noise on the gates of ``skills`` in training.
        adapt: how ``skills`` start from ``adapt_from``, a saved adapter of theirs: ``full`` (new
            table, everything learns), ``z`` (new table, which alone learns), ``mu`` (their mean,
            one plain LoRA).
        target_modules: names of modules, as in PEFT; None: the linears of feed-forward networks
            (or these networks, for ``feed_forward``).
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in PEFT.
        plain_modules: linears that get one plain LoRA of rank r beside the mixture.
        base_model: facts of the base model, filled in; another base model is refused.
        format_version: of what is saved; newer ones than this are refused.
    """

    router: Any = "token_choice"
    num_experts: int = 8
    top_k: int | None = None
    granularity: str | None = None
    router_scope: str = "linear"
    router_init: str | None = None
    experts: str = "lora"
    r: int = 8
    lora_alpha: int | float = 16.0
    use_rslora: bool = False
    omega: str | None = None
    lora_dropout: int | float = 0.0
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
    base_model: dict[str, Any] | None = None
    format_version: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        self._fresh = self.base_model is None  # not read from beside trained weights
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
        return self.plain_scaling if self.omega is None else 1.0

    @property
    def plain_scaling(self) -> float:
        """s of a LoRA that nothing routes."""
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
        within("lora_dropout", self.lora_dropout, 0, 1, below=True)
        if self.top_k is not None:
            within("top_k", self.top_k, 1, self.num_experts)
        if self.experts == "skills":
            self._check_skills()
        elif self.router is None and (self.num_experts > 1 or self.experts == "feed_forward"):
            raise ValueError(f"router=None: num_experts={self.num_experts} experts need a router")
        for name in ("top_k", "granularity", "omega", "router_init"):
            if self.router is None and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value!r}: is of a router, and there is none")
        for name, form in _FORM_OF.items():
            usual = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != usual and self.experts != form:
                raise ValueError(f"{name} is of experts={form!r}, not {self.experts!r}")
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
        if self.lora_dropout:
            raise ValueError(f"lora_dropout={self.lora_dropout}: experts='skills' have no dropout")
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
        if not isinstance(spec, Mapping) or "_target_" not in spec:
            raise ConfigError(
                f"router={spec!r}: must be a name in configs/router, a dict with _target_, or None"
            )
        spec = {str(key): value for key, value in spec.items()}
        target = _checked_class("router", spec)
        if spec.get("balancer") is not None:
            _checked_class("balancer", spec["balancer"])
        accepted = parameters(target)
        knobs = {"top_k": self.top_k, "granularity": self.granularity}
        for name, value in knobs.items():
            if value is not None:
                if name not in accepted:
                    also = "" if self.omega is None else ", and omega"
                    raise ValueError(
                        f"{name}={value!r}: {target.__name__} has no such knob; with this router "
                        f"{name}{also} must be null"
                    )
                spec[name] = value
        if self.omega is not None:
            if "weight" not in accepted or "top_k" not in accepted:
                raise ValueError(
                    f"omega={self.omega!r}: {target.__name__} has no constant weights; use "
                    "router='subset_sampling', or omega=None with lora_alpha"
                )
            spec.setdefault("top_k", inspect.signature(target).parameters["top_k"].default)
            size = spec["top_k"] * self.r
            spec["weight"] = 2 / (size if self.omega == "lora" else size**0.5)
        unknown = [name for name in spec if name not in (*accepted, "_target_", "balancer")]
        if unknown:
            raise ValueError(f"router: no knob {unknown[0]!r}; {nearest(unknown[0], accepted)}")
        return spec


def _checked_class(field: str, spec: Mapping[str, Any]) -> Any:
    """The class that a spec names. A saved adapter may come from anybody, so it cannot name any
    callable: only modules of ours or of the user's own directories, with plain arguments.
    """
    name, target = spec.get("_target_"), None
    if isinstance(name, str) and name.split(".")[0] not in _LIBRARIES:
        check_targets(OmegaConf.create({"_target_": name}))
        target = locate(name)
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise ConfigError(f"{field}: _target_={name!r} is not a {field}")
    for key, value in spec.items():
        if isinstance(value, Mapping) and key != "balancer":
            raise ConfigError(f"{field}: {key}={value!r} must be a plain value")
    return target


def _name(router: Any) -> str:
    return router if isinstance(router, str) else str(dict(router).get("_target_")).rsplit(".")[-1]
