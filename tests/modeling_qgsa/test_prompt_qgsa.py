"""The question in a prompt."""

import torch
from handmade import END, PAD, prompts

from modeling_qgsa.prompt_qgsa import find_question


def test_find_question_takes_the_last_closed_turn():
    ids = prompts([1, 20, 21, END, 5, 30, END, 40, 41, END, 6], [1, 50, END, 6], [1, 60, 61])
    question = find_question(ids, ids != PAD, END)
    assert [ids[row][question[row]].tolist() for row in range(3)] == [[40, 41], [1, 50], [1, 60, 61]]


def test_find_question_reads_nothing_that_is_hidden():
    ids = prompts([1, 20, 21, 22, END, 6, 30, 31, END])
    readable = torch.tensor([[True, False, True, True, True, True, False, False, False]])
    question = find_question(ids, readable, END)
    assert ids[question].tolist() == [1, 21, 22]
