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


@pytest.fixture
def verify(chains, cli, tmp_path):
    """verify(recipe, words..., check=True): the command on a policy of random weights and a few rows."""

    def run(recipe, *words, check=True):
        keys = [f"policy={{from_config: {chains}/model, tokenizer: {chains}/model}}", "train.batch_size=8"]
        return cli("doctor", "--verify-resume", recipe, *keys, *words, cwd=tmp_path, check=check, timeout=900)

    return run


def rows_of_trajectories(chains, path):
    """Answers of the data, every other one spoilt, as oreo wants them."""
    lines = (chains / "data/sft.jsonl").read_text().splitlines()[:64]
    with open(path, "w") as file:
        for number, row in enumerate(map(json.loads, lines)):
            spoilt = row["response"][:-1] + str((int(row["response"][-1]) + 1) % 10)
            answer = row["response"] if number % 2 else spoilt
            file.write(json.dumps({"prompt": row["prompt"], "response": answer, "reward": number % 2}) + "\n")


@pytest.mark.heavy
def test_oreo_on_two_processes_resumes_exactly(verify, chains, tmp_path):
    rows_of_trajectories(chains, tmp_path / "rows.jsonl")
    data = [f"data.train.0.path={tmp_path / 'rows.jsonl'}", f"data.eval.0.path={chains}/data/eval.jsonl"]
    done = verify("quickstart/oreo", *data, "launch.nproc_per_node=2", "launch.threads=1", "--json")
    told = json.loads(done.stdout)
    assert (told["status"], told["exit_code"], told["steps"]) == ("ok", 0, [2, 2])
    assert told["bounded"]["algorithm.value_warmup_steps"] == "200 -> 1"
    assert told["bounded"]["train.eval_samples"] == "null -> 16"
    assert told["kills"][0]["resumed_from"] == "step_000002"
    compared = {each["what"]: each for each in told["compared"]}
    assert "checkpoints/step_000004/critic.optimizer.safetensors" in compared
    assert "value_model/model.safetensors" in compared
    assert all(each["difference"] is None for each in compared.values())


@pytest.mark.heavy
def test_reft_killed_in_both_phases_resumes_exactly(verify, chains, tmp_path):
    data = [f"data.train=[{{path: {chains}/data/sft.jsonl, limit: 64}}]", "data.eval=[]"]
    keep = ["warmup.batch_size=8", "--steps", "2,1", "--keep", str(tmp_path / "kept")]
    done = verify("quickstart/reft", *data, *keep)
    killed = [line for line in done.stdout.splitlines() if line.startswith("killed")]
    assert [line.rpartition(" ")[2] for line in killed] == ["step_000002", "step_000004"]
    assert "differs" not in done.stdout
    assert "same     warmup/model.safetensors" in done.stdout
    assert (tmp_path / "kept/resumed/logs/attempt_3").is_dir()


@pytest.mark.heavy
def test_a_reward_that_counts_its_calls_is_caught(verify, chains, tmp_path):
    """The count starts again with the process: what came before the kill is lost."""
    (tmp_path / "counter.py").write_text(COUNTER)
    keys = [f"reward.sources=[{{kind: python, path: {tmp_path / 'counter.py'}}}]", "data.eval=[]"]
    keys += [f"data.train.0.path={chains}/data/prompts.jsonl", "template.allow=[R003, R004]"]
    done = verify("quickstart/ppo", *keys, "rollout.max_new_tokens=8", "-q", check=False)
    assert done.returncode == 1, done.stderr
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("the resume is not exact: metrics.jsonl, step 3, ")
    assert "Traceback" not in done.stderr
    assert "differs  metrics.jsonl" in done.stdout


def test_what_is_wrong_with_the_command_or_the_run_is_told_as_such(cli, tmp_path):
    done = cli("doctor", "quickstart/sft", cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a recipe is for --verify-resume" in done.stderr
    # No data here: the run's own refusal and exit code, and nothing is kept.
    done = cli("doctor", "--verify-resume", "quickstart/sft", "-q", cwd=tmp_path, check=False)
    assert done.returncode == 5
    assert "the uninterrupted run ended with exit code 5" in done.stderr
    assert "no such" in done.stderr
    assert list(tmp_path.iterdir()) == []
