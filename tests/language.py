"""A small language model as a folder from the Hugging Face hub: random weights in several files, and a tokenizer that was really trained."""

from pathlib import Path
from typing import Any

import torch

from flm_scale.data.tokens import LmTokenizer
from tests.data.lm_folder import write_lm_folder


def write_language_model(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Write a LLaMA of two layers, or of other sizes; return the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    write_lm_folder(folder, "llama")
    torch.manual_seed(seed)
    config = LlamaConfig(**{"vocab_size": LmTokenizer(folder).vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "attention_dropout": 0.5} | sizes)
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    return folder
