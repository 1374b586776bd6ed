"""Word problems in English and Chinese: a story of quantities, and one number asked for."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fathom.errors import UserError
from fathom.tasks.numerals import read_number
from fathom.tasks.task import Language, Problem, Task

_LANGUAGES: tuple[Language, ...] = ("en", "zh")
_NAMES = {
    "en": ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Isla", "Jack"),
    "zh": ("小明", "小红", "小华", "小丽", "小刚", "小芳", "小强", "小美", "小军", "小燕"),
}
_THINGS = {
    "en": ("apples", "marbles", "stickers", "books", "pencils", "shells", "coins", "cards"),
    "zh": ("个苹果", "颗弹珠", "张贴纸", "本书", "支铅笔", "个贝壳", "枚硬币", "张卡片"),
}
_PLACES = {"en": ("the lake", "the coast", "the next town"), "zh": ("湖边", "海边", "邻近的城市")}
_WORDS = {
    "en": ("First ", "Then ", "So the answer is ", "."),
    "zh": ("先算 ", "再算 ", "所以答案是", "。"),
}
"""Of a worked solution: before its first line, before further ones, before the answer, at the end of a line."""
_ANSWER = {"en": " Answer with the number alone.", "zh": "请只回答数字。"}


@dataclass(frozen=True)
class _Sizes:
    """From what ranges the numbers of a story come: the least, and one more than the most."""

    start: tuple[int, int]
    more: tuple[int, int]
    times: tuple[int, int]
    enough: int
    """What is more than this is not multiplied."""
    amount: tuple[int, int]
    price: tuple[int, int]
    fee: tuple[int, int]
    hours: tuple[int, int]
    speed: tuple[int, int]
    walk: tuple[int, int]


_SIZES = {
    "large": _Sizes((5, 60), (2, 50), (2, 5), 300, (2, 13), (2, 20), (3, 30), (2, 9), (4, 90), (2, 15)),
    "small": _Sizes((2, 10), (1, 10), (2, 4), 9, (2, 6), (2, 6), (1, 10), (2, 6), (2, 6), (1, 10)),
}


@dataclass
class _Story:
    """What has been told so far, and how the quantity asked for came about."""

    language: Language
    random: random.Random
    sizes: _Sizes
    value: int = 0
    sentences: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def one(self, english: Sequence[str], chinese: Sequence[str]) -> str:
        """One of the wordings of the story's language; of the other none is looked at."""
        return self.random.choice(english if self.language == "en" else chinese)

    def number(self, size: tuple[int, int]) -> int:
        """One number of a range."""
        return self.random.randrange(*size)

    def of(self, table: dict[str, tuple[str, ...]]) -> str:
        """One entry of a table of words."""
        return self.random.choice(table[self.language])

    def tell(self, sentence: str, calculation: str = "", value: int | None = None) -> None:
        """A sentence, and what is worked out with it."""
        self.sentences.append(sentence)
        if value is not None:
            self.value = value
            self.lines.append(f"{calculation} = {value}")

    def text(self, question: str) -> str:
        """The whole problem."""
        between = " " if self.language == "en" else ""
        return between.join([*self.sentences, question]) + _ANSWER[self.language]


class Bilingual(Task):
    """Stories of things owned, of shopping and of journeys, in English or Chinese; `level` steps to the answer."""

    name = "bilingual"
    levels = 5

    def __init__(
        self,
        *,
        language: Literal["both", "en", "zh"] = "both",
        numbers: Literal["large", "small"] = "large",
        mixing: float = 0.0,
    ) -> None:
        """`language` keeps to one of the two. `numbers` that are small can be learnt by heart. `mixing` is the share of
        the lines of worked solutions that are in the other language."""
        for name, value, known in (("language", language, ("both", *_LANGUAGES)), ("numbers", numbers, tuple(_SIZES))):
            if value not in known:
                raise UserError(f"task bilingual: {name} = '{value}' is not one of {', '.join(known)}")
        if not 0 <= mixing <= 1:
            raise UserError(f"task bilingual: mixing = {mixing} is not a share from 0 to 1")
        self._languages = _LANGUAGES if language == "both" else (language,)
        self._sizes, self._mixing = _SIZES[numbers], mixing

    def problem(self, random: random.Random, level: int) -> Problem:
        """The answer takes `level` operations."""
        story = _Story(random.choice(self._languages), random, self._sizes)
        question, units = random.choice((_owned, _shopping, _journey))(story, level)
        data = {"lines": tuple(story.lines), "units": units}
        return Problem(story.text(question), str(story.value), level, language=story.language, data=data)

    def check(self, problem: Problem, answer: str) -> float:
        """1 for the number, with or without the unit that was asked for."""
        return float(read_number(answer, units=problem.data["units"]) == int(problem.answer))

    def solution(self, problem: Problem, random: random.Random) -> str:
        """The calculations with a few words in the language of the question, but for what `mixing` says."""
        lines, last = problem.data["lines"], len(problem.data["lines"])
        told = []
        for place, line in enumerate((*lines, problem.answer)):
            mixed = self._mixing > 0 and random.random() < self._mixing
            words = _WORDS[next(other for other in _LANGUAGES if (other != problem.language) == mixed)]
            told.append(f"{words[2 if place == last else min(place, 1)]}{line}{words[3]}")
        return "\n".join(told)


def _owned(story: _Story, steps: int) -> tuple[str, tuple[str, ...]]:
    """Somebody has things; more come and some go."""
    who, things = story.of(_NAMES), story.of(_THINGS)
    story.value = story.number(story.sizes.start)
    has = story.one(
        (
            "{who} has {n} {things}.",
            "{who} starts the day with {n} {things}.",
            "There are {n} {things} in {who}'s box.",
        ),
        ("{who}有{n}{things}。", "早上{who}有{n}{things}。", "{who}的盒子里有{n}{things}。"),
    )
    story.tell(has.format(who=who, n=story.value, things=things))
    for _ in range(steps):
        story.random.choice(_CHANGES)(story, who, things)
    question = story.one(
        ("How many {things} does {who} have in the end?", "How many {things} does {who} have now?"),
        ("最后{who}有多少{things}？", "现在{who}一共有多少{things}？"),
    )
    return question.format(who=who, things=things), _units(things)


def _gain(story: _Story, who: str, things: str) -> None:
    more = story.number(story.sizes.more)
    said = story.one(
        ("Then a friend gives {who} {n} more.", "{who} finds another {n}.", "After that {who} buys {n} more {things}."),
        ("朋友又送给{who}{n}{things}。", "{who}又找到了{n}{things}。", "后来{who}又买了{n}{things}。"),
    )
    story.tell(said.format(who=who, n=more, things=things), f"{story.value} + {more}", story.value + more)


def _lose(story: _Story, who: str, things: str) -> None:
    if story.value < 3:
        return _gain(story, who, things)
    gone = story.random.randrange(2, story.value)
    said = story.one(
        ("{who} gives away {n}.", "Then {who} loses {n} of them.", "{who} sells {n} {things} to a neighbour."),
        ("{who}送出了{n}{things}。", "后来{who}弄丢了{n}{things}。", "{who}把{n}{things}卖给了邻居。"),
    )
    return story.tell(said.format(who=who, n=gone, things=things), f"{story.value} - {gone}", story.value - gone)


def _multiply(story: _Story, who: str, things: str) -> None:
    if story.value > story.sizes.enough:
        return _lose(story, who, things)
    times = story.number(story.sizes.times)
    said = story.one(
        ("A year later {who} has {n} times as many.", "With luck, {who} soon has {n} times that number of {things}."),
        ("一年后，{who}的数量变成了原来的{n}倍。", "不久，{who}的{things}变成了原来的{n}倍。"),
    )
    noun = things if story.language == "en" else things[1:]
    return story.tell(said.format(who=who, n=times, things=noun), f"{story.value} * {times}", story.value * times)


def _halve(story: _Story, who: str, things: str) -> None:
    shares = [n for n in range(2, 7) if story.value % n == 0 and story.value > n]
    if not shares:
        return _gain(story, who, things)
    people = story.random.choice(shares)
    said = story.one(
        ("{who} shares all of them equally among {n} people, keeping one share.",),
        ("{who}把它们平均分成{n}份，只留下一份。",),
    )
    return story.tell(said.format(who=who, n=people), f"{story.value} / {people}", story.value // people)


_CHANGES: tuple[Callable[[_Story, str, str], None], ...] = (_gain, _gain, _lose, _lose, _multiply, _halve)


def _shopping(story: _Story, steps: int) -> tuple[str, tuple[str, ...]]:
    """Things at a price each; two further steps buy another kind, one left over is a fee."""
    who = story.of(_NAMES)
    bought = story.random.sample(_THINGS[story.language], (steps + 1) // 2)
    for place, things in enumerate(bought):
        amount, price, before = story.number(story.sizes.amount), story.number(story.sizes.price), story.value
        said = story.one(
            ("{who} buys {n} {things} at {p} yuan each.", "{who} takes {n} {things}, which cost {p} yuan apiece."),
            ("{who}买了{n}{things}，每{m}{p}元。", "{who}拿了{n}{things}，单价是每{m}{p}元。"),
        )
        sentence = said.format(who=who, n=amount, things=things, p=price, m=things[0])
        story.tell(sentence, f"{amount} * {price}", amount * price)
        if place:
            story.tell(story.sentences.pop(), f"{before} + {amount * price}", before + amount * price)
    if steps % 2 == 0:
        fee = story.number(story.sizes.fee)
        said = story.one(
            ("Delivery costs {n} yuan more.", "A bag for all of it costs {n} yuan."),
            ("另外还要付{n}元运费。", "还花{n}元买了一个袋子。"),
        )
        story.tell(said.format(n=fee), f"{story.value} + {fee}", story.value + fee)
    question = story.one(
        ("How many yuan does {who} pay in all?", "What does {who} spend altogether, in yuan?"),
        ("{who}一共要付多少元？", "{who}总共花了多少元？"),
    )
    return question.format(who=who), ("yuan", "元")


def _journey(story: _Story, steps: int) -> tuple[str, tuple[str, ...]]:
    """Legs of hours at a speed; two further steps add a leg, one left over is a walk."""
    who, where = story.of(_NAMES), story.of(_PLACES)
    story.tell(story.one(("{who} sets out for {p}.", "{who} travels to {p}."), ("{who}出发去{p}。", "{who}要去{p}。")))
    story.sentences[0] = story.sentences[0].format(who=who, p=where)
    for leg in range((steps + 1) // 2):
        hours, speed, before = story.number(story.sizes.hours), story.number(story.sizes.speed), story.value
        said = story.one(
            ("{who} goes on for {n} hours at {v} kilometres an hour.", "For {n} hours the speed is {v} km per hour."),
            ("{who}以每小时{v}公里的速度走了{n}小时。", "有{n}小时，速度是每小时{v}公里。"),
        )
        story.tell(said.format(who=who, n=hours, v=speed), f"{hours} * {speed}", hours * speed)
        if leg:
            story.tell(story.sentences.pop(), f"{before} + {hours * speed}", before + hours * speed)
    if steps % 2 == 0:
        walk = story.number(story.sizes.walk)
        said = story.one(
            ("The last {n} kilometres are walked.", "{n} kilometres on foot bring {who} there."),
            ("最后步行{n}公里。", "剩下的{n}公里，{who}是走过去的。"),
        )
        story.tell(said.format(who=who, n=walk), f"{story.value} + {walk}", story.value + walk)
    question = story.one(
        ("How many kilometres is the whole journey?", "How far does {who} travel in all, in kilometres?"),
        ("全程一共多少公里？", "{who}总共走了多少公里？"),
    )
    return question.format(who=who), ("kilometres", "kilometers", "km", "公里", "千米")


def _units(things: str) -> tuple[str, ...]:
    """What may stand after the number: the things, and in Chinese their measure word alone."""
    return (things,) if things.isascii() else (things, things[0], things[1:])
