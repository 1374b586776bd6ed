"""Which candidates become rows: the filters in their order, the rewriting and its check, and a choice among equals."""

from collections.abc import Sequence
from dataclasses import dataclass

from fathom.config.rewards import Layout
from fathom.config.synth import SynthRecipe
from fathom.synth.candidates import Candidate, Solved
from fathom.synth.counts import DUPLICATE, HELD_OUT, REWRITING, SURPLUS, Counts
from fathom.synth.decontamination import HeldOutSets
from fathom.synth.duplicates import Duplicates
from fathom.synth.filters import reason_to_drop
from fathom.synth.rows import Row, answer_in, make_row, text_of
from fathom.tasks.checker import Checker
from fathom.tasks.task import Problem
from fathom.train.rollout import seed_of


@dataclass(frozen=True)
class Reader:
    """How the completions of a run are read, and who wrote them."""

    layout: Layout
    starts_thinking: bool
    """Whether prompts end with an open think tag."""
    instruction: str
    """What follows the question in a prompt."""
    source: str
    """What rows name as theirs."""


@dataclass(frozen=True)
class _Proposal:
    problem: Problem
    candidate: Candidate
    row: Row


class Selection:
    """Chooses rows, batch after batch, and counts what becomes of every candidate."""

    def __init__(self, recipe: SynthRecipe, reader: Reader, held_out: HeldOutSets) -> None:
        """Raises `UserError` where a filter needs a package that is missing."""
        self._recipe, self._reader, self._held_out = recipe, reader, held_out
        self._kept = Duplicates(recipe.filters.duplicates)
        self.counts = Counts()

    def rows(self, solved: Sequence[tuple[Problem, Solved]], checker: Checker) -> list[Row]:
        """The rows of a batch of one task, whose answers the checker has found right as they are written."""
        proposals = [
            [proposal for candidate in one.candidates if (proposal := self._proposed(problem, candidate, one.task))]
            for problem, one in solved
        ]
        listed = [proposal for group in proposals for proposal in group]
        rewrite = self._recipe.rewrite
        verdicts = iter(checker.check_all([(one.problem, answer_in(one.row, rewrite)) for one in listed]))
        rows: list[Row] = []
        for group in proposals:
            sound = []
            for proposal in group:
                if next(verdicts).score >= 1:
                    sound.append(proposal)
                else:
                    self._count(proposal, REWRITING)
            rows += self._chosen(sound)
        return rows

    def _proposed(self, problem: Problem, candidate: Candidate, task: str) -> _Proposal | None:
        """What would be written of a candidate that all filters of one candidate let pass."""
        place = (task, problem.level, candidate.round)
        self.counts.add(place, "drawn")
        if candidate.right:
            self.counts.add(place, "right")
        if said := candidate.fault or candidate.failure:
            self.counts.faults[said] += 1
        reader = self._reader
        reading = candidate.reading(reader.layout, starts_thinking=reader.starts_thinking)
        reason = reason_to_drop(candidate, reading, problem, self._recipe.filters)
        if not reason and self._held_out.has(problem.question):
            reason = HELD_OUT
        if reason:
            self.counts.add(place, reason)
            return None
        row = make_row(
            problem,
            candidate,
            reading,
            task=task,
            source=reader.source,
            instruction=reader.instruction,
            rewrite=self._recipe.rewrite,
        )
        return _Proposal(problem, candidate, row)

    def _chosen(self, proposals: Sequence[_Proposal]) -> list[Row]:
        """Of one problem's, those that are kept: asked in the order of preference, so that a row is a duplicate only of
        one that is written."""
        most, rows = self._recipe.filters.per_problem, []
        for proposal in sorted(proposals, key=self._preference):
            text = text_of(proposal.row)
            if self._kept.has(text):
                self._count(proposal, DUPLICATE)
            elif most is not None and len(rows) == most:
                self._count(proposal, SURPLUS)
            else:
                self._kept.add(text)
                self._count(proposal, "kept")
                rows.append(proposal.row)
        return rows

    def _preference(self, proposal: _Proposal) -> tuple[int, int]:
        if self._recipe.filters.choice == "shortest":
            said = proposal.row["messages"][1]
            return len(said["reasoning_content"]) + len(said["content"]), proposal.candidate.seed
        return seed_of(self._recipe.seed, "choice", proposal.candidate.seed), 0

    def _count(self, proposal: _Proposal, what: str) -> None:
        self.counts.add((proposal.row["task"], proposal.problem.level, proposal.candidate.round), what)
