"""Fenced blocks and command lines of the pages, for the tests that run them."""

import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGES = [*sorted((REPO / "docs").rglob("*.md")), *sorted(REPO.glob("README*.md")), REPO / "CONTRIBUTING.md"]
# A block without a language holds commands where a line has a prompt, or begins with one of these.
PROGRAM = re.compile(r"(\w+=\S* )*(rlhfctl|python3?|pip|make|sh|bash|source|export|vllm|docker|ssh)\s")


def blocks(text: str, *languages: str) -> list[str]:
    """What stands in the fenced blocks of these languages; "" is a block without one."""
    inside = re.split(r"^```", text, flags=re.MULTILINE)[1::2]
    return [body for language, body in (block.split("\n", 1) for block in inside) if language in languages]


def lines(block: str, shell: bool) -> Iterator[str]:
    """Commands of a block: prompts taken off, continued lines joined, comments dropped. A script is one command.

    Where a block shows a prompt, lines without one are output; else every line that is not indented is a command.
    """
    if block.startswith("#!") or re.search(r"^for .*; do$", block, re.MULTILINE):
        yield f"script: {block.splitlines()[1]}"
        return
    written = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    prompted = any(line.startswith("$ ") for line in written)
    if not (shell or prompted or any(PROGRAM.match(line) for line in written)):
        return
    for line in written:
        typed = re.split(r"\s+#", line.removeprefix("$ "))[0].strip()
        if typed and (line.startswith("$ ") if prompted else not line.startswith(" ")):
            yield typed


def page_commands(text: str) -> list[str]:
    plain = [line for block in blocks(text, "", "console") for line in lines(block, shell=False)]
    return plain + [line for block in blocks(text, "sh", "bash") for line in lines(block, shell=True)]


def header_commands(text: str, *labels: str) -> list[str]:
    """Of a recipe's header: what stands behind these of Before, Launch and Override, and on the lines below."""
    found, label = [], ""
    for line in text.splitlines():
        named = re.match(r"# (\w+): ", line)
        label = named[1] if named else label if line.startswith("#   ") else ""
        command = re.search(r"\b((?:python|rlhfctl) .*)", line) if label in labels else None
        if command:
            found.append(re.sub(r"   \(.*\)$", "", command[1]))
    return found
