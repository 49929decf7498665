"""Bands, charts of several metrics, evaluations, search trees, template renders: from a run's files to the page."""

import json
import re
from pathlib import Path

import pytest

from rlhfctl.preflight.run import run_preflight
from rlhfctl.recipe.load import load_recipe
from rlhfctl.report.chart import chart
from rlhfctl.report.page import page
from rlhfctl.report.read import read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "a"
    (path / "eval" / "beam").mkdir(parents=True)
    (path / "recipe.yaml").write_text("task: ppo\nname: demo\n")
    rows = [
        {
            "step": s,
            "reward/mean": 0.5,
            "reward/std": 0.1,
            "reward/rm": 1.0,
            "reward/rm/std": 0.2,
            "reward/rule": 0.0,
        }
        | {"reward/rule/std": 0.0, "seconds/rollout": 1.0, "seconds/train": 2.0, "seconds/step": 3.0}
        for s in (1, 2)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    interval = {
        "value": 0.5,
        "low": 0.4,
        "high": 0.625,
        "n": 100,
        "interval": "wilson",
        "standard_error": 0.05,
    }
    open_end = {"value": 2.0, "low": None, "high": None, "n": 3}
    summary = {"schema": 1, "method": "beam_2", "prompts": 100, "metrics": {"accuracy/beam_2": interval}}
    (path / "eval/beam/eval.json").write_text(json.dumps({**summary, "differences": {"gain<b>": open_end}}))
    nodes = [
        {
            "parent": None,
            "depth": 0,
            "text": "3+4=7\n",
            "value": 0.9,
            "score": 0.9,
            "finish": None,
            "kept": True,
        },
        {
            "parent": None,
            "depth": 0,
            "text": "3+4=8\n",
            "value": 0.1,
            "score": 0.1,
            "finish": None,
            "kept": False,
        },
        {"parent": 0, "depth": 1, "text": "#7", "value": 0.95, "score": 0.95, "finish": "stop", "kept": True},
    ]
    (path / "eval/beam/trees.jsonl").write_text(
        json.dumps({"id": "q<1>", "chosen": 2, "nodes": nodes}) + "\n"
    )
    return path


def test_evaluations_with_their_intervals(run: Path) -> None:
    text = page([read_run(run)])
    assert "<b>eval/beam</b> <span class='quiet'>beam_2 · 100 prompts</span>" in text
    assert "<tr><td>accuracy/beam_2</td><td>0.5</td><td>0.4 to 0.625</td><td>100</td></tr>" in text
    assert "<tr><td>gain&lt;b&gt;</td><td>2</td><td></td><td>3</td></tr>" in text


def test_a_search_tree_has_the_shape_of_the_search(run: Path) -> None:
    text = page([read_run(run)])
    assert "search tree of q&lt;1&gt;, 3 candidates" in text
    tree = text[text.index("<ul class='tree'>") :]
    answer = "<ul class='tree'><li><b><pre>#7</pre></b> <span class='quiet'>V 0.95, score 0.95, stop</span></li></ul>"
    assert tree.startswith(
        "<ul class='tree'><li><pre>3+4=7\n</pre> <span class='quiet'>V 0.9, score 0.9</span>"
        + answer
        + "</li>"
        "<li class='out'><pre>3+4=8\n</pre>"
    )


def test_a_tree_whose_parents_go_in_a_circle_ends(run: Path) -> None:
    nodes = [{"parent": 1, "text": "a"}, {"parent": 0, "text": "b"}, {"parent": None, "text": "c"}]
    (run / "eval/beam/trees.jsonl").write_text(json.dumps({"id": 1, "nodes": nodes}) + "\n")
    assert "<pre>c</pre>" in page([read_run(run)])


def test_bands_and_charts_of_several_metrics(run: Path) -> None:
    text = page([read_run(run)])
    figures = dict(re.findall(r"<figcaption>([^<]*)</figcaption>(.*?)</figure>", text))
    assert figures["reward/mean"].count("<polygon") == 1
    assert "<polygon" not in figures["seconds/rollout"]
    assert figures["reward by source"].count("<polyline") == 2
    assert (
        "</span>rm</span> <span class='name'><span class='key key1'></span>rule</span> "
        in figures["reward by source"]
    )
    assert re.findall(r"<title>([a-z]+)</title>", figures["seconds by phase"]) == ["rollout", "train"]
    several = page([read_run(run), read_run(run)])
    assert "reward by source" not in several  # one chart of each source then, a line for each run


def test_a_band_lies_where_it_belongs() -> None:
    drawn = chart("t", [("a", [(0.0, 0.5), (4.0, 0.5)])], [[(0.0, 0.0, 1.0), (4.0, 0.25, 0.75)]])
    assert '<polygon class="band0" points="52.0,164.0 350.0,125.5 350.0,48.5 52.0,10.0"/>' in drawn


def test_the_preflight_keeps_one_row_through_the_templates(chains: Path, tmp_path: Path) -> None:
    keys = {"policy.from_config": f"{chains}/model", "policy.tokenizer": f"{chains}/model", "data.eval": "[]"}
    keys |= {"data.train": f"[{{path: {chains}/data/sft.jsonl}}]", "reward": "null", "rollout": "null"}
    overrides = [f"{key}={value}" for key, value in keys.items()]
    report = run_preflight(load_recipe("quickstart/sft", overrides), run_dir=tmp_path, quick=True).as_dict()
    first = json.loads((chains / "data/sft.jsonl").read_text().splitlines()[0])
    ((render),) = report["renders"]
    assert first["prompt"] in render["policy"]
    assert first["response"] in render["policy"]
    assert (render["name"], render["rm"]) == (None, None)


def test_renders_of_both_sides_stand_side_by_side(run: Path) -> None:
    renders = [
        {"name": "models/rm", "policy": "<|im_start|>user", "rm": "[INST] hi"},
        {"name": "b", "policy": "x", "rm": None},
    ]
    (run / "preflight.json").write_text(json.dumps({"findings": [], "renders": renders}))
    text = page([read_run(run)])
    assert text.count("<div class='sides'>") == 1
    assert "<p class='quiet'>policy</p><pre>&lt;|im_start|&gt;user</pre>" in text
    assert "<p class='quiet'>models/rm</p><pre>[INST] hi</pre>" in text
