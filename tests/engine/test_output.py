"""Tokens to chunks: against the whole string, for random tokens, stop strings and tags, and case by case."""

import random
import re

import pytest

from fathom.engine.matching import Search
from fathom.engine.output import OutputStream
from fathom.engine.protocol import Chunk, Request, Thinking, TokenLogprob
from fathom.engine.thinking import find_think_tags
from fathom.errors import UserError
from tests.engine.vocabularies import EOS, QWEN_LIKE, byte_vocabulary

PIECES = (
    b"ab",
    b"aab",
    b"ba",
    b"\xa9\xe2",
    b"</",
    b"think>",
    b">\n\n",
    b"><",
    b"<thi",
    b"nk",
    b"\n<",
    b"\xe2\x82",
)
PLAIN = byte_vocabulary(*PIECES)
SINGLE = byte_vocabulary(*PIECES, tags=True, template=QWEN_LIKE)
TEXT = byte_vocabulary(*PIECES, template="<think></think>")
OPEN, CLOSE = SINGLE.vocab_size - 2, SINGLE.vocab_size - 1


def stream_of(tokenizer, **settings) -> OutputStream:
    request = Request(**{"prompt_ids": [1, 2, 3], "max_tokens": 10_000, **settings})
    return OutputStream(tokenizer, request, find_think_tags(tokenizer, tokenizer.vocab_size))


def feed(stream: OutputStream, tokens: list[int]) -> list[Chunk]:
    """The chunks of `tokens`, until the stream ends by itself; else it is cut off at the end."""
    chunks = []
    for token in tokens:
        logprob = None if stream._request.logprobs is None else TokenLogprob(token, -0.5)
        chunks += stream.push(token, logprob)
        if stream.finish_reason:
            return chunks
    return chunks + stream.end("cancelled")


def text(chunks: list[Chunk], part: str = "answer") -> str:
    return "".join(chunk.text for chunk in chunks if chunk.part == part)


def by_definition(tokenizer, tokens: list[int], *, starts: bool, stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """Thoughts, answer and whether a stop string came, from the whole text at once."""
    if tokenizer is SINGLE:  # spelled tags are text there: a private character stands for the real ones
        tags = {OPEN: "\ue000", CLOSE: "\ue001"}
        runs, run = [], b""
        for token in tokens:
            if token in tags:
                runs += [run.decode(errors="replace"), tags[token]]
                run = b""
            else:
                run += tokenizer.pieces[token]
        whole = "".join(runs) + run.decode(errors="replace")
    else:
        whole = b"".join(tokenizer.pieces[token] for token in tokens).decode(errors="replace")
        if tokenizer is TEXT:
            whole = whole.replace("<think>", "\ue000").replace("</think>", "\ue001")
    parts = [""]  # answer and thoughts in turn
    inside = starts
    for piece in re.split("([\ue000\ue001])", whole):
        if piece not in ("\ue000", "\ue001"):
            parts[-1] += piece
        elif inside == (piece == "\ue001"):
            inside = not inside
            parts.append("")
    trimmed = [part.lstrip("\n") if number or starts else part for number, part in enumerate(parts)]
    first = 0 if starts else 1
    last = len(parts) - 1
    thoughts = "".join(
        trimmed[number].rstrip("\n") if number < last else trimmed[number] for number in range(first, last + 1, 2)
    )
    answers, answer = trimmed[1 - first :: 2], ""
    for piece in answers:
        places = [place for place in (piece.find(s) for s in stop) if place >= 0]
        if places:
            return thoughts, answer + piece[: min(places)], True
        answer += piece
    return thoughts, answer, False


@pytest.mark.parametrize("seed", range(150))
def test_answers_equal_the_whole_strings(seed: int) -> None:
    """Random tokens with random stop strings give the whole text up to the stop string that begins first."""
    dice = random.Random(seed)
    alphabet = [*b"aab<\xc3", *range(257, PLAIN.vocab_size)]
    tokens = dice.choices(alphabet, k=dice.randint(0, 60))
    stop = tuple("".join(dice.choices("aab<é\n", k=dice.randint(1, 5))) for _ in range(dice.randint(0, 3)))
    chunks = feed(stream_of(PLAIN, stop=stop), tokens)
    _, answer, stopped = by_definition(PLAIN, tokens, starts=False, stop=stop)
    assert text(chunks) == answer
    assert not stopped or chunks[-1].finish_reason in ("stop", "cancelled")
    delivered = [token for chunk in chunks for token in chunk.token_ids]
    assert delivered == tokens[: len(delivered)]
    assert stopped or delivered == tokens
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert all(chunk.text for chunk in chunks[:-1])


@pytest.mark.parametrize("tokenizer", [SINGLE, TEXT], ids=["one token", "text"])
@pytest.mark.parametrize("seed", range(100))
def test_parts_equal_the_whole_strings(tokenizer, seed: int) -> None:
    """Random tokens and tags: thoughts and answer are those of the whole text, split at its tags."""
    dice = random.Random(seed)
    tags = [OPEN, CLOSE] if tokenizer is SINGLE else []
    alphabet = [*b"a\n\n<\xc3", *range(257, PLAIN.vocab_size), *tags * 3]
    tokens = dice.choices(alphabet, k=dice.randint(0, 60))
    if tokenizer is TEXT:
        for _ in range(3):
            place = dice.randint(0, len(tokens))
            tokens[place:place] = tokenizer.encode(dice.choice(["<think>", "</think>", "</think>\n\n"]))
    starts = dice.random() < 0.5
    chunks = feed(stream_of(tokenizer, starts_thinking=starts), tokens)
    thoughts, answer, _ = by_definition(tokenizer, tokens, starts=starts, stop=())
    assert text(chunks, "thinking") == thoughts
    assert text(chunks) == answer
    assert [token for chunk in chunks for token in chunk.token_ids] == tokens


def test_thoughts_and_answer_without_tags_and_their_newlines() -> None:
    """What a template writes around tags is in neither part, newlines inside the parts stay."""
    for tokenizer in (SINGLE, TEXT):
        tokens = tokenizer.encode("<think>\n\nOne\n\ntwo\n</think>\n\nFour\n\n", special=True)
        chunks = feed(stream_of(tokenizer), [*tokens, EOS])
        assert text(chunks, "thinking") == "One\n\ntwo"
        assert text(chunks) == "Four\n\n"
        assert chunks[-1].finish_reason == "stop"
        parts = [chunk.part for chunk in chunks]
        assert parts == sorted(parts, reverse=True)
        thought = tokenizer.encode("<think>\n\nOne\n\ntwo\n</think>", special=True)
        assert [t for chunk in chunks if chunk.part == "thinking" for t in chunk.token_ids] == thought
        assert chunks[-1].usage.reasoning == len(thought)


def test_answer_and_thoughts_in_one_token() -> None:
    """A token that ends a tag and begins the answer is shown in the answer; what precedes a tag is not lost."""
    tokenizer = byte_vocabulary(b"x</think>\ny", template="<think></think>")
    chunks = feed(stream_of(tokenizer, starts_thinking=True), [ord("w"), 257, ord("z")])
    assert (text(chunks, "thinking"), text(chunks)) == ("wx", "yz")
    assert [token for chunk in chunks for token in chunk.token_ids] == [ord("w"), 257, ord("z")]


def test_tags_of_an_opening_in_the_answer_go_with_the_thoughts() -> None:
    """Tokens before an opening tag belong to an answer chunk, the tag's own to a thinking chunk."""
    tokens = [ord("a"), *b"<think>", ord("b"), *b"</think>", ord("c")]
    chunks = feed(stream_of(TEXT), tokens)
    by_part = [(chunk.part, bytes(chunk.token_ids)) for chunk in chunks if chunk.token_ids]
    assert by_part == [("answer", b"a"), ("thinking", b"<think>b"), ("thinking", b"</think>"), ("answer", b"c")]


def test_text_is_held_back_no_longer_than_needed() -> None:
    """Text appears with the token that rules out the stop string, and not before."""
    stream = stream_of(PLAIN, stop=("stop",))
    shown = [text(stream.push(letter)) for letter in b"a sto sot"]
    assert shown == ["a", " ", "", "", "", "sto ", "", "so", "t"]


@pytest.mark.parametrize(
    ("stop", "written", "shown"),
    [
        (("aab",), "aaab", "a"),
        (("abcd", "bc"), "xabcd", "x"),
        (("abcd", "bc"), "xabce", "xa"),
        (("bc", "abcd"), "xabc", "xa"),
        (("ab", "abc"), "xabc", "x"),
        (("abab",), "abaabab", "aba"),
        (("é",), "caféx", "caf"),
        (("\n",), "a\nb", "a"),
    ],
)
def test_the_match_that_begins_first_wins(stop: tuple[str, ...], written: str, shown: str) -> None:
    """Overlaps with itself and with others, at the end of the text too, are decided by where a match begins."""
    stream = stream_of(PLAIN, stop=stop, max_tokens=len(written.encode()))
    chunks = feed(stream, list(written.encode()))
    assert (text(chunks), chunks[-1].finish_reason) == (shown, "stop")


def test_stop_strings_count_in_the_answer_only() -> None:
    """Neither thoughts nor the newlines behind a tag end the text; the same string in the answer does."""
    chunks = feed(stream_of(SINGLE, stop=("\n\n",), starts_thinking=True), [*b"a\n\nb", CLOSE, *b"\n\nc\n\nd"])
    assert (text(chunks, "thinking"), text(chunks), chunks[-1].finish_reason) == ("a\n\nb", "c", "stop")


def test_end_of_text_shows_nothing_unless_ignored() -> None:
    """The token ends with `stop`; with `ignore_eos` the text goes on without it."""
    chunks = feed(stream_of(PLAIN), [*b"ab", EOS, *b"c"])
    assert (text(chunks), chunks[-1].finish_reason, chunks[-1].usage.completion) == ("ab", "stop", 3)
    chunks = feed(stream_of(PLAIN, ignore_eos=True, max_tokens=4), [*b"ab", EOS, *b"c"])
    assert (text(chunks), chunks[-1].finish_reason, chunks[-1].usage.completion) == ("abc", "length", 4)


def test_the_end_shows_what_was_held_back() -> None:
    """At max_tokens the start of a stop string, of a tag and of a character, and newlines of open thoughts appear."""
    chunks = feed(stream_of(TEXT, stop=("bcd",), max_tokens=3), [*b"abc"])
    assert (text(chunks), chunks[-1].finish_reason) == ("abc", "length")
    assert text(feed(stream_of(TEXT, max_tokens=4), [*b"</t\xc3"])) == "</t\ufffd"
    chunks = feed(stream_of(SINGLE, starts_thinking=True, max_tokens=3), [*b"a\n\n"])
    assert (text(chunks, "thinking"), chunks[-1].part) == ("a\n\n", "thinking")


def test_logprobs_go_with_their_tokens() -> None:
    """Each chunk has one log-probability for each of its tokens, in order."""
    chunks = feed(stream_of(SINGLE, logprobs=0, stop=("zz",)), [OPEN, *b"a\xc3\xa9\n", CLOSE, *b"z", *b"y", EOS])
    for chunk in chunks:
        assert [logprob.token_id for logprob in chunk.logprobs] == chunk.token_ids
    assert sum(len(chunk.token_ids) for chunk in chunks) == 9


def test_ending_from_outside_says_why() -> None:
    """Cancelling and failing end the text once, with what was held back, the message and the usage."""
    stream = stream_of(PLAIN, stop=("ab",))
    stream.push(ord("a"))
    (chunk,) = stream.end("error", "out of memory")
    assert (chunk.text, chunk.finish_reason, chunk.message) == ("a", "error", "out of memory")
    assert (chunk.usage.prompt, chunk.usage.completion) == (3, 1)
    with pytest.raises(AssertionError):
        stream.end("cancelled")


def test_forced_tags_read_like_drawn_ones() -> None:
    """What a budget makes the engine write closes the thoughts in the text too."""
    stream = stream_of(SINGLE, starts_thinking=True, thinking=Thinking(budget=3))
    chunks = []
    for letter in b"abcdef":
        while stream.thoughts.forced:
            chunks += stream.push(stream.thoughts.forced[0])
        chunks += stream.push(letter)
    assert (text(chunks, "thinking"), text(chunks)) == ("ab", "cdef")


def test_wrong_requests_are_refused() -> None:
    """An empty stop string, and bounds on thoughts of a model without tags, are sentences."""
    with pytest.raises(UserError, match="stop: an empty string"):
        stream_of(PLAIN, stop=("a", ""))
    for settings in ({"thinking": Thinking(budget=1)}, {"starts_thinking": True}):
        with pytest.raises(UserError, match="no think tags"):
            stream_of(PLAIN, **settings)


def test_hostile_stop_strings_cost_linear_time() -> None:
    """A long stop string that nearly matches everywhere is one pass: each symbol is stepped over twice at most."""
    search = Search(("a" * 20_000 + "b",))
    released = sum(len(search.push("a" * 1000)[0]) for _ in range(60))
    assert released == 40_000
    before, match, rest = search.push("bc")
    assert (before, len(match), rest) == ("", 20_001, "c")
