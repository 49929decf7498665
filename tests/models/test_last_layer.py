"""The last layer computes the rows that are read: the same numbers and gradients as with all of them, fewer rows."""

import pytest
import torch
from transformers import GPT2Config, GPT2Model, MistralConfig

from rlhfctl.models import last_layer
from rlhfctl.models.head import token_logprobs
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors
from rlhfctl.models.lora import add_lora
from rlhfctl.models.packing import pack
from rlhfctl.models.shared_prefix import Sharing
from rlhfctl.recipe.sections import Lora
from tests.models.test_packed_forward import CONFIGS, SIZES, documents, two_copies
from tests.models.test_shared_prefix import rows

FAMILIES = CONFIGS | {"mistral": MistralConfig(**SIZES)}


def batches():
    """Documents whose second half is trained, and samples that share their prompts and its last token's prediction."""
    ids = documents()
    yield pack(range(len(ids)), ids, [range(len(row) // 2 or 1, len(row)) for row in ids], bucket=8)
    ids, prompts = rows()
    trained = [range(prompt, len(row)) for prompt, row in zip(prompts, ids, strict=True)]
    yield Sharing(ids, trained, prompts).pack(range(len(ids)))


def found(model, batch):
    model.zero_grad()
    logprobs, _ = token_logprobs(
        hidden_at_predictors(backbone(model), batch), head_weight(model), batch.targets
    )
    weights = torch.rand(len(logprobs), generator=torch.Generator().manual_seed(3))
    (logprobs * weights).sum().backward()
    return [logprobs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("library", ["torch", "onednn"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_values_and_gradients_of_all_rows(name, lora, library, monkeypatch):
    monkeypatch.setattr("rlhfctl.models.load.shape_bucket", lambda *_: 1 if library == "torch" else 8)
    model, _ = two_copies(FAMILIES[name])
    if lora:
        add_lora(model, Lora.model_validate({"rank": 4}), 1)
    seen = []
    last = backbone(model).layers[-1]
    last.mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    for batch in batches():
        seen.clear()
        narrow = found(model, batch)
        with monkeypatch.context() as patch:
            patch.setattr(last_layer, "WORTH", -1.0)
            whole = found(model, batch)
        # Only the rows read, filled up to a multiple of 8 where oneDNN makes the products.
        filled = -(-len(batch.read) // 8) * 8 if library == "onednn" else len(batch.read)
        assert seen == [filled, batch.ids.shape[1]]
        assert len(narrow) == len(whole)
        for ours, theirs in zip(narrow, whole, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)
        # A neighbour's row in place of the one that is read must show.
        batch.read = batch.read - 1
        assert (found(model, batch)[0] - whole[0]).abs().max() > 1e-3


def test_what_is_left_alone():
    model, _ = two_copies(CONFIGS["llama"])
    trunk = backbone(model)
    assert last_layer.narrowable(trunk) is trunk.layers[-1]
    model.gradient_checkpointing_enable()
    assert last_layer.narrowable(trunk) is None
    model.gradient_checkpointing_disable()
    next(trunk.layers[-1].mlp.parameters()).ds_id = 1
    assert last_layer.narrowable(trunk) is None
    assert last_layer.narrowable(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))) is None


def test_no_hook_outlives_a_pass_that_fails():
    model, _ = two_copies(CONFIGS["llama"])
    ids = documents()
    batch = pack(range(len(ids)), ids, [range(len(row) - 1, len(row)) for row in ids])
    batch.ids = batch.ids + 97
    with pytest.raises(IndexError):
        hidden_at_predictors(backbone(model), batch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
