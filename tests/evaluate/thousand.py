"""A task whose answer is a thousand, however it is written."""

import random

from fathom.tasks.task import Problem, Task


class Thousand(Task):
    """One question."""

    def problem(self, random: random.Random, level: int) -> Problem:
        return Problem("n?", "1000")

    def check(self, problem: Problem, answer: str) -> float:
        return float(float(answer.replace(",", "")) == 1000)
