"""What the harness returns, read without the harness: answers, metrics, places of data files."""

from __future__ import annotations

import pytest

from codecllm.verifier.evaluation.harness import _answer, _answers, _metrics, _placed


@pytest.mark.parametrize(
    ("responses", "answer"),
    [
        ([(-3.0, False), (-1.5, False), (-2.0, True)], 1),
        ([[-3.0, False], [-1.5, False]], 1),
        ([(-3.0, True)], True),
        ([(-3.0, False)], False),
        ([" Paris"], " Paris"),
        ([-123.4], None),  # the log-likelihood of a text
        ([(-3.0, False), " Paris"], None),
        ([], None),
    ],
)
def test_answers(responses, answer):
    assert _answer(responses) == answer
    assert type(_answer(responses)) is type(answer)


def test_answers_go_by_example_and_filter():
    rows = [
        {"doc_id": 3, "filter": "none", "filtered_resps": ["a"]},
        {"doc_id": 3, "filter": "strict", "filtered_resps": ["b"]},
        {"doc_id": 4, "filter": "none", "filtered_resps": [-1.0]},
    ]
    assert _answers(rows) == {(3, "none"): "a", (3, "strict"): "b"}


def test_metrics_have_their_standard_errors_and_filters():
    row = {
        "alias": "a task",
        "name": "task",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "word_perplexity,none": 12,
        "word_perplexity_stderr,none": "N/A",
        "exact_match,strict": 0.75,
        "exact_match_stderr,strict": 0.1,
        "bypass,none": "nothing",
    }
    assert _metrics(row) == {
        "acc": (0.5, 0.25),
        "word_perplexity": (12.0, None),
        "exact_match,strict": (0.75, 0.1),
    }


def test_data_files_beside_a_task_file_are_found(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    found = str((tmp_path / "a.jsonl").resolve())
    named = {"test": "a.jsonl", "train": ["a.jsonl", "hf://elsewhere/b.jsonl"]}
    assert _placed(named, tmp_path) == {
        "test": found,
        "train": [found, "hf://elsewhere/b.jsonl"],
    }
