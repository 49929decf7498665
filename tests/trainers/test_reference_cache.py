"""What a reference said of a row is read again for the same weights and the same tokens, and for nothing else."""

import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhfctl.recipe.sections import Policy
from rlhfctl.recipe.tasks import TASKS
from rlhfctl.trainers.oreo_data import Reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def rows(ids):
    trained = [list(range(1, len(row))) for row in ids]
    return SimpleNamespace(rows=list(ids), ids=list(ids), trained=trained, lengths=[len(row) for row in ids])


def filled(base, data, directory, **keys):
    """(the cache, how many rows were computed, what was said)."""
    said, computed = [], []
    recipe = SimpleNamespace(reference=str(base), policy=Policy(path=str(base), **keys), seed=0)
    policy = SimpleNamespace(config=SimpleNamespace(vocab_size=53))
    reference = Reference(SimpleNamespace(device=CPU), recipe, policy)
    forward = reference._computed
    reference._computed = lambda batch: (computed.extend(batch.rows), forward(batch))[1]
    reference.fill(SimpleNamespace(rank=0, say=said.append), data, 64, 20, str(directory))
    return reference.cache, len(computed), said


def test_rows_are_computed_once_for_the_same_weights(base, tmp_path):
    ids = [[3, 1, 4, 1], [5, 9], [2, 6, 5, 3, 5]]
    first, count, _ = filled(base, rows(ids), tmp_path / "cache")
    assert count == 3
    again, count, said = filled(base, rows(ids), tmp_path / "cache")
    assert count == 0
    assert "3 of 3 rows from" in said[0]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))

    # Another order, one row more, one changed: only what is new is computed, and the file holds all.
    other = [ids[2], [5, 8], ids[0], [7, 7, 7]]
    mixed, count, _ = filled(base, rows(other), tmp_path / "cache")
    assert count == 2
    assert torch.equal(mixed[0], first[2])
    assert torch.equal(mixed[2], first[0])
    fresh, _, _ = filled(base, rows(other), tmp_path / "elsewhere")
    torch.testing.assert_close(mixed[1], fresh[1], atol=1e-6, rtol=0)
    assert filled(base, rows([*ids, *other]), tmp_path / "cache")[1] == 0


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_damaged_file_is_made_again(base, tmp_path, kept):
    ids = [[3, 1, 4, 1], [5, 9]]
    first, _, _ = filled(base, rows(ids), tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    again, count, said = filled(base, rows(ids), tmp_path / "cache")
    assert count == 2
    assert "0 of 2 rows from" in said[0]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert filled(base, rows(ids), tmp_path / "cache")[1] == 0


def test_other_weights_and_other_bits_are_other_files(base, tmp_path):
    ids = [[3, 1, 4, 1], [5, 9]]
    first, _, _ = filled(base, rows(ids), tmp_path / "cache")
    moved = shutil.copytree(base, tmp_path / "copy")
    assert filled(moved, rows(ids), tmp_path / "cache")[1] == 0
    model = LlamaForCausalLM.from_pretrained(moved)
    model.model.norm.weight.data += 0.1
    model.save_pretrained(moved)
    changed, count, _ = filled(moved, rows(ids), tmp_path / "cache")
    assert count == 2
    assert not torch.equal(changed[0], first[0])
    assert filled(base, rows(ids), tmp_path / "cache", quantization="int8", lora={})[1] == 2
    assert filled(base, rows(ids), tmp_path / "cache", dtype="bfloat16")[1] == 2
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_the_same_weights_under_another_configuration_are_another_model(base, tmp_path):
    """A rope_theta that was corrected: no weight of the file moved, every state did."""
    ids = [[3, 1, 4, 1], [5, 9]]
    first, _, _ = filled(base, rows(ids), tmp_path / "cache")
    moved = shutil.copytree(base, tmp_path / "copy")
    config = LlamaConfig.from_pretrained(moved)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    config.save_pretrained(moved)
    changed, count, _ = filled(moved, rows(ids), tmp_path / "cache")
    assert count == 2
    assert not torch.equal(changed[0], first[0])


def test_a_cache_that_cannot_be_written_ends_no_run(base, tmp_path):
    """A file stands where its directory should be; a disk is full, which safetensors tells its own way."""
    ids = [[3, 1, 4, 1], [5, 9] * 500]
    wanted, _, _ = filled(base, rows(ids), tmp_path / "cache")
    (tmp_path / "file").write_text("")
    in_the_way, _, said = filled(base, rows(ids), tmp_path / "file")
    assert said[-1].endswith("; the run goes on without it")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        full, _, told = filled(base, rows(ids), tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in told[-1]
    assert told[-1].endswith("; the run goes on without it")
    assert list((tmp_path / "full").iterdir()) == []
    for found in (in_the_way, full):
        assert all(torch.equal(one, two) for one, two in zip(wanted, found, strict=True))


@pytest.mark.parametrize("keys", [{"reference_cache_mb": 0}, {}])
def test_a_directory_that_nothing_is_kept_in_is_an_error(keys):
    policy = {"path": "m"} if keys else {"from_config": "m", "tokenizer": "m"}
    recipe = {
        "task": "oreo", "name": "t", "policy": policy, "data": {"train": [{"path": "d"}]}, "train": {"steps": 1},
        "algorithm": {"reference_cache_dir": "c", **keys},
    }  # fmt: skip
    with pytest.raises(ValueError, match="reference_cache_dir is ignored here"):
        TASKS["oreo"].model_validate(recipe)
