"""The adapters that are compared, each with its objective, and the plain LoRA next to each."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf

from routerlab.backbones.pretrained import PretrainedLM
from routerlab.bench.adapter_sizes import AdapterSizes
from routerlab.bench.fine_tuning import NUM_TASKS, Batches, Contestant
from routerlab.core.config import ConfigError, available, compose, nearest
from routerlab.core.instantiate import build
from routerlab.training.build import build_adapter

SOFT = "soft"  # LoRAs on the feed-forward linears, top-k weights: what ReMix is measured against
LORA = "lora"
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


def build_method(
    name: str, sizes: AdapterSizes, base: Path, batches: Batches, **knobs: Any
) -> Contestant:
    """The contestant of a name from `method_names`; ``knobs`` are the objective's."""
    cfg = method_config(name, sizes)
    return Contestant(_adapted(base, build_adapter(cfg)), batches, cfg, **knobs)


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
    return Contestant(_adapted(base, adapter), like.batches, cfg)


def activated_rank(contestant: Contestant, picks: float) -> int:
    """The rank of a LoRA with as many parameters as a token uses of the mixture: (picks) r for
    experts of their own; for E heads on one A the mean of r and E r; r for cores between one A and
    one B, and for factors that are mixed before they are applied.
    """
    config: Any = contestant.backbone.model.peft_config["default"]
    if config.experts == "shared_a":
        return round(config.r * (1 + picks) / 2)
    return config.r if config.experts in ("core", "skills") else max(1, round(picks * config.r))


def _adapted(base: Path, adapter: Any) -> PretrainedLM:
    return PretrainedLM(str(base), base, adapter)


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
