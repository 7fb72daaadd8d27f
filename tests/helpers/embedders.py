"""A tiny sentence embedder in a folder."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from tests.helpers.language_models import VOCAB, tiny_tokenizer


def save_tiny_embedder(directory: Path) -> Path:
    """Writes a random BERT of width 16 and a tokenizer of characters; returns the folder."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**sizes, **layers)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
