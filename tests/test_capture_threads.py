"""Threads that use one model at the same time: each gets what it would get alone, and the model stays as it was."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_capture import make_model, masked_inputs
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from matt_fast.model.capture import capture
from matt_fast.model.switching import alone

WAIT = 20  # seconds, at most


def slow(model):
    """Let passes meet: each gives way in each of its layers."""
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: time.sleep(0.002))
    return model


def passes(model):
    """Calls that capture from a model in different ways, each of which gives tensors."""
    embeds = [torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    inputs = {kind: masked_inputs(kind)[0] for kind in ("plain", "left", "right", "packed")}

    def attention(layer, kind, implementation):
        found = capture(model, attention=[layer], attn_implementation=implementation, **inputs[kind])
        return found.attention[layer].states

    def backward(given):
        given = given.clone().requires_grad_()
        found = capture(model, attention=[2], hidden=3, checkpointing=True, inputs_embeds=given)
        (found.hidden.square().sum() + found.attention[2].query.sum()).backward()
        return (given.grad,)

    calls = [lambda x=(i, kind, name): attention(*x) for i, kind in enumerate(inputs) for name in ("sdpa", "eager")]
    calls += [lambda kind=kind: (capture(model, hidden=1, **inputs[kind]).hidden,) for kind in inputs]
    calls += [lambda: (capture(model, head=True, **inputs["left"]).head_input,)]
    return calls + [lambda x=x: backward(x) for x in embeds]


def test_threads_capture_from_one_model_what_each_would_alone():
    model = slow(make_model("gemma3"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    hooks = [(name, len(x._forward_hooks)) for name, x in model.named_modules()]
    alone = [call() for call in passes(model)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda call: call(), passes(model) * 2, timeout=WAIT * 3))
    for found, expected in zip(together, alone * 2, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    assert hooks == [(name, len(x._forward_hooks)) for name, x in model.named_modules()]
    assert not [x for x in model.model.layers if "forward" in vars(x)]


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("wanted", [{"attention": [3]}, {"hidden": 3}, {"hidden": 3, "checkpointing": True}])
def test_a_thread_that_does_not_capture_finds_the_model_as_it_is(wanted, implementation):
    """Its pass is half way when the capture begins, and goes on in the middle of it; so does a further one."""
    model, (inputs, _) = make_model("gemma3"), masked_inputs("plain")
    expected = model(**inputs).logits
    begun, captured_half, other_done = (threading.Event() for _ in range(3))

    def other():
        def at_the_middle(*_):
            if threading.current_thread() is threads[0]:
                begun.set()
                captured_half.wait(WAIT)

        hook = model.model.layers[1].register_forward_hook(at_the_middle)
        try:
            return model(**inputs).logits
        finally:
            hook.remove()

    threads, found = [], []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: threads.append(threading.current_thread())).result()
        late = pool.submit(other)
        assert begun.wait(WAIT)

        def in_the_middle(*_):
            if threading.current_thread() is threading.main_thread() and not other_done.is_set():
                other_done.set()
                captured_half.set()
                found.append(late.result(WAIT))
                found.append(pool.submit(lambda: model(**inputs).logits).result(WAIT))

        hook = model.model.layers[0].register_forward_hook(in_the_middle)
        given = capture(model, attn_implementation=implementation, **wanted, **inputs)
        hook.remove()
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(found) == 2
    again = capture(model, attn_implementation=implementation, **wanted, **inputs)
    if "hidden" in wanted:
        assert torch.equal(given.hidden, again.hidden)
    else:
        assert torch.equal(given.attention[3].query, again.attention[3].query)


def test_parts_that_attend_in_several_ways_stay_so():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 101, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14})
    chosen = {"text_config": "eager", "vision_config": "sdpa"}
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=chosen)
    capture(model, attention=[1], input_ids=torch.arange(9)[None])
    assert {name: getattr(model.config, name)._attn_implementation for name in chosen} == chosen


def test_what_keeps_a_layers_weights_elsewhere_stays_there():
    """accelerate puts its own forward into a module whose weights it moves."""
    model = make_model("llama")
    layer = model.model.layers[0]
    layer.forward = own = layer.forward
    capture(model, hidden=1, checkpointing=True, **masked_inputs("plain")[0])
    assert vars(layer)["forward"] is own


def test_a_forked_process_waits_for_no_thread_of_its_parent():
    """A data worker, say, that is started while another thread captures."""
    model, held, over = make_model("llama"), threading.Event(), threading.Event()

    def hold():
        with alone(model):
            held.set()
            over.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert held.wait(WAIT)
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            with alone(model):
                os._exit(0)
        _, status = os.waitpid(child, 0)
        over.set()
    assert status == 0
