"""What a run leaves behind, and how a run that goes wrong ends."""

import json

import pytest
import torch


def test_ppo_leaves_samples_and_a_model_that_transformers_loads(workspace, command, cli, metrics, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    changes = {
        "train.steps": 2,
        "train.samples_every": 2,
        "train.samples_per_step": 3,
        "train.batch_size": 16,
    }
    cli(*command("ppo", run, changes), cwd=workspace)

    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 2, 2]
    for sample in samples:
        assert sample["prompt"].endswith("?")
        assert sample["tokens"] >= len(sample["response"])  # one token a character, and the stop token
        assert sample["reward"] in (0.0, 0.1, 1.0)
        assert sample["reward"] == 1.0 or not sample["reward_metrics"]["correct"]

    model = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1+2-3*4+5?"}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("1+2-3*4+5?1+2=")
    sft = AutoModelForCausalLM.from_pretrained(workspace / ".quickstart/sft/final")
    moved = max(
        (mine - theirs).abs().max().item()
        for mine, theirs in zip(model.parameters(), sft.parameters(), strict=True)
    )
    assert 0 < moved < 0.1


def test_same_seed_same_metrics_another_seed_others(workspace, command, cli, metrics, tmp_path):
    runs = {"a": 17, "b": 17, "c": 18}
    for name, seed in runs.items():
        cli(
            *command("ppo", tmp_path / name, {"train.steps": 2, "train.batch_size": 8, "seed": seed}),
            cwd=workspace,
        )
    first, again, other = (metrics(tmp_path / name) for name in runs)
    assert first == again
    assert first != other


def test_attention_by_torchs_kernel(workspace, command, tmp_path, monkeypatch):
    """policy.attention: sdpa leaves out the call for a whole pack, which here fails."""
    from rlhfctl.cli.main import run
    from rlhfctl.models import pack_attention

    def attention(*given):
        raise RuntimeError("computed in one call")

    monkeypatch.chdir(workspace)
    monkeypatch.setattr(pack_attention, "attention", attention)
    monkeypatch.setitem(pack_attention.chosen, "attention", "auto")  # put back at the end
    for kind, code in {"auto": 1, "sdpa": 0}.items():
        changes = {"train.steps": 1, "policy.attention": kind}
        assert run(command("sft", tmp_path / kind, changes)) == code
    assert "computed in one call" in (tmp_path / "auto/logs/attempt_1/rank0.log").read_text()


@pytest.mark.parametrize(
    ("task", "changes", "sentence"),
    [
        ("ppo", {"algorithm.kl_limit": 1e-9}, "passed algorithm.kl_limit 1e-09"),
        ("sft", {"optim.lr": 1e30, "optim.max_grad_norm": "null"}, "is nan at step"),
    ],
)
def test_a_run_that_goes_wrong_stops_with_its_cause(
    task, changes, sentence, workspace, command, cli, tmp_path
):
    run = tmp_path / "run"
    changes |= {"train.batch_size": 8, "train.save_every": 1}
    done = cli(*command(task, run, changes), cwd=workspace, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 4
    assert not (run / "final").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
