"""Capture what passes inside a model, and stop the forward pass when all that was asked for has been seen.

Attention states are caught in every model that goes through transformers' attention interface: an attention function is
registered under a name of its own, the model is switched to it for the call, and at the target layers it keeps what it
was given. Other layers run the implementation the caller asks for. Hidden states are caught by hooks. Nothing is
specific to an architecture.

The model is one for all threads: they capture from it one after the other, and what a thread runs on it meanwhile in
another way finds the implementation that the model had.
"""

import contextvars
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from matt_fast.model.attention import AttentionInputs, attention_inputs
from matt_fast.model.inputs import check_model, prepare_inputs
from matt_fast.model.layers import decoder_layers
from matt_fast.model.packed import Packing, attend_by_document
from matt_fast.model.switching import alone, switched


@dataclass
class Capture:
    """What one forward pass gave, see `capture`.

    Attributes:
        attention: layer index -> what its attention function received.
        hidden: [B, n, hidden], the residual stream behind the layer asked for; None if none was.
        head_input: [B, n, hidden], what the output head received, after the last normalisation; None if not asked for.
    """

    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    hidden: torch.Tensor | None = None
    head_input: torch.Tensor | None = None


PREFIX = "matt_fast_"  # of the names of attention functions that capture


class Complete(BaseException):
    """Ends the forward pass; a BaseException, which no `except Exception` on the way swallows.

    The model's own forward may end with it or without.
    """


@dataclass
class _Recorder:
    """What is still to be seen in the running forward pass, and what has been seen."""

    documents: torch.Tensor | None
    packing: Packing | None
    missing: set
    gradients: bool = field(default_factory=torch.is_grad_enabled)  # whether the pass keeps what backward needs
    attended: set[int] = field(default_factory=set)  # layers that called their attention function
    result: Capture = field(default_factory=Capture)

    def seen(self, what) -> None:
        if self.gradients and not torch.is_grad_enabled():
            raise ValueError(
                "model: wanted gradient checkpointing with use_reentrant=False, got use_reentrant=True, which runs "
                "layers without gradients: what is caught in them would have none"
            )
        self.missing.discard(what)
        if not self.missing:
            raise Complete


_recorder: contextvars.ContextVar[_Recorder] = contextvars.ContextVar("recorder")


@torch.compiler.disable(reason="capture switches the model's attention and ends its forward pass early")
def capture(
    model: PreTrainedModel,
    *,
    attention: Iterable[int] = (),
    hidden: int | None = None,
    head: bool = False,
    attn_implementation: str | None = None,
    documents: torch.Tensor | None = None,
    checkpointing: bool = False,
    compiled: bool = False,
    **inputs,
) -> Capture:
    """Run `model` until everything asked for has been seen, and return it; nothing behind it is computed.

    Gradients flow from the result to the inputs (`inputs_embeds`, say) as in an ordinary forward pass.

    Args:
        model: a transformers model whose attention goes through the attention interface.
        attention: indices of layers, counted from 0, whose attention inputs are wanted.
        hidden: index of the layer whose output (the residual stream behind it) is wanted.
        head: whether the input of the output head is wanted.
        attn_implementation: what the layers run, as for `from_pretrained`: "sdpa", "eager", "flash_attention_2" or
            another registered name; what the model was loaded with if None.
        documents: [B, n] int64, for rows that hold several documents: the document of each token, -1 for padding; best
            on the CPU, where it is read. Positions start again at each document, and attention runs on one at a time.
        checkpointing: keep the inputs of layers only, and run a layer once more in backward. Layers in `attention` are
            left as they are.
        compiled: run layers through torch.compile, but for those in `attention`; not for rows of several documents.
        **inputs: as for `capture_attention`.

    Raises:
        TypeError: as `capture_attention`.
        ValueError: as `capture_attention`; also nothing was asked for, the model has no head, packed documents would
            see each other, or are to be compiled, or meet the model's own gradient checkpointing.
    """
    check_model(model)
    attention = {_index(x) for x in attention}
    layers = attention | (set() if hidden is None else {_index(hidden)})
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for layer in sorted(layers):
        if not 0 <= layer < depth:
            raise ValueError(f"layer: wanted an index from 0 to {depth - 1} for this model, got {layer}")
    wanted = attention | ({"hidden"} if hidden is not None else set()) | ({"head"} if head else set())
    if not wanted:
        raise ValueError("capture: wanted attention, hidden or head, got none of them")
    documents, packing, inputs = prepare_inputs(model, documents, inputs)
    if packing is not None and compiled:
        raise ValueError(
            "documents and compiled: wanted one of them, got both (positions that start again count as documents): "
            "attention runs on one document at a time, and layers would be compiled anew for those of each batch"
        )
    if packing is not None and _checkpoints_itself(model):
        raise ValueError(
            "documents: wanted a model without gradient checkpointing of its own, which would run layers again without "
            "the documents; give checkpointing=True instead"
        )
    recorder = _Recorder(documents, packing, wanted)
    with alone(model), ExitStack() as stack:
        implementation = _twin(model, attn_implementation)
        if hidden is not None:
            stack.callback(decoder_layers(model)[hidden].register_forward_hook(_keep_hidden).remove)
        if head:
            stack.callback(_head_of(model).register_forward_pre_hook(_keep_head_input).remove)
        if checkpointing or compiled:
            changed = (x for index, x in enumerate(decoder_layers(model)) if index not in attention)
            stack.enter_context(_changed(changed, model, implementation, recorder, checkpointing, compiled))
        stack.enter_context(_recording(model, implementation, recorder))
        with suppress(Complete):
            model(**inputs)
    if recorder.missing:
        raise _not_seen(model, recorder)
    if packing is not None:
        _check_all_attended(model, recorder, depth if head else 1 + max(layers))
    return recorder.result


def capture_attention(
    model: PreTrainedModel, layer: int, *, attn_implementation: str | None = None, **inputs
) -> AttentionInputs:
    """Run `model` up to the attention of one layer and return the states that this attention receives.

    The target layer's attention, its output projection, its feed-forward block and all later layers are not computed.
    Gradients flow to the model's parameters and to `inputs_embeds`. The model is left as it was. Several threads may
    capture from it, one waits for another; what they run on it meanwhile in another way is as ever.

    Args:
        model: a transformers model whose attention goes through the attention interface: as it is, with adapters
            (PEFT), or spread by FSDP2. Not compiled, though a step around this call may be.
        layer: counted from 0.
        attn_implementation: what the layers below run, as for `from_pretrained`; None: what it was loaded with.
        **inputs: as the model's forward takes them: `input_ids` [B, n] or `inputs_embeds` [B, n, hidden], and where
            needed `attention_mask` [B, n] (1 for tokens, 0 for padding on either side) or `position_ids` [B, n].
            Without a mask, positions that start again are those of packed documents, of which none sees another; or
            give `documents` [B, n], the document of each token, -1 for padding.

    Raises:
        TypeError: `model` is something around a model, such as DistributedDataParallel; `layer` is no integer, an input
            no tensor.
        ValueError: a layer that does not exist, or whose attention cannot be caught or is of a kind that the AIM loss
            does not describe; an encoder beside a decoder; gradient checkpointing of the reentrant kind; shapes that do
            not fit.
    """
    given = capture(model, attention=[layer], attn_implementation=attn_implementation, **inputs)
    return given.attention[_index(layer)]


def _index(layer) -> int:
    try:
        return operator.index(layer)
    except TypeError as error:
        raise TypeError(f"layer: wanted an integer, got {layer!r}") from error


def _checkpoints_itself(model: nn.Module) -> bool:
    """Whether transformers keeps only inputs of layers in this pass."""
    used = model.training and torch.is_grad_enabled()
    return used and any(getattr(x, "gradient_checkpointing", False) for x in model.modules())


@contextmanager
def _recording(model: PreTrainedModel, implementation: str, recorder: _Recorder) -> Iterator[None]:
    """Attention goes through a capturing twin, which tells `recorder`."""
    with switched(model, implementation):
        token = _recorder.set(recorder)
        try:
            yield
        finally:
            _recorder.reset(token)


@contextmanager
def _changed(
    layers: Iterable[nn.Module], model, implementation: str, recorder: _Recorder, checkpointing: bool, compiled: bool
) -> Iterator[None]:
    """Some layers run compiled, or once more in backward, or both."""
    with ExitStack() as stack:
        if checkpointing:  # hooks behind a layer's modules, as of weights that wait elsewhere, run in backward too
            stack.enter_context(set_checkpoint_early_stop(False))
        for layer in layers:
            forward = functools.partial(_compiled(type(layer).forward), layer) if compiled else layer.forward
            if checkpointing:
                again = functools.partial(_forward_again, model, implementation, recorder, forward)
                forward = functools.partial(checkpoint, again, use_reentrant=False, preserve_rng_state=False)
            stack.callback(_put_back, layer, vars(layer).get("forward"))
            layer.forward = functools.partial(_in_pass, recorder, forward, layer.forward)
        yield


def _in_pass(recorder: _Recorder, changed: Callable, forward: Callable, *arguments, **options):
    """A layer's changed forward in the recorder's pass, and its own in that of another thread."""
    return (changed if _recorder.get(None) is recorder else forward)(*arguments, **options)


def _put_back(layer: nn.Module, forward: Callable | None) -> None:
    """Take a changed forward away; what stood in its place before was put there by whoever keeps weights elsewhere."""
    del layer.forward
    if forward is not None:
        layer.forward = forward


def _twin(model: PreTrainedModel, chosen: str | None) -> str:
    """The name of the attention function that captures and runs the chosen implementation, or the model's own."""
    own = model.config.get_text_config(decoder=True)._attn_implementation
    return _register(chosen or own, own)


@functools.cache
def _register(base: str, own: str) -> str:
    """Register the capturing twin of an attention implementation and its mask; return its name.

    Args:
        base: what it runs in the passes that are captured from.
        own: what the model runs in others, as of another thread at the same time.
    """
    known = AttentionInterface._global_mapping
    if base != "eager" and base not in known:
        names = ", ".join(sorted(x for x in known if not x.startswith(PREFIX)))
        raise ValueError(f"attn_implementation: wanted eager or one of {names}; got {base!r}")
    name = f"{PREFIX}{base}" if base == own else f"{PREFIX}{base}_{len(known)}"  # transformers reads names for "flash"
    AttentionInterface.register(name, functools.partial(_attention, base, own))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, functools.partial(_mask, base, own))
    return name


def _mask(base: str, own: str, *arguments, **options):
    """The registered mask function: packed rows get none, `_attention` takes them apart."""
    recorder = _recorder.get(None)
    if recorder is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[own](*arguments, **options)
    if recorder.packing is not None:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[base](*arguments, **options)


@functools.cache
def _compiled(forward: Callable) -> Callable:
    """One compiled function for all layers of a kind and all lengths."""
    return torch.compile(forward, dynamic=True)


def _attention(base: str, own: str, module, query, key, value, attention_mask, **kwargs):
    """The registered attention function: keep the inputs of the target layers, delegate the work."""
    attention = _base_attention(base, module)
    if torch.compiler.is_compiling():  # neither layers to capture nor packed rows are ever compiled
        return attention(module, query, key, value, attention_mask, **kwargs)
    recorder = _recorder.get(None)
    if recorder is None:
        return _base_attention(own, module)(module, query, key, value, attention_mask, **kwargs)
    layer = module.layer_idx
    recorder.attended.add(layer)
    arguments = {"module": module, "query": query, "key": key, "value": value, **kwargs}
    if layer in recorder.missing:
        recorder.result.attention[layer] = attention_inputs(arguments, recorder.documents, layer)
        recorder.seen(layer)
    if recorder.packing is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    given = attention_inputs(arguments, recorder.documents, layer)
    return attend_by_document(
        attention,
        ALL_MASK_ATTENTION_FUNCTIONS[base],
        module,
        given.states,
        recorder.packing,
        causal=given.causal,
        sliding_window=given.sliding_window,
        options={name: value for name, value in kwargs.items() if name != "position_ids"},
    )


def _forward_again(model, implementation: str, recorder: _Recorder, forward, *arguments, **options):
    """A layer's forward, in the pass itself and, under the attention that the pass had, once more in backward."""
    if _recorder.get(None) is recorder:
        return forward(*arguments, **options)
    with _recording(model, implementation, recorder):
        return forward(*arguments, **options)


def _keep_hidden(module, arguments, output) -> None:
    recorder = _recorder.get(None)
    if recorder is not None:
        recorder.result.hidden = output[0] if isinstance(output, tuple) else output
        recorder.seen("hidden")


def _keep_head_input(module, arguments) -> None:
    recorder = _recorder.get(None)
    if recorder is not None:
        (recorder.result.head_input,) = arguments
        recorder.seen("head")


def _head_of(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: wanted a model with an output head, got {type(model).__name__}")
    return head


def _base_attention(base: str, module) -> Callable:
    if base == "eager":  # every modelling file has its own; the interface does not list them
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface._global_mapping[base]


def _check_all_attended(model: PreTrainedModel, recorder: _Recorder, reached: int) -> None:
    other = sorted(set(range(reached)) - recorder.attended)
    if other:
        raise ValueError(
            f"documents: layer {other[0]} of {type(model).__name__} has no softmax attention: packed documents would "
            "see each other there; use rows of one document"
        )


def _not_seen(model: PreTrainedModel, recorder: _Recorder) -> ValueError:
    """The error for a pass that ended before all was seen."""
    layers = sorted(recorder.missing - {"hidden", "head"})
    if not layers:
        return ValueError(f"model: {type(model).__name__} never called {' and '.join(sorted(recorder.missing))}")
    if hasattr(model, "_orig_mod") or any(x._compiled_call_impl is not None for x in model.modules()):
        return ValueError(
            f"model: wanted one that is not compiled, got {type(model).__name__} behind torch.compile, where attention "
            "cannot be caught; compiled=True compiles the layers that nothing is caught in"
        )
    return ValueError(
        f"model: layer {layers[0]} of {type(model).__name__} never called its attention function through transformers' "
        "attention interface. Either the architecture does not use the interface, or this layer has no softmax "
        "attention; choose another layer or model"
    )
