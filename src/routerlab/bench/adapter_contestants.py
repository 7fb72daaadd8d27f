"""The adapters that are compared, each with its objective, and the plain LoRA next to each."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from routerlab.backbones.pretrained import PretrainedLM
from routerlab.bench.adapter_sizes import AdapterSizes
from routerlab.core.config import ConfigError, available, compose, nearest
from routerlab.core.instantiate import build, build_all
from routerlab.objectives.finetune import FineTune
from routerlab.objectives.step import Batch
from routerlab.training.build import build_adapter

SOFT = "soft"  # LoRAs on the feed-forward linears, top-k weights: what ReMix is measured against
LORA = "lora"
NUM_TASKS = 4
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def method_names(asked: str = "all") -> list[str]:
    """`SOFT` and the names in a comma-separated list: files of ``configs/adapter`` but plain LoRA,
    which every row is compared with; for all, those that go on from a saved adapter are left out.
    """
    known = [name for name in available("adapter") if name != LORA]
    if asked == "all":
        return [SOFT, *(name for name in known if not _goes_on(name))]
    chosen = [name.strip() for name in asked.split(",")]
    for name in chosen:
        if name not in (SOFT, *known):
            raise ConfigError(f"adapters={name!r}: no such method; {nearest(name, [SOFT, *known])}")
    return list(dict.fromkeys([SOFT, *chosen]))


def method_config(name: str, sizes: AdapterSizes) -> DictConfig:
    """The config of a method as its file composes it, with the sizes put in: E experts of rank r,
    and K picks where the router has a number of them.
    """
    cfg = _composed(name).copy()
    knobs: dict[str, Any] = {"num_experts": sizes.num_experts, "r": sizes.r}
    picks = cfg.get("router") and "top_k" in cfg.router
    knobs |= {"top_k": sizes.top_k if picks else None, "num_tasks": NUM_TASKS}
    for knob, value in knobs.items():
        if knob in cfg.adapter:
            cfg.adapter[knob] = value
    return cfg


@contextmanager
def random_base(sizes: AdapterSizes) -> Iterator[Path]:
    """The folder of a llama of random weights, as long as the context is open."""
    from safetensors.torch import save_model
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_ff,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=sizes.sequence_length,
        tie_word_embeddings=True,
    )
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_model(LlamaForCausalLM(config), f"{folder}/model.safetensors", {"format": "pt"})
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
        yield Path(folder)


class Batches:
    """Batches of prompts and answers, padded on the left; rows are three quarters full or more,
    and the answer is what lies in the last quarter.
    """

    def __init__(self, sizes: AdapterSizes, device: torch.device, seed: int) -> None:
        self.sizes, self.device = sizes, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self.draws, self.batch = 0, {}
        self.draw()

    def draw(self) -> None:
        """A new batch, and so a new routing."""
        rows, length = self.sizes.batch_size, self.sizes.sequence_length
        draw = partial(torch.randint, generator=self._generator, device=self.device)
        tokens = draw(0, self.sizes.vocab_size, (rows, length + 1))
        place = torch.arange(length, device=self.device)
        valid = place >= draw(0, length // 4 + 1, (rows, 1))
        prompt = (place < length - length // 4) & valid
        tasks = torch.arange(rows, device=self.device) % NUM_TASKS
        self.draws += 1
        self.batch: Batch = {
            "input_ids": tokens[:, :-1],
            "labels": tokens[:, 1:].masked_fill(prompt | ~valid, -100),
            "valid": valid,
            "prompt": prompt,
            "task": tasks,
            "domain": tasks,
        }


class Contestant:
    """A base model with an adapter, and its training steps: gradients as the objective takes them,
    then the optimizer; clipping, logging and schedules left out.
    """

    def __init__(
        self,
        base: Path,
        adapter: Any,
        batches: Batches,
        cfg: DictConfig,
        losses: bool = True,
        **knobs: Any,
    ) -> None:
        backbone = PretrainedLM(str(base), base, adapter)
        made = build(
            cfg.objective,
            backbone=backbone.to(batches.device),
            optimizer=build(cfg.optimizer),
            losses=build_all(cfg.get("loss")) if losses else {},
            diagnostics={},
            domains=[str(task) for task in range(NUM_TASKS)],
            **knobs,
        )
        assert isinstance(made, FineTune)
        self.objective, self.batches = made, batches
        self.optimizer = made.recipe.build(made, 1000)[0]
        made.train()

    @property
    def backbone(self) -> PretrainedLM:
        """The model."""
        model: Any = self.objective.backbone
        return model

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of the model, frozen ones too."""
        return list(self.objective.parameters())

    @property
    def trainable(self) -> int:
        """Number of parameters that learn."""
        return sum(p.numel() for p in self.parameters if p.requires_grad)

    def step(self) -> object:
        """One training step on the batch that was drawn last."""
        batch, objective = self.batches.batch, self.objective
        self.optimizer.zero_grad()
        context = objective.context(batch, self.batches.draws, 0)
        terms, _, _ = objective.accumulate([batch], [context], due=False)
        self.optimizer.step()
        return terms

    def forget(self) -> None:
        """Lets go of what the last step left: gradients and records."""
        self.optimizer.zero_grad()
        state = getattr(self.backbone.model.base_model, "state", None)
        if state is not None:
            state.records = {}

    @torch.no_grad()
    def run(self) -> Tensor:
        """The logits of the batch, in the mode that the model is in."""
        batch = self.batches.batch
        context = self.objective.context(batch, self.batches.draws, 0)
        return self.objective.run(batch, context).logits

    @torch.no_grad()
    def picks(self) -> float:
        """Experts that a real token uses, on average over layers."""
        batch = self.batches.batch
        context = self.objective.context(batch, self.batches.draws, 0)
        records = self.objective.run(batch, context).router_outputs.values()
        found = sum(len(record.token_indices) for record in records)
        return found / max(1, len(records) * int(batch["valid"].sum()))


def build_method(
    name: str, sizes: AdapterSizes, base: Path, batches: Batches, **knobs: Any
) -> Contestant:
    """The contestant of a name from `method_names`; ``knobs`` are the objective's."""
    cfg = method_config(name, sizes)
    return Contestant(base, build_adapter(cfg), batches, cfg, **knobs)


def build_lora(like: Contestant, rank: int, base: Path) -> Contestant:
    """Plain LoRA of ``rank`` on the linears that another contestant adapts, with its dropout;
    linears where that one has a plain LoRA get one of the same rank.
    """
    theirs: Any = like.backbone.model.peft_config["default"]
    mixed = _FEED_FORWARD if theirs.experts == "feed_forward" else theirs.target_modules
    plain = theirs.plain_modules or []
    cfg = _composed(LORA).copy()
    cfg.adapter.r, cfg.adapter.lora_dropout = rank, theirs.lora_dropout
    cfg.adapter.target_modules = sorted({*mixed, *plain})
    adapter = build(cfg.adapter, rank_pattern=dict.fromkeys(plain, theirs.r))
    return Contestant(base, adapter, like.batches, cfg)


def activated_rank(contestant: Contestant, picks: float) -> int:
    """The rank of a LoRA with as many parameters as a token uses of the mixture: (picks) r for
    experts of their own; for E heads on one A the mean of r and E r; r for cores between one A and
    one B, and for factors that are mixed before they are applied.
    """
    config: Any = contestant.backbone.model.peft_config["default"]
    if config.experts == "shared_a":
        return round(config.r * (1 + picks) / 2)
    return config.r if config.experts in ("core", "skills") else max(1, round(picks * config.r))


@cache
def _composed(name: str) -> DictConfig:
    """The config of a method as its files say; callers change a copy."""
    choices = [f"adapter={'remix' if name == SOFT else name}"]
    if name == SOFT:
        fixed = ("omega", "granularity", "router_init")
        choices += ["router=mixtral", *(f"adapter.{knob}=null" for knob in fixed)]
    return compose("experiment=finetune", *choices)


def _goes_on(name: str) -> bool:
    """Whether an adapter needs a saved one."""
    return OmegaConf.is_missing(_composed(name).adapter, "adapt_from")
