"""What capture returns must reproduce the model's own eager attention, for every kind of layer and mask."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen3Config,
)

from matt_fast import aim_loss
from matt_fast.model.capture import capture, capture_attention
from matt_fast.model.layers import layer_config

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
LOCAL_GLOBAL = ["sliding_attention", "full_attention"] * 2

CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=7, layer_types=LOCAL_GLOBAL, attn_logit_softcapping=0.7),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=7, layer_types=LOCAL_GLOBAL, query_pre_attn_scalar=9),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "qwen3": Qwen3Config(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_pct=0.5),
}
N = 23


def make_model(name):
    torch.manual_seed(3)
    earlier = "eager" if name == "gemma2" else "sdpa"  # Gemma 2 has no SDPA: soft-capping
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), attn_implementation=earlier).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def attention_module(model, layer):
    return next(
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) == layer and hasattr(module, "is_causal")
    )


def eager_output(model, layer, inputs):
    """The model's own eager attention output at a layer, before the output projection: [B, n, H * d]."""
    kept = []
    attention = attention_module(model, layer)
    projection = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
    handle = projection.register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0].detach()))
    model.set_attn_implementation("eager")
    model(**inputs, use_cache=False)
    handle.remove()
    return kept[0]


def attention_output(captured):
    """softmax(q k' scale) v under the visibility that the captured fields describe, token by token in plain words."""
    query, key, value = (states.double() for states in captured.states)
    batch, heads, n, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(batch, n, heads, value.shape[-1], dtype=query.dtype)
    for row in range(batch):
        for i in range(n):
            visible = [
                t
                for t in range(n)
                if (not captured.causal or t <= i)
                and (captured.sliding_window is None or i - t < captured.sliding_window)
                and (captured.documents is None or captured.documents[row, t] == captured.documents[row, i] >= 0)
            ]
            if not visible:
                continue
            for head in range(heads):
                logits = key[row, head // group, visible] @ query[row, head, i] * captured.scale
                if captured.softcap is not None:
                    logits = captured.softcap * torch.tanh(logits / captured.softcap)
                output[row, i, head] = logits.softmax(-1) @ value[row, head // group, visible]
    return output.flatten(2)


def masked_inputs(kind):
    torch.manual_seed(5)
    ids = torch.randint(0, 101, (2, N))
    if kind == "plain":
        return {"input_ids": ids}, torch.ones(2, N, dtype=torch.bool)
    if kind == "packed":
        lengths = [[5, 1, 17], [11, 12, 0]]
        positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
        return {"input_ids": ids, "position_ids": positions}, torch.ones(2, N, dtype=torch.bool)
    mask = torch.ones(2, N, dtype=torch.int64)
    if kind == "left":
        mask[0, :6] = 0
    else:
        mask[1, -9:] = 0
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_states_reproduce_the_models_own_attention(name, layer, kind):
    model = make_model(name)
    inputs, real = masked_inputs(kind)
    with torch.no_grad():
        captured = capture_attention(
            model, layer, attn_implementation="eager" if name == "gemma2" else "sdpa", **inputs
        )
        expected = eager_output(model, layer, inputs)
        torch.testing.assert_close(attention_output(captured)[real].float(), expected[real], rtol=2e-5, atol=2e-5)


def test_what_comes_along_is_the_layers_own():
    plain, _ = masked_inputs("plain")
    with torch.no_grad():
        local = capture_attention(make_model("gemma3"), 2, **plain)
        everywhere = capture_attention(make_model("gemma3"), 3, **plain)
        capped = capture_attention(make_model("gemma2"), 3, attn_implementation="eager", **plain)
    assert (local.sliding_window, everywhere.sliding_window) == (7, None)
    assert local.scale == pytest.approx(1 / 3)
    assert capped.softcap == 0.7
    assert local.options == {"scale": pytest.approx(1 / 3), "sliding_window": 7, "softcap": None, "causal": True}
    assert local.documents is None
    assert local.query.shape == (2, 4, N, 16)
    assert local.value.shape == (2, 2, N, 16)


def test_nothing_after_the_states_is_computed():
    model = make_model("llama")
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        capture_attention(model, 2, **masked_inputs("plain")[0])
    assert "model.layers.1.mlp" in ran
    assert "model.layers.2.self_attn.v_proj" in ran
    for absent in (
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.mlp",
        "model.layers.3.input_layernorm",
        "lm_head",
    ):
        assert absent not in ran


def test_gradients_reach_the_input_embeddings():
    model = make_model("qwen3")
    embeds = torch.randn(1, 9, 32, requires_grad=True)
    captured = capture_attention(model, 1, inputs_embeds=embeds)
    (captured.query.square().sum() + captured.value.square().sum()).backward()
    assert embeds.grad.abs().min() > 0


def test_the_model_is_left_as_it_was():
    model = make_model("gemma3")
    inputs, _ = masked_inputs("plain")
    with torch.no_grad():
        before = model(**inputs).logits
        capture_attention(model, 1, attn_implementation="eager", **inputs)
        after = model(**inputs).logits
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_shortened_config_loads_the_lower_layers_only(tmp_path):
    model = make_model("gemma3")
    model.save_pretrained(tmp_path)
    config = layer_config(model.config, 3)
    short = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert len(short.model.layers) == 3
    assert config.layer_types == LOCAL_GLOBAL[:3]
    inputs, _ = masked_inputs("plain")
    with torch.no_grad():
        one, other = capture_attention(short, 2, **inputs), capture_attention(model, 2, **inputs)
    torch.testing.assert_close(one.query, other.query)
    assert one.sliding_window == other.sliding_window


def test_bad_input_is_named():
    model = make_model("llama")
    inputs, _ = masked_inputs("plain")
    with pytest.raises(ValueError, match=r"layer: wanted an index from 0 to 3 .* got 4"):
        capture_attention(model, 4, **inputs)
    with pytest.raises(ValueError, match=r"attn_implementation: wanted .* got 'quick'"):
        capture_attention(model, 1, attn_implementation="quick", **inputs)
    with pytest.raises(ValueError, match=r"attention_mask: wanted shape \[B, n\]"):
        capture_attention(model, 1, attention_mask=torch.ones(2, 1, N, N), **inputs)
    with pytest.raises(ValueError, match=r"n_layers: wanted 1 to 4"):
        layer_config(model.config, 5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layer": 1.0}, TypeError, "layer: wanted an integer, got 1.0"),
        ({"input_ids": [[1, 2]]}, TypeError, r"input_ids: wanted a tensor \[B, n\], got list"),
        ({"input_ids": torch.arange(5)}, ValueError, r"input_ids: wanted shape \[B, n\], got \(5,\)"),
        ({"input_ids": None}, TypeError, "wanted input_ids or inputs_embeds by name, got neither"),
        ({"attention_mask": [[1] * N] * 2}, TypeError, r"attention_mask: wanted a tensor \[B, n\], got list"),
        ({"attention_mask": torch.ones(2, N - 1)}, ValueError, rf"attention_mask: .* = \(2, {N}\), got \(2, {N - 1}\)"),
        ({"position_ids": torch.arange(N)}, ValueError, rf"position_ids: .* = \(2, {N}\), got \({N},\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        capture_attention(make_model("llama"), **{"layer": 1, **masked_inputs("plain")[0], **changed})


def test_documents_are_those_that_attention_tells_apart():
    """A mask of other numbers hides what it hides in transformers; positions that go on say nothing."""
    model, (inputs, _) = make_model("llama"), masked_inputs("plain")
    numbered = torch.ones(2, N, dtype=torch.int64)
    numbered[:, 9:] = 2
    numbered[0, -3:] = 0
    with torch.no_grad():
        found = capture_attention(model, 2, **inputs, attention_mask=numbered)
        expected = eager_output(model, 2, {**inputs, "attention_mask": numbered})
    real = numbered.bool()
    assert torch.equal(found.documents, real.long() - 1)
    torch.testing.assert_close(attention_output(found)[real].float(), expected[real], rtol=2e-5, atol=2e-5)
    for positions in (torch.arange(N)[None], torch.arange(3, N + 3).expand(2, N)):
        assert capture_attention(model, 1, **inputs, position_ids=positions).documents is None


def test_a_layer_may_be_a_number_of_numpy():
    model, (inputs, _) = make_model("llama"), masked_inputs("plain")
    expected = capture_attention(model, 2, **inputs)
    assert torch.equal(capture_attention(model, np.int64(2), **inputs).query, expected.query)


def test_an_encoder_with_a_decoder_is_refused():
    """Both have a layer 1, and the encoder's comes first."""
    config = BartConfig(vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=8)
    model = BartForConditionalGeneration(config)
    with pytest.raises(ValueError, match="model: wanted a decoder or an encoder, got BartForConditionalGeneration"):
        capture_attention(model, 1, input_ids=torch.arange(5)[None])


def test_gradients_with_the_models_own_checkpointing():
    """The reentrant kind runs layers without gradients: the loss would have none, unseen beside another loss."""
    inputs, _ = masked_inputs("right")
    gradients = []
    for kind in (None, False, True):
        model = make_model("llama").train()
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
        if kind:
            with pytest.raises(ValueError, match="wanted gradient checkpointing with use_reentrant=False, got"):
                capture_attention(model, 2, **inputs)
            with torch.no_grad():
                capture_attention(model, 2, **inputs)
        else:
            captured = capture_attention(model, 2, **inputs)
            (captured.query.square().sum() + captured.value.square().sum()).backward()
            gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


GRANITE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4, "num_local_experts": 0}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (
            GraniteMoeHybridForCausalLM,
            GraniteMoeHybridConfig(**SIZES, **GRANITE, layer_types=["mamba", "attention"] * 2, num_key_value_heads=2),
        ),
        (
            LlavaForConditionalGeneration,
            LlavaConfig(
                text_config=GROUPED | {"model_type": "llama"},
                vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
                | {x: SIZES[x] for x in ("hidden_size", "intermediate_size", "num_hidden_layers")}
                | {"num_attention_heads": 2},
            ),
        ),
    ],
    ids=["hybrid", "images"],
)
def test_nothing_is_kept_for_tokens_to_come(kind, config, monkeypatch):
    """Models that hand `use_cache` on: a cache would take memory, and tokens twice where a layer runs again."""
    torch.manual_seed(0)
    model = kind._from_config(config).train()
    embedded, gradients = torch.randn(2, 7, 32, requires_grad=True), []
    for name in ("__init__", "update"):
        monkeypatch.setattr(DynamicCache, name, lambda *given, **named: pytest.fail("a cache"))
    for checkpointing in (False, True):
        hidden = capture(model, hidden=2, inputs_embeds=embedded, checkpointing=checkpointing).hidden
        gradients += torch.autograd.grad(hidden.square().sum(), embedded)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_a_step_around_it_may_be_compiled():
    """torch.compile leaves capture and the loss as they are: they are not traced, let alone for each batch anew."""
    model, graphs = make_model("llama"), []

    def step(ids, segments):
        with torch.no_grad():
            teacher = capture_attention(model, 1, input_ids=ids)
        student = capture_attention(model, 1, input_ids=(ids + 1) % 101)
        return 2 * aim_loss(teacher.states, student.states, segments, segments, backend="torch")

    compiled = torch.compile(step, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for n in (N, N - 4, N - 9):
        ids, segments = masked_inputs("plain")[0]["input_ids"][:, :n], torch.arange(n).expand(2, n) // (n % 3 + 1)
        expected, got = step(ids, segments), compiled(ids, segments)
        assert torch.equal(expected, got)
        weights = [torch.autograd.grad(x, model.get_input_embeddings().weight)[0] for x in (expected, got)]
        assert torch.equal(*weights)
    torch._dynamo.reset()
    functions = {node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert not functions & {torch.bmm, torch.matmul, torch.nn.functional.linear}


def test_a_model_without_the_interface_is_an_error():
    from transformers import BloomConfig

    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="attention interface"):
        capture_attention(model, 1, input_ids=torch.arange(5)[None])


class Around(torch.nn.Module):
    """Hands on what it is asked for, as FullyShardedDataParallel and DeepSpeed's engine do."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "module" else getattr(super().__getattr__("module"), name)


def test_what_is_around_a_model_is_named():
    """Nothing can be caught in what torch.compile made; DistributedDataParallel would not average these gradients."""
    inputs, _ = masked_inputs("plain")
    for around in (torch.nn.DataParallel, Around):
        with pytest.raises(TypeError, match=rf"wanted a transformers model, got {around.__name__}; give its \.module"):
            capture_attention(around(make_model("llama")), 1, **inputs)
    model = make_model("llama")
    expected = capture_attention(model, 1, **inputs).query
    model.model.layers[1].compile(backend="eager")
    for compiled in (model, torch.compile(make_model("llama"), backend="eager")):
        with pytest.raises(ValueError, match=r"model: wanted one that is not compiled, got \w+ behind torch\.compile"):
            capture_attention(compiled, 1, **inputs)
    torch._dynamo.reset()
    assert torch.equal(capture_attention(make_model("llama"), 1, **inputs).query, expected)
