"""Tiny causal language models of transformers, a tokenizer of characters, and their folder."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB, POSITIONS = 64, 128
EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unk|>"
CHARACTERS = string.ascii_lowercase + string.digits + " \n.,:;?!'\"()[]+-*/=<>%$_&"
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Two layers of width 32, FFN 48, 4 heads on 2 key-value heads, tied head, 64 tokens."""
    torch.manual_seed(seed)
    return _stirred(LlamaForCausalLM(LlamaConfig(**_sizes(config))))


def tiny_qwen3(seed: int = 0, **config: Any) -> Qwen3ForCausalLM:
    """The like of `tiny_llama` with normalised queries and keys."""
    torch.manual_seed(seed)
    return _stirred(Qwen3ForCausalLM(Qwen3Config(**{"head_dim": 8} | _sizes(config))))


def tiny_gpt2(seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """Learned absolute positions, `Conv1D` layers; sizes as in `tiny_llama`."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
    common = {"n_positions": POSITIONS, "initializer_range": 0.2, **IDS}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _stirred(GPT2LMHeadModel(GPT2Config(**sizes | common | off | config)))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, in lower case; `VOCAB` tokens, no begin token is added."""
    vocab = {token: i for i, token in enumerate([EOS, PAD, UNKNOWN, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    characters.normalizer = normalizers.Lowercase()
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=POSITIONS,
    )


def save_tiny(directory: Path, model: PreTrainedModel | None = None) -> Path:
    """Writes a model (`tiny_llama()` by default) and `tiny_tokenizer()`; returns the folder."""
    (tiny_llama() if model is None else model).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"max_position_embeddings": POSITIONS, "tie_word_embeddings": True}
    return sizes | heads | rest | {"initializer_range": 0.2, **IDS} | config


def _stirred(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):  # ones and zeros hide mistakes
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()
