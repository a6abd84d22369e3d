"""The demo's rows: the same each time, well formed, and nothing in common between the two splits."""

import json
import re
from dataclasses import fields
from datetime import date

import data
import pools
import score

TRAIN, HELD_OUT = data.make()


def answers(rows):
    return [json.loads(row["messages"][-1]["content"]) for row in rows]


def test_the_shipped_files_are_what_the_code_makes(tmp_path):
    for rows, shipped in ((TRAIN, data.TRAIN_FILE), (HELD_OUT, data.HELD_OUT_FILE)):
        assert data.write(rows, tmp_path / "rows.jsonl").read_bytes() == shipped.read_bytes()


def test_another_seed_makes_other_rows():
    assert data.make(seed=1)[0] != TRAIN


def test_there_are_enough_rows_and_none_twice():
    assert len(TRAIN) == data.TRAIN_ROWS
    assert len(HELD_OUT) == data.HELD_OUT_ROWS >= 100
    messages = [row["messages"][1]["content"] for row in TRAIN + HELD_OUT]
    assert len(set(messages)) == len(messages)


def test_every_row_is_a_conversation_whose_answer_matches_itself():
    for row in TRAIN + HELD_OUT:
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        answer = row["messages"][-1]["content"]
        assert list(json.loads(answer)) == [field.name for field in fields(data.Order)]
        assert score.matches(answer, answer)


def test_every_answer_can_be_read_off_its_message():
    for row, answer in zip(TRAIN + HELD_OUT, answers(TRAIN + HELD_OUT), strict=True):
        message = row["messages"][1]["content"]
        assert answer["customer"] in message
        assert answer["order"] in message
        assert answer["total"].split()[1] in message
        day = date.fromisoformat(answer["date"])
        assert any(style(day) in message for style in data.DATES)


def test_no_value_is_in_both_splits():
    for field in fields(data.Order):
        seen = {answer[field.name] for answer in answers(TRAIN)}
        assert not seen & {answer[field.name] for answer in answers(HELD_OUT)}, field.name


def test_no_word_of_a_value_and_no_phrase_is_in_both_splits():
    def words(rows):
        return {word for answer in answers(rows) for key in ("customer", "order") for word in answer[key].split()}

    def amounts(rows):
        return {re.sub(r"\D", "", answer["total"]) for answer in answers(rows)}

    assert not words(TRAIN) & words(HELD_OUT)
    assert not amounts(TRAIN) & amounts(HELD_OUT)
    assert not set(pools.TRAIN.phrases) & set(pools.HELD_OUT.phrases)
