"""Rows on disk are the rows that would be made, under a name that anything they follow from changes."""

import json
import os
from pathlib import Path

import pytest

from rlhfctl.data import prepared
from rlhfctl.data.prepared import Preparation, preparation, sft_preparation
from rlhfctl.errors import Refused
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.sections import DataSource
from rlhfctl.templates.encode import ChatEncoder

RECIPES = {
    "sft": "data: {{train: [{{path: {data}/sft.jsonl}}], max_length: 40}}\n",
    "rm": "data: {{train: [{{path: {data}/pairs.jsonl}}, {{path: {data}/steps.jsonl}}], max_length: 50}}\n"
    "algorithm: {{step_coef: 1.0, score: token_sum}}\n",
    "oreo": "data: {{train: [{{path: {data}/trajectories.jsonl, format: trajectory}}], max_length: 40}}\n",
}


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the rows, which few samples get into as well."""
    monkeypatch.setenv("RLHFCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "LEAST", 1)
    return tmp_path / "cache/rows"


@pytest.fixture
def data(chains: Path, tmp_path: Path) -> Path:
    """The quickstart's rows, and trajectories: right answers and wrong ones."""
    out = tmp_path / "data"
    out.mkdir()
    for name in ("pairs", "steps"):
        (out / f"{name}.jsonl").write_bytes((chains / f"data/{name}.jsonl").read_bytes())
    rows = [json.loads(line) for line in (chains / "data/sft.jsonl").read_text().splitlines()]
    rows = [
        {**row, "response": "1+1=2\n" * (number % 50 == 7) + row["response"]}
        for number, row in enumerate(rows)
    ]
    (out / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, row in enumerate(rows):
        row["reward"] = number % 2
    (out / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture
def encoder(chains: Path) -> ChatEncoder:
    return ChatEncoder.from_path(chains / "model")


def recipe_of(task: str, data: Path, chains: Path):
    text = f"task: {task}\nname: t\npolicy: {{path: {chains}/model}}\n" + RECIPES[task].format(data=data)
    file = data / f"{task}.yaml"
    file.write_text(text + "train: {steps: 1}\n")
    return load_recipe(str(file)).recipe


def of_task(task: str, data: Path, chains: Path, encoder: ChatEncoder) -> Preparation:
    recipe = recipe_of(task, data, chains)
    return preparation(recipe, recipe.data.train, encoder)


def sft(
    data: Path, encoder: ChatEncoder, length: int = 40, train_on: str = "all_assistant", **source
) -> Preparation:
    return sft_preparation([DataSource(path=str(data / "sft.jsonl"), **source)], 0, encoder, length, train_on)


def refuse(*given):
    raise AssertionError("made again")


@pytest.mark.parametrize("task", RECIPES)
def test_what_is_read_is_what_was_made(task, data, chains, encoder, kept):
    work = of_task(task, data, chains, encoder)
    assert work.held() is None
    made = work.make()
    assert len(made.rows) > 100
    assert bool(made.report.dropped) == (task != "rm")  # and why is kept as well
    (file,) = kept.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    work.encode = refuse
    found = work.make()
    assert (found.rows, found.report, found.ids, found.sources) == (
        made.rows,
        made.report,
        made.ids,
        made.sources,
    )
    assert [type(row) for row in found.rows] == [type(row) for row in made.rows]
    places = found.places()
    assert [found.rows[place].id for place in places if place is not None] == [row.id for row in found.rows]
    assert places.count(None) == len(found.ids) - len(found.rows)


def test_several_chunks(data, encoder, monkeypatch):
    monkeypatch.setattr(prepared, "CHUNK", 7)
    made = sft(data, encoder).make()
    assert sft(data, encoder).held().rows == made.rows


def test_another_name_for_whatever_rows_follow_from(data, chains, encoder, monkeypatch):
    def other(**changes):
        keys = {
            "template": encoder.template,
            "tokens": encoder.tokens,
            "tokenizer": encoder.tokenizer,
        } | changes
        return ChatEncoder(keys.pop("template"), keys.pop("tokens"), keys.pop("tokenizer"), **keys)

    tokenizer = ChatEncoder.from_path(chains / "model").tokenizer
    tokenizer.add_special_tokens(["<more>"])
    names = [
        sft(data, encoder).file(),
        sft(data, encoder, length=41).file(),
        sft(data, encoder, train_on="last_assistant").file(),
        sft(data, encoder, limit=399).file(),
        sft(data, encoder, system="Be brief.").file(),
        sft(data, encoder, columns={"prompt": "question"}).file(),
        sft(data, other(template=encoder.template + " ")).file(),
        sft(data, other(tokens=encoder.tokens | {"bos_token": "<pad>"})).file(),
        sft(data, other(tokenizer=tokenizer)).file(),
        sft(data, other(template_kwargs={"thinking": True})).file(),
        sft(data, other(stop_ids=[3])).file(),
        *(of_task(task, data, chains, encoder).file() for task in ("rm", "oreo")),
    ]
    with open(data / "sft.jsonl", "a") as file:
        file.write('{"prompt": "1+1?", "response": "#2"}\n')
    names.append(sft(data, encoder).file())
    monkeypatch.setattr(prepared, "code", lambda: ["of tomorrow"])
    names.append(sft(data, encoder).file())
    assert None not in names
    assert len(set(names)) == len(names)
    assert sft(data, encoder).file() == names[-1]


def test_the_checks_and_the_run_name_the_same_file(data, chains, encoder):
    """transformers reads the tokenizer for the run, and writes down a post-processor that adds nothing."""
    from rlhfctl.models.tokenizer import load_encoder

    ours = load_encoder(str(chains / "model"))
    assert ours.tokenizer.to_str() != encoder.tokenizer.to_str()
    assert sft(data, ours).file() == sft(data, encoder).file()


def test_the_run_reads_what_the_checks_before_it_made(data, chains, kept, monkeypatch):
    from rlhfctl.models.tokenizer import load_encoder
    from rlhfctl.preflight import inputs
    from rlhfctl.trainers.sft_data import load_sft_rows

    recipe = recipe_of("sft", data, chains)
    monkeypatch.setattr(inputs, "ROWS", 100)
    one_in_four = inputs.Inputs(recipe, None, quick=False).encoded("train")
    assert (one_in_four.every, one_in_four.report.kept) == (4, 100)
    assert not kept.exists() or not list(kept.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("RLHFCTL_CACHE", str(data / "cache"))
    monkeypatch.setattr(prepared, "LEAST", 1)
    found = inputs.Inputs(recipe, None, quick=False).encoded("train")
    monkeypatch.setattr(prepared, "encode_sft", refuse)
    again = inputs.Inputs(recipe, None, quick=True).encoded("train")
    assert (again.rows, again.report, again.every) == (found.rows, found.report, 1)
    trained = load_sft_rows(recipe.data.train, recipe.data, load_encoder(str(chains / "model")), 0, 16)
    assert trained.ids == [row.ids for row in found.rows]


def test_rows_that_show_the_date_are_not_kept(data, encoder, kept):
    dated = ChatEncoder(
        "{{ strftime_now('%d') }}" + encoder.template, encoder.tokens, encoder.tokenizer, clock=None
    )
    assert sft(data, dated).file() is None
    assert not kept.exists() or not list(kept.iterdir())


def test_few_samples_are_not_kept(data, encoder, kept, monkeypatch):
    monkeypatch.setattr(prepared, "LEAST", 401)
    assert len(sft(data, encoder).make().ids) == 400
    assert not kept.exists() or not list(kept.iterdir())


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "of another kind", "no rows"])
def test_a_file_that_is_not_whole_is_made_again(damage, data, encoder, kept, tmp_path):
    made = sft(data, encoder).make()
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    changed = whole.replace(made.ids[0].encode(), made.ids[0][:-1].encode() + b"x")
    assert changed != whole
    file.write_bytes(
        {
            "cut": whole[:-20],
            "changed": changed,
            "empty": b"",
            "of another kind": sealed(b'["Path",[1,{},{}],[],[]]\n'),
            "no rows": sealed(b'{"rows": []}\n'),
        }[damage]
    )
    assert sft(data, encoder).held() is None
    assert sft(data, encoder).make().rows == made.rows
    assert file.read_bytes() == whole


def sealed(content: bytes) -> bytes:
    return prepared.hashlib.sha256(content).digest() + content


def test_nothing_is_kept_where_others_could_write(data, encoder, kept, monkeypatch):
    sft(data, encoder).make()
    kept.chmod(0o777)
    assert prepared.cache_directory() is None
    assert sft(data, encoder).held() is None
    monkeypatch.setenv("RLHFCTL_CACHE", "")
    assert prepared.cache_directory() is None
    monkeypatch.setenv("RLHFCTL_CACHE", str(data / "sft.jsonl"))  # no directory can be made there
    assert prepared.cache_directory() is None
    assert sft(data, encoder).make().rows
    monkeypatch.delenv("RLHFCTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "xdg"))
    assert prepared.cache_directory() == data / "xdg/rlhfctl/rows"


def test_a_full_disk_costs_time_alone(data, encoder, kept, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "line", full)
    assert sft(data, encoder).make().rows
    assert list(kept.iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(data, encoder, kept):
    work = sft(data, encoder)
    encode = work.encode

    def slow(samples):
        with open(data / "sft.jsonl", "a") as file:
            file.write('{"prompt": "1+1?", "response": "#2"}\n')
        return encode(samples)

    work.encode = slow
    assert len(work.make().ids) == 400
    assert list(kept.iterdir()) == []
    assert len(sft(data, encoder).make().ids) == 401


def test_what_was_unused_longest_makes_room(data, encoder, kept, monkeypatch):
    for length in (40, 41, 42):
        sft(data, encoder, length).make()
    old, used, last = (sft(data, encoder, length).file() for length in (40, 41, 42))
    for age, file in ((30, used), (20, old), (10, last)):
        os.utime(file, (1e9 - age, 1e9 - age))
    sft(data, encoder, 41).held()
    size = old.stat().st_size
    monkeypatch.setattr(prepared, "MOST", int(2.5 * size))
    sft(data, encoder, 43).make()
    assert set(kept.iterdir()) == {used, sft(data, encoder, 43).file()}


def test_bad_rows_are_refused_each_time(data, encoder, kept):
    with open(data / "sft.jsonl", "a") as file:
        file.write("no row\n")
    for _ in range(2):
        with pytest.raises(Refused, match="401"):
            sft(data, encoder).make()
    assert list(kept.iterdir()) == []
