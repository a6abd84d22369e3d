"""What counts as right: JSON, the whole of it, equal in every key, value and type."""

import json
import types

import pytest
import score

WANTED = '{"customer": "Anna Holm", "quantity": 3}'


@pytest.mark.parametrize("given", [WANTED, '{"quantity":3,\n "customer":"Anna Holm"}', f" {WANTED}\n"])
def test_right(given):
    assert score.matches(given, WANTED)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Anna Holm wants 3",
        f"Here you are: {WANTED}",
        f"{WANTED} {WANTED}",
        WANTED[:-1],
        '{"customer": "Anna Holm", "quantity": "3"}',
        '{"customer": "Anna Holm", "quantity": 3.0}',
        '{"customer": " Anna Holm", "quantity": 3}',
        '{"customer": "Anna Holm"}',
        '{"customer": "Anna Holm", "quantity": 3, "total": null}',
        f"[{WANTED}]",
        "3",
    ],
)
def test_wrong(given):
    assert not score.matches(given, WANTED)


def test_true_is_not_one():
    assert not score.matches('{"a": true}', '{"a": 1}')


def test_the_score_is_the_share_of_right_answers():
    samples = [score.Sample("m", WANTED, given) for given in (WANTED, "no", WANTED, "{}")]
    assert score.Report(samples, 1.0).score == 0.5


def test_rows_are_asked_in_batches_without_their_answers(monkeypatch, tmp_path):
    asked = []

    def answer(model, tokenizer, prompts):
        asked.append(prompts)
        return [WANTED for _ in prompts]

    def template(turns, **how):
        return "|".join(turn["content"] for turn in turns)

    monkeypatch.setattr(score, "load", lambda path: (None, types.SimpleNamespace(apply_chat_template=template)))
    monkeypatch.setattr(score, "answer", answer)
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": WANTED}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(5)))
    report = score.score("somewhere", score.read(path), batch_size=2)
    assert [len(prompts) for prompts in asked] == [2, 2, 1]
    assert all(prompt == "q" for prompts in asked for prompt in prompts)
    assert report.score == 1.0
