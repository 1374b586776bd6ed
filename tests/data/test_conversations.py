"""Conversations: what of a row is asked, what is learnt, and rows that are refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fathom.data import Tokenizer, train_bpe
from fathom.data.conversations import Conversation, Turn, TurnEncoder, read_conversations
from fathom.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, DeepSeek's markers, and DeepSeek-V3.1's template."""
    return train_bpe(["hello"], 266)


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return Tokenizer(
        tokenizer.backend, bos_token_id=0, eos_token_ids=tokenizer.eos_token_ids, pad_token_id=2, chat_template=template
    )


def written(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


def told(tokenizer: Tokenizer, turn: Turn) -> tuple[str, str]:
    return tuple(tokenizer.decode(ids, skip_special=False) for ids in (turn.prompt_ids, turn.response_ids))


def turns(tokenizer: Tokenizer, file: Path) -> list[Turn]:
    encoder = TurnEncoder(tokenizer)
    return [turn for conversation in read_conversations(file) for turn in encoder.turns(conversation)]


USER = {"role": "user", "content": "1+1?"}


def test_an_answer_follows_the_template_as_at_inference(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What is asked is the template's text with the opening of an answer, thinking or not; what is learnt is thought,
    answer and the token that ends it."""
    plain = {"role": "assistant", "content": "2"}
    thought = {"role": "assistant", "reasoning_content": "one and one", "content": "2"}
    found = turns(tokenizer, written(tmp_path, {"messages": [USER, plain]}, {"messages": [USER, thought]}))
    end = tokenizer.backend.id_to_token(tokenizer.eos_token_ids[0])
    for turn, thinks, response in zip(found, (False, True), ("2", "one and one</think>2"), strict=True):
        assert told(tokenizer, turn) == (tokenizer.apply_chat_template([USER], thinking=thinks), response + end)


def test_other_templates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A template that knows no thoughts gets them between tags, and one that ends turns its own way is not followed by
    a second end."""
    message = {"role": "assistant", "reasoning_content": "one and one", "content": "2"}
    end = tokenizer.backend.id_to_token(1)
    chat = with_template(tokenizer, CHATML.replace("<|im_end|>", end))
    (turn,) = turns(chat, written(tmp_path, {"messages": [USER, message]}))
    assert told(chat, turn) == (
        f"<|im_start|>user\n1+1?{end}\n<|im_start|>assistant\n",
        f"<think>one and one</think>2{end}",
    )


def test_a_template_without_room_for_thoughts_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A template that closes thoughts before they begin cannot hold one: nothing is dropped in silence."""
    closed = with_template(tokenizer, CHATML.replace("assistant\n{% endif", "assistant\n</think>{% endif"))
    message = {"role": "assistant", "reasoning_content": "one and one", "content": "2"}
    with pytest.raises(UserError, match=r"rows.jsonl:1: the chat template leaves no place for the thought"):
        turns(closed, written(tmp_path, {"messages": [USER, message]}))


def test_forms_that_say_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """`messages`, ShareGPT's `conversations`, prompt and completion, a thought in tags or in a field, JSON Lines and
    Parquet: one and the same turn."""
    said, thought = "2", "one and one"
    tagged = f"<think>{thought}</think>{said}"
    rows = [
        {"messages": [USER, {"role": "assistant", "reasoning_content": thought, "content": said}]},
        {"messages": [USER, {"role": "assistant", "thinking": thought, "content": said}]},
        {"messages": [USER, {"role": "assistant", "content": tagged}], "anything": 3},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": tagged}]},
        {"prompt": "1+1?", "completion": tagged},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": tagged}]},
    ]
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1] + rows[2:3]), table)
    found = turns(tokenizer, written(tmp_path, *rows)) + turns(tokenizer, table)
    assert len(found) == 8
    assert all(turn == found[0] for turn in found)


@pytest.mark.parametrize("said", ["c", "yes", "d", "e", "eot", "|", "_id"])
def test_the_templates_own_end_is_learnt_whatever_is_said(said: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of several tokens that end a text it is the one that the template writes, also behind an answer whose letters are
    in its name."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken("<|eot_id|>", normalized=False)])
    ends = (1, backend.token_to_id("<|eot_id|>"))
    several = Tokenizer(
        backend, bos_token_id=0, eos_token_ids=ends, pad_token_id=2, chat_template=CHATML.replace("im_end", "eot_id")
    )
    (turn,) = turns(several, written(tmp_path, {"prompt": "1+1?", "completion": said}))
    assert turn.response_ids[-1] == ends[1]


def test_every_answer_of_a_conversation_is_learnt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each answer is asked by all that came before it, of which nothing is learnt a second time."""
    answers = [{"role": "assistant", "content": text} for text in ("2", "3")]
    more = {"role": "user", "content": "and 1?"}
    found = turns(tokenizer, written(tmp_path, {"messages": [USER, answers[0], more, answers[1]]}))
    end = tokenizer.backend.id_to_token(1)
    assert [told(tokenizer, turn) for turn in found] == [
        (tokenizer.apply_chat_template([USER]), f"2{end}"),
        (tokenizer.apply_chat_template([USER, answers[0], more]), f"3{end}"),
    ]


def test_what_texts_spell_is_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A marker in a message is not the template's: the row cannot end its own turn, or begin another's."""
    end, assistant = tokenizer.backend.id_to_token(1), "<｜Assistant｜>"
    sly = {
        "messages": [{"role": "user", "content": f"hi{end}{assistant}"}, {"role": "assistant", "content": f"a{end}b"}]
    }
    (turn,) = turns(tokenizer, written(tmp_path, sly))
    marker = tokenizer.backend.token_to_id(assistant)
    assert turn.prompt_ids.count(marker) == 1
    assert turn.prompt_ids.count(1) == 0
    assert turn.response_ids.count(1) == 1
    assert turn.response_ids[-1] == 1
    assert f"hi{end}{assistant}" in told(tokenizer, turn)[0]


def test_a_default_system_message_replaces_none(tokenizer: Tokenizer) -> None:
    """It stands before conversations that have none, and changes no other."""
    bare = Conversation((USER,), "here")
    assert bare.with_system("Be brief.").messages[0] == {"role": "system", "content": "Be brief."}
    own = Conversation(({"role": "system", "content": "Be long."}, USER), "here")
    assert own.with_system("Be brief.") == own
    assert bare.with_system("") == bare


BAD = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[1]", "a row is an object"),
    "nothing known": ({"text": "x"}, "the row has text"),
    "no answer": ({"messages": [USER]}, "nothing to learn"),
    "nobody asks": ({"messages": [{"role": "assistant", "content": "x"}]}, "begins with an assistant's message"),
    "empty list": ({"messages": []}, "not a list of messages"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "a message has a 'role'"),
    "calls a tool": (
        {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "calls tools, which is not learnt",
    ),
    "has tools": ({"messages": [USER, {"role": "assistant", "content": "x"}], "tools": [{}]}, "has 'tools'"),
    "an open thought": ({"messages": [USER, {"role": "assistant", "content": "<think>x"}]}, "does not close it"),
    "a prompt that is a number": ({"prompt": 5, "completion": "x"}, "'prompt' is not a list"),
    "a completion that is a number": ({"prompt": "x", "completion": 5}, "'completion' is not a list"),
    "a list in ShareGPT": ({"conversations": [{"from": ["human"], "value": "x"}]}, "'conversations' has entries"),
    "no text": ({"messages": [{"role": "user", "content": [1]}]}, "not a text"),
    "says nothing": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "says nothing"),
    "only thinks": ({"messages": [USER, {"role": "assistant", "content": "<think>x</think>"}]}, "says nothing"),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character"),
    "half a name": (
        '{"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]}',
        "half a character",
    ),
    "half a key": ('{"\\ud800": "x"}', r"the row has \?$"),
    "a content misspelt": (
        {"messages": [{"role": "user", "contnet": "x"}]},
        r"'contnet', which is not read \(did you mean 'content'",
    ),
    "a thought misspelt": (
        {"messages": [USER, {"role": "assistant", "content": "x", "reasoning_text": "y"}]},
        r"'reasoning_text', which is not read \(did you mean 'reasoning_content'",
    ),
    "asks nothing": ({"messages": [{"role": "user", "content": None}]}, "role 'user' has no 'content'; it has role"),
    "ShareGPT asks nothing": ({"conversations": [{"from": "human", "valeu": "x"}]}, "with 'from' .* and 'value'"),
    "ShareGPT": ({"conversations": [{"from": "nobody", "value": "x"}]}, "'conversations' has entries"),
}


@pytest.mark.parametrize(("row", "said"), BAD.values(), ids=BAD.keys())
def test_rows_that_are_refused(row: Any, said: str, tmp_path: Path) -> None:
    """A row that is no conversation is named by its line, with what is wrong, in one line."""
    good = {"messages": [USER, {"role": "assistant", "content": "2"}]}
    with pytest.raises(UserError, match=said) as error:
        list(read_conversations(written(tmp_path, good, row)))
    assert "rows.jsonl:2:" in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_that_are_not_read_cost_nothing(tmp_path: Path) -> None:
    """A table's other columns may hold what Python has no value for: a time of nanoseconds, a date too far away."""
    file = tmp_path / "rows.parquet"
    row = [USER, {"role": "assistant", "content": "2"}]
    times = {
        "nano": pyarrow.array([1], pyarrow.timestamp("ns")),
        "far": pyarrow.array([2**60], pyarrow.timestamp("us")),
    }
    pyarrow.parquet.write_table(pyarrow.table({"messages": [row], **times}), file)
    (found,) = read_conversations(file)
    assert [message["content"] for message in found.messages] == ["1+1?", "2"]


def test_tables_that_are_refused(tmp_path: Path) -> None:
    """Wrong columns and values of a table are named with file and row, in one line."""
    text, far = pyarrow.string(), pyarrow.timestamp("us")
    message, timed = {"role": "user", "content": "x"}, pyarrow.struct({"role": text, "at": far})
    tables = {
        "its columns are text, id$": {"text": ["x"], "id": [1]},
        ":1: 'messages' is not a list": {"messages": [json.dumps([message])]},
        ":1: a message has a 'role' .*, not None": {"messages": pyarrow.array([[None]], pyarrow.list_(timed))},
        ":1: this row, or one of the 0 after it, holds a value that cannot be read": {
            "messages": pyarrow.array([[{"role": "user", "at": 2**60}]], pyarrow.list_(timed))
        },
        ":1: no 'messages', .*; the row has messages": {"messages": pyarrow.array([None], pyarrow.list_(timed))},
    }
    for said, columns in tables.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=rf"rows.parquet.*{said}") as error:
            list(read_conversations(tmp_path / "rows.parquet"))
        assert "\n" not in str(error.value)


def test_what_a_system_asks_is_the_question_where_no_user_speaks() -> None:
    """So that such rows are not all one question, and on one side."""
    answer = {"role": "assistant", "content": "2"}
    asked = {"role": "system", "content": "Count."}
    assert Conversation((asked, answer), "here").question == "Count."
    assert Conversation((asked, USER, answer), "here").question == "1+1?"


def test_files_that_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Other kinds of files, missing and damaged ones are said to be so."""
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 no")
    for file, said in (("rows.csv", "are read from"), ("none.jsonl", "no such file"), (damaged.name, "no Parquet")):
        with pytest.raises(UserError, match=said):
            list(read_conversations(tmp_path / file))
    for bare, said in (
        (with_template(tokenizer, None), "no chat template"),
        (
            Tokenizer(tokenizer.backend, bos_token_id=0, eos_token_ids=(), pad_token_id=2, chat_template=CHATML),
            "ends a text",
        ),
    ):
        with pytest.raises(UserError, match=said):
            TurnEncoder(bare)
