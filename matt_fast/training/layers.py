"""Layers that are trained beside the rows, so that they get used to the new tokens (healing): LoRA, some, or all."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft import PeftModel as AdaptedModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from matt_fast.model.layers import decoder_layers, text_model
from matt_fast.training.options import HealingOptions

WEIGHTS, ADAPTER = "layers.safetensors", "adapter"
# Model types whose kernels take weights of some modules without calling these: peft refuses adapters there.
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


class TrainedLayers:
    """The student's layers in training, over frozen weights that are the teacher's own, not copied.

    What is trained has float32 copies, which AdamW without weight decay updates; the model computes in its own dtype.

    Args:
        model: the frozen teacher, whole and on its device; not changed.
        options: what to train, see `HealingOptions`.
        spread: for adapters alone, instead: called with the model, which has them in it then, to spread its own weights
            over the processes. It is teacher and student, see `teaching`.

    Attributes:
        student: the model with the trained layers.
        optimizer: over `masters`.
        masters: name -> float32 tensor.

    Raises:
        ValueError: the model has no layer that LoRA could adapt.
    """

    def __init__(
        self, model: PreTrainedModel, options: HealingOptions, spread: Callable[[PreTrainedModel], object] | None = None
    ):
        self.options, self._spread = options, spread is not None
        trained = set() if options.method == "lora" else set(_trained_names(model, options))
        self.student = model
        if spread is None:
            shared = [x for name, x in model.named_parameters() if name not in trained]
            shared += [x for name, x in model.named_buffers() if name not in trained]
            self.student = copy.deepcopy(model, {id(x): x for x in shared})
        self._adapted: AdaptedModel | None = None
        if options.method == "lora":
            self._adapted = self._adapt(self.student)
            self.student = self._adapted.base_model.model
            if spread is not None:
                spread(self.student)
            self._parameters = {name: x for name, x in self.student.named_parameters() if ".lora_" in name}
        else:
            self._parameters = {name: x for name, x in self.student.named_parameters() if name in trained}
        for parameter in self._parameters.values():
            parameter.requires_grad_()
        self.masters = {
            name: x.detach() if x.dtype == torch.float32 else x.detach().float() for name, x in self._parameters.items()
        }
        masters = list(self.masters.values())
        fused = masters[0].device.type in ("cpu", "cuda")  # one pass over all of them; not on the meta device
        self.optimizer = torch.optim.AdamW(masters, lr=options.lr, weight_decay=0.0, fused=fused)

    def _adapt(self, model: PreTrainedModel) -> AdaptedModel:
        config = LoraConfig(
            r=self.options.rank,
            lora_alpha=2 * self.options.rank,
            target_modules="all-linear",
            exclude_modules=_not_adapted(model),
            task_type="CAUSAL_LM" if model.can_generate() else None,  # or it wants to generate with an encoder
        )
        with _without_known_warnings():
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(model.dtype)
        return adapted

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(x.numel() for x in self._parameters.values())

    def gradients(self) -> list[torch.Tensor]:
        """Those of the last backward passes, float32; zeros where there is none. They are taken off the parameters."""
        found = []
        for parameter in self._parameters.values():
            found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return _converted(found, torch.float32)

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor], lr: float) -> None:
        """One update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        """The model takes over what the float32 copies say."""
        # a float32 parameter shares its memory with its copy
        other = [name for name, parameter in self._parameters.items() if parameter.dtype != torch.float32]
        if other:
            torch._foreach_copy_([self._parameters[x] for x in other], [self.masters[x] for x in other])

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on."""
        tensors = {f"layers.{name}": x for name, x in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"layers.{name}.{key}"] = value
        return tensors

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Bring what `state` gave back."""
        states = {}
        with torch.no_grad():
            for number, (name, master) in enumerate(self.masters.items()):
                master.copy_(tensors[f"layers.{name}"])
                found = {key: tensors.get(f"layers.{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
                if found["step"] is not None:
                    states[number] = {key: x.clone() for key, x in found.items()}
        # It knows where each belongs: the step of a fused update is on the device.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})
        self._follow()

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """In it the model that `spread` was called with is the teacher: its adapters are off."""
        with self._adapted.disable_adapter() if self._spread and self._adapted is not None else nullcontext():
            yield

    @torch.no_grad()
    def measured(self, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The student as it stands, with embeddings of its own that may be replaced, and no other copies.

        Of one that is spread over processes a whole copy, which `load` gives the weights of: this is of one process.
        """
        if self._spread:
            with torch.random.fork_rng(devices=[]):  # new adapters begin at random
                whole = self._adapt(load()).base_model.model
            parameters = dict(whole.named_parameters())
            for name, parameter in self._parameters.items():
                parameters[name].copy_(parameter)
            return whole
        tables = (self.student.get_input_embeddings(), self.student.get_output_embeddings())
        own = {id(x) for table in tables if table is not None for x in table.parameters()}
        shared = [x for x in (*self.student.parameters(), *self.student.buffers()) if id(x) not in own]
        return copy.deepcopy(self.student, {id(x): x for x in shared})

    def weights(self) -> dict[str, torch.Tensor]:
        """name -> float32 tensor on the CPU: what was trained."""
        return {name: x.detach().cpu().clone() for name, x in self.masters.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `weights` gave."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[name])
        self._follow()

    def save(self, folder: Path) -> None:
        """Write what was trained: an adapter as peft loads it, or tensors by the model's names."""
        if self._adapted is not None:
            state = {f"base_model.model.{name}": x for name, x in self.weights().items()}
            self._adapted.save_pretrained(folder / ADAPTER, state_dict=state, save_embedding_layers=False)
        else:
            save_file({name: x.contiguous() for name, x in self.weights().items()}, folder / WEIGHTS)


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Of peft: what it has seen to itself (layers that are stored transposed, names that only older models have)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
        yield


def _not_adapted(model: PreTrainedModel) -> str | None:
    """A pattern of the modules that adapters would do nothing for, or that LoRA does not describe; None for none."""
    patterns = [
        re.escape(name)
        for name, x in model.named_modules()
        if isinstance(x, torch.nn.Linear)
        and type(x).forward is not torch.nn.Linear.forward  # a router, say
        and type(x).__module__.startswith("transformers.models.")
        and type(x).__name__ != "FalconLinear"  # a product, in two steps
    ]
    if model.config.model_type in MAMBA:
        patterns.append(r".*\.(out_proj|conv1d)")
    if part := text_model(model)[0]:  # beside it images, say
        patterns.append(rf"(?!{re.escape(part)}\.).*")
    return "|".join(patterns) or None


def _converted(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Themselves, or copies made at a stroke, where one has another dtype."""
    if all(x.dtype == dtype for x in tensors):
        return tensors
    found = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(found, tensors)
    return found


@torch.no_grad()
def put_layers(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, set[str]]:
    """Put what `TrainedLayers.save` wrote into the original's weights, in place; LoRA's products are made in float32.

    Returns:
        (the model, the names of the parameters that changed).
    """
    names = {id(x): name for name, x in model.named_parameters()}
    if not (folder / ADAPTER).is_dir():
        parameters, tensors = dict(model.named_parameters()), load_file(folder / WEIGHTS)
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        return model, set(tensors)
    with _without_known_warnings():
        adapted, changed = AdaptedModel.from_pretrained(model, folder / ADAPTER), set()
    for module in adapted.modules():
        if isinstance(module, LoraLayer):  # of a module's weight, or of one of its parameters: a router, experts
            weight = module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
            weight.copy_(weight.float() + module.get_delta_weight("default").float())
            changed.add(names[id(weight)])
    return adapted.unload(), changed


def _trained_names(model: PreTrainedModel, options: HealingOptions) -> Iterator[str]:
    """Parameters that are trained as they are: of outer layers, or all of the text's but embeddings and head."""
    layers = decoder_layers(model)
    names = {id(x): name for name, x in model.named_parameters()}
    if options.method == "full":
        tables = {id(x) for y in (model.get_input_embeddings(), model.get_output_embeddings()) for x in y.parameters()}
        yield from (names[id(x)] for x in text_model(model)[1].parameters() if id(x) not in tables)
        return
    for layer in (*layers[: options.outer_layers], *layers[-options.outer_layers :]):
        yield from (names[id(x)] for x in layer.parameters())
