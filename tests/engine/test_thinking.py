"""Think tags as one token and as several: budgets to the token, minima, and everything else that a model may do."""

import random

import pytest

from fathom.engine.protocol import Thinking
from fathom.engine.thinking import ThinkTags, ThoughtTracker, find_think_tags
from fathom.errors import UserError
from tests.engine.vocabularies import EOS, QWEN_LIKE, byte_vocabulary

PIECES = (b"</", b"think", b">\n\n", b"><", b"</think>", b" x</", b"nk>", b"<th")
SINGLE = byte_vocabulary(tags=True)
TEXT = byte_vocabulary(*PIECES, template="<think></think>")
OPEN, CLOSE = 257, 258
A = ord("a")


def tags_of(tokenizer) -> ThinkTags:
    tags = find_think_tags(tokenizer, tokenizer.vocab_size + 3)
    assert tags is not None
    return tags


def run(tracker: ThoughtTracker, drawn: list[int]) -> list[int]:
    """The tokens that come out when a model would draw these and the engine writes what is forced."""
    output = []
    for token in drawn:
        while tracker.forced:
            output.append(tracker.forced[0])
            tracker.advance(tracker.forced[0])
        tracker.advance(token)
        output.append(token)
    return output


def spelled(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, special=True)


def test_models_without_tags_are_told_apart() -> None:
    """Tags count when they are added tokens or when the template spells both; half of a pair is none."""
    assert find_think_tags(byte_vocabulary(), 300) is None
    assert find_think_tags(byte_vocabulary(template="{{ content.split('</think>')[-1] }}"), 300) is None
    assert tags_of(SINGLE).tokens == {OPEN: "opening", CLOSE: "closing"}
    assert tags_of(TEXT).tokens == {}
    assert tags_of(byte_vocabulary(tags=True, template=QWEN_LIKE)).tokens != {}


@pytest.mark.parametrize("budget", [0, 1, 2, 5])
@pytest.mark.parametrize("tokenizer", [SINGLE, TEXT], ids=["one token", "text"])
def test_the_budget_is_exact(tokenizer, budget: int) -> None:
    """A model that would think for ever is closed after exactly `budget` tokens, opened by prompt or by itself."""
    closing = spelled(tokenizer, "</think>")
    tracker = ThoughtTracker(tags_of(tokenizer), Thinking(budget=budget), inside=True)
    assert run(tracker, [A] * 20) == [A] * budget + closing + [A] * (20 - budget)
    assert (tracker.thoughts, tracker.reasoning) == (budget, budget + len(closing))
    opening = spelled(tokenizer, "<think>")
    tracker = ThoughtTracker(tags_of(tokenizer), Thinking(budget=budget), inside=False)
    assert run(tracker, [A, *opening, *[A] * 20]) == [A, *opening, *[A] * budget, *closing, *[A] * (20 - budget)]
    assert (tracker.thoughts, tracker.reasoning) == (budget, budget + len(closing) + len(opening))


def test_newlines_of_the_template_are_written_within_the_budget() -> None:
    """The newline before a forced tag is the budget's last token, or left out where a thought ends a line itself."""
    tokenizer = byte_vocabulary(tags=True, template=QWEN_LIKE)
    newline = ord("\n")
    for budget, thoughts in ((0, []), (1, [A]), (2, [A, newline]), (4, [A, A, A, newline])):
        tracker = ThoughtTracker(tags_of(tokenizer), Thinking(budget=budget), inside=True)
        assert run(tracker, [A] * 9)[: budget + 4] == [*thoughts, CLOSE, newline, newline, A]
    tracker = ThoughtTracker(tags_of(tokenizer), Thinking(budget=3), inside=True)
    assert run(tracker, [A, newline, A, A])[:6] == [A, newline, A, CLOSE, newline, newline]


def test_answering_begins_behind_the_last_forced_token() -> None:
    """The newlines behind a forced tag are still the engine's: a grammar begins after them."""
    tracker = ThoughtTracker(tags_of(byte_vocabulary(tags=True, template=QWEN_LIKE)), Thinking(budget=0), inside=True)
    seen = []
    while tracker.forced:
        seen.append(tracker.answering)
        tracker.advance(tracker.forced[0])
    assert seen == [False] * 3
    assert tracker.answering


def test_minimum_forbids_closing_and_ending() -> None:
    """Below the minimum neither tag nor end of text can be drawn; at the minimum both can; outside thoughts always."""
    tracker = ThoughtTracker(tags_of(SINGLE), Thinking(minimum=2), inside=True)
    for _ in range(2):
        mask = tracker.mask()
        assert mask is not None
        assert (~mask).nonzero()[:, 0].tolist() == [EOS, CLOSE]
        tracker.advance(A)
    assert tracker.mask() is None
    assert ThoughtTracker(tags_of(SINGLE), Thinking(minimum=2), inside=False).mask() is None


def test_minimum_forbids_whatever_completes_a_spelled_tag() -> None:
    """Of tokens that are text, those that would make the tag whole are forbidden, and no others."""
    tags, vocabulary = tags_of(TEXT), TEXT.backend.get_vocab()
    closing, ending = vocabulary["</think>"], vocabulary["nk>"]
    tracker = ThoughtTracker(tags, Thinking(minimum=3), inside=True)
    assert (~tracker.mask()).nonzero()[:, 0].tolist() == sorted([EOS, closing])
    for letter in b"</thi":
        tracker.advance(letter)
    assert (~tracker.mask()).nonzero()[:, 0].tolist() == sorted([EOS, closing, ending])
    assert tracker.mask().shape == (TEXT.vocab_size + 3,)
    for letter in b"aaa":
        tracker.advance(letter)
    for letter in b"</thi":
        tracker.advance(letter)
    assert tracker.mask() is None


@pytest.mark.parametrize("tokenizer", [SINGLE, TEXT], ids=["one token", "text"])
def test_closing_early_is_allowed(tokenizer) -> None:
    """A tag that the model writes itself ends thoughts below the budget, and nothing is forced afterwards."""
    closing = spelled(tokenizer, "</think>")
    tracker = ThoughtTracker(tags_of(tokenizer), Thinking(budget=12), inside=True)
    assert run(tracker, [A, A, *closing, *[A] * 20]) == [A, A, *closing, *[A] * 20]
    assert (tracker.thoughts, tracker.reasoning) == (2, 2 + len(closing))


def test_never_opening_is_allowed() -> None:
    """Without a tag all is answer: nothing is counted, forced or forbidden."""
    tracker = ThoughtTracker(tags_of(SINGLE), Thinking(budget=1, minimum=1), inside=False)
    assert run(tracker, [A] * 9) == [A] * 9
    assert (tracker.thoughts, tracker.reasoning, tracker.mask()) == (0, 0, None)
    assert tracker.answering


def test_opening_again_shares_the_budget() -> None:
    """Thoughts after a second opening tag count on, and once the budget is spent the tag cannot be drawn again."""
    tracker = ThoughtTracker(tags_of(SINGLE), Thinking(budget=3), inside=True)
    assert run(tracker, [A, CLOSE, A, OPEN, *[A] * 9]) == [A, CLOSE, A, OPEN, A, A, CLOSE, *[A] * 7]
    assert (tracker.thoughts, tracker.reasoning) == (3, 6)
    assert (~tracker.mask()).nonzero()[:, 0].tolist() == [OPEN]


def test_tags_in_the_wrong_place_change_nothing() -> None:
    """An opening tag inside thoughts is a thought; a closing one outside is answer."""
    tracker = ThoughtTracker(tags_of(SINGLE), None, inside=True)
    run(tracker, [A, OPEN, A])
    assert (tracker.inside, tracker.thoughts) == (True, 3)
    run(tracker, [CLOSE, CLOSE, A])
    assert (tracker.inside, tracker.thoughts, tracker.reasoning) == (False, 3, 4)


def test_a_token_that_two_tags_share_is_counted_once() -> None:
    """A token that ends the opening tag and begins the closing one is no thought, and one token of reasoning."""
    shared = TEXT.backend.get_vocab()["><"]
    tracker = ThoughtTracker(tags_of(TEXT), None, inside=False)
    run(tracker, [*b"<think", shared, *b"/think>"])
    assert (tracker.inside, tracker.thoughts, tracker.reasoning) == (False, 0, 14)


def test_contradicting_bounds_are_refused() -> None:
    """A minimum above the budget is a sentence."""
    with pytest.raises(UserError, match="minimum 3 is above budget 2"):
        ThoughtTracker(tags_of(SINGLE), Thinking(budget=2, minimum=3), inside=True)


@pytest.mark.parametrize("seed", range(60))
def test_counts_equal_those_of_the_whole_text(seed: int) -> None:
    """For random pieces of tags, thought tokens are those between tags of the whole text that hold no byte of a tag."""
    dice = random.Random(seed)
    choices = [*range(257, TEXT.vocab_size), *b"</think>\na", *b"<think>"]
    drawn = [token for token in dice.choices(choices, k=150) if token != EOS]
    starts = dice.random() < 0.5
    tracker = ThoughtTracker(tags_of(TEXT), None, inside=starts)
    run(tracker, drawn)
    pieces = [TEXT.pieces[token] for token in drawn]
    owner = [number for number, piece in enumerate(pieces) for _ in piece]
    text, place, inside = b"".join(pieces), 0, starts
    thoughts, tagged = set(), set()
    while True:
        tag = b"</think>" if inside else b"<think>"
        found = text.find(tag, place)
        end = found if found >= 0 else len(text)
        thoughts |= {owner[n] for n in range(place, end)} if inside else set()
        if found < 0:
            break
        tagged |= {owner[n] for n in range(found, found + len(tag))}
        place, inside = found + len(tag), not inside
    assert tracker.inside == inside
    assert tracker.thoughts == len(thoughts - tagged)
    assert tracker.reasoning == len(thoughts | tagged)
