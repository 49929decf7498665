"""A packed forward equals one forward per document through transformers' own attention, values and gradients."""

import copy

import pytest
import tiny_sizes
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlhfctl.models import attention, linear
from rlhfctl.models.export import save_portable
from rlhfctl.models.head import token_logprobs, weighted_nll
from rlhfctl.models.load import (
    backbone,
    head_weight,
    hidden_at_predictors,
    load_causal_lm,
    load_trunk,
    prepare,
)
from rlhfctl.models.packing import pack
from rlhfctl.models.reward_training import load_for_training
from rlhfctl.recipe.sections import Policy

SIZES = tiny_sizes.SIZES | {"vocab_size": 97}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
}
LENGTHS = (7, 20, 20, 33, 2)


def two_copies(config):
    """The same weights under our attention and under transformers' eager one."""
    attention.register()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention.NAME)
    ours.load_state_dict(plain.state_dict())
    return prepare(ours, torch.device("cpu")), prepare(plain, torch.device("cpu"))


def documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]


def one_by_one(plain, rows, temperature=1.0):
    out = []
    for row in rows:
        ids = torch.tensor([row])
        logprobs = (plain(ids).logits[0, :-1] / temperature).log_softmax(-1)
        out.append(logprobs.gather(1, ids[0, 1:, None]).squeeze(1))
    return torch.cat(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logprobs_and_gradients_equal_one_document_at_a_time(name):
    ours, plain = two_copies(CONFIGS[name])
    rows = documents()
    batch = pack(range(len(rows)), rows, [range(1, len(row)) for row in rows])
    weights = torch.rand(len(batch.targets), generator=torch.Generator().manual_seed(2))

    expected = one_by_one(plain, rows)
    (expected * weights).sum().neg().backward()
    hidden = hidden_at_predictors(backbone(ours), batch)
    logprobs, _ = token_logprobs(hidden, head_weight(ours), batch.targets)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    (logprobs * weights).sum().neg().backward()
    for (_, mine), (where, theirs) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=where)


def test_fused_loss_has_the_value_and_gradient_of_the_plain_one():
    ours, _ = two_copies(CONFIGS["qwen2-tied"])
    rows = documents()
    batch = pack(range(len(rows)), rows, [range(2, len(row), 3) for row in rows])
    weights = torch.rand(len(batch.targets), generator=torch.Generator().manual_seed(2))

    def gradients(loss):
        ours.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}

    def hidden():
        return hidden_at_predictors(backbone(ours), batch)

    plain = -(token_logprobs(hidden(), head_weight(ours), batch.targets)[0] * weights).sum()
    fused = weighted_nll(hidden(), head_weight(ours), batch.targets, weights)
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-6)
    expected, found = gradients(3.0 * plain), gradients(3.0 * fused)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("chunk", "keep"), [(1 << 24, 1 << 24), (97 * 16, 1 << 24), (97 * 16, 0)])
def test_head_chunks_change_nothing(monkeypatch, chunk, keep):
    """Kept or recomputed probabilities, one chunk or many: one answer, that of a plain log_softmax in float64."""
    monkeypatch.setattr("rlhfctl.models.head.CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr("rlhfctl.models.head.KEEP_ELEMENTS", keep)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(50, 8, generator=generator, requires_grad=True)
    weight = torch.randn(97, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 97, (50,), generator=generator)
    factor = torch.randn(50, generator=generator)

    exact_hidden, exact_weight = (
        hidden.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
    )
    exact = (exact_hidden @ exact_weight.t() / 0.7).log_softmax(-1)
    chosen = exact.gather(1, targets[:, None]).squeeze(1)
    (chosen * factor).sum().backward()

    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=0.7)
    (logprobs * factor).sum().backward()
    torch.testing.assert_close(logprobs.double(), chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, atol=1e-5, rtol=1e-5)


def test_documents_of_a_pack_do_not_see_each_other():
    """Change one document: the others' log-probabilities stay bit for bit."""
    ours, _ = two_copies(CONFIGS["llama"])
    rows = documents()
    changed = [list(row) for row in rows]
    changed[1] = [(token + 1) % 97 for token in changed[1]]

    def per_row(rows):
        batch = pack(range(len(rows)), rows, [range(1, len(row)) for row in rows])
        with torch.no_grad():
            logprobs, _ = token_logprobs(
                hidden_at_predictors(backbone(ours), batch), head_weight(ours), batch.targets
            )
        return logprobs.split(batch.counts)

    for index, (before, after) in enumerate(zip(per_row(rows), per_row(changed), strict=True)):
        assert torch.equal(before, after) == (index != 1)


def test_a_sampled_pad_token_gets_its_embedding_gradient():
    config = Qwen2Config(**SIZES, pad_token_id=5, tie_word_embeddings=False)
    ours, _ = two_copies(config)
    batch = pack([0], [[3, 5, 5, 8]], [range(1, 4)])
    logprobs, _ = token_logprobs(
        hidden_at_predictors(backbone(ours), batch), head_weight(ours), batch.targets
    )
    logprobs.sum().backward()
    assert float(ours.get_input_embeddings().weight.grad[5].abs().sum()) > 0


def test_gradient_checkpointing_changes_memory_alone():
    ours, _ = two_copies(CONFIGS["llama"])
    rows = documents()
    batch = pack(range(len(rows)), rows, [range(1, len(row)) for row in rows])

    def gradients():
        ours.zero_grad()
        hidden = hidden_at_predictors(backbone(ours), batch)
        weighted_nll(hidden, head_weight(ours), batch.targets, torch.ones(len(batch.targets))).backward()
        return {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}

    expected = gradients()
    prepare(ours, torch.device("cpu"), gradient_checkpointing=True)
    assert ours.training
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("task", ["policy", "reward model"])
def test_random_weights_in_bfloat16_are_the_model_of_their_checkpoint(task, tmp_path):
    """Rotary frequencies are no weight: rounded, positions from a few dozen on would be others."""
    CONFIGS["llama"].save_pretrained(tmp_path / "config")
    spec = Policy(from_config=str(tmp_path / "config"), tokenizer="t", dtype="bfloat16")
    if task == "policy":
        model = load_causal_lm(spec, torch.device("cpu"), 0)
    else:
        model, _ = load_for_training(spec, "zero", torch.device("cpu"), 0)
    save_portable(model, tmp_path / "saved")
    again = load_trunk(str(tmp_path / "saved"), torch.bfloat16, torch.device("cpu"))
    rows = documents()
    batch = pack(range(len(rows)), rows, [range(1, len(row)) for row in rows])
    found, expected = (hidden_at_predictors(trunk, batch) for trunk in (backbone(model), again))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_both_matrix_libraries_agree(library, monkeypatch):
    """The choice of library is rounding, in values and gradients, with and without bias."""
    monkeypatch.setenv("RLHFCTL_MATMUL", library)
    linear.onednn_is_faster.cache_clear()
    try:
        for config in (CONFIGS["llama"], CONFIGS["qwen2-tied"]):
            ours, plain = two_copies(config)
            fast = [module for module in ours.modules() if isinstance(module, linear.OnednnLinear)]
            assert bool(fast) == (library == "onednn")
            rows = documents((9, 4, 12))
            batch = pack(range(3), rows, [range(1, len(row)) for row in rows])
            logprobs, _ = token_logprobs(
                hidden_at_predictors(backbone(ours), batch), head_weight(ours), batch.targets
            )
            expected = one_by_one(plain, rows)
            torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
            logprobs.sum().backward()
            expected.sum().backward()
            for (_, mine), (where, theirs) in zip(
                ours.named_parameters(), plain.named_parameters(), strict=True
            ):
                torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-5, rtol=1e-4, msg=where)
    finally:
        linear.onednn_is_faster.cache_clear()


def test_buckets_fill_packs_and_change_nothing():
    ours, _ = two_copies(CONFIGS["llama"])
    rows = documents()
    trained = [range(1, len(row)) for row in rows]

    def logprobs(bucket):
        batch = pack(range(len(rows)), rows, trained, bucket=bucket)
        assert batch.ids.shape[1] % bucket == 0
        return token_logprobs(hidden_at_predictors(backbone(ours), batch), head_weight(ours), batch.targets)[
            0
        ]

    torch.testing.assert_close(logprobs(64), logprobs(1), atol=1e-6, rtol=0)
