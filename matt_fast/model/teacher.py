"""Load a pretrained model, whole or only its lower layers, from a folder or the hub."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from matt_fast.model.classes import model_class
from matt_fast.model.folders import check_model_place
from matt_fast.model.layers import layer_config
from matt_fast.model.precision import keep_few_products
from matt_fast.model.tokenizer_files import load_tokenizer
from matt_fast.model.trust import check_implementations, no_pickles

PICKLED = "pytorch_model*.bin"


class Teacher:
    """Where a pretrained model comes from, and how much may run on the way.

    It is a language model, causal or masked (an encoder), or the body of one, or one with a head for another task: the
    class that its configuration names.

    Args:
        model: folder or hub name.
        trust_remote_code: let the repository run code of its own.
        allow_pickle: accept weights that are not safetensors; loading a pickle can run code.
        argument: what errors call the model.
        untie: give a model whose output head is its input embedding a head of its own, with the same rows.

    Raises:
        FileNotFoundError: it can only be a path, and nothing is there.
        ValueError: there is no such model, its configuration cannot be read, it is of another kind, or it names code
            that would be fetched.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        argument: str = "model",
        untie: bool = False,
    ):
        self.model, self.argument, self.untie = model, argument, untie
        self.options = {"trust_remote_code": trust_remote_code}
        self.use_safetensors = None if allow_pickle else True
        check_model_place(model, argument)
        try:
            self.config = AutoConfig.from_pretrained(model, **self.options)
        except Exception as error:  # of many kinds: of fields with other types, of JSON that is no object
            raise ValueError(f"{argument}: {str(model)!r} could not be loaded as a model: {_told(error)}") from error
        if not trust_remote_code:
            check_implementations(self.config, str(model), argument)
        self.kind = model_class(self.config)
        if not (isinstance(self.depth, int) and self.depth > 0):
            raise ValueError(
                f"{argument}: wanted num_hidden_layers in the configuration of {str(model)!r}, got {self.depth}"
            )

    @property
    def stored(self) -> "Teacher":
        """The model as its files have it, not untied."""
        teacher = copy.copy(self)
        teacher.untie = False
        return teacher

    @property
    def depth(self) -> int:
        return getattr(self.config.get_text_config(decoder=True), "num_hidden_layers", None)

    @property
    def masked(self) -> bool:
        """Whether it is an encoder: its tokens see those behind them."""
        return self.kind.sees_all

    def check_language_model(self, what: str) -> None:
        """Raise a ValueError if the model has no language model's head, which `what` wants."""
        if not self.kind.is_language_model:
            raise ValueError(f"{what} wants a language model, but {str(self.model)!r} is a {self.kind.name}")

    def trunk(self, model: PreTrainedModel) -> PreTrainedModel:
        """A loaded model without its head."""
        return model.base_model if self.masked and self.kind.is_language_model else model.get_decoder()

    def load(self, dtype: torch.dtype | str, n_layers: int | None = None, **placement) -> PreTrainedModel:
        """The model in evaluation mode, on the CPU.

        Args:
            dtype: of the weights; "auto" keeps the one they are stored in.
            n_layers: read only so many of the lower layers (and embeddings and head) from disk.
            **placement: further arguments of `from_pretrained`, which may put it elsewhere.
        """
        config = self.config if n_layers is None else layer_config(self.config, n_layers)
        given = {"config": config, "dtype": dtype, "use_safetensors": self.use_safetensors}
        return self._untied(self._load(self.model, **given, **placement))

    def outline(
        self, dtype: torch.dtype, n_layers: int | None = None, config: PreTrainedConfig | None = None
    ) -> PreTrainedModel:
        """What `load` gives, on the meta device: shapes from the configuration (the model's own), no weights."""
        config = copy.deepcopy(self.config if config is None else config)  # a model changes its own
        config = config if n_layers is None else layer_config(config, n_layers)
        own_class = isinstance(self.kind.loader, type) and issubclass(self.kind.loader, PreTrainedModel)
        try:
            with self._building(self.model), torch.device("meta"):
                if own_class:
                    return self._untied(self.kind.loader._from_config(config, dtype=dtype).eval())
                return self._untied(self.kind.loader.from_config(config, dtype=dtype, **self.options).eval())
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{self.argument}: no model can be made of the configuration of {str(self.model)!r}: {_told(error)}"
            ) from error

    def _untied(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, in place with a head of its own if that was wanted and it has none."""
        head = model.get_output_embeddings()
        if not self.untie or head is None or head.weight is not model.get_input_embeddings().weight:
            return model
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
        for module in model.modules():  # what transformers ties again, as soon as rows are added
            if isinstance(module, PreTrainedModel):
                module.all_tied_weights_keys = {}
        return model

    def load_result(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """A model that was made of this one, from the folder it was written to."""
        return self._load(folder, dtype=dtype)

    def _load(self, path: str | Path, **arguments) -> PreTrainedModel:
        keep_few_products()
        with self._building(path), no_pickles() if self.use_safetensors else nullcontext():
            return self.kind.loader.from_pretrained(path, **arguments, **self.options).eval()

    @contextmanager
    def _building(self, place: str | Path) -> Iterator[None]:
        try:
            with only_errors():
                yield
        except ImportError as error:
            attention = getattr(self.config, "_attn_implementation", None)
            named = "" if attention is None else f", whose configuration names the attention {attention!r},"
            raise ValueError(
                f"{self.argument}: {str(place)!r}{named} needs a package that is not here: {error} Install it, or "
                "take attn_implementation out of config.json"
            ) from error
        except OSError as error:
            pickled = self.use_safetensors and Path(place).is_dir() and any(Path(place).glob(PICKLED))
            hint = "; those in .bin are pickles, which can run code when they are loaded, see allow_pickle"
            raise OSError(
                f"{self.argument}: the weights of {str(place)!r} could not be loaded: {error}" + hint * pickled
            ) from error

    def load_tokenizer(self, path: str | Path | None = None) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, or the one at `path`, under the same options."""
        place, argument = (self.model, self.argument) if path is None else (path, "tokenizer")
        return load_tokenizer(place, argument, **self.options)


def _told(error: Exception) -> str:
    """What an error says, behind its kind where that is needed to understand it."""
    line = " ".join(str(error).split())
    return line if isinstance(error, OSError | ValueError) and line else f"{type(error).__name__}: {line}"


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
