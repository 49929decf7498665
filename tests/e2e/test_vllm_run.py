"""ppo through vLLM with the real command: each sync proven, resumed as if never stopped, refused in time."""

import json
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.heavy
RECIPE = """\
task: ppo
name: through-vllm
policy: {from_config: model, tokenizer: model}
reward: {sources: [{kind: verifier, name: chain_answer}, {kind: python, path: reward.py}]}
rollout: {engine: vllm, n: 2, max_new_tokens: 16, temperature: 0.8}
algorithm: {advantage: rloo, kl_coef: 0.01}
data: {train: [{path: prompts.jsonl, format: qa}], max_length: 48}
optim: {lr: 1.0e-3, schedule: constant, warmup_ratio: 0.0}
train: {steps: 4, batch_size: 16, tokens_per_microbatch: 2048, save_every: 2, log_every: 1}
"""
REWARD = "def score(samples, **_):\n    return [len(str(sample)) % 7 / 7 for sample in samples]\n"


@pytest.fixture(scope="module")
def task(chains, tmp_path_factory):
    """The quickstart's prompts for a model with heads of 32: vLLM has no CPU kernel for the quickstart's 16."""
    out = tmp_path_factory.mktemp("through-vllm")
    for model, heads in (("model", 2), ("model16", 4)):
        (out / model).mkdir()
        for file in (chains / "model").iterdir():
            (out / model / file.name).write_bytes(file.read_bytes())
        config = json.loads((out / model / "config.json").read_text())
        config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        (out / model / "config.json").write_text(json.dumps(config))
    (out / "prompts.jsonl").write_bytes((chains / "data" / "prompts.jsonl").read_bytes())
    (out / "reward.py").write_text(REWARD)
    (out / "r.yaml").write_text(RECIPE)
    return out


def test_every_sync_is_proven_and_a_resumed_run_is_the_same(task, cli, metrics):
    cli("ppo", "r.yaml", "-q", "--run-dir", "whole", cwd=task)
    whole = metrics(task / "whole")
    assert len(whole) == 4
    for record in whole:
        assert 0 < record["sync/canary"] < 2e-5
        assert record["kl/rollout"] < 1e-9
    assert len({record["sync/canary"] for record in whole} | {r["entropy"] for r in whole}) > 4
    killed_in_the_sync_of_step_3(task)
    cli("ppo", "r.yaml", "-q", "--run-dir", "halves", "--resume", cwd=task)
    assert metrics(task / "halves") == whole


def killed_in_the_sync_of_step_3(task):
    """kill -9 while the engine takes over the weights; the checkpoint of step 2 is there."""
    arguments = [sys.executable, "-m", "rlhfctl", "ppo", "r.yaml", "-q", "--run-dir", "halves"]
    process = subprocess.Popen(arguments, cwd=task, stderr=subprocess.PIPE)
    record, end = task / "halves/logs/attempt_1/rank0.beat", time.monotonic() + 240
    while not (record.exists() and '"step": 3, "phase": "sync"' in record.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in (task / "halves/checkpoints").iterdir()] == ["step_000002"]


def test_heads_without_a_kernel_are_refused_before_launch(task, cli):
    done = cli("ppo", "r.yaml", "policy.from_config=model16", "--dry-run", cwd=task, check=False)
    assert done.returncode == 4
    assert "attention heads have size 16, which vLLM cannot run on a CPU" in done.stdout + done.stderr


def test_a_nucleus_is_refused(task, cli):
    done = cli("ppo", "r.yaml", "rollout.top_p=0.9", "--dry-run", cwd=task, check=False)
    assert done.returncode == 2
    assert "rollout.top_p must be 1, or rollout.engine hf" in done.stderr
