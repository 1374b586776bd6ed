"""Pages and their holders, against a model that is too simple to be wrong."""

import random

import pytest

from fathom.engine.blocks import SINGLES_BELOW, BlockPool, block_keys
from fathom.kernels.ops import PAGE


class Simple:
    """What a pool should be: sets of holders, and idle blocks in order."""

    def __init__(self, count: int) -> None:
        self.holders: dict[int, int] = dict.fromkeys(range(count), 0)
        self.known: dict[bytes, int] = {}
        self.idle: list[int] = []

    def content(self, page: int) -> bytes | None:
        return next((key for key, known in self.known.items() if known == page), None)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk(seed: int) -> None:
    """Whatever is taken, found, shared, published and released in whatever order: no page is held by two who did not
    share it, none is lost, idle ones go in order of release, and what is found has the content asked for."""
    draw = random.Random(seed)
    pool, simple = BlockPool(9), Simple(9)
    texts = [[b"%d.%d" % (text, block) for block in range(4)] for text in range(4)]
    held: list[list[int]] = []
    for _ in range(600):
        action = draw.choice(["take", "take", "find", "share", "publish", "release"])
        if action == "take":
            _take(pool, simple, held, draw.choice([[], *held]))
        elif action == "find":
            _find(pool, simple, held, draw.choice(texts)[: draw.randint(0, 4)])
        elif action == "share" and held:
            shared = draw.choice(held)
            held.append(pool.share(shared[: draw.randint(0, len(shared))]))
            for page in held[-1]:
                simple.holders[page] += 1
        elif action == "publish" and (longest := max(held, key=len, default=[])):
            place = draw.randrange(min(4, len(longest)))
            page, key = longest[place], draw.choice(texts)[place]
            pool.publish(page, key)
            if key not in simple.known and simple.content(page) is None:
                simple.known[key] = page
        elif action == "release" and held:
            _release(pool, simple, held.pop(draw.randrange(len(held))))
        assert pool.used == sum(count > 0 for count in simple.holders.values())
        assert pool.used + pool.available == pool.count
    for pages in held:
        _release(pool, simple, pages)
    assert pool.used == 0
    taken = [pool.take() for _ in range(9)]
    assert sorted(page for page in taken if page is not None) == list(range(9))
    assert pool.take() is None


def _take(pool: BlockPool, simple: Simple, held: list[list[int]], pages: list[int]) -> None:
    page = pool.take()
    free = [p for p, holders in simple.holders.items() if not holders and p not in simple.idle]
    if page is None:
        assert all(simple.holders.values())
        return
    assert simple.holders[page] == 0
    if free:
        assert page in free, "a known block was given up while there were free pages"
    else:
        assert page == simple.idle.pop(0), "not the longest unused"
        del simple.known[simple.content(page)]  # type: ignore[arg-type]
    simple.holders[page] = 1
    if not any(pages is other for other in held):
        held.append(pages)
    pages.append(page)


def _find(pool: BlockPool, simple: Simple, held: list[list[int]], keys: list[bytes]) -> None:
    expected = []
    for key in keys:
        if key not in simple.known:
            break
        expected.append(simple.known[key])
    assert pool.find(keys) == expected
    for page in expected:
        simple.holders[page] += 1
        if page in simple.idle:
            simple.idle.remove(page)
    held.append(expected)


def _release(pool: BlockPool, simple: Simple, pages: list[int]) -> None:
    pool.release(pages)
    for page in reversed(pages):
        simple.holders[page] -= 1
        if simple.holders[page] == 0 and simple.content(page) is not None:
            simple.idle.append(page)


def test_the_end_of_a_text_is_given_up_before_its_beginning() -> None:
    """When memory is needed, a released text loses its last block first, so its beginning can still be found."""
    pool = BlockPool(3)
    pages = [pool.take() for _ in range(3)]
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.publish(page, key)  # type: ignore[arg-type]
    pool.release(pages)  # type: ignore[arg-type]
    assert pool.take() == pages[2]
    assert pool.find([b"a", b"b", b"c"]) == pages[:2]


def test_a_page_that_is_found_is_not_given_away() -> None:
    """A block that was idle and is held again outlives one that was released after it."""
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    pool.publish(first, b"first")
    pool.publish(second, b"second")
    pool.release([first])
    pool.release([second])
    assert pool.find([b"first"]) == [first]
    assert pool.take() == second
    assert pool.take() is None


def test_what_nobody_holds_is_a_defect_that_shows() -> None:
    """A page that nobody holds can be neither released nor shared."""
    pool = BlockPool(1)
    page = pool.take()
    assert page is not None
    pool.release([page])
    with pytest.raises(AssertionError):
        pool.release([page])
    with pytest.raises(AssertionError):
        pool.share([page])


def test_keys_say_what_a_text_begins_with() -> None:
    """Two texts share exactly the keys of the full blocks up to the first difference, and none over unlike salt."""
    text = list(range(5 * PAGE + 7))
    keys = block_keys(text, salt="a", prompt_length=len(text))
    assert len(keys) == 5
    assert len(set(keys)) == 5
    for place in (0, PAGE - 1, PAGE, 3 * PAGE + 5, 5 * PAGE):
        other = [*text[:place], -1, *text[place + 1 :]]
        shared = [a == b for a, b in zip(keys, block_keys(other, salt="a", prompt_length=len(text)), strict=True)]
        assert shared == [index < place // PAGE for index in range(5)]
    assert not set(keys) & set(block_keys(text, salt="b", prompt_length=len(text)))
    assert not set(block_keys(text, salt="", prompt_length=len(text))) & set(
        block_keys(text, salt="\ud800", prompt_length=len(text))
    )
    # A text that begins with another's second block does not have its key.
    assert not set(keys) & set(block_keys(text[PAGE:], salt="a", prompt_length=len(text)))


def test_keys_may_be_made_bit_by_bit() -> None:
    """Continuing from the keys of the first blocks gives the keys of the whole."""
    text = [7] * (4 * PAGE)
    keys: list[bytes] = []
    for stop in range(0, len(text) + 1, 40):
        keys = block_keys(text[:stop], salt="a", prompt_length=len(text), known=keys)
    assert block_keys(text, salt="a", prompt_length=len(text), known=keys) == block_keys(
        text, salt="a", prompt_length=len(text)
    )


def test_what_was_written_and_what_was_read_are_different_blocks() -> None:
    """From position 256 on, a block with written tokens has another key than the same tokens in a prompt."""
    text = list(range(8 * PAGE))
    read = block_keys(text, salt="", prompt_length=len(text))
    for prompt_length in (1, 4 * PAGE, 5 * PAGE, 5 * PAGE + 3, 8 * PAGE - 1):
        written = block_keys(text, salt="", prompt_length=prompt_length)
        alike = max(SINGLES_BELOW, prompt_length) // PAGE
        assert [a == b for a, b in zip(read, written, strict=True)] == [True] * alike + [False] * (8 - alike)
