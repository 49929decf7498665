"""The completion scripts in real shells: bash and fish through a pty, zsh through its zpty module."""

import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Complete = Callable[[str], str]


def require(shell: str) -> str:
    """The shell's path. Absent: skipped on a developer's box, a failure in CI."""
    path = shutil.which(shell)
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{shell} is not installed")
        pytest.skip(f"{shell} is not installed")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an rlhfctl on its own PATH, a recipe and some other files to complete."""
    path = tmp_path_factory.mktemp("shell")
    (path / "bin").mkdir()
    command = path / "bin/rlhfctl"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rlhfctl "$@"\n')
    command.chmod(0o755)
    (path / "desk/mine").mkdir(parents=True)
    (path / "desk/mine/first.yaml").write_text("task: sft\n")
    (path / "desk/mine/notes.txt").write_text("")
    (path / "desk/with space.jsonl").write_text("")
    run = path / "desk/done/first"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("task: sft\n")
    (run / "status.json").write_text('{"state": "done", "step": 120}')
    return path


def environment(place: Path) -> dict[str, str]:
    return {
        "PATH": f"{place}/bin:{os.environ['PATH']}",
        "HOME": str(place),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),  # this checkout, whatever is installed
        "TERM": "dumb",
        "LANG": "C.UTF-8",
    }


class Terminal:
    """A shell on a pty. `complete` types a line and a TAB, and returns the line as it then stands."""

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # fish asks whose terminal it is
        )
        os.close(slave)

    def read(self, until: str, timeout: float = 20.0) -> str:
        text, deadline = "", time.monotonic() + timeout
        while until not in text:
            if time.monotonic() > deadline:
                raise AssertionError(f"no {until!r} in {text!r}")
            if select.select([self.master], [], [], 0.1)[0]:
                text += os.read(self.master, 65536).decode(errors="replace")
        return text

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def install_line(repo: Path, shell: str) -> str:
    """The line of the README that installs the completion of this shell."""
    (line,) = re.findall(
        rf"^(.*--completion {shell}\b.*?) +#", (repo / "README.md").read_text(), re.MULTILINE
    )
    return str(line)


@pytest.fixture(scope="module")
def bash(place: Path, repo: Path) -> Iterator[Complete]:
    """Ctrl-X Ctrl-L prints the line being edited, so what is read back is the line and not an echo of it."""
    terminal = Terminal([require("bash"), "--norc", "--noprofile", "-i"], place / "desk", environment(place))
    terminal.send(
        "PS1='READY> '; set +o history; bind 'set enable-bracketed-paste off'; bind 'set bell-style none'\n"
        "bind 'set show-all-if-ambiguous on'; bind 'set completion-query-items 0'; bind 'set page-completions off'\n"
        'show() { printf "\\nLINE[%s]END\\n" "$READLINE_LINE"; READLINE_LINE=; }; bind -x \'"\\C-x\\C-l": show\'\n'
        f"{install_line(repo, 'bash')}; echo SET''UP\n"
    )
    terminal.read("SETUP")

    def complete(line: str) -> str:
        terminal.send(f"{line}\t\x18\x0c")
        return terminal.read("]END")

    yield complete
    terminal.close()


def line_of(shown: str) -> str:
    found = re.search(r"LINE\[(.*)\]END", shown)
    assert found is not None
    return found[1]


TILDES = [
    ("rlhfctl sft ~/desk/mine/fi", "rlhfctl sft ~/desk/mine/first.yaml "),
    ("rlhfctl ppo --run-dir ~/desk/mi", "rlhfctl ppo --run-dir ~/desk/mine/"),
]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("rlhfctl rec", "rlhfctl recipes "),
        ("rlhfctl pp", "rlhfctl ppo "),
        ("rlhfctl ppo quickstart/p", "rlhfctl ppo quickstart/ppo "),
        ("rlhfctl sft mi", "rlhfctl sft mine/"),
        ("rlhfctl sft mine/", "rlhfctl sft mine/first.yaml "),
        ("rlhfctl ppo --dry", "rlhfctl ppo --dry-run "),
        ("rlhfctl ppo quickstart/ppo algor", "rlhfctl ppo quickstart/ppo algorithm."),
        ("rlhfctl ppo quickstart/ppo optim.weight", "rlhfctl ppo quickstart/ppo optim.weight_decay="),
        ("rlhfctl ppo x algorithm.advantage=gr", "rlhfctl ppo x algorithm.advantage=grpo "),
        ("rlhfctl ppo x algorithm.advantage=rei", "rlhfctl ppo x algorithm.advantage=reinforce"),
        ("rlhfctl ppo x data.shuffle=", "rlhfctl ppo x data.shuffle="),
        ("rlhfctl ppo x data.shuffle=f", "rlhfctl ppo x data.shuffle=false "),
        ("rlhfctl ppo x data.train.2.for", "rlhfctl ppo x data.train.2.format="),
        ("rlhfctl ppo x data.train.0.path=mine/n", "rlhfctl ppo x data.train.0.path=mine/notes.txt "),
        ("rlhfctl ppo x data.train.0.path=wi", r"rlhfctl ppo x data.train.0.path=with\ space.jsonl "),
        ("rlhfctl ppo x reward.sources.0.kind=v", "rlhfctl ppo x reward.sources.0.kind=verifier "),
        ("rlhfctl ppo --run-dir mi", "rlhfctl ppo --run-dir mine/"),
        ("rlhfctl sft x algor", "rlhfctl sft x algor"),
        ("rlhfctl recipes show quickstart/pp", "rlhfctl recipes show quickstart/ppo "),
        ("rlhfctl recipes schema p", "rlhfctl recipes schema ppo "),
        ("rlhfctl report don", "rlhfctl report done/"),
        ("rlhfctl report done/f", "rlhfctl report done/first "),
        ("rlhfctl report done/first done/f", "rlhfctl report done/first done/first "),
        ("rlhfctl eval done/", "rlhfctl eval done/first "),
        ("rlhfctl eval done/first --verifier pr", "rlhfctl eval done/first --verifier program_answer "),
        ("rlhfctl eval done/first --engine v", "rlhfctl eval done/first --engine vllm"),
        ("rlhfctl eval done/first --engine vllm_", "rlhfctl eval done/first --engine vllm_server "),
        ("rlhfctl serve-rm x --engine p", "rlhfctl serve-rm x --engine plain "),
        ("rlhfctl --completion f", "rlhfctl --completion fish "),
        (
            "rlhfctl doctor --verify-resume quickstart/ppo train.st",
            "rlhfctl doctor --verify-resume quickstart/ppo train.steps=",
        ),
        ("rlhfctl eval done/first --seed d", "rlhfctl eval done/first --seed d"),
        ("rlhfctl ppo --resume --run-dir done/", "rlhfctl ppo --resume --run-dir done/first "),
        ("rlhfctl ppo x tracking.wandb.mode=o", "rlhfctl ppo x tracking.wandb.mode=o"),
        ("rlhfctl ppo x tracking.wandb.mode=of", "rlhfctl ppo x tracking.wandb.mode=offline "),
        *TILDES,
        (
            "rlhfctl ppo x data.train.0.path=~/desk/mine/n",
            "rlhfctl ppo x data.train.0.path=~/desk/mine/notes.txt ",
        ),
        ("rlhfctl ppo x 'data.train.0.path=wi", "rlhfctl ppo x 'data.train.0.path=with space.jsonl' "),
        ("rlhfctl ppo x data.train.0.path='wi", "rlhfctl ppo x data.train.0.path='with space.jsonl' "),
        ('rlhfctl ppo x data.train.0.path="with s', 'rlhfctl ppo x data.train.0.path="with space.jsonl" '),
    ],
)
def test_bash(bash: Complete, typed: str, line: str) -> None:
    assert line_of(bash(typed)) == line


def test_bash_lists_what_is_possible(bash: Complete) -> None:
    assert {"sft", "ppo", "recipes", "doctor", "inspect-template"} <= set(bash("rlhfctl ").split())
    listed = set(bash("rlhfctl ppo x algorithm.advantage=").split())
    assert {"gae", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline"} <= listed
    assert {"optim.lr=", "optim.betas="} <= set(bash("rlhfctl ppo x optim.").split())


ZPTY = r"""
zmodload zsh/zpty
setopt extended_glob
zpty -b shell "$ZSH -f -i"
send() { zpty -w -n shell "$1" }
expect() {
  local out all
  until [[ $all == *"$1"* ]]; do zpty -r -m -t shell out 2>/dev/null && all+=$out || sleep 0.02; done
  REPLY=$all
}
send $'PS1=; PROMPT_EOL_MARK=; unsetopt beep; LISTMAX=10000; COLUMNS=200\n'
send $'zle_show() { zle -I; print -r -- "LINE[$LBUFFER]END"; BUFFER= }; zle -N zle_show\n'
send $'bindkey "^X^L" zle_show; bindkey "^I" complete-word\n'
send "$SETUP"$'\nprint SET""UP\n'
expect SETUP
while IFS= read -r typed; do
  send "$typed"$'\t'; send $'\x18\x0c'
  expect ']END'
  print -r -- "${REPLY//$'\n'/ }" | tr -d '\r'
done
zpty -d shell
"""


def zsh_lines(place: Path, repo: Path, typed: list[str], setup: str) -> list[str]:
    env = {**environment(place), "ZSH": require("zsh"), "SETUP": setup, "REPO": str(repo)}
    done = subprocess.run(
        [require("zsh"), "-f", "-c", ZPTY],
        input="".join(f"{line}\n" for line in typed),
        capture_output=True,
        text=True,
        cwd=place / "desk",
        env=env,
        timeout=180,
    )
    lines = [line for line in done.stdout.splitlines() if "LINE[" in line]
    assert len(lines) == len(typed), (done.stdout, done.stderr)
    return lines


FROM_FPATH = "fpath=($REPO/completions $fpath); autoload -Uz compinit; compinit -u -D"
SOURCED = "autoload -Uz compinit; compinit -u -D; "

ZSH_CASES = [
    ("rlhfctl rec", "rlhfctl recipes "),
    ("rlhfctl ppo quickstart/p", "rlhfctl ppo quickstart/ppo "),
    ("rlhfctl sft mi", "rlhfctl sft mine/"),
    ("rlhfctl ppo --dry", "rlhfctl ppo --dry-run "),
    ("rlhfctl ppo x algor", "rlhfctl ppo x algorithm."),
    ("rlhfctl ppo x optim.weight", "rlhfctl ppo x optim.weight_decay="),
    ("rlhfctl ppo x algorithm.advantage=gr", "rlhfctl ppo x algorithm.advantage=grpo "),
    ("rlhfctl ppo x data.shuffle=f", "rlhfctl ppo x data.shuffle=false "),
    ("rlhfctl ppo x data.train.2.for", "rlhfctl ppo x data.train.2.format="),
    ("rlhfctl ppo x data.train.0.path=wi", r"rlhfctl ppo x data.train.0.path=with\ space.jsonl "),
    ("rlhfctl ppo --run-dir mi", "rlhfctl ppo --run-dir mine/"),
    ("rlhfctl sft x algor", "rlhfctl sft x algor"),
    ("rlhfctl recipes schema p", "rlhfctl recipes schema ppo "),
    ("rlhfctl report done/f", "rlhfctl report done/first "),
    ("rlhfctl eval done/first --verifier pr", "rlhfctl eval done/first --verifier program_answer "),
    *TILDES,
]


@pytest.mark.parametrize("setup", [FROM_FPATH, SOURCED], ids=["from fpath", "sourced"])
def test_zsh(place: Path, repo: Path, setup: str) -> None:
    setup += install_line(repo, "zsh") if setup is SOURCED else ""
    shown = zsh_lines(place, repo, [typed for typed, _ in ZSH_CASES], setup)
    assert [line_of(each) for each in shown] == [line for _, line in ZSH_CASES]


def test_zsh_completes_at_the_first_tab_and_lists_with_descriptions(place: Path, repo: Path) -> None:
    (first,) = zsh_lines(place, repo, ["rlhfctl ppo x algorithm.kl"], FROM_FPATH)
    assert line_of(first) == "rlhfctl ppo x algorithm.kl_"
    (commands,) = zsh_lines(place, repo, ["rlhfctl s"], FROM_FPATH)
    assert "sft" in commands
    assert "Supervised fine-tuning on prompts and responses." in commands
    (ended,) = zsh_lines(place, repo, ["rlhfctl report done/f"], FROM_FPATH + "; setopt always_last_prompt")
    assert line_of(ended) == "rlhfctl report done/first "


@pytest.fixture(scope="module")
def fish(place: Path, repo: Path) -> Iterator[Complete]:
    terminal = Terminal([require("fish"), "--no-config", "-i"], place / "desk", environment(place))
    terminal.send(
        "function fish_prompt; end; bind \\cx 'echo; echo LINE[(commandline)]END; commandline \"\"'\n"
        f"{install_line(repo, 'fish')}; echo SET''UP\n"
    )
    terminal.read("SETUP")

    def complete(line: str) -> str:
        terminal.send(f"{line}\t\x18")
        return terminal.read("]END")

    yield complete
    terminal.close()


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        *[case for case in ZSH_CASES if "report" not in case[0]],
        ("rlhfctl report done/fi", "rlhfctl report done/first "),
        ("rlhfctl ppo x data.train.0.path='with s", "rlhfctl ppo x data.train.0.path='with space.jsonl' "),
    ],
)
def test_fish(fish: Complete, typed: str, line: str) -> None:
    assert line_of(fish(typed)) == line


def test_fish_lists_with_descriptions(place: Path, repo: Path) -> None:
    ask = f"source {repo}/completions/rlhfctl.fish; complete -C 'rlhfctl ppo x optim.'"
    argv = [require("fish"), "--no-config", "-c", ask]
    listed = subprocess.run(argv, cwd=place / "desk", env=environment(place), capture_output=True, text=True)
    found = dict(row.split("\t") for row in listed.stdout.splitlines())
    assert found["optim.lr="].startswith("peak learning rate")
    assert "optim.betas=" in found


def test_the_zsh_script_is_one_that_compinit_takes(repo: Path) -> None:
    assert (repo / "completions/_rlhfctl").read_text().splitlines()[0] == "#compdef rlhfctl"
    for name in ("_rlhfctl", "rlhfctl.bash", "rlhfctl.fish"):
        assert len((repo / "completions" / name).read_text().splitlines()) <= 20


def test_a_failure_prints_nothing(place: Path) -> None:
    env = {**environment(place), "_RLHFCTL_COMPLETE": "zsh"}
    done = subprocess.run([place / "bin/rlhfctl", "nonsense", ""], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def offered(place: Path, *words: str) -> set[str]:
    env = {**environment(place), "_RLHFCTL_COMPLETE": "zsh"}
    done = subprocess.run(
        [place / "bin/rlhfctl", *words, ""], env=env, cwd=place / "desk", capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return {line.split("\t")[0] for line in done.stdout.splitlines()}


# (command, option): words that bring the command to the value; the others of its options take free text or numbers.
ENUMERATED = {
    ("", "--completion"): (),
    ("eval", "--search"): ("x",),
    ("eval", "--engine"): ("x",),
    ("eval", "--verifier"): ("x", "--data", "x.jsonl"),
    ("serve-rm", "--engine"): ("x",),
    ("serve-rm", "--dtype"): ("x",),
    ("serve-rm", "--match"): ("x", "--data", "x.jsonl"),
}
FREE = {("serve-rm", "--api-key-env")}


@pytest.mark.parametrize(("name", "flag"), ENUMERATED, ids=" ".join)
def test_what_is_offered_is_what_is_accepted(place: Path, name: str, flag: str) -> None:
    """A value that no command takes is answered with all that this one takes."""
    (place / "desk/x").mkdir(exist_ok=True)
    (place / "desk/x/config.json").write_text("{}")
    command = [name] if name else []
    argv = [place / "bin/rlhfctl", *command, *ENUMERATED[name, flag], flag, "nonsense"]
    refused = subprocess.run(argv, env=environment(place), cwd=place / "desk", capture_output=True, text=True)
    assert refused.returncode == 2
    told = re.split(": give | knows ", refused.stderr)[1]
    accepted = set(re.findall(r"[\w-]+", re.split(", and |, not ", told)[0])) - {"or"}
    assert offered(place, *command, flag) == accepted


def test_every_option_with_words_for_values_is_among_them() -> None:
    from typer.main import get_command

    from rlhfctl.cli.main import app

    group: Any = get_command(app)
    found = {
        (name, flag)
        for name, command in [("", group), *group.commands.items()]
        for param in command.params
        if param.param_type_name == "option" and param.metavar in ("NAME", "HOW", "SHELL")
        for flag in param.opts
        if flag.startswith("--")
    }
    assert found - FREE == set(ENUMERATED)
