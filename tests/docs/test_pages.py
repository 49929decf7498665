"""The pages keep up with the code: every key of a section and every metric a trainer writes is explained."""

import re
from pathlib import Path

import pytest

from rlhfctl.recipe import sections
from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.recipe.oreo_sections import Collect, OfflineReasoning, ValueFit
from rlhfctl.recipe.rollout_server import RolloutServer
from rlhfctl.recipe.tracking import Tracking, Wandb
from rlhfctl.report.page import ELSE, FIRST, TOLD

PPO_SECTIONS = [Algorithm, sections.Rollout, sections.ValueModel, sections.Shaping]
SFT_SECTIONS = [sections.Data, sections.Train, sections.Optim]
METRIC = re.compile(
    r'"((?:loss|rm|oreo|value_fit|reward|kl|clip|importance|advantage|value|returns|groups|length|grad_norm|eval|seconds|memory|sync)/\w+)"'
)


def named_in(page: str) -> set[str]:
    """Everything a page puts in backticks."""
    return set(re.findall(r"`([^`\n]+)`", page))


@pytest.mark.parametrize("section", PPO_SECTIONS, ids=lambda section: section.__name__)
def test_ppo_page_has_a_row_for_every_key(repo: Path, section: type[sections.Section]) -> None:
    page = (repo / "docs" / "ppo.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert set(section.model_fields) <= rows


@pytest.mark.parametrize("section", SFT_SECTIONS, ids=lambda section: section.__name__)
def test_sft_page_names_every_key(repo: Path, section: type[sections.Section]) -> None:
    named = named_in((repo / "docs" / "sft.md").read_text())
    rollouts_alone = {"samples_every", "samples_per_step"}
    prefix = section.__name__.lower()
    assert {f"{prefix}.{key}" for key in set(section.model_fields) - rollouts_alone} <= named


def test_rm_page_has_a_row_with_the_default_of_every_key(repo: Path) -> None:
    page = (repo / "docs" / "rm.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([\w.]+)`? \|", page, re.MULTILINE))
    for key, field in sections.RewardModelling.model_fields.items():
        assert rows[key] == str(field.default)


def test_oreo_page_has_a_row_with_the_default_of_every_key(repo: Path) -> None:
    page = (repo / "docs" / "oreo.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", page, re.MULTILINE))
    for prefix, section in (("", OfflineReasoning), ("collect.", Collect), ("value_fit.", ValueFit)):
        for key, field in section.model_fields.items():
            default = field.get_default(call_default_factory=True)
            assert rows[prefix + key] == ("null" if default is None else str(default))


def test_tracking_page_has_a_row_with_the_default_of_every_key(repo: Path) -> None:
    page = (repo / "docs" / "tracking.md").read_text()
    rows = dict(re.findall(r"^\| `tracking\.([\w.]+)` \| `?([^|`]*?)`? \|", page, re.MULTILINE))
    keys = dict(Tracking.model_fields)
    keys |= {f"wandb.{key}": field for key, field in Wandb.model_fields.items()}
    assert set(rows) == set(keys)
    for key, field in keys.items():
        default = "-" if field.is_required() else field.get_default(call_default_factory=True)
        assert rows[key] == {"False": "false", "None": "null"}.get(str(default), str(default))


def test_ppo_page_gives_the_defaults_of_the_code(repo: Path) -> None:
    page = (repo / "docs" / "ppo.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", page, re.MULTILINE))
    checked = 0
    for section in PPO_SECTIONS:
        for key, field in section.model_fields.items():
            default, shown = field.default, rows[key]
            if field.default_factory is not None:
                assert shown == "section"
            elif isinstance(default, bool) or default is None:
                assert shown == {True: "true", False: "false", None: "null"}[default]
            elif isinstance(default, int | float):
                assert float(shown) == default
            else:
                assert shown == default
            checked += 1
    assert checked > 30


def test_rollout_page_has_a_row_with_the_default_of_every_key_of_a_server(repo: Path) -> None:
    page = (repo / "docs" / "rollout.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|`]+?) \|", page, re.MULTILINE))
    for key, field in RolloutServer.model_fields.items():
        shown = "null" if field.default is None else str(field.default).removesuffix(".0")
        assert rows[key] == shown


def test_every_metric_of_the_trainers_is_in_the_glossary(repo: Path) -> None:
    named = named_in((repo / "docs" / "metrics.md").read_text())
    written = {
        metric
        for folder in ("trainers", "rewards", "rollout")
        for path in (repo / "rlhfctl" / folder).glob("*.py")
        for metric in METRIC.findall(path.read_text())
    }
    assert {"loss/sft", "loss/policy", "reward/mean", "kl/rollout", "clip/fraction"} <= written
    assert written - named == set()


def test_every_metric_that_a_page_or_the_report_names_is_in_a_glossary(repo: Path) -> None:
    known = named_in((repo / "docs/metrics.md").read_text()) | named_in((repo / "docs/eval.md").read_text())
    for path in (repo / "docs").rglob("*.md"):
        for name in named_in(path.read_text()):
            assert name in known or not METRIC.fullmatch(f'"{name}"'), f"{path.name} names {name}"
    for name in (*FIRST, *TOLD, *ELSE):
        assert name in known


def test_every_file_that_the_pages_name_exists(repo: Path) -> None:
    found = 0
    for page in ("ppo.md", "rm.md", "sft.md", "oreo.md", "metrics.md"):
        for name in named_in((repo / "docs" / page).read_text()):
            if re.fullmatch(
                r"(rlhfctl/|algorithms/|models/|rewards/|trainers/|docs/|tests/)[\w/]+\.(py|md)", name
            ):
                path = (
                    repo / name
                    if name.startswith(("rlhfctl/", "docs/", "tests/"))
                    else repo / "rlhfctl" / name
                )
                assert path.is_file(), f"docs/{page} names {name}"
                found += 1
    assert found > 10
