"""A remote reward in preflight: the handshake, the template behind it, and its answers on real rows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfctl.preflight.run import Report, run_preflight
from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.tasks import TASKS

RULES = """
def score(samples):
    return [float(s["response"].strip().endswith("#" + str(s["label"]))) for s in samples]
"""
# Refuses a system message, and has no end of turn.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m.role == 'user' %}={% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Path], str]]:
    """serve(source): the address of a service in a process of its own."""
    running: list[subprocess.Popen[str]] = []

    def run(source: Path) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhfctl", "serve-rm", str(source), "--port", "0", "-q"],
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    yield run
    for process in running:
        process.terminate()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def preflight(chains: Path, source: dict[str, Any], train: Path | None = None, **template: Any) -> Report:
    model = str(chains / "model")
    recipe = {
        "task": "ppo",
        "name": "toy",
        "policy": {"from_config": model, "tokenizer": model},
        "data": {"train": [{"path": str(train or chains / "data/prompts.jsonl")}], "max_length": 64},
        "reward": {"sources": [{"kind": "remote", **source}]},
        "rollout": {"max_new_tokens": 32},
        "train": {"steps": 4, "batch_size": 8},
        "template": template,
    }
    return run_preflight(SimpleNamespace(recipe=TASKS["ppo"].model_validate(recipe)))  # type: ignore[arg-type]


def graver(report: Report) -> dict[str, Any]:
    return {f.id: f for f in report.findings if f.severity != "info" and not f.handled}


@pytest.fixture(scope="module")
def rules(serve: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rules") / "rules.py"
    path.write_text(RULES)
    return serve(path)


def test_rules_that_tell_right_from_wrong_pass(chains: Path, rules: str) -> None:
    report = preflight(chains, {"url": rules})
    assert graver(report) == {}
    assert report.exit_code == 0


def test_a_server_that_is_down_is_refused(chains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhfctl.rewards.remote_servers.HANDSHAKE_SECONDS", 0.3)
    report = preflight(chains, {"url": "http://127.0.0.1:9"})
    assert (list(graver(report)), report.exit_code) == (["R001"], 5)
    assert "no reward server answers its handshake: http://127.0.0.1:9" in graver(report)["R001"].detail


def test_one_of_two_that_is_down_is_a_warning(
    chains: Path, rules: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhfctl.rewards.remote_servers.HANDSHAKE_SECONDS", 2.0)
    report = preflight(chains, {"urls": ["http://127.0.0.1:9", rules]})
    assert (list(graver(report)), report.exit_code) == (["R006"], 0)
    assert "http://127.0.0.1:9" in graver(report)["R006"].title


def test_another_fingerprint_is_refused(chains: Path, rules: str) -> None:
    report = preflight(chains, {"url": rules, "fingerprint": "0" * 64})
    assert (list(graver(report)), report.exit_code) == (["R001"], 5)
    assert "the recipe expects 0000" in graver(report)["R001"].detail


def test_the_template_of_a_remote_model_goes_through_the_gate(
    chains: Path, serve: Callable[[Path], str], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    directory = tmp_path / "rm"
    write_model(directory)
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(directory, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(NO_SYSTEM)
    url = serve(directory)
    rows = [
        {
            "id": f"r{n}",
            "messages": [{"role": "system", "content": "0*0=0"}, {"role": "user", "content": f"{n}+1?"}],
        }
        for n in range(9)
    ]
    train = tmp_path / "rows.jsonl"
    train.write_text("".join(json.dumps({**row, "label": "1"}) + "\n" for row in rows))
    shown = inspect_recipe(chains, tmp_path, url, train)
    assert shown.returncode == 3, shown.stderr
    assert url in shown.stdout
    refused = preflight(chains, {"url": url}, train)
    assert refused.exit_code == 3, refused.rows()
    assert any(finding.side in ("rm", "pair") for finding in graver(refused).values())
    folded = preflight(chains, {"url": url}, train, fold_system=True)
    assert 3 not in {
        finding.exit_code
        for finding in folded.findings
        if finding.severity == "error" and not finding.handled
    }


def inspect_recipe(chains: Path, tmp_path: Path, url: str, train: Path) -> "subprocess.CompletedProcess[str]":
    recipe = tmp_path / "inspected.yaml"
    recipe.write_text(
        f"""task: ppo
name: inspected
policy: {{path: {chains / "model"}}}
reward: {{sources: [{{kind: remote, url: "{url}", retries: 0}}]}}
data: {{train: [{{path: {train}}}]}}
train: {{steps: 1}}
"""
    )
    command = [sys.executable, "-m", "rlhfctl", "inspect-template", str(recipe)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_inspect_template_says_when_a_server_is_down(chains: Path, tmp_path: Path) -> None:
    done = inspect_recipe(chains, tmp_path, "http://127.0.0.1:9", chains / "data/prompts.jsonl")
    assert done.returncode in (0, 3), done.stderr
    assert "warning: a remote reward is not compared: no reward server answers its handshake" in done.stderr


def test_the_command_ends_with_the_exit_code_and_starts_nothing(chains: Path, tmp_path: Path) -> None:
    model = chains / "model"
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "rlhfctl",
                "ppo",
                "quickstart/ppo",
                "--json",
                "--run-dir",
                "run",
                "data.eval=[]",
            ),
            f"policy={{from_config: {model}, tokenizer: {model}}}",
            f"data.train=[{{path: {chains / 'data/prompts.jsonl'}}}]",
            "reward.sources=[{kind: remote, url: 'http://127.0.0.1:9', retries: 0}]",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ,
    )
    said = json.loads(done.stdout)
    assert (done.returncode, said["status"], said["exit_code"]) == (5, "refused", 5), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
