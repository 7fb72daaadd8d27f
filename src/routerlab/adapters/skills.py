"""Poly and MHR: LoRA factors that are mixed by task, not by token."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from routerlab.adapters.config import MixtureOfLoraConfig
from routerlab.adapters.layer import MixtureLayer
from routerlab.adapters.state import RoutingState
from routerlab.core.routing import RouterOutput, RoutingContext


class TaskTable(nn.Module):
    r"""How much each task uses each skill, head by head (Poly, arXiv 2202.13914, and MHR, arXiv
    2211.03831):

    .. math:: \alpha_{\tau q s} = \hat z_{\tau q s} / \sum_{s'} \hat z_{\tau q s'}, \quad
              \hat z = \sigma(Z) \text{ or, in training with noise, } \sigma(Z + \mathrm{logit}\,u).

    A sigmoid for each skill, then a division: not a softmax, several skills can be fully on.

    Args:
        num_tasks, num_heads, num_skills: the shape of Z, drawn from U(-1e-3, 1e-3).
        noise: relaxed Bernoulli noise (temperature 1) in training, drawn for each sequence.
    """

    causal = True
    eps = 1e-12

    def __init__(self, num_tasks: int, num_heads: int, num_skills: int, noise: bool = True) -> None:
        super().__init__()
        self.num_experts, self.noise = num_skills, noise
        self.task_logits = nn.Parameter(
            torch.empty(num_tasks, num_heads, num_skills).uniform_(-1e-3, 1e-3)
        )

    def alphas(self, context: RoutingContext) -> Float[Tensor, "B h E"]:
        """The mixing weights of each sequence; they sum to 1 over skills."""
        logits = self.task_logits[self._tasks(context)]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.training and self.noise:
            uniform = [
                torch.rand(
                    (len(logits) // context.num_replicas, *logits.shape[1:]),
                    generator=generator,
                    device=logits.device,
                )
                for generator in context.generators(logits.device)
            ]
            u = torch.cat(uniform).clamp(1e-6, 1 - 1e-6)
            logits = logits + torch.logit(u)
        gates = logits.sigmoid()
        return gates / (gates.sum(-1, keepdim=True) + self.eps)

    def record(self, alphas: Float[Tensor, "B h E"], context: RoutingContext) -> RouterOutput:
        """Every token of a sequence with the weights of its task, averaged over heads."""
        probs = alphas.mean(1).repeat_interleave(context.sequence_length, 0)
        logits = (probs + self.eps).log()
        skills = torch.arange(self.num_experts, device=probs.device).expand(len(probs), -1)
        return RouterOutput.from_top_k(logits, probs, skills, probs, valid=context.valid)

    def _tasks(self, context: RoutingContext) -> Int[Tensor, "B"]:
        if context.task_ids is None:
            raise ValueError(
                "task_ids: experts='skills' route by task; call the model inside "
                "`with model.base_model.state.tasks(ids)`, or train on data that has tasks"
            )
        smallest, largest = (int(task) for task in context.task_ids.aminmax())
        wrong = smallest if smallest < 0 else largest
        if not 0 <= wrong < len(self.task_logits):
            raise ValueError(
                f"task_ids: task {wrong} of {len(self.task_logits)} that the adapter knows "
                f"(num_tasks={len(self.task_logits)})"
            )
        return context.task_ids


class SkillExperts(nn.Module):
    """The inventory: A [h, S, I/h, r] and B [h, S, r, O/h]; head q owns the q-th block of input
    rows of A and of output columns of B.
    """

    def __init__(
        self, d_in: int, d_out: int, num_skills: int, r: int, scaling: int | float, num_heads: int
    ) -> None:
        super().__init__()
        for name, width in (("input", d_in), ("output", d_out)):
            if width % num_heads:
                raise ValueError(
                    f"num_heads={num_heads}: must divide the {width} {name} features of every "
                    "adapted linear"
                )
        self.num_experts, self.r, self.scaling = num_skills, r, scaling
        self.num_heads = num_heads
        bound = math.sqrt(1 / (3 * d_in))  # leaky-relu gain of a = sqrt(5) over sqrt(d_in)
        a = torch.empty(num_heads, num_skills, d_in // num_heads, r)
        self.lora_A = nn.Parameter(a.uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(num_heads, num_skills, r, d_out // num_heads))

    def forward(
        self, x: Float[Tensor, "B S I"], alphas: Float[Tensor, "#B h E"]
    ) -> Float[Tensor, "B S O"]:
        """s (x A^t) B^t with the factors of each sequence's task."""
        alphas = alphas.to(self.lora_A.dtype)
        down = torch.einsum("bqs,qsdr->bqdr", alphas, self.lora_A).flatten(1, 2)
        up = torch.einsum("bqs,qsrd->brqd", alphas, self.lora_B).flatten(2)
        return self.scaling * torch.matmul(torch.matmul(x, down), up)


class SkillLinear(nn.Module, MixtureLayer):
    """``W x + s (x A^t) B^t``: a linear whose LoRA is made for the task of the sequence."""

    forms = ("skills",)

    def __init__(
        self, base_layer: nn.Module, d_in: int, d_out: int, name: str, block: str,
        state: RoutingState,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        MixtureLayer.__init__(self, base_layer, name, block, state)
        self.in_features, self.out_features = d_in, d_out

    def update_layer(
        self, adapter: str, config: MixtureOfLoraConfig, plain: bool, routed: bool
    ) -> None:
        """Adds an adapter and its table; ``adapt="mu"`` has none, and one skill."""
        super().update_layer(adapter, config, plain, routed=False)
        if config.adapt != "mu" and not plain:
            tasks = config.num_tasks or 1
            table = TaskTable(tasks, config.num_heads, config.num_experts, config.gate_noise)
            self.mix_router[adapter] = table.train(self.training)
            self._move_adapter_to_device_of_base_layer(adapter)
        if config.adapt == "z":
            self.frozen_peft_weight_names[adapter] = ("mix_experts",)
        self.set_adapter(self.active_adapters)

    def make_experts(self, config: MixtureOfLoraConfig, plain: bool) -> tuple[nn.Module, int]:
        """The inventory of skills; one skill without heads where there is no table."""
        alone = plain or config.adapt == "mu"
        skills, heads = (1, 1) if alone else (config.num_experts, config.num_heads)
        experts = SkillExperts(
            self.in_features, self.out_features, skills, config.r, config.plain_scaling, heads
        )
        return experts, self.in_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the base layer plus that of the active adapter."""
        y = self.base_layer(x, *args, **kwargs)
        adapter = self.active()
        if adapter is None:
            return y
        experts: Any = self.mix_experts[adapter]
        context = self.context(x[..., 0].numel())
        tokens = x.reshape(context.batch_size, context.sequence_length, -1)
        if not torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(experts.lora_A.dtype)
        if adapter in self.mix_router:
            table: Any = self.mix_router[adapter]
            alphas = table.alphas(context)
            self.state.keep(self.name, table.record(alphas, context))
        else:
            alphas = tokens.new_ones(1, 1, 1)
        return y + experts(tokens, alphas).to(y.dtype).view_as(y)
