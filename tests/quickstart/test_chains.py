import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.quickstart import chains

PROMPT = "3+8*2-9+5"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return chains.make_rows(0)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quickstart")
    chains.main([str(directory), "--seed", "0"])
    return directory


def test_right_chain_by_hand() -> None:
    assert chains.chain(PROMPT) == "3+8=1\n1*2=2\n2-9=3\n3+5=8\n#8"


def test_annotator_goes_on_from_its_own_slip() -> None:
    never_right = random.Random(0)
    never_right.random = lambda: 0.5  # type: ignore[method-assign]  # above Q_HARD, below 1 - SLIP
    wrong = chains.chain(PROMPT, {(1, "*", 2): 7}, never_right)
    assert wrong == "3+8=1\n1*2=7\n7-9=8\n8+5=3\n#3"


def test_hard_facts_are_a_fixed_share_and_wrong() -> None:
    hard = chains.draw_hard_facts(random.Random(5))
    assert len(hard) == 120
    assert all(chains.apply(*fact) != digit for fact, digit in hard.items())


def test_annotator_accuracy_is_that_of_the_task(rows: dict[str, list[dict[str, str]]]) -> None:
    """About .28 over seeds for this setting; one seed's choice of hard facts moves it by a few points."""
    right = [row["response"][-1] == chains.chain(row["prompt"][:-1])[-1] for row in rows["sft"]]
    whole = [row["response"] == chains.chain(row["prompt"][:-1]) for row in rows["sft"]]
    assert 0.24 < sum(right) / len(right) < 0.34
    assert 0.12 < sum(whole) / len(whole) < 0.24


def test_counts_and_no_prompt_twice(rows: dict[str, list[dict[str, str]]]) -> None:
    assert {name: len(content) for name, content in rows.items()} == {
        "sft": 20000,
        "prompts": 2000,
        "eval": 1000,
        "pairs": 24000,
        "pairs_eval": 1000,
        "steps": 24000,
    }
    prompts = [row.get("prompt") or row["question"] for content in rows.values() for row in content]
    assert len(set(prompts)) == 72000
    assert len({row["id"] for content in rows.values() for row in content}) == 72000


def test_pairs_are_a_right_and_a_wrong_chain(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in rows["pairs"] + rows["pairs_eval"]:
        assert row["chosen"] == chains.chain(row["prompt"][:-1])
        assert row["rejected"][-1] != row["chosen"][-1]
        assert len(row["rejected"]) == len(row["chosen"])  # length tells nothing


def test_steps_are_labelled_one_by_one(rows: dict[str, list[dict[str, Any]]]) -> None:
    wrong = 0
    for row in rows["steps"]:
        for step, label in zip(row["completions"][:-1], row["labels"][:-1], strict=True):
            a, op, b = int(step[0]), step[1], int(step[2])
            right = {"+": a + b, "-": a - b, "*": a * b}[op] % 10 == int(step[4])
            assert label is right
            wrong += not right
        assert row["labels"][-1] is ("\n".join(row["completions"]) == chains.chain(row["prompt"][:-1]))
        if row["labels"][-1]:
            assert row["right"]
    assert 0.28 < wrong / (chains.N_OPS * len(rows["steps"])) < 0.32


def test_the_last_step_answers_for_all() -> None:
    assert chains.step_labels(["3+8=1", "1*2=2", "2-9=3", "3+5=8", "#8"]) == [True] * 5
    assert chains.step_labels(["3+8=1", "1*2=7", "7-9=8", "8+5=3", "#3"]) == [True, False, True, True, False]
    assert chains.step_labels(["3+8=1", "1*2=2", "2-9=3", "3+5=8", "#3"]) == [True, True, True, True, False]


def test_steps_are_wrong_on_every_fact_alike(rows: dict[str, list[dict[str, Any]]]) -> None:
    """What is hard for the annotator and what is not: a label tells as much of the one as of the other."""
    hard = chains.draw_hard_facts(random.Random("mod-10 chains 0"))
    wrong: dict[bool, list[bool]] = {True: [], False: []}
    favourite = 0
    for row in rows["steps"]:
        for step, label in zip(row["completions"][:-1], row["labels"][:-1], strict=True):
            fact = (int(step[0]), step[1], int(step[2]))
            wrong[fact in hard].append(not label)
            favourite += hard.get(fact) == int(step[4])
    shares = {kind: sum(marks) / len(marks) for kind, marks in wrong.items()}
    assert all(0.28 < share < 0.32 for share in shares.values())
    assert 0.5 < favourite / sum(wrong[True]) < 0.6  # half, and a slip in nine hits the same digit


def test_labels_are_right(rows: dict[str, list[dict[str, str]]]) -> None:
    for row in rows["prompts"] + rows["eval"]:
        value = int(row["question"][0])
        for op, digit in zip(row["question"][1:-1:2], row["question"][2:-1:2], strict=True):
            value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[op] % 10
        assert row["answer"] == str(value)


def test_same_seed_same_bytes_on_every_machine(out: Path) -> None:
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted((out / "data").iterdir())
    }
    assert digests == DIGESTS


def test_other_seed_other_facts() -> None:
    assert chains.make_rows(1)["sft"][0] != chains.make_rows(0)["sft"][0]


def test_tokenizer_alone_and_through_transformers(out: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": f"{PROMPT}?"}, {"role": "assistant", "content": "3+8=1\n#1"}]
    wrapped = AutoTokenizer.from_pretrained(out / "model")
    text = wrapped.apply_chat_template(messages, tokenize=False)
    assert text == "3+8*2-9+5?3+8=1\n#1<eos>"
    alone = Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    expected = [3, 10, 8, 12, 2, 11, 9, 10, 5, 16, 3, 10, 8, 13, 1, 14, 15, 1, 18]
    assert alone.encode(text, add_special_tokens=False).ids == expected
    assert wrapped(text)["input_ids"] == expected
    assert alone.decode(expected, skip_special_tokens=False) == text
    assert (wrapped.pad_token_id, wrapped.eos_token_id, len(wrapped)) == (17, 18, 19)


def test_unknown_character_is_not_dropped_in_silence() -> None:
    with pytest.raises(Exception, match="UNK"):
        chains.make_tokenizer().encode("3/8")


def test_model_size(out: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out / "model"))
    # 2 x 19 x 64 embeddings, 3 x (4 x 64 x 64 + 3 x 64 x 192 + 2 x 64), final norm 64
    assert sum(p.numel() for p in model.parameters()) == 162_624


def test_rows_load_with_detected_formats(out: Path) -> None:
    from rlhfctl.data.load import load_samples
    from rlhfctl.recipe.sections import DataSource

    sft = load_samples([DataSource(path=str(out / "data" / "sft.jsonl"))])
    assert (sft.reports[0].format, len(sft.samples), sft.samples[0].id) == ("prompt_response", 20000, "sft-0")
    evaluation = load_samples([DataSource(path=str(out / "data" / "eval.jsonl"))]).samples[0]
    assert evaluation.label == "8"
    assert evaluation.response == "5*9=5\n5*0=0\n0+4=4\n4*7=8\n#8"
    assert evaluation.messages == [{"role": "user", "content": "5*9*0+4*7?"}]


def test_command_line_is_light(tmp_path: Path) -> None:
    code = (
        "import sys; from rlhfctl.quickstart import chains; chains.main([sys.argv[1]]); "
        "print(sorted(m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["pad_token_id"] != config["eos_token_id"]


def test_unwritable_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "rlhfctl.quickstart.chains", str(tmp_path / "file")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write")
    assert "Traceback" not in done.stderr


DIGESTS = {
    "eval.jsonl": "812ea159c0145124",
    "pairs.jsonl": "9e972c181bb716fe",
    "pairs_eval.jsonl": "581f907c40fb38f4",
    "prompts.jsonl": "1d04d2f0d85d4510",
    "sft.jsonl": "bda60cadf54e4f3b",
    "steps.jsonl": "534951ab44fd7625",
}
