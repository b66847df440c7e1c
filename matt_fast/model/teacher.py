"""Load a pretrained model, whole or only its lower layers, from a folder or the hub."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from matt_fast.model.layers import layer_config
from matt_fast.model.trust import check_implementations, no_pickles


class Teacher:
    """Where a pretrained model comes from, and how much may run on the way.

    It is a causal language model, or a masked one (an encoder) if its configuration names such an architecture.

    Args:
        model: folder or hub name.
        trust_remote_code: let the repository run code of its own.
        allow_pickle: accept weights that are not safetensors; loading a pickle can run code.

    Raises:
        ValueError: there is no such model, its configuration cannot be read, or names code that would be fetched.
    """

    def __init__(self, model: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False):
        self.model = model
        self.options = {"trust_remote_code": trust_remote_code}
        self.use_safetensors = None if allow_pickle else True
        try:
            self.config = AutoConfig.from_pretrained(model, **self.options)
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(model)!r} could not be loaded as a model: {error}") from error
        if not trust_remote_code:
            check_implementations(self.config, str(model))

    @property
    def depth(self) -> int:
        return self.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def masked(self) -> bool:
        """Whether it is an encoder with a masked-language-model head."""
        return any(name.endswith("ForMaskedLM") for name in self.config.architectures or ())

    def trunk(self, model: PreTrainedModel) -> PreTrainedModel:
        """A loaded model without its head."""
        return model.base_model if self.masked else model.get_decoder()

    def load(self, dtype: torch.dtype | str, n_layers: int | None = None, **placement) -> PreTrainedModel:
        """The language model in evaluation mode, on the CPU.

        Args:
            dtype: of the weights; "auto" keeps the one they are stored in.
            n_layers: read only so many of the lower layers (and embeddings and head) from disk.
            **placement: further arguments of `from_pretrained`, which may put it elsewhere.
        """
        config = self.config if n_layers is None else layer_config(self.config, n_layers)
        return self._load(self.model, config=config, dtype=dtype, use_safetensors=self.use_safetensors, **placement)

    def outline(self, dtype: torch.dtype, n_layers: int | None = None) -> PreTrainedModel:
        """What `load` gives, on the meta device: shapes from the configuration, no weights."""
        config = self.config if n_layers is None else layer_config(self.config, n_layers)
        kind = AutoModelForMaskedLM if self.masked else AutoModelForCausalLM
        with only_errors(), torch.device("meta"):
            return kind.from_config(config, dtype=dtype, **self.options).eval()

    def load_result(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """A model that was made of this one, from the folder it was written to."""
        return self._load(folder, dtype=dtype)

    def _load(self, path: str | Path, **arguments) -> PreTrainedModel:
        kind = AutoModelForMaskedLM if self.masked else AutoModelForCausalLM
        with only_errors(), no_pickles() if self.use_safetensors else nullcontext():
            return kind.from_pretrained(path, **arguments, **self.options).eval()

    def load_tokenizer(self, path: str | Path | None = None) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, or the one at `path`, under the same options."""
        return AutoTokenizer.from_pretrained(self.model if path is None else path, **self.options)


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep transformers' report of the layers that were left out on purpose, and its bars, off the screen."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
