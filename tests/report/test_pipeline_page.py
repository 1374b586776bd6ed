"""The page on a pipeline: the whole story, for whatever its folder holds, and nothing but it."""

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fathom.config.hf import read_config
from fathom.errors import UserError
from fathom.model.accounting import flops_per_token
from fathom.pipeline.state import read_state
from fathom.pipeline.table import result_of
from fathom.report.cost import duration
from fathom.report.page import write_report
from fathom.report.stages import Story
from fathom.report.tables import quantity
from tests.evaluate.scripted import MODULAR
from tests.pipeline import house as tiny
from tests.report import house
from tests.report.outline import Outline, headings, references, table_of, text_of

HOSTILE = "</bdi></pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x1b[31m"
CORRECTION = {"step": 7, "question": "1+1=", "completion": "<think>3, Wait, 2</think>2", "word": "wait"}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """All stages made."""
    return house.build(tmp_path / "house")


def _page(folder: Path) -> str:
    page = write_report(folder).read_text(encoding="utf-8")
    Outline(page)
    return page


def _change(folder: Path, stage: str, change: Any) -> None:
    """Apply `change` to every measurement of a stage."""
    found = house.states(folder)
    for measured in found[stage]["evaluation"]["measurements"]:
        change(measured)
    house.write_states(folder, found)


def test_every_stage_has_its_place_in_the_order_of_the_run(whole: Path) -> None:
    """In the table and as a part of the page; what compares them comes behind the last, and cost at the end."""
    page = _page(whole)
    names = list(house.states(whole))
    assert [row[0] for row in table_of(page, "Stages")[1:]] == names
    titles = headings(page, 2)
    assert titles[0] == "What each stage gained"
    assert titles[1 : 1 + len(names)] == [f"{number} {name}" for number, name in enumerate(names, start=1)]
    assert titles[1 + len(names) :] == [
        "Ways to teach given",
        "What more thinking is worth",
        "The same problems, before and after",
        "What it cost",
        "Recipe",
    ]


def test_the_table_says_what_was_measured(whole: Path) -> None:
    """pass@1 with its interval, tokens of thought and minutes are those of `pipeline.json`, for every stage."""
    rows = {row[0]: row for row in table_of(_page(whole), "Stages")}
    assert rows["stage"] == ["stage", "what it is", "modular, pass@1", "tokens of thought", "minutes"]
    for name, state in house.states(whole).items():
        _, _, share, thought, minutes = rows[name]
        assert float(minutes) == pytest.approx(state["seconds"] / 60, abs=0.05)
        if state["evaluation"] is None:
            assert (share, thought) == ("", "")
            continue
        (measured,) = state["evaluation"]["measurements"]
        found = measured["pass@k"]["1"]
        assert share == f"{100 * found['value']:.1f} % ({100 * found['low']:.1f}–{100 * found['high']:.1f})"
        assert thought == f"{measured['thought_tokens']['mean']:.0f}" == "4"


def test_a_pipeline_that_was_really_run(tmp_path: Path) -> None:
    """What its stages left in their folders is on its page: their measurements, their curves and what they said."""
    result, _ = tiny.run(tiny.build(tmp_path), tmp_path / "runs")
    page = _page(result.folder)
    rows = {row[0]: row for row in table_of(page, "Stages")}
    for name in ("student", "zero"):
        (measured,) = json.loads((result.folder / name / "evaluation.json").read_text())["measurements"]
        assert rows[name][2].startswith(f"{100 * measured['pass@k']['1']['value']:.1f} % (")
        for said in measured["transcripts"]:
            assert html.escape(said["question"]) in page
    assert headings(page, 2)[1:4] == ["1 traces", "2 student", "3 zero"]
    assert {"From candidates to rows", "Loss", "Right answers", "Length", "Entropy"} <= set(headings(page, 3))
    assert float(table_of(page, "Cost of the stages")[2][3]) > 0
    assert references(page) == []


def test_what_a_stage_is_follows_from_its_verb_and_its_references(whole: Path) -> None:
    """Whatever the stages are called."""
    told = {row[0]: row[1] for row in table_of(_page(whole), "Stages")[1:]}
    assert told == {
        "ground": "pre-training from nothing",
        "first-floor": "reinforcement learning from ground",
        "bricks": "solutions by first-floor",
        "best": "fine-tuning of ground on bricks",
        "given": "package:small as it is",
        "lessons": "solutions by best",
        "taught": "fine-tuning of given on lessons",
        "judged": "on-policy distillation of given by best",
        "alone": "reinforcement learning from given",
    }
    story = Story.read(whole)
    assert [stage.name for stage in story.cast] == ["ground", "first-floor", "best"]
    teachers = {stage.name: [teacher.name for teacher in story.teachers(stage)] for stage in story.stages}
    assert {name: found for name, found in teachers.items() if found} == {
        "best": ["first-floor"], "taught": ["best"], "judged": ["best"],
    }  # fmt: skip
    assert {origin: [stage.name for stage in family] for origin, family in story.students.items()} == {
        "given": ["given", "taught", "judged", "alone"]
    }


def test_a_student_is_compared_with_its_teacher_and_with_rewards_alone(whole: Path) -> None:
    """Teacher first, then the student as it was and each way; minutes are with those of writing the lessons."""
    rows = table_of(_page(whole), "Ways to teach given")
    assert [row[0] for row in rows] == ["model", "best", "given", "taught", "judged", "alone"]
    assert rows[1][1] == "the teacher"
    assert [row[3].partition(" ")[0] for row in rows[1:]] == ["100.0", "0.0", "75.0", "50.0", "25.0"]
    assert rows[3][-1] == f"{(70 + 60) / 60:.1f}"
    assert rows[2][2] == ""  # a model that is not in the folder
    assert rows[1][2] != ""


def test_without_a_student_nothing_is_compared(tmp_path: Path) -> None:
    """Stages that learn from their own kind's answers are no distillation."""
    page = _page(house.build(tmp_path / "house", made=4))
    assert not any(title.startswith("Ways") for title in headings(page, 2))


def test_what_models_write_is_only_text(whole: Path) -> None:
    """Tags in questions, thoughts, answers, a correction, a task's name, a path and a reason do nothing."""

    def spoil(measured: dict[str, Any]) -> None:
        measured["task"] = HOSTILE
        for one in measured["transcripts"]:
            one |= {"thought": HOSTILE, "answer": HOSTILE}

    for stage in ("ground", "first-floor", "best", "taught"):
        _change(whole, stage, spoil)
    broken = CORRECTION | {"question": HOSTILE, "completion": f"{HOSTILE}<think>wait {HOSTILE}"}
    (whole / "first-floor" / "first_correction.json").write_text(json.dumps(broken))
    counts = house.COUNTS | {"total": house.COUNTS["total"] | {"dropped": {HOSTILE: 3}}}
    (whole / "bricks" / "synth.json").write_text(json.dumps(counts))
    toml = (whole / "pipeline.toml").read_text()
    (whole / "pipeline.toml").write_text(toml.replace("package:small", "<script>alert(1)</script>"))
    page = _page(whole)
    assert not {"script", "img"} & set(Outline(page).tags)
    assert "&lt;script&gt;alert(1)" in page
    assert "␛[31m" in page
    assert "default-src 'none'" in page
    assert "\x1b" not in page


def test_nothing_is_fetched(whole: Path) -> None:
    """No address, no script, no style or picture from elsewhere."""
    assert references(_page(whole)) == []


def test_pictures_are_whole(whole: Path) -> None:
    """Every chart is XML by itself, with title and description; no two elements of the page share an id."""
    page = _page(whole)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) > 20
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        kinds = {element.tag.rpartition("}")[2] for element in root}
        assert {"title", "desc"} <= kinds
    named = re.findall(r' id="([^"]+)"', page)
    assert len(named) == len(set(named))
    assert set(re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', page)) <= set(named)


@pytest.mark.parametrize(("made", "under_way"), [(0, False), (0, True), (1, True), (3, False), (6, True), (8, False)])
def test_a_pipeline_that_is_half_done_has_a_page(tmp_path: Path, made: int, under_way: bool) -> None:
    """It says which stages are not made yet and which is under way, and has no part for what was not begun."""
    page = _page(house.build(tmp_path / "house", made=made, under_way=under_way))
    rows = table_of(page, "Stages")[1:]
    said = [re.search(r"\((not made yet|under way)\)", row[1]) for row in rows]
    assert [found[1] if found else "" for found in said] == (
        [""] * made + ["under way"] * under_way + ["not made yet"] * (len(rows) - made - under_way)
    )
    assert len([title for title in headings(page, 2) if title[0].isdigit()]) == made + under_way
    assert f"{made} of {len(rows)} made" in page
    if made == 0:
        assert "No stage has been measured yet." in page


def test_the_first_correction_stands_in_its_stage(whole: Path) -> None:
    """With its step, its question and the word marked, between that stage's heading and the next one's."""
    assert "corrects itself" not in _page(whole)
    (whole / "first-floor" / "first_correction.json").write_text(json.dumps(CORRECTION))
    page = _page(whole)
    part = page.partition('id="stage-2"')[2].partition('id="stage-3"')[0]
    assert "The first time that it corrects itself: step 7" in part
    assert "<mark>Wait</mark>" in part
    quoted = text_of(re.search(r'<div class="moment">.*?<pre[^>]*>(.*?)</pre>', part, re.DOTALL)[1])
    assert quoted == f"{CORRECTION['question']}\n{CORRECTION['completion']}"


def test_a_long_correction_keeps_its_word(whole: Path) -> None:
    """Of a completion of 50,000 letters the part around the word is shown."""
    file, without = whole / "first-floor" / "first_correction.json", _page(whole)
    file.write_text(json.dumps(CORRECTION | {"completion": "a" * 30_000 + " wait " + "b" * 20_000}))
    page = _page(whole)
    assert "aaa <mark>wait</mark> bbb" in page
    assert len(page) < len(without) + 5000
    assert "a" * 3000 not in page


def test_the_same_problems_before_and_after(whole: Path) -> None:
    """Each question once, with what every compared stage said to it and whether that was right."""
    page = _page(whole)
    part = page.partition('id="dialogues"')[2].partition('id="cost"')[0]
    (measured,) = house.states(whole)["best"]["evaluation"]["measurements"]
    questions = [one["question"] for one in measured["transcripts"]]
    assert len(questions) == 4
    for question in questions:
        assert part.count(f"<bdi>{html.escape(question)}</bdi>") == 1
    stages = re.findall(r"<h4>(\S+) <span class=\"verdict\">(\w+)</span>", part)
    assert stages == [("ground", "right"), ("first-floor", "right"), ("best", "right")] * 4
    _change(whole, "first-floor", lambda measured: measured["transcripts"].pop(1))
    part = _page(whole).partition('id="dialogues"')[2].partition('id="cost"')[0]
    assert [question for question in questions if f"<bdi>{html.escape(question)}</bdi>" in part] == [
        questions[place] for place in (0, 2, 3)
    ]


def test_measurements_of_an_older_version_are_shown_without_what_they_lack(whole: Path) -> None:
    """No transcripts and no language: no dialogues, and the rest of the page as before."""
    for stage in ("ground", "first-floor", "best"):
        _change(whole, stage, lambda measured: (measured.pop("transcripts"), measured.pop("language")))
    titles = headings(_page(whole), 2)
    assert "The same problems, before and after" not in titles
    assert "What it cost" in titles


def test_language_has_a_column_where_a_model_mixed(whole: Path) -> None:
    """And nowhere else: a share of 1 everywhere says nothing."""
    assert "language kept" not in table_of(_page(whole), "Stages")[0]
    _change(whole, "first-floor", lambda measured: measured.update(language=0.75))
    rows = {row[0]: row for row in table_of(_page(whole), "Stages")}
    place = rows["stage"].index("language kept")
    assert (rows["first-floor"][place], rows["best"][place], rows["bricks"][place]) == ("75.0 %", "100.0 %", "")


def test_a_figure_of_one_model_says_whose_it_is(whole: Path) -> None:
    """The vote and the cut thoughts may be of different stages, and one line has no legend."""
    found = house.states(whole)
    found["best"]["evaluation"] = house.evaluation(3, MODULAR.replace(budgets=(0, 5)))
    found["first-floor"]["evaluation"] = house.evaluation(3, MODULAR.replace(samples=8))
    house.write_states(whole, found)
    page = _page(whole)
    assert "solved where the thought of best is cut off" in page
    assert table_of(page, "More samples: modular")[0] == ["samples of first-floor that vote", "first-floor"]


def test_points_that_are_means_are_said_to_be(whole: Path) -> None:
    """In the stage whose lines are thinned, and in no other."""
    assert "is the mean of" not in _page(whole)
    lines = (json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in range(1, 501))
    (whole / "best" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    page = _page(whole)
    assert page.count("is the mean of 3 steps") == 1
    assert "is the mean of 3 steps" in page.partition('id="stage-4"')[2].partition('id="stage-5"')[0]


def test_language_and_thoughts_are_means_of_answers(whole: Path) -> None:
    """A task of a tenth of the answers counts a tenth; of language, one whose thoughts have few words counts little."""
    found = house.states(whole)
    first = found["best"]["evaluation"]["measurements"][0]
    first |= {"problems": 90, "thought_tokens": {"mean": 10.0, "median": 9.0}, "language": 1.0, "language_thoughts": 30}
    second = json.loads(json.dumps(first)) | {"task": "stories", "problems": 10, "language": 0.5}
    second |= {"thought_tokens": {"mean": 110.0, "median": 9.0}, "language_thoughts": 10}
    found["best"]["evaluation"]["measurements"].append(second)
    house.write_states(whole, found)
    rows = {row[0]: row for row in table_of(_page(whole), "Stages")}
    assert rows["best"][rows["stage"].index("tokens of thought")] == "20"
    assert rows["best"][rows["stage"].index("language kept")] == "87.5 %"
    assert result_of(read_state(whole)["best"]).endswith(", 20 tokens of thought")


def test_what_more_thinking_is_worth(whole: Path) -> None:
    """Accuracy over budgets, of the stage that measured them, and over votes, of those of which most were drawn."""
    found = house.states(whole)
    found["best"]["evaluation"] = house.evaluation(3, MODULAR.replace(budgets=(0, 5, 9), samples=8))
    house.write_states(whole, found)
    page = _page(whole)
    thought = table_of(page, "More thought: modular")
    assert thought == [["tokens of thought at most", "best"], ["0", "0 %"], ["5", "37.5 %"], ["9", "37.5 %"]]
    votes = table_of(page, "More samples: modular")
    assert [row[0] for row in votes] == ["samples of best that vote", "1", "2", "4", "8"]
    assert votes[0][1:] == ["best"]
    assert "thoughts as long as they get" in page


def test_tasks_without_a_bar_are_named(whole: Path) -> None:
    """There are five colours: of seven tasks, two stand in tables alone, and the page says which."""
    assert "no room for" not in _page(whole)
    found = house.states(whole)
    measurements = found["best"]["evaluation"]["measurements"]
    measurements += [json.loads(json.dumps(measurements[0])) | {"task": f"task{number}"} for number in range(2, 8)]
    house.write_states(whole, found)
    page = _page(whole)
    assert "no room for task6, task7." in page
    assert "task7, pass@1" in table_of(page, "Stages")[0]


def test_a_stage_measured_twice_is_of_its_own_descent(whole: Path) -> None:
    """A stage `model` that stands for an earlier one belongs to its family, and is called by its name."""
    toml = (
        (whole / "pipeline.toml").read_text()
        + """
[[stages]]
name = "again"
verb = "model"
set = { model = "@best" }
"""
    )
    (whole / "pipeline.toml").write_text(toml)
    story = Story.read(whole)
    again = story.stages[-1]
    assert (story.origin(again), story.told(again)) == ("ground", "best as it is")


def test_several_tasks_stand_side_by_side(whole: Path) -> None:
    """A column and a bar each; a stage that was not measured on one of them has an empty cell."""
    found = house.states(whole)
    second = json.loads(json.dumps(found["best"]["evaluation"]["measurements"][0])) | {"task": "stories"}
    found["best"]["evaluation"]["measurements"].append(second)
    house.write_states(whole, found)
    page = _page(whole)
    rows = {row[0]: row for row in table_of(page, "Stages")}
    assert rows["stage"][2:4] == ["modular, pass@1", "stories, pass@1"]
    assert (rows["best"][3], rows["ground"][3]) == (rows["best"][2], "")
    assert re.search(r'class="bar s2"', page)


def test_cost_adds_up(whole: Path) -> None:
    """Seconds are those of the stages, money is their time at the stated price, and arithmetic is the model's own."""
    rows = table_of(_page(whole), "Cost of the stages")
    assert rows[0] == ["stage", "time", "money", "tokens learnt from", "arithmetic", "of the machine's peak"]
    cost = {row[0]: row[1:] for row in rows[1:]}
    assert cost["ground"][:2] == ["10.0 s", "€0.1000"]
    assert cost["all"][:2] == ["7 min 30 s", "€4.5000"]
    assert cost["bricks"][2:] == ["", "", ""]
    assert cost["first-floor"][2] == f"{2 * 2 * 4 * 5}"
    config = read_config(whole / "ground" / "checkpoints" / "step_00000002")
    assert cost["ground"][2:] == ["2 k", quantity(2000 * flops_per_token(config, 64), "FLOP"), "25 %"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (59.6, "1 min 00 s"), (3599.6, "1 h 00 min"), (7199.0, "2 h 00 min")],
)
def test_durations_are_rounded_and_not_cut(seconds: float, said: str) -> None:
    """To seconds, and from an hour on to minutes."""
    assert duration(seconds) == said


def test_energy_is_told_where_it_is_known(whole: Path) -> None:
    """In joules, and their sum; where some stages have none, it is said to be no more than a part."""
    found = house.states(whole)
    assert "energy could not be read on this machine" in _page(whole)
    found["ground"]["joules"], found["best"]["joules"] = 1500.0, 500.0
    house.write_states(whole, found)
    cost = {row[0]: row for row in table_of(_page(whole), "Cost of the stages")}
    assert cost["stage"][2] == "energy"
    assert (cost["ground"][2], cost["bricks"][2], cost["all"][2]) == ("1.5 kJ", "", "at least 2 kJ")
    for stage in found.values():
        stage["joules"] = 250.0
    house.write_states(whole, found)
    page = _page(whole)
    assert table_of(page, "Cost of the stages")[-1][2] == "2.25 kJ"
    assert "<dt>energy</dt><dd><bdi>2.25 kJ</bdi></dd>" in page


def test_what_the_data_factory_kept(whole: Path) -> None:
    """The funnel, the reasons, and with repair the yield of each round."""
    page = _page(whole)
    funnel = re.findall(r">(\d+) (drawn|right|kept)</text>", page)[:3]
    assert funnel == [("40", "drawn"), ("20", "right"), ("10", "kept")]
    assert table_of(page, "Why candidates were not kept")[1:] == [
        ["wrong", "20", "50.0 %"],
        ["duplicate", "10", "25.0 %"],
    ]
    rounds = table_of(page, "Yield of each round")
    assert [row[0::4] for row in rounds] == [["round", "yield"], ["first answers", "20.0 %"], ["repair 1", "40.0 %"]]


def test_a_pipeline_without_training(tmp_path: Path) -> None:
    """A model from elsewhere that is only measured has a page, and no chart of training."""
    folder = tmp_path / "one"
    folder.mkdir()
    head = house.TOML.partition("[[stages]]")[0].replace('serves = "best"\n', "")
    stage = '[[stages]]\nname = "given"\nverb = "model"\nset = { model = "package:small" }\n'
    (folder / "pipeline.toml").write_text(head + stage)
    state = {"verb": "model", "fingerprint": "f", "finished": True, "seconds": 1.0, "evaluation": house.evaluation(2)}
    house.write_states(folder, {"given": state})
    page = _page(folder)
    assert table_of(page, "Stages")[1][1:3] == ["package:small as it is", "50.0 % (33.6–66.4)"]
    assert "Loss" not in headings(page, 3)


def test_figures_can_be_had_by_name(whole: Path) -> None:
    """Each as SVG that brings its colours; the first is the main one, and a wrong name is answered with all."""
    for name in ("stages", "distillation", "consensus"):
        svg = write_report(whole, whole / f"{name}.svg", figure=name).read_text()
        assert "prefers-color-scheme" in svg
        ElementTree.fromstring(svg)
    assert write_report(whole, whole / "x.svg").read_bytes() == (whole / "stages.svg").read_bytes()
    with pytest.raises(UserError, match=r"--figure stage: .*did you mean.*there are: stages, distillation, consensus"):
        write_report(whole, whole / "x.svg", figure="stage")
    with pytest.raises(UserError, match=r"--figure stages: is written with --out FILE"):
        write_report(whole, figure="stages")


def test_mistakes_are_said_in_a_line(tmp_path: Path) -> None:
    """A pipeline of an older version, a figure of nothing, and files that were broken are named."""
    folder = house.build(tmp_path / "house", made=0)
    with pytest.raises(UserError, match="has measured nothing yet"):
        write_report(folder, folder / "x.svg")
    (folder / "pipeline.toml").unlink()
    with pytest.raises(UserError, match=r"without pipeline\.toml, from an older version; run it once more"):
        write_report(folder)
    folder = house.build(tmp_path / "odd")
    found = house.states(folder)
    found["best"]["evaluation"]["measurements"][0]["pass@k"]["1"] = {"value": 0.5}
    house.write_states(folder, found)
    with pytest.raises(UserError, match=r"pipeline\.json"):
        write_report(folder)
    folder = house.build(tmp_path / "broken")
    (folder / "bricks" / "synth.json").write_text("{")
    with pytest.raises(UserError, match=r"synth\.json: cannot be read"):
        write_report(folder)
