"""`rlhfctl eval` from the command line: results, files, and one sentence for each mistake."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.evaluation.subject import lineage

Evaluate = Callable[..., tuple[dict[str, Any], str]]


def test_a_run_is_evaluated_with_its_own_recipe(
    finished_run: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    told, err = evaluate(
        str(finished_run), "--search", "sample", "-n", "4", "--limit", "30", "--out", str(tmp_path)
    )
    assert (told["status"], told["exit_code"], told["method"], told["prompts"]) == ("ok", 0, "sample_4", 30)
    assert told["overlap"] == 0
    metrics = told["metrics"]
    assert {"accuracy/greedy", "accuracy/sample", "pass@2", "pass@4", "majority@4"} <= set(metrics)
    assert metrics["pass@1"]["value"] == pytest.approx(metrics["accuracy/sample"]["value"])
    assert metrics["pass@1"]["value"] < metrics["pass@2"]["value"] < metrics["pass@4"]["value"]
    assert metrics["accuracy/greedy"]["interval"] == "wilson"
    assert "30 prompts, 4 samples each at temperature 1" in err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"eval-{index}" for index in range(30)]
    share = sum(answer["correct"] for row in rows for answer in row["samples"]) / 120
    assert metrics["accuracy/sample"]["value"] == pytest.approx(share)
    assert json.loads((tmp_path / "eval.json").read_text())["metrics"] == metrics


def test_samples_depend_on_the_seed_alone(finished_run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    def samples(name: str, *words: str) -> bytes:
        evaluate(
            str(finished_run),
            "--search",
            "sample",
            "-n",
            "2",
            "--out",
            str(tmp_path / name),
            "--limit",
            "10",
            *words,
        )
        return (tmp_path / name / "results.jsonl").read_bytes()

    first = samples("a")
    assert samples("b") == first
    assert samples("c", "--seed", "1") != first
    same, _ = evaluate(str(finished_run), "--limit", "10", "--compare", str(tmp_path / "a"))
    difference = same["differences"]["accuracy greedy - sample_2 (compared)"]
    assert difference["n"] == 10
    rows = [json.loads(line) for line in first.splitlines()]
    expected = sum(row["greedy"]["correct"] - row["accuracy"] for row in rows) / 10
    assert difference["value"] == pytest.approx(expected)


def test_trajectories_are_written_balanced(finished_run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    words = (str(finished_run), "--search", "sample", "-n", "6", "--limit", "20", "--balance", "1")
    told, _ = evaluate(*words, "--save-trajectories", str(file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert told["trajectories"]["rows"] == len(rows)
    assert told["trajectories"]["left_out"] == 120 - len(rows)
    kinds: dict[str, list[bool]] = {}
    for row in rows:
        kinds.setdefault(row["prompt_id"], []).append(row["correct"])
        assert row["reward"] == float(row["correct"])
    assert all(sorted(kind) in ([True], [False], [False, True]) for kind in kinds.values())
    again = tmp_path / "again.jsonl"
    evaluate(*words, "--save-trajectories", str(again))
    assert again.read_bytes() == file.read_bytes()


def test_prompts_that_were_trained_on_are_counted(
    finished_run: Path, chains: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    lines = (chains / "data/eval.jsonl").read_text().splitlines()[:5]
    trained = [json.loads(line) for line in (chains / "data/sft.jsonl").read_text().splitlines()[:3]]
    lines += [json.dumps({"question": row["prompt"], "answer": "1"}) for row in trained]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    told, err = evaluate(str(finished_run), "--data", str(tmp_path / "mixed.jsonl"))
    assert told["overlap"] == 3
    assert "warning: 3 of 8 prompts are in the training data too" in err
    # A model directory that is a run's final/ tells the same.
    told, _ = evaluate(
        str(finished_run / "final"), "--data", str(tmp_path / "mixed.jsonl"), "--verifier", "chain_answer"
    )
    assert told["overlap"] == 3


def test_every_model_of_a_run_tells_what_it_was_trained_on(finished_run: Path, tmp_path: Path) -> None:
    shutil.copy(finished_run / "recipe.yaml", tmp_path / "recipe.yaml")
    known = [source.path for source in lineage(str(finished_run / "final"))]
    assert len(known) == 1
    for model in ("final", "warmup", "rounds/1/policy", "checkpoints/step_000010/policy"):
        assert [source.path for source in lineage(str(tmp_path / model))] == known
    for model in ("policy", "final/policy", "elsewhere", "checkpoints/step_000010", "rounds/1/value_model"):
        assert lineage(str(tmp_path / model)) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "evaluate what?"),
        (("nowhere",), 2, "nowhere is no directory: give a model directory or a run directory"),
        (("RUN", "--data", "missing.jsonl"), 5, "missing.jsonl"),
        (("RUN/final",), 2, "give the prompts with --data FILE"),
        (("RUN/final", "--data", "DATA"), 2, "say what is right with --verifier chain_answer | math_answer"),
        (("RUN", "--verifier", "chain"), 2, "--verifier chain: give chain_answer or math_answer"),
        (("RUN", "--search", "bean"), 2, "--search bean: give greedy, sample, best-of-n, beam"),
        (("RUN", "--engine", "sglang"), 2, "--engine sglang: give hf"),
        (
            ("RUN", "--search", "beam"),
            2,
            "has no value_model/: give --value-model DIR",
        ),
        (("RUN", "--search", "best-of-n"), 2, "ranks samples: give --value-model DIR or --reward-model DIR"),
        (("RUN", "--search", "beam", "--value-model", "RUN/final"), 5, "is not a value model"),
        (("RUN", "--out", "/proc/x"), 2, "cannot write /proc/x/results.jsonl"),
        (("RUN", "--search", "sample", "--save-trajectories", "."), 2, "cannot write .: it is a directory"),
        (("RUN", "--search", "sample", "--save-trajectories", "DATA"), 2, "jsonl would be overwritten"),
        (
            ("RUN", "--search", "sample", "--out", ".", "--save-trajectories", "./results.jsonl"),
            2,
            "results.jsonl would be overwritten",
        ),
        *[
            (
                ("RUN", "--search", "sample", "--temperature", given),
                2,
                f"--temperature {given}: give a finite number",
            )
            for given in ("nan", "inf", "1e-300", "0", "0.009")
        ],
        (
            ("RUN", "--search", "beam", "--value-model", "x", "--alpha", "nan"),
            2,
            "--alpha nan: give a finite number",
        ),
        (("RUN", "--seed", str(2**63)), 2, "--seed"),
        (("RUN", "-n", "4"), 2, "-n is for --search sample, best-of-n or beam"),
        (("RUN", "--max-steps", "5"), 2, "--max-steps bounds the candidates of --search beam"),
        (("RUN", "--value-model", "x"), 2, "--value-model is for --search sample, best-of-n or beam"),
        (
            ("RUN", "--search", "sample", "--balance", "2"),
            2,
            "--balance is about the rows of --save-trajectories",
        ),
        (("RUN", "--save-trajectories", "x"), 2, "--save-trajectories writes the samples of --search sample"),
        (("RUN", "--compare", "DATA"), 2, "is no results.jsonl of `rlhfctl eval --out`"),
        (("RUN", "--max-new-tokens", "64"), 2, "--max-new-tokens 64 leaves no room for a prompt"),
        (
            (
                "RUN",
                "--verifier",
                "chain_answer",
                "--search",
                "sample",
                "--limit",
                "3",
                "--save-trajectories",
                "t",
            ),
            5,
            "samples are wrong: there is nothing to learn from",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    finished_run: Path,
    chains: Path,
    evaluate: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(chains / "data/eval.jsonl")
    told, err = evaluate(*(word.replace("RUN", str(finished_run)).replace("DATA", data) for word in words))
    assert (told["exit_code"], told["message"].count("\n")) == (code, 0)
    assert said in told["message"]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "none"])
def test_weights_that_cannot_be_read_are_told_before_anything_is_sampled(
    finished_run: Path, chains: Path, evaluate: Evaluate, tmp_path: Path, damage: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished_run / "final", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    if damage == "none":
        weights.unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"value_model": {"head": "scalar"}}))
    said = {"cut": "the weights of", "none": "holds no weights (*.safetensors)"}[damage]
    rank = (str(finished_run), "--search", "best-of-n")
    for words in (
        (str(model), "--data", str(chains / "data/eval.jsonl"), "--verifier", "chain_answer"),
        (*rank, "--reward-model", str(model)),
        (*rank, "--value-model", str(model)),
    ):
        told, err = evaluate(*words)
        assert (told["exit_code"], told["message"].count("\n")) == (5, 0)
        assert said in told["message"]
        assert "greedy" not in err


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_heads_that_vllm_cannot_run_are_refused_before_anything_is_loaded(
    finished_run: Path, chains: Path, evaluate: Evaluate, engine: str
) -> None:
    """The quickstart's model has heads of 16 on a CPU: preflight's X010."""
    from rlhfctl.preflight.devices import this_machine

    if this_machine().usable_gpus:
        pytest.skip("a GPU runs heads of any size")
    data = ("--data", str(chains / "data/eval.jsonl"), "--verifier", "chain_answer")
    for words in ((str(finished_run),), (str(finished_run / "final"), *data)):
        told, err = evaluate(*words, "--engine", engine)
        assert told["exit_code"] == 4
        said = "the policy's attention heads have size 16, which vLLM cannot run on a CPU: use --engine hf"
        assert (told["message"], err) == (said, f"{said}\n")


def test_a_ctrl_c_says_that_there_is_no_result(
    finished_run: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "never.jsonl")  # read without end
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    told, err = evaluate(str(finished_run), "--data", str(tmp_path / "never.jsonl"))
    timer.join()
    assert (told["exit_code"], told["message"]) == (130, "interrupted before there was a result")
    assert err == "interrupted before there was a result\n"


def test_an_unfinished_run_and_a_reward_model_run(
    finished_run: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text((finished_run / "recipe.yaml").read_text())
    told, _ = evaluate(str(tmp_path))
    assert told["exit_code"] == 5
    assert "has no final/ model: the run is not finished" in told["message"]
    from rlhfctl.recipe.load import dump, load_recipe

    (tmp_path / "recipe.yaml").write_text(dump(load_recipe("quickstart/rm").recipe))
    told, _ = evaluate(str(tmp_path))
    assert "a reward model writes no answers" in told["message"]


def test_a_value_model_guides_and_is_measured(
    finished_run: Path, chains: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    import torch

    from rlhfctl.models.load import backbone, load_causal_lm
    from rlhfctl.models.value_model import save_value_model
    from rlhfctl.recipe.sections import Policy

    policy = Policy(path=str(finished_run / "final"))
    trunk = backbone(load_causal_lm(policy, torch.device("cpu"), 0))
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    save_value_model(tmp_path / "value", trunk, head, policy, {"link": "logistic", "alpha": 0.5})
    words = (str(finished_run), "--limit", "12", "--value-model", str(tmp_path / "value"))
    told, err = evaluate(*words, "--search", "beam", "-n", "8", "--save-trees", str(tmp_path / "trees.jsonl"))
    assert (told["exit_code"], told["method"]) == (0, "beam_8"), told
    assert "beams of 8, score V + 0.5 log pi" in err
    assert {"accuracy/beam_8", "value/auc", "value/calibration_error"} <= set(told["metrics"])
    assert told["differences"]["accuracy beam_8 - greedy"]["n"] == 12
    trees = [json.loads(line) for line in (tmp_path / "trees.jsonl").read_text().splitlines()]
    for tree in trees:
        for node in tree["nodes"]:
            assert node["score"] == pytest.approx(node["value"] + 0.5 * node["logprob"])
    told, _ = evaluate(
        *words, "--search", "best-of-n", "-n", "3", "--alpha", "0", "--out", str(tmp_path / "out")
    )
    assert told["method"] == "best_of_3"
    for line in (tmp_path / "out/results.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["chosen"]["score"] == max(answer["score"] for answer in row["samples"])
    told, _ = evaluate(*words, "--search", "beam", "--delimiter", "#######")
    assert told["exit_code"] == 5
    assert "holds the delimiter '#######'" in told["message"]
    other = tmp_path / "value/tokenizer.json"
    other.write_text(other.read_text().replace('"+"', '"&"'))
    told, _ = evaluate(*words, "--search", "beam")
    assert told["exit_code"] == 5
    assert "another vocabulary" in told["message"]


def test_a_reranker_of_two_labels_is_one_sentence(
    finished_run: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    """Which of its two labels means right, and on what scale, it does not say."""
    import shutil

    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(finished_run / "final", num_labels=2)
    shutil.copytree(
        finished_run / "final", tmp_path / "reranker", ignore=shutil.ignore_patterns("*.safetensors")
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reranker")
    words = ["--search", "best-of-n", "-n", "2", "--limit", "2", "--reward-model", str(tmp_path / "reranker")]
    told, _ = evaluate(str(finished_run), *words)
    assert (told["exit_code"], told["message"].count("\n")) == (5, 0)
    assert "has shape [2, 64] (two labels" in told["message"]


def test_a_value_is_kept_where_nothing_ends_a_step(
    finished_run: Path, chains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """alpha cannot be chosen by a search; what was fitted ranks whole answers."""
    import torch

    from rlhfctl.models.value_model import load_value_model
    from rlhfctl.trainers import value_command

    words = [str(finished_run), "--data", f"{chains}/data/eval.jsonl", "--samples", "40", "--steps", "2"]
    assert value_command.main([*words, "--delimiter", "\u00a7", "--out", str(tmp_path / "v")]) == 0
    assert "no alpha is chosen: none of 400 answers holds the delimiter '\u00a7'" in capsys.readouterr().err
    fitted = load_value_model(tmp_path / "v", torch.float32, torch.device("cpu"))
    assert (fitted.facts["link"], "alpha" in fitted.facts) == ("logistic", False)
    assert value_command.main([*words, "--delimiter", ""]) == 2
