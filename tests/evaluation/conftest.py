"""A run of the quickstart task with random weights: what a trained one has on disk, in a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REWARD = '''
def score(samples):
    """An answer of an even number of characters is right."""
    return [{"score": float(len(s["response"]) % 2 == 0), "metrics": {"correct": float(len(s["response"]) % 2 == 0)}}
            for s in samples]
'''


@pytest.fixture(scope="session")
def finished_run(chains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipe.yaml and final/; its reward calls answers of even length correct, so both kinds occur."""
    import torch

    from rlhfctl.models.export import export_policy
    from rlhfctl.models.load import load_causal_lm
    from rlhfctl.recipe.load import dump, load_recipe
    from rlhfctl.recipe.sections import Policy

    run = tmp_path_factory.mktemp("run") / "sft"
    run.mkdir()
    (run / "reward.py").write_text(REWARD)
    policy = Policy(from_config=str(chains / "model"), tokenizer=str(chains / "model"))
    export_policy(load_causal_lm(policy, torch.device("cpu"), 5), policy, run / "final", merge=False)
    loaded = load_recipe(
        "quickstart/sft",
        [
            f"policy.from_config={chains}/model",
            f"policy.tokenizer={chains}/model",
            f"data.train=[{{path: {chains}/data/sft.jsonl}}]",
            f"data.eval=[{{path: {chains}/data/eval.jsonl, format: qa}}]",
            f"reward.sources=[{{kind: python, path: {run}/reward.py}}]",
            "rollout.max_new_tokens=24",
        ],
    )
    (run / "recipe.yaml").write_text(dump(loaded.recipe))
    return run


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], str]]:
    """`rlhfctl eval ... --json` in this process: the object, and what stderr got."""
    from rlhfctl.cli.main import run

    def call(*words: str) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        run(["eval", *words, "--json"])
        out, err = capsys.readouterr()
        assert out.count("\n") == 1
        return json.loads(out), err

    return call
