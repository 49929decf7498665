"""ppo on the quickstart task, its reward served by serve-rm in another process."""

import json
import os
import subprocess
import sys

import pytest

RULES = """
def score(samples):
    found = []
    for sample in samples:
        answer = sample["response"].rpartition("\\n")[2]
        readable = len(answer) == 2 and answer[0] == "#" and answer[1].isdigit()
        right = answer == "#" + str(sample["label"])
        found.append({"score": 1.0 if right else 0.1 if readable else 0.0, "metrics": {"correct": float(right)}})
    return found
"""


KEY = "planted-5f1c9d27-key"


@pytest.fixture
def service(tmp_path):
    """(address, file of its stderr) of the rules above, for those who have the key."""
    (tmp_path / "rules.py").write_text(RULES)
    command = ["serve-rm", str(tmp_path / "rules.py"), "--port", "0", "--api-key-env", "SERVICE_KEY"]
    with open(tmp_path / "served", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhfctl", *command],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "SERVICE_KEY": KEY},
            text=True,
        )
    yield process.stdout.readline().strip(), tmp_path / "served"
    process.terminate()
    assert process.wait(30) == 0
    assert KEY not in (tmp_path / "served").read_text()
    process.stdout.close()


SHORT = (
    "launch.threads=1",
    "train.steps=4",
    "train.batch_size=32",
    "train.eval_every=0",
    "train.log_every=1",
    "train.eval_samples=50",
)


@pytest.mark.heavy
def test_the_remote_reward_trains_as_the_verifier_does(workspace, cli, metrics, service, tmp_path):
    """The rules are those of chain_answer, so the two runs agree in every number but the verifier's extra metrics. The
    key that opened the service is in none of the files that a run leaves."""
    url, _ = service
    remote = f"reward.sources=[{{kind: remote, url: '{url}', request_size: 8, api_key_env: TRAINER_KEY}}]"
    for name, reward in (("local", ()), ("remote", (remote, "train.samples_every=1"))):
        run = [*SHORT, *reward, "--run-dir", str(tmp_path / name)]
        done = cli("ppo", "quickstart/ppo", *run, cwd=workspace, env={"TRAINER_KEY": KEY})
        assert KEY not in done.stdout + done.stderr
    cli("report", str(tmp_path / "remote"), cwd=workspace)
    files = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert {"launch.json", "recipe.yaml", "preflight.json", "samples.jsonl", "rank0.log", "report.html"} <= {
        path.name for path in files
    }
    assert [str(path) for path in files if KEY.encode() in path.read_bytes()] == []
    local, over_http = metrics(tmp_path / "local"), metrics(tmp_path / "remote")
    assert len(local) == len(over_http)
    assert any("loss/policy" in record for record in over_http)
    for ours, theirs in zip(over_http, local, strict=True):
        assert ours == {key: value for key, value in theirs.items() if key in ours}
    assert not (tmp_path / "remote/quarantine.jsonl").exists()


def test_a_server_that_dies_stops_the_run_with_its_cause(workspace, cli, tmp_path):
    rules = tmp_path / "dies.py"
    # It lives through preflight, then ends the whole service from inside.
    rules.write_text(
        RULES
        + "\nimport os, signal\nasked = score\n"
        + """
def score(samples):
    if os.path.exists(os.path.join(os.path.dirname(__file__), "now")):
        os.kill(os.getppid(), signal.SIGKILL)
    return asked(samples)
"""
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhfctl", "serve-rm", str(rules), "--port", "0", "-q"],
        stdout=subprocess.PIPE,
        text=True,
    )
    url = process.stdout.readline().strip()
    source = f"reward.sources=[{{kind: python, path: {tmp_path / 'touch.py'}, weight: 0.0}}, "
    source += f"{{kind: remote, url: '{url}', retries: 1, timeout: 5}}]"
    # A source that is asked before the remote one; in the run itself (not in preflight) it lets the service die.
    (tmp_path / "touch.py").write_text(
        "import os\n"
        "def score(samples):\n"
        "    if len(samples) == 32: open(os.path.join(os.path.dirname(__file__), 'now'), 'w').close()\n"
        "    return [float(len(s['response'])) for s in samples]\n"
    )
    run = tmp_path / "run"
    done = cli(
        "ppo", "quickstart/ppo", "--run-dir", str(run), "--json", *SHORT, source, cwd=workspace, check=False
    )
    process.wait(30)
    process.stdout.close()
    assert done.returncode == 1, done.stderr
    assert "rewards failed, 0 allowed" in done.stderr
    quarantined = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert len(quarantined) == 32
    assert {record["source"] for record in quarantined} == {"remote"}
    assert {record["status"] for record in quarantined} <= {"error", "timeout"}
    assert all(record["sample"]["messages"] for record in quarantined)
