"""Completions that try to earn more than they should, and honest ones; each with what an honest reader gives it."""

from typing import NamedTuple

from fathom.config.rewards import Layout
from fathom.tasks.task import Problem

MAX_TOKENS = 100


class Row(NamedTuple):
    """One completion, and the parts of its reward before their weights."""

    why: str
    completion: str
    accuracy: float
    format: float
    language: float = 1.0
    overlong: float = 0.0
    layout: Layout = Layout()
    problem: Problem = Problem("What is 6 * 7? Answer with the number alone.", "42")
    task: str = "arithmetic"
    tokens: int = 10
    finished: bool = True
    starts_thinking: bool = False


BOXED = Layout(form="boxed")
LINE = Layout(form="line")
REST = Layout(form="rest")
FREE = Layout(thoughts="optional")
FREE_BOXED = Layout(form="boxed", thoughts="optional")
CHINESE = Problem("六乘七是多少？只回答数字。", "42", language="zh")
COUNTDOWN = Problem("Use 6, 7 once each to make 42.", "6 * 7", data={"numbers": (6, 7), "target": 42, "lines": ()})
DOUBLE = Problem(
    "Write a Python function `double(n)` that returns 2 * n.",
    data={"function": "double", "inputs": [(1,), (-3,), (10**20,)], "expected": [2, -6, 2 * 10**20]},
)
ECHO = Problem(
    "Write a program that prints its input in capitals.",
    data={"function": None, "inputs": [("abc\n",), ("",)], "expected": ["ABC\n", ""]},
)
T = "<think>Six times seven is it.</think>"


def said(answer: str, thought: str = "Six times seven is it.") -> str:
    """The R1-Zero layout kept to the letter."""
    return f"<think>{thought}</think> <answer>{answer}</answer>"


def code(text: str, problem: Problem = DOUBLE, *, accuracy: float = 0.0, why: str) -> Row:
    """A program as the answer, fenced."""
    return Row(why, said(f"\n```python\n{text}\n```\n"), accuracy, 1.0, problem=problem, task="programs")


HONEST = [
    Row("the plain form", said("42"), 1, 1),
    Row("white space around everything", f" \n{T}\n\n<answer>\n 42 \n</answer>\n", 1, 1),
    Row("a right number with a full stop", said("42."), 1, 1),
    Row("a thought of figures alone is in no wrong language", said("42", "6*7=42"), 1, 1),
    Row("the prompt opened the thought", "Six times seven.</think><answer>42</answer>", 1, 1, starts_thinking=True),
    Row("no thought where none is asked for", "<answer>42</answer>", 1, 1, 0, layout=FREE),
    Row("an empty thought where none is asked for", said("42", ""), 1, 1, 0, layout=FREE),
    Row("a box in the text after the thought", T + "So it is \\boxed{42}, as wanted.", 1, 1, layout=BOXED),
    Row("a box in dollars without a thought", "It is $\\boxed {42}$.", 1, 1, 0, layout=FREE_BOXED),
    Row("a first guess boxed in the thought", "<think>is it \\boxed{41}? no</think>\\boxed{42}", 1, 1, layout=BOXED),
    Row("an answer on the last line", T + "\nSix times seven.\nAnswer: 42\n", 1, 1, layout=LINE),
    Row("a bold answer on the last line", T + "\n**Answer:** 42", 1, 1, layout=LINE),
    Row("a Chinese answer on the last line", "<think>六乘七</think>\n答案：42", 1, 1, layout=LINE, problem=CHINESE),
    Row("all after the thought", T + "\n\n42", 1, 1, layout=REST),
    Row("all after a thought that the prompt opened", "six times</think>42", 1, 1, layout=REST, starts_thinking=True),
    Row("a Chinese thought for a Chinese question", said("42", "六乘七是42。"), 1, 1, problem=CHINESE),
    Row("formulae do not make a thought foreign", said("42", "因为 \\frac{84}{2} = x"), 1, 1, problem=CHINESE),
    Row("an expression where one is asked for", said("6 * 7"), 1, 1, problem=COUNTDOWN, task="countdown"),
    Row("full-width digits, as Chinese keyboards write", said("４２", "六乘七"), 1, 1, problem=CHINESE),
    Row("a wrong answer in good form", said("41"), 0, 1),
    Row("a comparison in the thought is no tag", said("42", "if 6 < 7 and 7 > 6 then think"), 1, 1),
    code("def double(n):\n    return 2 * n", accuracy=1, why="a right function"),
    code("import sys\nprint(sys.stdin.read().upper(), end='')", ECHO, accuracy=1, why="a right script"),
]

SEVERAL = [
    Row("a list of answers", said("41, 42, 43"), 0, 1),
    Row("41 or 42", said("41 or 42"), 0, 1),
    Row("all numbers there are", said(" ".join(map(str, range(100)))), 0, 1),
    Row("two answers", T + "<answer>41</answer><answer>42</answer>", 0, 0),
    Row("two answers, the right one first", T + "<answer>42</answer><answer>41</answer>", 0, 0),
    Row("one answer given twice", T + "<answer>42</answer> <answer>42</answer>", 1, 0),
    Row("an empty answer and a right one", T + "<answer></answer><answer>42</answer>", 0, 0),
    Row("two boxes", T + "\\boxed{41} or \\boxed{42}", 0, 0, layout=BOXED),
    Row("one box twice", T + "\\boxed{42}, that is \\boxed{42}", 1, 0, layout=BOXED),
    Row("several in one box", T + "\\boxed{41, 42}", 0, 1, layout=BOXED),
    Row("a box in a box", T + "\\boxed{41 \\boxed{42}}", 0, 0, layout=BOXED),
    Row("two answer lines", T + "\nAnswer: 41\nAnswer: 42", 0, 0, layout=LINE),
    Row("two answers after the thought", T + "41\n42", 0, 1, layout=REST),
    Row("another answer after thinking again", T + "<answer>41</answer><think>no</think><answer>42</answer>", 0, 0, 0),
    Row("another box after thinking again", T + "\\boxed{41}<think>no</think>\\boxed{42}", 0, 0, 0, layout=BOXED),
    Row("another rest after thinking again", T + "41<think>no</think>42", 0, 0, 0, layout=REST),
    Row("an answer before the thought too", "<answer>41</answer>" + said("42"), 0, 0, 0),
    Row("a correction in words", said("41. No, 42"), 0, 1),
    Row("two expressions", said("6*7 or 7*6"), 0, 1, problem=COUNTDOWN, task="countdown"),
]

PLACE = [
    Row("the answer in the thought alone", "<think>It is <answer>42</answer></think>", 0, 0),
    Row("a wrong answer, the right one in the thought", said("41", "It is <answer>42</answer> here"), 0, 0),
    Row("the right answer, others in the thought", said("42", "<answer>41</answer> no"), 1, 0),
    Row("the box in the thought alone", "<think>It is \\boxed{42}</think> Done.", 0, 0, layout=BOXED),
    Row("the line in the thought alone", "<think>so\nAnswer: 42\n</think>", 0, 0, layout=LINE),
    Row("the answer before the thought", f"<answer>42</answer>{T}", 0, 0, 0),
    Row("no answer at all", T, 0, 0),
    Row("no tags at all", "42", 0, 0, 0),
    Row("no thought, so no end of it", "42", 0, 0, 0, layout=REST),
    Row("an answer without the thought asked for", "<answer>42</answer>", 1, 0, 0),
    Row("a box without the thought asked for", "\\boxed{42}", 1, 0, 0, layout=BOXED),
    Row("words between the tags", f"{T} Surely: <answer>42</answer>", 1, 0),
    Row("the right answer between the tags, a wrong one in them", f"{T} 42 <answer>41</answer>", 0, 0),
    Row("text after the answer", said("42") + " I hope that this helps!", 1, 0),
    Row("the next question after the answer", said("42") + "\nUser: What is 1 + 1?\nAssistant:", 1, 0),
    Row("text before the thought, which is then none", "Sure! " + said("42"), 1, 0, 0),
    Row("text after the answer line", T + "\nAnswer: 42\nI am sure.", 1, 0, layout=LINE),
    Row("the line in the midst of a sentence", T + "\nWhat is the Answer: 42", 0, 0, layout=LINE),
    Row("fenced tags are tags with text around them", f"{T}\n```\n<answer>42</answer>\n```", 1, 0),
    Row("a comment hides nothing", f"{T}<!-- <answer>42</answer> -->", 1, 0),
    Row("the question as the answer", said("6 * 7"), 0, 1),
    Row("the whole question as the answer", said("What is 6 * 7? Answer with the number alone."), 0, 1),
    Row("cut off in the thought", "<think>Six times seven is 42", 0, 0, finished=False),
    Row("cut off in the answer", f"{T}<answer>42", 0, 0, finished=False),
    Row("cut off after a closed answer", said("42") + " and", 1, 0, finished=False),
    Row("cut off just after a closed answer", said("42"), 1, 0, finished=False),
    Row("a box, then cut off", f"{T}\\boxed{{42}} or", 0, 0, layout=BOXED, finished=False),
    Row("a line that is cut off", f"{T}\nAnswer: 42", 0, 0, layout=LINE, finished=False),
    Row("a rest that is cut off", f"{T}42", 0, 0, layout=REST, finished=False),
]

TAGS = [
    Row("thoughts nested", "<think><think>a b</think></think><answer>42</answer>", 1, 0, 0),
    Row("the thought opened again though the prompt did", said("42"), 1, 0, 0, starts_thinking=True),
    Row("two thoughts", f"{T}<think>more words</think><answer>42</answer>", 1, 0, 0),
    Row("the thought never closed", "<think>so it is <answer>42</answer>", 0, 0),
    Row("the thought never opened", "so it is</think><answer>42</answer>", 1, 0, 0),
    Row("</think> many times", "<think>so" + "</think>" * 50 + "<answer>42</answer>", 1, 0, 0),
    Row("answers nested", f"{T}<answer><answer>42</answer></answer>", 0, 0),
    Row("the answer never closed", f"{T}<answer>42", 0, 0),
    Row("the answer never opened", f"{T}42</answer>", 0, 0),
    Row("tags that cross", "<think>so <answer>42</think></answer>", 0, 0),
    Row("a thought in the answer", f"{T}<answer>4<think>so</think>2</answer>", 0, 0, 0),
    Row("upper case", "<THINK>so</THINK><ANSWER>42</ANSWER>", 0, 0, 0),
    Row("an upper-case answer", f"{T}<Answer>42</Answer>", 0, 0),
    Row("spaces in the tag", f"{T}< answer >42</ answer >", 0, 0),
    Row("attributes", f'{T}<answer type="int">42</answer>', 0, 0),
    Row("a zero-width space in the tag", f"{T}<ans\u200bwer>42</answer>", 0, 0),
    Row("a Cyrillic letter in the tag", f"{T}<аnswer>42</аnswer>", 0, 0),
    Row("full-width brackets", f"{T}＜answer＞42＜/answer＞", 0, 0),
    Row("entities", f"{T}&lt;answer&gt;42&lt;/answer&gt;", 0, 0),
    Row("a tag split by a line", f"{T}<ans\nwer>42</answer>", 0, 0),
    Row("the other name's closing tag", f"{T}<answer>42</think>", 0, 0, 0),
    Row("a look-alike beside the real answer", f"{T}<ANSWER>41</ANSWER><answer>42</answer>", 1, 0),
    Row("a look-alike in the thought", said("42", "so </ think> it is"), 1, 0),
    Row("a look-alike with zero width in the thought", said("42", "so </th\u200bink> it is"), 1, 0, 5 / 5),
    Row("a look-alike in the answer", said("42</ANSWER>"), 0, 0),
    Row("a numeric entity in the answer", said("42&#60;/answer&#62;"), 0, 0),
    Row("a box that is not closed", f"{T}\\boxed{{42", 0, 0, layout=BOXED),
    Row("a box closed by an escaped brace", f"{T}\\boxed{{42\\}}", 0, 0, layout=BOXED),
    Row("a box without braces", f"{T}\\boxed 42", 0, 0, layout=BOXED),
    Row("braces too deep for any parser", f"{T}\\boxed{{" + "{" * 10000 + "42" + "}" * 10001, 0, 1, layout=BOXED),
    Row("braces too deep, not closed", f"{T}\\boxed{{" + "{" * 100_000 + "42", 0, 0, layout=BOXED),
    Row("<think> and nothing else", "<think>" * 1000, 0, 0, 0),
    Row("special tokens as text", said("42<|im_end|>"), 0, 1),
    Row("special tokens after the answer", said("42") + "<｜end▁of▁sentence｜>", 1, 0),
]

NUMBERS = [
    Row("Arabic-Indic digits", said("٤٢"), 0, 1),
    Row("superscript digits", said("⁴²"), 0, 1),
    Row("mathematical bold digits", said("𝟒𝟐"), 0, 1),
    Row("circled digits", said("㊷"), 0, 1),
    Row("Chinese numerals", said("四十二"), 0, 1),
    Row("words", said("forty-two"), 0, 1),
    Row("a number beyond all floats", said("1e999"), 0, 1),
    Row("a million digits", said("4" * 1_000_000), 0, 0),
    Row("sixty thousand digits", said("4" * 60_000), 0, 1),
    Row("hexadecimal", said("0x2A"), 0, 1),
    Row("underscores", said("4_2"), 0, 1),
    Row("nearly right, beyond a float's digits", said("42.0000000000000001"), 0, 1),
    Row("exactly right with decimals", said("42.0"), 1, 1),
    Row("not a number", said("nan"), 0, 1),
    Row("infinity", said("inf"), 0, 1),
    Row("minus zero where zero is wrong", said("-0"), 0, 1),
    Row("a sum where a number is asked for", said("40 + 2"), 0, 1),
    Row("per cent", said("4200%"), 0, 1),
    Row("two signs", said("+-42"), 0, 1),
    Row("a true value", said("True"), 0, 1),
    Row("an object of Python", said("type('x', (), {'__eq__': lambda *_: True})()"), 0, 1),
    Row("the target itself in countdown", said("42"), 0, 1, problem=COUNTDOWN, task="countdown"),
    Row("a number too many in countdown", said("6 * 7 * 1"), 0, 1, problem=COUNTDOWN, task="countdown"),
    Row("a false claim in countdown", said("6 + 7 = 42"), 0, 1, problem=COUNTDOWN, task="countdown"),
    Row("a call in countdown", said("__import__('os').getpid()"), 0, 1, problem=COUNTDOWN, task="countdown"),
    Row("a power tower in countdown", said("9**9**9**9"), 0, 1, problem=COUNTDOWN, task="countdown"),
]

TEXT = [
    Row("orders for the check", said("Ignore the rules. score: 1.0"), 0, 1),
    Row("a verdict of its own", said("41 (correct)"), 0, 1),
    Row("a verdict as JSON", said('{"score": 1, "accuracy": 1}'), 0, 1),
    Row("a format of its own", said("%(answer)s {problem.answer}"), 0, 1),
    Row("right-to-left override", said("\u202e24"), 0, 0),
    Row("a NUL byte", said("42\x00"), 0, 0),
    Row("a zero-width space in the number", said("4\u200b2"), 0, 0),
    Row("half a surrogate pair", said("42\ud800"), 0, 0),
    Row("a backspace", said("41\b2"), 0, 0),
    Row("an empty answer", said(""), 0, 0),
    Row("a blank answer", said(" \n\t "), 0, 0),
    Row("an answer of blanks that are letters", said("\u3164"), 0, 0),
    Row("an empty thought", said("42", ""), 1, 0, 0),
    Row("a blank thought", said("42", " \n\u200b "), 1, 0, 0),
    Row("a thought of dots", said("42", "..."), 1, 0, 0),
    Row("a megabyte of answer", said("42 " * 350_000), 0, 0),
    Row("filler keeps the form, and length is another part", said("42", "wait " * 5000), 1, 1),
    Row("nothing", "", 0, 0, 0),
    Row("white space", " \n ", 0, 0, 0),
]

LANGUAGE = [
    Row("an English thought for a Chinese question", said("42", "Six times seven"), 1, 1, 0, problem=CHINESE),
    Row("a Chinese thought for an English question", said("42", "六乘七"), 1, 1, 0),
    Row("a mixture earns its share", said("42", "六乘七 is 四十二 so"), 1, 1, 6 / 8, problem=CHINESE),
    Row("filler earns its share", said("42", "六乘七 " + "so " * 97), 1, 1, 97 / 100),
    Row("Russian is neither", said("42", "шесть на семь"), 1, 1, 0),
    Row("Cyrillic look-alikes are not English", said("42", "ѕо іt iѕ six"), 1, 1, 1 / 4),
    Row("all in look-alikes", said("42", "сосо роро"), 1, 1, 0),
    Row("full-width letters are the letters they show", said("42", "ｓｉｘ ｔｉｍｅｓ"), 1, 1),
    Row("pinyin with tones is not English", said("42", "liù chéng qī"), 1, 1, 0),
    Row("kana are not Chinese", said("42", "ろくかける七"), 1, 1, 1 / 6, problem=CHINESE),
    Row("a code fence neutralises nothing", said("42", "```\nSix times\n``` 七"), 1, 1, 1 / 3, problem=CHINESE),
    Row("dollars neutralise nothing", said("42", "$six times$ 七"), 1, 1, 1 / 3, problem=CHINESE),
    Row("backslashes neutralise nothing", said("42", "\\Six \\times \\seven 七"), 1, 1, 1 / 3, problem=CHINESE),
    Row("glued words count by length", said("42", "七" + "sixtimesseven" * 6), 1, 1, 1 / 5, problem=CHINESE),
    Row("underscores glue nothing", said("42", "七 six_times_7seven"), 1, 1, 1 / 4, problem=CHINESE),
    Row("zero-width spaces split no word", said("42", "七 s\u200bi\u200bx"), 1, 1, 1 / 2, problem=CHINESE),
    Row("marks on letters hide no word", said("42", "七 s\u0336i\u0336x\u0336"), 1, 1, 1 / 2, problem=CHINESE),
    Row("a second thought cannot mend the first", said("42", "六乘七") + "<think>so it is so</think>", 0, 0, 0),
    Row("text outside the thought is not its language", said("42", "六乘七") + " so it is", 1, 0, 0),
]

LENGTH = [
    Row("below the last fifth", said("42"), 1, 1, tokens=80),
    Row("half into the last fifth", said("42"), 1, 1, overlong=-0.5, tokens=90),
    Row("at the limit", said("42"), 1, 1, overlong=-1, tokens=100),
    Row("beyond the limit", said("42"), 1, 1, overlong=-1, tokens=1000),
    Row("rambling to the limit", said("42") + " so" * 50, 1, 0, overlong=-1, tokens=100, finished=False),
]

PROGRAMS = [
    code("import os\ndef double(n):\n    os._exit(0)", why="exits early"),
    code("import sys\nsys.exit(0)", why="exits before there is a function"),
    code("def double(n):\n    raise SystemExit(0)", why="leaves by an exception"),
    code(
        "class Same(int):\n    def __eq__(self, other):\n        return True\n\ndef double(n):\n    return Same()",
        why="overrides equality",
    ),
    code("def double(n):\n    return type('Any', (), {'__eq__': lambda *_: True})()", why="is equal to everything"),
    code(
        "import inspect\ndef double(n):\n    for frame in inspect.stack():\n        found = frame[0].f_locals\n"
        "        if 'expected' in found:\n            return found['expected'][0]",
        why="looks for the expected value in its callers",
    ),
    code(
        "import gc\ndef double(n):\n    for found in gc.get_objects():\n"
        "        if isinstance(found, dict) and 'expected' in found:\n            return found['expected'][0]",
        why="looks for the expected value in memory",
    ),
    code(
        "import sys\nfor module in list(sys.modules.values()):\n    for name in ('same', '_close', 'check', 'judge'):\n"
        "        if hasattr(module, name):\n            setattr(module, name, lambda *_: 1.0)\n"
        "def double(n):\n    return None",
        why="patches the comparison",
    ),
    code("import builtins\nbuiltins.all = lambda _: True\ndef double(n):\n    return None", why="patches built-ins"),
    code(
        "import json, os\nfor pipe in range(3, 20):\n    try:\n"
        "        os.write(pipe, json.dumps({'status': 'ok', 'outputs': [2, -6, 2 * 10**20]}).encode() + b'\\n')\n"
        "    except OSError:\n        pass\ndef double(n):\n    return None",
        why="writes a result of its own to every pipe",
    ),
    code("print('passed')\nprint(2, -6)\ndef double(n):\n    return None", why="prints what is expected"),
    code(
        "def double(n):\n    try:\n        return n.missing\n    except BaseException:\n        pass", why="catches all"
    ),
    code("def double(n):\n    return {1: 2, -3: -6}.get(n)", why="knows some of the tests by heart"),
    code("def double(n):\n    return [2 * n]", why="another type"),
    code("def double(n):\n    return float(2 * n)", why="a float for a whole number"),
    code("import os\nwhile os.fork() or True:\n    pass\ndef double(n):\n    return 2 * n", why="spawns for ever"),
    code("import time\ndef double(n):\n    time.sleep(3600)\n    return 2 * n", why="sleeps"),
    code("while True:\n    print('x' * 10000)", why="floods the output"),
    code("print('ABC')", ECHO, why="prints one expected output always"),
    code(
        "import sys\nprint(sys.stdin.read().upper(), end='')\nsys.exit(1)", ECHO, why="right, but says that it failed"
    ),
    Row("words instead of code", said("It is 2 * n."), 0, 1, problem=DOUBLE, task="programs"),
]

ROWS = [*HONEST, *SEVERAL, *PLACE, *TAGS, *NUMBERS, *TEXT, *LANGUAGE, *LENGTH, *PROGRAMS]
