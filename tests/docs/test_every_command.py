"""Every command line of the pages and of the recipes' headers: run here, or listed here with the reason why not.

What trains is run with --dry-run (all its checks, nothing is started); the rest as it stands, on models and data of the
names that the pages use, which are tiny, after one step of sft and one of ppo. `rlhfctl` is called in this process.
"""

import json
import random
import re
import shlex
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, REPO, blocks, header_commands, page_commands
from tiny_hub import MODELS, write_model

from rlhfctl.cli.main import run
from rlhfctl.quickstart.chains import CHATML, PLAIN, chain, draw_prompts
from rlhfctl.quickstart.chains import write_model as write_family
from rlhfctl.recipe.load import dump, load_recipe
from rlhfctl.recipe.tasks import TASKS
from rlhfctl.run_dir import RunDir, write_text
from rlhfctl.stop import SIGNALS

pytest.importorskip("torch")
from safetensors.torch import load_file, save_file

RECIPES = sorted((REPO / "recipes").glob("*/*.yaml"))
# A header's launch line is its override line with fewer keys (tests/recipe/test_load.py).
HEADER = ("Before", "Override")
# Not run here, each with the reason; a line that no page has any more is an error.
LISTED = {
    r"make .*|pip install .*|pipx install .*": "installs, or runs this suite: the CI jobs",
    r"echo \$\?": "the code of the line above: ENDS",
    r"script: # gate.sh .*|sh gate.sh .*": "tests/docs/test_ci_page.py runs it",
    r"python3 -m rlhfctl.preflight.sarif .*": "reads two reports: tests/preflight/test_sarif.py",
    r"script: .*": "starts several machines: tests/docs/test_cluster_page.py",
    r"python -m rlhfctl.quickstart.chains .*": "seconds of CPU: tests/quickstart/test_chains.py",
    r"python recipes/stories/pairs.py .*": "minutes: tests/quickstart/test_stories.py",
    r"rlhfctl serve-rm .*": "goes on until it is stopped: tests/serving/test_process.py",
    r"rlhfctl ppo (quickstart/served-rm|gsm8k/remote-rm) .*": "asks a service: tests/e2e/test_remote_reward.py",
    r"VLLM_SERVER_DEV_MODE=1 vllm serve .*": "needs vLLM: tests/e2e/test_vllm_server.py",
    r"rlhfctl .* \[.*": "a form, not a command: tests/docs/test_commands.py",
}


def commands() -> list[tuple[str, str]]:
    """(page, line); of two lines that are the same the first."""
    found = [(line, path) for path in PAGES for line in page_commands(path.read_text())]
    found += [(line, path) for path in RECIPES for line in header_commands(path.read_text(), *HEADER)]
    first = dict(reversed(found))
    return [(path.relative_to(REPO).as_posix(), line) for line, path in first.items()]


def reason(page: str, line: str) -> str | None:
    """Why the line is not run here."""
    if page.startswith("docs/tutorials/") and "inspect-template" not in line and "--dry-run" not in line:
        return "tests/docs/test_tutorials.py runs it"
    return next((why for pattern, why in LISTED.items() if re.fullmatch(pattern, line)), None)


# Digits alone: every tokenizer here reads them, and the verifiers need no algebra, which takes half a second to load.
ROWS: dict[str, list[dict[str, Any]]] = {
    "qa": [{"question": "3?", "answer": "7"}],
    "chain": [{"question": "3+0*1-0+4?", "answer": "7"}],
    "trajectory": [
        {"prompt": "3?", "response": "1\n7", "reward": 1},
        {"prompt": "3?", "response": "1\n8", "reward": 0},
    ],
    "preference": [{"prompt": "3?", "chosen": "7", "rejected": "8 or 9"}],
    "messages": [
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
    ],
}
FILES = {
    "qa": "q.jsonl questions.jsonl held-out.jsonl gsm8k/train.jsonl gsm8k/test.jsonl "
    "data/gsm8k/train.jsonl data/gsm8k/test.jsonl",
    "chain": "prompts.jsonl",
    "trajectory": "trajectories.jsonl trajectories_eval.jsonl offline.jsonl mine.jsonl",
    "preference": "pairs.jsonl .stories/pairs.jsonl .stories/pairs_eval.jsonl",
    "messages": "alpaca.jsonl data/alpaca.messages.jsonl",
}
QWEN, REWARD_MODEL = "Qwen/Qwen2.5-0.5B-Instruct", "Skywork/Skywork-Reward-V2-Llama-3.1-8B"
ALIASES = (
    "Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-7B "
    "Qwen/Qwen3-8B meta-llama/Llama-3.1-8B-Instruct models/stories260k models/m"
)
PLACEHOLDERS = {
    "POLICY": QWEN,
    "REWARD_MODEL": REWARD_MODEL,
    "RUN": "runs/a",
    "Q.jsonl": "prompts.jsonl",
    "policy.path=DIR": "policy.path=models/stories260k",
    "reward.sources.0.path=DIR": "reward.sources.0.path=runs/rm/final",
    "FILE": "alpaca.jsonl",
    "NODE0": "127.0.0.1",
}
# A command that is shown to be refused, and how it ends.
ENDS = {
    "rlhfctl ppo quickstart/ppo algorithm.klcoef=3 optim.lr=abc": 2,
    "rlhfctl inspect-template POLICY REWARD_MODEL": 3,
    "rlhfctl inspect-template POLICY REWARD_MODEL --json": 3,
    f"rlhfctl inspect-template Qwen/Qwen2.5-7B-Instruct {REWARD_MODEL}": 3,
}


def execute(page: str, line: str) -> int:
    """The exit code of one command line, with small things in the place of a page's large ones."""
    line = re.sub(r"^source <\((.*)\)$", r"\1", line).removesuffix(" | source")
    for name, value in PLACEHOLDERS.items():
        line = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w])", value, line)
    program, *words = shlex.split(re.split(r" > ", line)[0])
    assert program == "rlhfctl", f"{page}: `{line}` is neither run nor listed"
    if words[0] in TASKS:
        return dry(page, words)
    if words[0] == "eval":
        words += ["--limit", "2", "--max-new-tokens", "8"]
        if "--save-trajectories" in words:  # not over the rows that other lines read
            words[words.index("--save-trajectories") + 1] = "sampled.jsonl"
    return call(words)


def dry(page: str, words: list[str]) -> int:
    """A command that trains, up to its start: my.yaml is the page's, rows from the hub become local ones."""
    task, *rest = words
    if "my.yaml" in rest or "mine.yaml" in rest:
        shown = blocks((REPO / page).read_text(), "yaml") if "tutorials" in page else []
        for name in {"my.yaml", "mine.yaml"} & set(rest):
            Path(name).write_text(
                shown[0].replace("runs/sft/final", QWEN) if shown else Path(f"{task}.yaml").read_text()
            )
    if "--resume" in rest:
        return call([*words, "--dry-run"])
    if "--run-dir" in rest:
        rest[rest.index("--run-dir") + 1] = f"fresh/{len(list(Path('fresh').glob('*')))}"
    keys = [word for word in rest if "=" in word]
    if page.startswith("README"):
        return call([*words, "--dry-run"])
    data = load_recipe(rest[0], keys).recipe.data
    for part in ("train", "eval"):
        if any(source.path == "openai/gsm8k" for source in getattr(data, part)):
            keys.append(f"data.{part}=[{{path: questions.jsonl, format: qa}}]")
    return call([task, *[word for word in rest if "=" not in word], *keys, "--dry-run"])


def write_rows(path: Path, rows: list[dict[str, Any]], count: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(
            json.dumps(row | {"id": f"{n}-{i}"}) + "\n" for n in range(count) for i, row in enumerate(rows)
        )
    )


def write_chains(directory: Path) -> None:
    """The quickstart's files, a few rows each."""
    for name, family in (("model", PLAIN), ("model-b", CHATML)):
        write_family(directory / name, family)
    questions = draw_prompts(
        260, random.Random(0)
    )  # 200 of them are held out where a value for search is fitted
    prompts = questions[:6]
    right = [{"prompt": f"{prompt}?", "response": chain(prompt)} for prompt in prompts]
    wrong = [row["response"][:-1] + str((int(row["response"][-1]) + 1) % 10) for row in right]
    rows = {
        "sft": [row | {"label": row["response"][-1]} for row in right],
        "prompts": [{"question": f"{prompt}?", "answer": chain(prompt)[-1]} for prompt in questions],
        "eval": [{"question": row["prompt"], "answer": row["response"][-1]} for row in right],
        "pairs": [
            {"prompt": row["prompt"], "chosen": row["response"], "rejected": bad}
            for row, bad in zip(right, wrong, strict=True)
        ],
        "steps": [
            {"prompt": row["prompt"], "completions": bad.split("\n"), "labels": [True] * 4 + [False]}
            for row, bad in zip(right, wrong, strict=True)
        ],
    }
    for name, content in (rows | {"pairs_eval": rows["pairs"]}).items():
        write_rows(directory / f"data/{name}.jsonl", content, 1)
    judged = [row | {"reward": 1} for row in right]
    judged += [row | {"response": bad, "reward": 0} for row, bad in zip(right, wrong, strict=True)]
    write_rows(directory / "trajectories.jsonl", judged, 1)


# my.yaml of a page that shows none: the quickstart's recipe of that task, one step long.
SHORT = "train: {{{length}, batch_size: 8, eval_every: 0, log_every: 1}}\n"
MY = {
    "sft": SHORT.format(length="steps: null, epochs: 1") + "rollout: {max_new_tokens: 8}\n",
    "rm": SHORT.format(length="steps: 1"),
    "ppo": SHORT.format(length="steps: 1")
    + "rollout: {n: 2, max_new_tokens: 8}\nalgorithm: {minibatches: 1}\n",
    "reft": SHORT.format(length="steps: 1")
    + "rollout: {n: 2, max_new_tokens: 8}\nalgorithm: {minibatches: 1}\n",
    "oreo": SHORT.format(length="steps: 1")
    + "rollout: {max_new_tokens: 8}\nalgorithm: {value_warmup_steps: 0}\n",
}
LINKS = {  # what an earlier step of some page makes: one of the two runs or of the models above
    ".quickstart/sft": ".quickstart/sft-b runs/toy/20260102-030405",
    "runs/a": "runs/b runs/sft runs/cross runs/dense",
    REWARD_MODEL: ".quickstart/rm/final .stories/rm/final runs/rm/final runs/gsm8k-rm/final",
}


def call(words: list[str]) -> int:
    """rlhfctl in this process; its signal handlers are not left behind."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        return run(words)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def answer_seven_or_eight(file: Path) -> None:
    """The policy of the quickstart's family then answers a line and `#7` or `#8`, each half of the time."""
    weights = load_file(file)
    ids = {token: number for number, token in enumerate(PLAIN.vocabulary)}
    follows = {"?": ["="], "=": ["\n"], "\n": ["#"], "#": ["7", "8"]} | {
        digit: ["<eos>"] for digit in "0123456789"
    }
    for name, tensor in weights.items():
        if "norm" not in name:
            tensor.zero_()
    for token, nexts in follows.items():
        weights["model.embed_tokens.weight"][ids[token], ids[token]] = 1.0
        for each in nexts:
            weights["lm_head.weight"][ids[each], ids[token]] = 4.0
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory as the reader's after the steps before: models, rows, and runs of one step each."""
    home = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_model(home / QWEN, *MODELS[QWEN])
        write_model(home / REWARD_MODEL, *MODELS[REWARD_MODEL])
        link(QWEN, ALIASES)
        for form, names in FILES.items():
            for name in names.split():
                write_rows(home / name, ROWS[form])
        write_chains(home / ".quickstart")
        for task in TASKS:
            Path(f"{task}.yaml").write_text(f"task: {task}\nextends: quickstart/{task}\n{MY[task]}")
        link("ppo.yaml", "my-ppo.yaml")
        Path("chat.jinja").write_text(CHATML.template)
        assert call(["sft", "sft.yaml", "--run-dir", ".quickstart/sft", "-q"]) == 0
        answer_seven_or_eight(Path(".quickstart/sft/final/model.safetensors"))
        assert call(["ppo", "ppo.yaml", "--run-dir", "runs/a", "-q"]) == 0
        RunDir(".quickstart/reft").create()
        write_text(RunDir(".quickstart/reft").recipe, dump(load_recipe("reft.yaml").recipe))
        for target, names in LINKS.items():
            link(target, names)
        assert call(["eval", "runs/a", "--out", "runs/a/eval", "-q"]) == 0
        Path(
            "stories"
        ).mkdir()  # without a prompts.jsonl, which would be read before the one beside the recipe
        for name in ("models", ".stories", "data", "alpaca.jsonl"):
            Path("stories", name).symlink_to(home / name)
        yield home


def link(target: str, names: str) -> None:
    for name in names.split():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(Path(target).absolute())


@pytest.mark.parametrize(("page", "line"), [each for each in commands() if reason(*each) is None])
def test_the_command_ends_as_the_page_says(
    page: str, line: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home / "stories" if "stories" in page else home)
    code = execute(page, line)
    said = capsys.readouterr()
    missing = re.search("not started: packages are missing: (.*)", said.err)
    if missing and not any(map(find_spec, missing[1].split(", "))):
        assert code == 4  # of a bare installation; all else about the line was checked before
        return
    assert code == ENDS.get(line, 0), f"{page}: {line}\n{said.out[-2000:]}{said.err}"


def test_what_is_listed_is_on_a_page() -> None:
    lines = [line for _, line in commands()]
    assert [pattern for pattern in LISTED if not any(re.fullmatch(pattern, line) for line in lines)] == []


@pytest.mark.parametrize(
    "line", ["accelerate launch x.py", "rlhfctl frob runs/a", "rlhfctl report --frob runs/a"]
)
def test_a_new_command_is_run_or_must_be_listed(
    line: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert page_commands(f"Text.\n\n```\n$ {line}   # a comment\noutput\n```\n") == [line]
    assert page_commands(f"```\nrlhfctl doctor\n{line} \\\n  --more\n```\n") == [
        "rlhfctl doctor",
        f"{line}    --more",
    ]
    assert reason("docs/new.md", line) is None
    with pytest.raises(AssertionError):
        assert execute("docs/new.md", line) == 0
