"""On-policy distillation: the gradient against the exact divergence, one update by hand, and whole runs."""

import io
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import fathom.train.rl as module
from fathom.config.policy import PolicyLoss
from fathom.config.rl import PromptSection, RLRecipe
from fathom.data import train_bpe
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.train import rl_estimate
from fathom.train.grpo import PolicyBatch, policy_loss, teacher_advantages
from fathom.train.learner import Learner, frozen_copy, update
from fathom.train.rollout import Group
from tests.model.configs import LLAMA, V3, build
from tests.train import test_learner, test_rl, test_rl_told
from tests.train.test_rl import changed, lines, run, stop_after, weights
from tests.train.test_update import group, learner, logprobs
from tests.train.tiny import MODEL

recipe, start = test_rl.recipe, test_rl.start  # fixtures, of this file too

WORDS, LONGEST = 3, 3
"""A toy's vocabulary, whose word 0 ends a text, and the most words of a text."""

# ------------------------------------------------------------------------------------------ the gradient, exactly


def all_texts() -> list[tuple[int, ...]]:
    """Every text of the toy: ended, or cut at the limit."""
    return [
        text
        for length in range(1, LONGEST + 1)
        for text in itertools.product(range(WORDS), repeat=length)
        if 0 not in text[:-1] and (text[-1] == 0 or length == LONGEST)
    ]


class Toy:
    """A distribution over next words after every beginning; beginnings share a part of their logits."""

    def __init__(self, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        self.beginnings = {text[:length]: None for text in all_texts() for length in range(len(text))}
        shapes = ((len(self.beginnings), WORDS), (WORDS,))
        self.parameters = [torch.randn(s, generator=source, dtype=torch.float64).requires_grad_() for s in shapes]

    def table(self) -> dict[tuple[int, ...], Tensor]:
        """Log-probabilities [WORDS] after every beginning."""
        own, shared = self.parameters
        return dict(zip(self.beginnings, (own + shared).log_softmax(1), strict=True))

    def of(self, text: tuple[int, ...]) -> Tensor:
        """Log-probability of every word of a text."""
        table = self.table()
        return torch.stack([table[text[:place]][word] for place, word in enumerate(text)])


def expected_gradient(student: Toy, teacher: Toy) -> list[Tensor]:
    """That of the loss over every text there is, each weighed by how often the student writes it."""
    texts = all_texts()
    new = [student.of(text) for text in texts]
    owner = torch.cat([torch.full((len(text),), place) for place, text in enumerate(texts)])
    old = torch.cat(new).detach()
    judged = torch.cat([teacher.of(text) for text in texts])
    chances = torch.stack([one.sum().exp() for one in new]).detach()
    assert float(chances.sum()) == pytest.approx(1)
    batch = PolicyBatch(owner, teacher_advantages(judged, old), chances, old)
    loss, _ = policy_loss(torch.cat(new), batch, PolicyLoss())
    return list(torch.autograd.grad(loss, student.parameters))


def test_the_expected_gradient_is_that_of_the_exact_reverse_divergence() -> None:
    """Over all texts of a toy vocabulary: Σ KL(student ‖ teacher) of the next word after every beginning, weighed by
    how often the student comes there, which is held fixed."""
    student, teacher = Toy(1), Toy(2)
    ours, theirs = student.table(), teacher.table()
    divergence = torch.zeros((), dtype=torch.float64)
    for beginning, own in ours.items():
        reached = student.of(beginning).sum().exp().detach() if beginning else 1.0
        divergence = divergence + reached * (own.exp() * (own - theirs[beginning].detach())).sum()
    exact = torch.autograd.grad(divergence, student.parameters)
    for found, wanted in zip(expected_gradient(student, teacher), exact, strict=True):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_student_like_its_teacher_has_no_gradient() -> None:
    """Where both are the same model, every term is 0, and not only their mean."""
    for gradient in expected_gradient(Toy(1), Toy(1)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


# ------------------------------------------------------------------------------------------------------- one update


@pytest.fixture
def groups() -> list[Group]:
    """Two groups whose rewards are all equal, one completion cut off."""
    torch.manual_seed(0)
    return [group(5, (2, 7, 1), (1.0,) * 3), group(3, (13, 25), (0.0,) * 2, finished=False)]


def taught_by(teacher: Transformer, own: Learner, **fields: Any) -> Learner:
    """`own` with a teacher."""
    own.recipe, own.teacher = own.recipe.model_copy(update={"teacher": "t"} | fields), teacher
    return own


@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_is_what_a_hand_computes(groups: list[Group], parts: int) -> None:
    """Every text alone, at the temperature of sampling: w · (log p − log π_old) per token, groups of equal rewards too;
    with two mini-batches π_old is the policy before the first."""
    rollout = {"problems": 2, "samples": 4, "temperature": 0.7}
    model, teacher = build(LLAMA), build(LLAMA, seed=3)
    own = taught_by(teacher, learner(model, rollout=rollout, train={"mini_batches": parts, "rows": 20}))
    hand = learner(build(LLAMA), rollout=rollout)
    batches = [groups] if parts == 1 else [groups[:1], groups[1:]]
    texts = [[(g.prompt_ids, r.drawn.tokens) for g in batch for r in g.rollouts] for batch in batches]
    with torch.no_grad():
        before = [logprobs(hand.model, one, 0.7) for one in texts]
        judged = [logprobs(teacher, one, 0.7) for one in texts]
    for one, olds, theirs in zip(texts, before, judged, strict=True):
        loss = torch.zeros(())
        for new, old, its in zip(logprobs(hand.model, one, 0.7), olds, theirs, strict=True):
            ratio, advantage = (new - old).exp(), its - old
            loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean() / len(one)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hand.model.parameters(), 1.0)
        hand.optimizer.step(hand.recipe.optimizer.lr)
        hand.optimizer.zero_grad()
    values = update(own, groups)
    gaps = torch.cat([old - its for one in zip(before, judged, strict=True) for old, its in zip(*one, strict=True)])
    assert values["teacher_kl"] == pytest.approx(float(gaps.mean()), abs=1e-4)
    assert values["updates"] == parts
    for (name, found), wanted in zip(model.named_parameters(), hand.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5, msg=name)


def test_a_student_of_itself_stays_as_it_is(groups: list[Group]) -> None:
    """With its own copy as the teacher no weight moves by a bit, and the divergence is 0 to the bit."""
    model = build(LLAMA)
    own = taught_by(frozen_copy(model), learner(model, optimizer={"lr": 1e-2, "weight_decay": 0.0}))
    values = update(own, groups)
    assert (values["teacher_kl"], values["grad_norm"], values["updates"]) == (0.0, 0.0, 1)
    before = own.teacher.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_teacher_goes_by_its_own_routes() -> None:
    """A mixture of experts that teaches its copy, whose engine has chosen other experts: it chooses as it always does,
    and the copy goes by the engine's."""
    own = taught_by(build(V3), learner(build(V3)))
    replayed, free = (test_learner.logprobs_alone(build(V3), replayed=replayed) for replayed in (True, False))
    values = update(own, test_learner.groups())
    assert values["teacher_kl"] == pytest.approx(float((replayed - free).mean().detach()), abs=1e-4)
    assert abs(values["teacher_kl"]) > 1e-3


def test_a_teacher_is_asked_in_its_own_way(groups: list[Group]) -> None:
    """With a prompt of its own it judges the same completions behind that one, while the student stays with its own."""
    tokenizer, config = train_bpe(["0123456789"], 266), LLAMA.replace(vocab_size=266)
    teacher = build(config, seed=3)
    own = taught_by(
        teacher, learner(build(config)), teacher_prompt=PromptSection(style="template", template="{question}!")
    )
    own.tokenizer = tokenizer
    theirs = [tokenizer.bos_token_id, *tokenizer.encode("?!")]
    completions = [(g.prompt_ids, r.drawn.tokens) for g in groups for r in g.rollouts]
    students = torch.cat(logprobs(build(config), completions, 1.0))
    judged = torch.cat(logprobs(teacher, [(theirs, tokens) for _, tokens in completions], 1.0))
    assert update(own, groups)["teacher_kl"] == pytest.approx(float((students - judged).mean().detach()), abs=1e-4)


def test_a_text_beyond_the_teachers_context_is_refused(groups: list[Group]) -> None:
    """Nothing is made up for places that the teacher has never seen."""
    own = taught_by(build(LLAMA.replace(max_position_embeddings=26)), learner(build(LLAMA)))
    with pytest.raises(UserError, match="reads 26 tokens at most, and a prompt with its completion has 27"):
        update(own, groups)


def drawn_by(model: Transformer, prompt: list[int], source: torch.Generator) -> Group:
    """Thirty-two completions of four tokens."""
    ids = torch.tensor(prompt).expand(32, -1)
    for _ in range(4):
        with torch.no_grad():
            chances = model.logits(model.hidden_states(ids)[0])[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(chances, 1, generator=source)), 1)
    found = group(len(prompt), (4,) * 32, (1.0,) * 32)
    for one, tokens in zip(found.rollouts, ids[:, len(prompt) :].tolist(), strict=True):
        one.drawn.tokens = tokens
    return replace(found, prompt_ids=prompt)


def test_a_student_gets_nearer_to_its_teacher() -> None:
    """After thirty steps the divergence on the student's own samples is a small part of what it was."""
    config, source = LLAMA.replace(vocab_size=8), torch.Generator().manual_seed(0)
    own = taught_by(build(config, seed=3), learner(build(config), optimizer={"lr": 3e-3, "weight_decay": 0.0}))
    gaps = [update(own, [drawn_by(own.model, [word], source) for word in (1, 2)])["teacher_kl"] for _ in range(30)]
    assert sum(gaps[-5:]) < 0.2 * sum(gaps[:5])


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def teacher(start: Path, tmp_path: Path) -> Path:
    """A model of the student's vocabulary and shape that is of a decided opinion."""
    model, tokenizer = module.load(start / "model", dtype="float32")
    save_model(build(model.config, seed=7), tmp_path / "teacher", tokenizer=tokenizer)
    return tmp_path / "teacher"


@pytest.fixture
def taught(recipe: RLRecipe, teacher: Path) -> RLRecipe:
    return changed(recipe, {"eval": {"probe": False}}).replace(teacher=str(teacher))


def trained(result: Any) -> list[dict[str, Any]]:
    return [line for line in lines(result) if line["kind"] == "train"]


def test_all_problems_are_learnt_from_whatever_their_rewards(taught: RLRecipe, tmp_path: Path) -> None:
    """Where no answer is ever right every step makes its update, on every token, and nobody is told to change levels;
    rewards are measured."""
    (tmp_path / "rules.py").write_text(test_rl_told.RULES)
    hopeless = {"task": {"name": f"{tmp_path / 'rules.py'}:Hopeless"}, "train": {"mini_batches": 2}}
    result, said = run(changed(taught, hopeless), tmp_path / "runs")
    found = trained(result)
    assert [(line["updates"], line["reward"], line["uninformative"]) for line in found] == [(2, 0.0, 1.0)] * 4
    assert all(line["grad_norm"] > 0 for line in found)
    assert f"taught by {taught.teacher}, " in said
    assert "nothing to learn from" not in said
    assert "had something to learn" not in said


def test_a_resumed_run_is_the_unbroken_one(taught: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, a stop and two more give the bytes and metrics of four; the teacher is in no checkpoint."""
    unbroken, _ = run(taught, tmp_path / "one")
    stop_after(monkeypatch, 2)
    halted, _ = run(taught, tmp_path / "two")
    assert (halted.interrupted, halted.step) == (True, 2)
    monkeypatch.undo()
    resumed, _ = run(taught, tmp_path / "two", resume=True)
    assert weights(resumed) == weights(unbroken)
    assert lines(resumed) == lines(unbroken)
    assert {Path(name).parent.name for name in weights(resumed)} == {"", "training_state"}


def test_a_teacher_of_another_vocabulary_is_refused(taught: RLRecipe, tmp_path: Path) -> None:
    """Before a step is made, with what to do; in a dry run as well."""
    other = train_bpe(["0123456789 sums"] * 3, 267)
    model = Transformer(MODEL.replace(vocab_size=other.vocab_size))
    model.init_weights(1)
    save_model(model, tmp_path / "other", tokenizer=other)
    told = taught.replace(teacher=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r'another vocabulary .* way = "traces"'):
        run(told, tmp_path / "runs")
    with pytest.raises(UserError, match=r'another vocabulary .* way = "traces"'):
        rl_estimate.dry_run(told, Console(file=io.StringIO()))
    assert not (tmp_path / "runs").exists()


def test_a_teacher_with_fewer_tokens_is_refused() -> None:
    """One vocabulary, but a model whose table is cut shorter than the student's: some tokens it could not judge."""
    tokenizer = train_bpe(["0123456789"], 266)
    configs = [SimpleNamespace(vocab_size=size) for size in (266, 320)]
    module.require_one_vocabulary("t", (configs[1], tokenizer), (configs[0], tokenizer))
    with pytest.raises(UserError, match="another vocabulary"):
        module.require_one_vocabulary("t", (configs[0], tokenizer), (configs[1], tokenizer))


def test_a_teacher_that_is_not_there_is_named(taught: RLRecipe, tmp_path: Path) -> None:
    """Training stops before it begins; a dry run prints the recipe and says what is missing."""
    told = taught.replace(teacher=str(tmp_path / "nobody"))
    with pytest.raises(UserError, match="nobody: no such model folder"):
        run(told, tmp_path / "runs")
    said = io.StringIO()
    rl_estimate.dry_run(told, Console(file=said, width=400))
    assert "nobody: no such model folder; what the run takes can be said once it is there" in said.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"resample": 1}}, r"rollout\.resample = 1 with a teacher"),
        ({"teacher": "m/"}, "the model itself"),
        ({"teacher": None, "teacher_prompt": {}}, "teacher_prompt without a teacher"),
    ],
)
def test_what_a_teacher_makes_senseless_is_refused(taught: RLRecipe, changes: dict[str, Any], message: str) -> None:
    """Named by its field when the recipe is read."""
    with pytest.raises(UserError, match=message):
        RLRecipe.parse(taught.model_dump() | {"model": "m"} | changes, where="recipe")


def test_a_dry_run_counts_the_teacher(taught: RLRecipe) -> None:
    """Its parameters, its pass forward at every step, and its memory: a third of a pass of training, 4 bytes each."""
    plain, judged = (rl_estimate.step_work(LLAMA, taught, [5, 7], teacher) for teacher in (None, LLAMA))
    assert judged.teacher_flops == pytest.approx(plain.update_flops / 3)
    assert judged.update_flops == pytest.approx(plain.update_flops * 4 / 3)
    assert rl_estimate.storage(LLAMA, taught, 10, V3).teacher == sum(p.nbytes for p in build(V3).parameters())
    said = io.StringIO()
    rl_estimate.dry_run(taught, Console(file=said, width=400, soft_wrap=True))
    assert f"{taught.teacher}: " in said.getvalue()
    assert " a step to judge every token" in said.getvalue()


def test_a_teacher_multiplies_as_its_student_does(recipe: RLRecipe, start: Path, tmp_path: Path) -> None:
    """In FP8 a student that is taught by its own beginning says the same as its teacher, to the bit."""
    twin = shutil.copytree(start / "model", tmp_path / "twin")
    own = changed(recipe, {"train": {"precision": "fp8"}}).replace(teacher=str(twin))
    begun, ids = module._start(own, None), torch.arange(9)[None]
    assert begun.teacher is not None
    assert torch.equal(begun.teacher(ids), begun.model(ids))
