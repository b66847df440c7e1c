"""What may run or be unpickled while a stranger's model is loaded: nothing that nobody allowed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OWN_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")  # transformers' other ones fetch a kernel


def check_implementations(config: PreTrainedConfig, name: str, argument: str = "model") -> None:
    """Raise a ValueError if a configuration, or one in it, names code that transformers would fetch from the hub.

    Attention with a slash in its name is a hub kernel, and one of flash attention becomes one where its package is not
    installed.
    """
    for part in _with_parts(config):
        named = {
            "attn_implementation": part._attn_implementation,
            "experts_implementation": part._experts_implementation,
        }
        for key, value in named.items():
            own = value in OWN_EXPERTS if key.startswith("experts") else _is_here(value)
            if not own:
                raise ValueError(
                    f"{argument}: the configuration of {name!r} names {key} {value!r}, which is not installed and "
                    "would be fetched from the hub and run; take that entry out of config.json, or allow it with "
                    "trust_remote_code"
                )


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _with_parts(value)


def _is_here(attention: object) -> bool:
    if attention in (None, "eager"):
        return True
    if not isinstance(attention, str) or "/" in attention:
        return False
    version = attention.rpartition("flash_attention_")[2]
    if version.isdecimal() and int(version) in FLASH_ATTENTION_COMPATIBILITY_MATRIX:
        return FLASH_ATTENTION_COMPATIBILITY_MATRIX[int(version)]["general_availability_check"]()
    return attention in ALL_ATTENTION_FUNCTIONS.valid_keys()


@contextmanager
def no_pickles() -> Iterator[None]:
    """Let torch unpickle no file while the block runs: an index, a configuration or an adapter can name any.

    Raises:
        ValueError: something tries to.
    """
    load = torch.load

    def refuse(file, *arguments, **options):
        raise ValueError(
            f"model: wanted weights in .safetensors, got {str(file)!r}: loading a pickle can run code, see allow_pickle"
        )

    torch.load = refuse  # every caller looks it up there
    try:
        yield
    finally:
        torch.load = load
