"""How the frozen weights are kept: as they are on the device, in 8 or 4 bits there, or elsewhere until a layer runs.

Embeddings and the output head stay as they are in any case; `TrainingOptions` says what goes together.
"""

import tempfile
import weakref
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from matt_fast.model.layers import decoder_layers
from matt_fast.model.teacher import Teacher
from matt_fast.support.installing import install_line
from matt_fast.support.temporary import work_folder
from matt_fast.training.options import TrainingOptions
from matt_fast.training.sharding import check_sharding

BLOCK = 64  # weights that share a scale in 4 bits
GATHERED = {"cuda": 2, "cpu": 3}  # layers that are whole at once where they are spread; gloo has a buffer of its own


def check_frozen(source: Teacher, options: TrainingOptions, device: torch.device, processes: int | None = None) -> None:
    """Raise before any work is done what `load_frozen` and `shard_layers` would.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model is quantised already; weights are to wait in the memory of the device itself; layers are
            to be spread over one process, or accelerate is to do it.
    """
    if processes is not None:
        check_sharding(options.shard, processes)
    if options.quantization is not None:
        if getattr(source.config, "quantization_config", None) is not None:
            raise ValueError("quantization: wanted a model whose weights are not quantised yet, got one that is")
        if find_spec("bitsandbytes") is None:
            raise ImportError(
                f"quantization={options.quantization!r} needs bitsandbytes: {install_line('quantization')}"
            )
    if options.offload == "cpu" and device.type == "cpu":
        raise ValueError("offload: wanted 'disk' where the model runs on the CPU, got 'cpu'")


def load_frozen(
    source: Teacher, dtype: torch.dtype, n_layers: int | None, options: TrainingOptions, device: torch.device
) -> PreTrainedModel:
    """The model of `source.load`, kept as the options say: on the CPU if they say nothing, else ready for `device`.

    Args:
        source: where the model comes from.
        dtype, n_layers: as for `source.load`; what is quantised multiplies in this dtype too.
        options: `quantization` and `offload` are read.
        device: where the model runs.
    """
    if options.quantization is not None:
        chosen = {
            "8bit": {"load_in_8bit": True},
            "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
        }
        config = BitsAndBytesConfig(**chosen[options.quantization])
        return keep_gradients(source.load(dtype, n_layers, quantization_config=config, device_map={"": str(device)}))
    if options.offload is not None:
        places = _places(source.outline(dtype, n_layers), str(device), options.offload)
        stack = ExitStack()
        folder = stack.enter_context(work_folder(Path(tempfile.gettempdir())))  # empty but for converted weights
        model = source.load(dtype, n_layers, device_map=places, offload_folder=str(folder))
        weakref.finalize(decoder_layers(model), stack.close)
        return model
    return source.load(dtype, n_layers)


def keep_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """Let gradients pass layers that bitsandbytes quantised, in evaluation mode too; returns `model`.

    On some CPUs a 4-bit layer in evaluation mode packs its weights anew in the first pass without gradients, and from
    then on has none. Training mode, which changes nothing else of these layers, keeps it from that.
    """
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()
    return model


def outline_frozen(
    model: PreTrainedModel, quantization: str | None, offload: str | None, device: str, spread: int = 1
) -> None:
    """Let a model on the meta device take the memory that `load_frozen` would give it on "cuda" or "cpu", in place.

    With its layers spread over so many processes, it takes that of `shard_layers`.
    """
    if quantization is not None:
        for layer in decoder_layers(model):
            for parent in list(layer.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is nn.Linear:
                        setattr(parent, name, _QuantizedLinear(child, quantization, device))
    if offload is not None:
        for layer in decoder_layers(model):
            for module in layer.modules():
                if module._parameters:
                    _keep_elsewhere(module)
    if spread > 1:
        _keep_part(model, spread, GATHERED[device])


def _places(model: PreTrainedModel, device: str, elsewhere: str) -> dict[str, str]:
    """A device map: the list of layers is elsewhere, all around it on the device."""
    layers, places = decoder_layers(model), {}

    def place(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if child is layers:
                places[prefix + name] = elsewhere
            elif any(x is layers for x in child.modules()):
                place(child, f"{prefix}{name}.")
            else:
                places[prefix + name] = device

    place(model, "")
    return places


def _keep_part(model: PreTrainedModel, processes: int, gathered: int) -> None:
    """On the meta device: a part of each layer, and some whole ones: FSDP gathers into a buffer and copies it out."""
    parts, whole = 0, []
    for layer in decoder_layers(model):
        whole.append(sum(x.nbytes for x in layer.parameters()))
        parts += sum(-(-len(x) // processes) * (x.nbytes // len(x)) for x in layer.parameters() if x.ndim > 0)
        for module in layer.modules():
            for name, x in module._parameters.items():
                if x is not None:
                    nothing = x.new_empty(()).expand(x.shape)
                    module._parameters[name] = nn.Parameter(nothing, requires_grad=False)
    for name, size in (("parts_of_layers", parts), ("gathered_layers", gathered * max(whole))):
        model.register_buffer(name, torch.empty(size, dtype=torch.uint8, device="meta"))


class _QuantizedLinear(nn.Linear):
    """On the meta device: a linear layer with the memory that bitsandbytes' have, at rest and at work.

    Adapters (peft) go beside it as they do beside those.
    """

    def __init__(self, linear: nn.Linear, quantization: str, device: str):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        del self.weight
        self.__dict__["weight"] = linear.weight  # for its dtype and shape: as no parameter it is not counted
        self.shape, self.bias, self.bits, self.device = linear.weight.shape, linear.bias, quantization, device
        count = linear.weight.numel()
        packed, scales = (count, self.shape[0]) if quantization == "8bit" else (-(-count // 2), -(-count // BLOCK))
        self.register_buffer("packed", torch.empty(packed, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32, device="meta"))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return _QuantizedProduct.apply(given, self)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, layer):
        ctx.shape = layer.shape
        if layer.bits == "8bit":
            ctx.given = given  # bitsandbytes keeps it, also where a checkpoint would let go of it
            if layer.device == "cuda":  # integer products; the weights are dequantised in backward only
                integers = given.to(torch.float16).to(torch.int8)
                products = integers.new_empty(*given.shape[:-1], layer.shape[0], dtype=torch.int32)
                return products.to(given.dtype)
        return F.linear(given, given.new_empty(layer.shape), layer.bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.shape), None


def _keep_elsewhere(module: nn.Module) -> None:
    """On the meta device: parameters that take memory while the module runs, or for as long as autograd has them."""
    forward = module.forward
    for name, parameter in module._parameters.items():
        if parameter is not None:
            nothing = parameter.new_empty(()).expand(parameter.shape)
            module._parameters[name] = nn.Parameter(nothing, requires_grad=False)
    away = dict(module._parameters)

    def fetched(*arguments, **options):
        for name, parameter in away.items():
            if parameter is not None:
                here = parameter.new_empty(parameter.shape)
                module._parameters[name] = nn.Parameter(here, requires_grad=False)
        try:
            return forward(*arguments, **options)
        finally:
            module._parameters.update(away)

    module.forward = fetched
