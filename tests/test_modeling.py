"""Models cut for the AIM loss: every architecture, a user's own, and their partly frozen embeddings."""

import pytest
import torch
from tiny import new_tokenizer
from tiny_matt import MODELS, ROWS, prepared, save
from torch import nn
from transformers import AutoModelForCausalLM

from matt_fast.modeling import Gemma3ForAIM, PartlyFrozenEmbeddings, PreTrainedModelForAIM
from matt_fast.modeling.gemma3 import Gemma3TextScaledPartlyFrozenWordEmbedding


@pytest.mark.parametrize("frozen", [False, True], ids=["all-rows", "frozen"])
@pytest.mark.parametrize("with_ntp", [False, True], ids=["aim", "aim+ntp"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_every_architecture_trains_what_it_says(kind, with_ntp, frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MODELS["qwen3"][1].update({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})
    matt, architecture, folder = prepared(kind, with_ntp=with_ntp)
    mask = matt.prepare_frozen_embeddings_mask() if frozen else None
    teacher = architecture.from_pretrained(folder, n_layers=2, dtype=torch.float32)
    student = architecture.from_pretrained(
        folder, n_layers=2, frozen_embeddings_mask=mask, with_ntp=with_ntp, dtype=torch.float32
    )
    assert student.tied == MODELS[kind][2]
    full = AutoModelForCausalLM.from_pretrained(folder)
    result = matt.train(teacher, student)
    frozen_rows = torch.zeros(ROWS, dtype=torch.bool) if mask is None else mask
    old = full.get_input_embeddings().weight.detach().clone(), full.get_output_embeddings().weight.detach().clone()
    moved = (result.input_embeddings != old[0]).any(1)
    assert moved.any()
    assert not moved[frozen_rows].any()
    module = student.get_input_embeddings()
    learned = module.to_embeddings().weight if frozen else module.weight
    assert torch.equal(learned, result.input_embeddings)
    if with_ntp:
        moved = (result.output_embeddings != old[1]).any(1)
        assert moved.any()
        assert not moved[frozen_rows].any()
        assert torch.equal(student.get_output_embeddings().weight, result.output_embeddings)
    else:
        assert result.output_embeddings is None
    result.apply_to(full)
    assert torch.equal(full.get_input_embeddings().weight, result.input_embeddings)
    tied = full.get_output_embeddings().weight is full.get_input_embeddings().weight
    assert tied == student.tied
    if with_ntp:
        assert torch.equal(full.get_output_embeddings().weight, result.output_embeddings)


class MyModelForAIM(PreTrainedModelForAIM):
    """The reference README's example of a user's own architecture."""

    def get_base_model(self, model):
        return model.model  # Return base transformer

    def get_layers(self):
        return self.model.layers  # Return layer list

    def set_layers(self, layers):
        self.model.layers = nn.ModuleList(layers)

    def create_partly_frozen_embeddings(self, frozen_mask):
        return PartlyFrozenEmbeddings(
            embeddings=self.model.embed_tokens,
            frozen_mask=frozen_mask,
        )


def test_a_users_own_architecture_trains_as_ours(setting):
    matt, ours, folder = setting
    mask = matt.prepare_frozen_embeddings_mask()
    results = []
    for architecture in (ours, MyModelForAIM):
        teacher = architecture.from_pretrained(folder, n_layers=2)
        student = architecture.from_pretrained(folder, n_layers=2, frozen_embeddings_mask=mask)
        assert len(student.model.layers) == 2
        results.append(matt.train(teacher, student))
    assert torch.equal(*(result.input_embeddings for result in results))


def test_a_whole_model_is_cut_like_one_that_is_loaded_so(setting):
    _, architecture, folder = setting
    whole = AutoModelForCausalLM.from_pretrained(folder)
    made = architecture(whole, n_layers=2)
    loaded = architecture.from_pretrained(folder, n_layers=2, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 80, 7]])
    for mine, theirs in zip(made(ids).to_tuple(), loaded(ids).to_tuple(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="n_layers: wanted 1 to 4 for this model, got 5"):
        architecture(AutoModelForCausalLM.from_pretrained(folder), n_layers=5)
    with pytest.raises(ValueError, match="n_layers: wanted 1 to 4 for this model, got 0"):
        architecture.from_pretrained(folder, n_layers=0)
    other = architecture.from_pretrained(folder, 2, torch_dtype=torch.float32, attn_implementation="eager")
    assert (other.model.dtype, other.model.config._attn_implementation) == (torch.float32, "eager")
    assert made.config.hidden_size == 32


def test_forward_gives_eager_attention_and_the_next_token_loss(setting):
    _, architecture, folder = setting
    model = architecture.from_pretrained(folder, n_layers=2, with_ntp=True, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.tensor([[5, 9, 80, 7, 3], [4, 4, 2, 60, 0]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 1, 0]])
    with torch.no_grad():
        found = model(ids, attention_mask=mask, ntp_labels=ids)
        theirs = whole(ids, attention_mask=mask, labels=ids, output_attentions=True)
    torch.testing.assert_close(found.ntp_loss, theirs.loss)
    torch.testing.assert_close(found.attentions, theirs.attentions[1])
    assert found.value_states.shape == (2, 2, 5, 8)
    assert found.aim_loss is None
    short = architecture.from_pretrained(folder, n_layers=2)
    with pytest.raises(ValueError, match="with_ntp: the output head is there with with_ntp=True only"):
        short.get_output_embeddings()
    assert short(ids, ntp_labels=ids).ntp_loss is None  # as in the reference library


def test_partly_frozen_embeddings_are_the_embedding_in_two_tables():
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 3, padding_idx=0, dtype=torch.float64)
    mask = torch.tensor([True, False, True, False, False])  # the last row is padding of the table
    split = PartlyFrozenEmbeddings(embedding, mask)
    assert (split.vocab_size, split.embedding_dim) == (6, 3)
    assert torch.equal(split.frozen_embeddings.weight, embedding.weight[[0, 2]])
    assert torch.equal(split.active_embeddings.weight, embedding.weight[[1, 3, 4, 5]])
    ids = torch.tensor([[0, 1, 5], [2, 2, 4]])
    assert torch.equal(split(ids), embedding(ids))
    split(ids).square().sum().backward()
    assert split.frozen_embeddings.weight.grad is None
    assert (split.active_embeddings.weight.grad != 0).any(1).tolist() == [True, False, True, True]
    again = split.to_embeddings()
    assert torch.equal(again.weight, embedding.weight)
    assert (again.padding_idx, again.weight.dtype) == (0, torch.float64)
    split.freeze_all()
    assert not any(parameter.requires_grad for parameter in split.parameters())
    split.unfreeze_active()
    assert [p.requires_grad for p in (split.frozen_embeddings.weight, split.active_embeddings.weight)] == [False, True]
    with pytest.raises(ValueError, match="frozen_mask: wanted one entry for each of at most 6 rows"):
        PartlyFrozenEmbeddings(embedding, torch.ones(7, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"frozen_mask: wanted a bool tensor, got torch\.int64"):
        PartlyFrozenEmbeddings(embedding, torch.ones(6, dtype=torch.int64))


def test_gemmas_scale_is_applied_when_running_and_not_saved(tmp_path):
    save(tmp_path / "gemma", "gemma3", new_tokenizer())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma").get_input_embeddings()
    mask = torch.arange(ROWS) % 2 == 0
    split = Gemma3ForAIM.from_pretrained(tmp_path / "gemma", 1, mask, dtype=torch.float32).get_input_embeddings()
    ids = torch.arange(ROWS).view(2, -1)
    assert torch.equal(split(ids), whole(ids))
    again = Gemma3TextScaledPartlyFrozenWordEmbedding(whole, mask, embed_scale=whole.embed_scale)
    assert torch.equal(again(ids), whole(ids))
    assert torch.equal(PartlyFrozenEmbeddings(whole, mask)(ids), whole.weight[ids])
    assert not torch.equal(split(ids), whole.weight[ids])
    assert torch.equal(split.to_embeddings().weight, whole.weight)


class MyEmbeddings(PartlyFrozenEmbeddings):
    """Scales what the one it is made from looks up."""

    def forward(self, input_ids):
        return super().forward(input_ids) * 2


class MyOtherEmbeddings(PartlyFrozenEmbeddings):
    """Looks rows up by itself, which training cannot follow."""

    def forward(self, input_ids):
        return self.to_embeddings()(input_ids)


class MyScaledModelForAIM(MyModelForAIM):
    embeddings = MyEmbeddings

    def create_partly_frozen_embeddings(self, frozen_mask):
        return self.embeddings(self.model.embed_tokens, frozen_mask)


def test_a_users_own_embeddings_are_used_in_training(setting, monkeypatch):
    matt, architecture, folder = setting
    mask = matt.prepare_frozen_embeddings_mask()

    def trained(embeddings):
        monkeypatch.setattr(MyScaledModelForAIM, "embeddings", embeddings)
        student = MyScaledModelForAIM.from_pretrained(folder, 2, frozen_embeddings_mask=mask)
        return matt.train(architecture.from_pretrained(folder, 2), student), matt.progress.losses

    (plain, losses), (_, scaled_losses) = trained(PartlyFrozenEmbeddings), trained(MyEmbeddings)
    assert scaled_losses[0] != losses[0]
    with pytest.raises(ValueError, match=r"student_model: wanted an embedding whose forward .* got MyOtherEmbeddings"):
        trained(MyOtherEmbeddings)
    matt.config.with_ntp = True  # which the reference library does not combine with a mask
    student = MyScaledModelForAIM.from_pretrained(folder, 2, frozen_embeddings_mask=mask, with_ntp=True)
    assert isinstance(student.model.embed_tokens, MyOtherEmbeddings)
    assert len(student.model.layers) == 4
    assert plain.shape == (ROWS, 32)
