"""A reward that can be gamed is gamed, and the guard says so before step 40, with the numbers and a checkpoint."""

import json

import pytest

LINES = "def score(samples):\n    return [sample['response'].count('\\n') for sample in samples]\n"


def stopped(done, run):
    """Of a run that the guard ended: the step, and the cause in status.json."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"], done.stderr


def sources(*given):
    return "[{}]".format(", ".join((*given, "{kind: verifier, name: chain_answer, weight: 0.0}")))


@pytest.mark.heavy
def test_a_reward_for_lines(workspace, command, cli, tmp_path):
    """The policy learns to write more lines and forgets the answer; the verifier beside it has no weight."""
    (tmp_path / "lines.py").write_text(LINES)
    lines = f"{{kind: python, path: {tmp_path / 'lines.py'}}}"
    keys = {
        "reward.sources": sources(lines),
        "template.allow": "[R003]",
        "train.steps": 40,
        "train.save_every": 1,
    }
    keys |= {"train.batch_size": 64, "train.keep_checkpoints": 40}
    run = tmp_path / "run"
    step, said = stopped(cli(*command("ppo", run, keys), cwd=workspace, check=False), run)
    assert step < 40
    assert "the policy games its reward: reward/raw" in said
    assert "while reward/correct" in said
    assert f"the last good checkpoint is {run / 'checkpoints/step_'}" in said


@pytest.mark.heavy
def test_a_reward_model_whose_score_grows_with_the_lines(workspace, command, cli, tmp_path):
    """The quickstart policy against a sum over tokens, neither scaled nor cut."""
    rm, run = tmp_path / "rm", tmp_path / "run"
    keys = {"algorithm.score": "token_sum", "train.steps": 150, "train.batch_size": 64}
    cli(*command("rm", rm, keys), cwd=workspace)
    keys = {"reward.sources": sources(f"{{kind: model, path: {rm / 'final'}}}"), "reward.max_failures": 1000}
    keys |= {"algorithm.kl_coef": 0.05, "train.steps": 40, "train.batch_size": 128}
    step, said = stopped(cli(*command("ppo", run, keys), cwd=workspace, check=False), run)
    assert step < 40
    assert "the policy games its reward: reward/raw" in said
    assert "while reward/correct" in said
