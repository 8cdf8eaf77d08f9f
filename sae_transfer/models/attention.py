"""Attention that stays fused where a model in float32 has grouped queries on a GPU.

Of torch's fused CUDA kernels those that take fewer keys and values than queries have no float32 (torch 2.13), and
transformers asks for them whatever the precision (5.23): torch then multiplies matrices, with all the scores `[batch
heads pos pos]` in memory. With the keys and values repeated the memory-efficient kernel takes float32.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

REPEATING = "sdpa_with_repeated_keys"


def repeat_keys(model: PreTrainedModel) -> None:
    """Have a model whose attention is SDPA repeat its keys and values; another one is left as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(REPEATING)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    n_groups = getattr(module, "num_key_value_groups", 1)
    # as a module that has no groups, of which it would ask for a kernel that has them
    ungrouped: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    keys, values = repeat_kv(key, n_groups), repeat_kv(value, n_groups)
    return sdpa_attention_forward(ungrouped, query, keys, values, attention_mask, **options)


AttentionInterface.register(REPEATING, _attend)
AttentionMaskInterface.register(REPEATING, sdpa_mask)
