"""`rlhfctl doctor --verify-resume` with the real command: sft, rm and ppo are killed in test_resume.py."""

import json

import pytest

COUNTER = """
asked = 0
def score(samples):
    global asked
    asked += 1
    return [len(sample["response"]) % 3 + asked / 8 for sample in samples]
"""


def rows_of_trajectories(workspace, path):
    """Answers of the data, every other one spoilt, as oreo wants them."""
    lines = (workspace / ".quickstart/data/sft.jsonl").read_text().splitlines()[:64]
    with open(path, "w") as file:
        for number, row in enumerate(map(json.loads, lines)):
            spoilt = row["response"][:-1] + str((int(row["response"][-1]) + 1) % 10)
            answer = row["response"] if number % 2 else spoilt
            file.write(json.dumps({"prompt": row["prompt"], "response": answer, "reward": number % 2}) + "\n")


@pytest.mark.heavy
def test_oreo_on_two_processes_resumes_exactly(workspace, cli, tmp_path):
    rows_of_trajectories(workspace, tmp_path / "rows.jsonl")
    keys = [f"data.train.0.path={tmp_path / 'rows.jsonl'}"]
    keys += ["train.batch_size=8", "launch.nproc_per_node=2", "launch.threads=1"]
    done = cli("doctor", "--verify-resume", "quickstart/oreo", *keys, "--json", cwd=workspace)
    told = json.loads(done.stdout)
    assert (told["status"], told["exit_code"], told["steps"]) == ("ok", 0, [2, 2])
    assert told["bounded"]["algorithm.value_warmup_steps"] == "200 -> 1"
    assert told["kills"][0]["resumed_from"] == "step_000002"
    compared = {each["what"]: each for each in told["compared"]}
    assert "checkpoints/step_000004/critic.optimizer.safetensors" in compared
    assert "value_model/model.safetensors" in compared
    assert all(each["difference"] is None for each in compared.values())


@pytest.mark.heavy
def test_reft_killed_in_both_phases_resumes_exactly(workspace, cli, tmp_path):
    keys = ["data.train.0.limit=64", "data.eval=[]", "warmup.batch_size=8", "train.batch_size=8"]
    keep = ["--steps", "2,1", "--keep", str(tmp_path / "kept")]
    done = cli("doctor", "--verify-resume", "quickstart/reft", *keys, *keep, cwd=workspace)
    killed = [line for line in done.stdout.splitlines() if line.startswith("killed")]
    assert [line.rpartition(" ")[2] for line in killed] == ["step_000002", "step_000004"]
    assert "differs" not in done.stdout
    assert "same     warmup/model.safetensors" in done.stdout
    assert (tmp_path / "kept/resumed/logs/attempt_3").is_dir()


@pytest.mark.heavy
def test_a_reward_that_counts_its_calls_is_caught(workspace, command, cli, tmp_path):
    """The count starts again with the process: what came before the kill is lost."""
    (tmp_path / "counter.py").write_text(COUNTER)
    keys = [f"reward.sources=[{{kind: python, path: {tmp_path / 'counter.py'}}}]", "data.eval=[]"]
    keys += ["train.batch_size=8", "rollout.max_new_tokens=8", "template.allow=[R003, R004]"]
    done = cli("doctor", "--verify-resume", "quickstart/ppo", *keys, "-q", cwd=workspace, check=False)
    assert done.returncode == 1, done.stderr
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("the resume is not exact: metrics.jsonl, step 3, ")
    assert "Traceback" not in done.stderr
    assert "differs  metrics.jsonl" in done.stdout


def test_what_is_wrong_with_the_command_or_the_run_is_told_as_such(workspace, cli, tmp_path):
    done = cli("doctor", "quickstart/sft", cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a recipe is for --verify-resume" in done.stderr
    # No data here: the run's own refusal and exit code, and nothing is kept.
    done = cli("doctor", "--verify-resume", "quickstart/sft", "-q", cwd=tmp_path, check=False)
    assert done.returncode == 5
    assert "the uninterrupted run ended with exit code 5" in done.stderr
    assert "no such" in done.stderr
    assert list(tmp_path.iterdir()) == []
