"""The chat page in a headless Chromium, against a scripted service that sends the service's own security policy."""

import json
from collections.abc import Iterator

import pytest

pytest.importorskip("selenium", reason="the page's tests need selenium: pip install selenium")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.serve.browser import CHROMIUM, DRIVER, Browser
from tests.serve.page_server import Drop, Gate, KeepAlive, Ruin, Script, Text, Thoughts, serve_page
from tests.serve.page_texts import HOSTILE, RICH

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="the page's tests need Chromium and its driver: apt-get install chromium chromium-driver",
    ),
    pytest.mark.xdist_group("page"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("downloads"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[str, Script]]:
    with serve_page() as running:
        yield running


@pytest.fixture
def script(service: tuple[str, Script]) -> Script:
    """What the service answers in this test."""
    fresh = Script()
    vars(service[1]).update(vars(fresh))
    return service[1]


@pytest.fixture
def page(chromium: Browser, service: tuple[str, Script], script: Script) -> Iterator[Browser]:
    """The page, opened for the first time. Afterwards the console must be silent: no policy violation, no error."""
    chromium.visit(service[0])
    yield chromium
    assert chromium.complaints() == []


def test_thoughts_stream_into_a_fold_before_the_answer(page: Browser, script: Script) -> None:
    """Thoughts are shown open while they come, with the seconds; then the fold closes and the answer follows."""
    thinking, answering = Gate(), Gate()
    script.reply = [Thoughts("Let me *think*"), thinking, Thoughts(" more."), answering, Text("It is **4**.")]
    page.write("2 + 2?")
    page.wait(lambda: page.text(".thoughts .prose em") == "think")
    assert page.shown(".thoughts .prose")
    assert page.text(".thoughts summary").startswith("Thinking ")
    thinking.open()
    page.wait(lambda: "more." in page.text(".thoughts .prose"))
    answering.open()
    page.settled()
    assert page.text(".answer-text strong") == "4"
    assert page.text(".thoughts summary").startswith("Thought for ")
    assert page.text(".thoughts summary").endswith(" s")
    assert not page.shown(".thoughts .prose")
    page.click(".thoughts summary")
    assert page.shown(".thoughts .prose")


def test_deepthink_and_effort_reach_the_service(page: Browser, script: Script) -> None:
    """The request carries the switch and the dial as they stand, and they stand so again after a reload."""
    page.ask("one")
    assert script.asked[-1]["thinking"] == {"type": "enabled"}
    assert script.asked[-1]["reasoning_effort"] == "medium"
    assert script.asked[-1]["stream_options"] == {"include_usage": True}
    page.find("#effort").send_keys(Keys.ARROW_RIGHT)
    assert page.text("#effort-name") == "high"
    page.ask("two")
    assert script.asked[-1]["reasoning_effort"] == "high"
    page.click("#think")
    page.reload()
    assert page.find("#think").get_attribute("aria-pressed") == "false"
    assert not page.shown("#effort")
    page.ask("three")
    assert script.asked[-1]["thinking"] == {"type": "disabled"}
    assert "reasoning_effort" not in script.asked[-1]


def test_model_without_think_tags_says_so(page: Browser, script: Script) -> None:
    """DeepThink cannot be switched on, a sentence says why, and no thinking parameter is sent."""
    script.thinking = False
    page.reload()
    assert page.find("#think").get_attribute("aria-disabled") == "true"
    assert "without visible thoughts" in page.find("#think-hint").text
    page.click("#think")
    page.ask("hello")
    assert not {"thinking", "reasoning_effort", "thinking_budget"} & set(script.asked[-1])


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_reaches_the_service(page: Browser, script: Script, way: str) -> None:
    """Stopping closes the connection, and what had been written stays."""
    gate = Gate()
    script.reply = [Text("First words"), gate, Text(" never seen")]
    page.write("go")
    page.wait(lambda: page.text(".answer-text") == "First words")
    if way == "button":
        page.click("#send")
    else:
        ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
    page.settled()
    assert gate.left.wait(10)
    assert page.text(".answer-text") == "First words"
    assert "stopped" in page.text(".figures")


def test_conversation_is_there_after_a_reload(page: Browser, script: Script) -> None:
    """Questions, thoughts and answers come back, and the list of conversations opens them."""
    script.reply = [Thoughts("hm"), Text("An answer to keep")]
    page.ask("A question to keep")
    page.reload()
    assert page.text(".bubble") == "A question to keep"
    assert page.text(".answer-text") == "An answer to keep"
    assert page.text(".thoughts .prose") == "hm"
    page.click("#new")
    assert not page.all(".bubble")
    page.click("#conversations .open-conversation")
    assert page.text(".bubble") == "A question to keep"


def test_answer_survives_a_reload_in_its_middle(page: Browser, script: Script) -> None:
    """What had been written when the page was left is kept."""
    script.reply = [Text("Half an answer"), Gate()]
    page.write("go")
    page.wait(lambda: page.text(".answer-text") == "Half an answer")
    page.reload()
    assert page.text(".answer-text") == "Half an answer"


def test_edit_and_resend_keeps_both_versions(page: Browser, script: Script) -> None:
    """An edited question is sent without what followed the old one, which stays reachable."""
    script.reply = [Text("first")]
    page.ask("old question")
    page.ask("later question")
    script.reply = [Text("second")]
    page.all("[aria-label='Edit and send again']")[0].click()
    area = page.find(".editor textarea")
    area.send_keys(Keys.CONTROL, "a")
    area.send_keys("new question", Keys.ENTER)
    page.wait(lambda: page.text(".bubble") == "new question")
    page.settled()
    assert [message["content"] for message in script.asked[-1]["messages"]] == ["new question"]
    assert page.text(".version") == "1 of 2" or page.text(".question .version") == "2 of 2"
    page.click(".question [aria-label='Earlier version']")
    page.wait(lambda: len(page.all(".bubble")) == 2)
    assert page.all(".bubble")[0].text == "old question"


def test_regenerate_asks_the_same_again(page: Browser, script: Script) -> None:
    """Another answer to the same question; both can be looked at."""
    script.reply = [Text("one answer")]
    page.ask("the question")
    script.reply = [Text("another answer")]
    page.click("[aria-label='Answer again']")
    page.wait(lambda: page.text(".answer-text") == "another answer")
    page.settled()
    assert script.asked[0]["messages"] == script.asked[1]["messages"]
    page.click(".answer [aria-label='Earlier version']")
    page.wait(lambda: page.text(".answer-text") == "one answer")


def test_earlier_thoughts_are_not_sent_back(page: Browser, script: Script) -> None:
    """A later request holds the roles and contents of the conversation and nothing else."""
    script.reply = [Thoughts("secret"), Text("visible")]
    page.ask("one")
    page.ask("two")
    assert script.asked[-1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "visible"},
        {"role": "user", "content": "two"},
    ]


@pytest.mark.parametrize("whole", [True, False], ids=["at once", "letter by letter"])
def test_hostile_output_runs_nothing(page: Browser, script: Script, whole: bool) -> None:
    """Whatever a model prints, in thoughts or answer, no element, address or handler of its choice comes to be."""
    pieces = [HOSTILE] if whole else list(HOSTILE)
    script.reply = [*map(Thoughts, pieces), *map(Text, pieces)]
    page.ask("<img src=x onerror=window.ran=20> [a](javascript:window.ran=21)")
    page.click(".thoughts summary")
    assert page.script("return window.ran") is None
    forbidden = "img, script, iframe, object, embed, style, form, base, link, meta, [style*=fixed], [srcdoc], [id]"
    assert (
        page.script(f"return [...document.querySelectorAll('#messages :is({forbidden})')].map((e) => e.outerHTML)")
        == []
    )
    handlers = "return [...document.querySelectorAll('#messages *')].flatMap((e) => e.getAttributeNames())"
    assert [name for name in page.script(handlers) if name.startswith("on")] == []
    links = page.script("return [...document.querySelectorAll('#messages a')].map((a) => [a.protocol, a.rel])")
    assert {protocol for protocol, _ in links} <= {"http:", "https:", "mailto:"}
    assert all("noopener" in rel for _, rel in links)
    assert page.find("#prompt").is_displayed()


def test_trusted_types_are_enforced(page: Browser) -> None:
    """Even a mistake in the page's own code could not have a string parsed as HTML: the browser refuses it."""
    attempt = "try { document.body.innerHTML = '<p>'; return 'parsed' } catch (error) { return error.name }"
    assert page.script(attempt) == "TypeError"
    assert any("TrustedHTML" in entry or "Trusted Type" in entry for entry in page.complaints())


@pytest.mark.parametrize(
    "text",
    [
        ">" * 20_000,
        "- " * 5_000,
        "[" * 20_000,
        "*a " * 10_000,
        "`" * 20_000,
        "$" + "{" * 9_000 + "$",
        "$$" + r"\frac" * 3_000,
    ],
    ids=["quotes", "lists", "brackets", "stars", "ticks", "braces", "fractions"],
)
def test_huge_nesting_does_not_break_the_page(page: Browser, script: Script, text: str) -> None:
    """An answer that nests without end is drawn in some form, and the next question works."""
    script.reply = [Text(text)]
    page.ask("nest")
    script.reply = [Text("still here")]
    page.ask("and now?")
    assert page.text(".answer-text") == "still here"


def test_settled_blocks_are_not_drawn_again(page: Browser, script: Script) -> None:
    """While an answer grows, the elements of earlier paragraphs stay the same ones."""
    gate, end = Gate(), Gate()
    script.reply = [Text("First.\n\nSecond.\n\nThi"), gate, Text("rd.\n\n```js\nlet a = 1"), end, Text("\n```\n")]
    page.write("go")
    page.wait(lambda: page.text(".answer-text").endswith("Thi"))
    page.script("for (const p of document.querySelectorAll('.answer-text > p')) p.mark = p.textContent")
    gate.open()
    page.wait(lambda: "let a = 1" in page.text(".answer-text pre"))
    end.open()
    page.settled()
    marks = page.script("return [...document.querySelectorAll('.answer-text > *')].map((e) => e.mark ?? null)")
    assert marks == ["First.", "Second.", None, None]
    assert page.all(".answer-text .hljs-keyword")


def test_growing_text_ends_as_the_whole_one(page: Browser, script: Script) -> None:
    """Letter by letter or read back from the browser's storage, an answer becomes the same elements."""
    text = (
        "See [ref].\n\n"
        + RICH
        + "\nÜmläut 🙂\r\n\r\nlone\rreturn\n\n$$\nx\n\ny\n$$\n\n[ref]: https://example.org/late\n"
    )
    script.reply = [*map(Text, text)]
    page.ask("go")
    grown = page.script("return document.querySelector('.answer-text').innerHTML")
    page.reload()
    assert page.script("return document.querySelector('.answer-text').innerHTML") == grown
    assert page.all(".answer-text mfrac")
    assert page.all(".answer-text a[href='https://example.org/late']")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Browser, script: Script, theme: str) -> None:
    """With a rich answer, an open fold, an error and each dialog: no serious or critical violation."""
    page.prefer(theme)
    script.reply = [Thoughts("thinking about $x$"), Text(RICH)]
    page.ask("show everything")
    script.refusals = [(429, {}, "busy")]
    page.ask("once more")
    page.click(".thoughts:not([hidden]) summary")
    assert page.violations() == []
    page.click("#settings")
    assert page.violations() == []
    page.click("#settings-dialog [data-cancel]")
    page.resize(360, 700)
    page.click("#menu")
    page.wait(lambda: page.script("return document.getAnimations().length === 0"))
    page.click(".row-menu summary")
    page.wait(lambda: page.script("return document.getAnimations().length === 0"))
    assert page.violations() == []


def test_phone_width_does_not_scroll_sideways(page: Browser, script: Script) -> None:
    """At 360 px wide content scrolls within its own box; the page and the messages do not, and all is within reach."""
    page.resize(360, 700)
    script.reply = [Thoughts("x" * 300), Text(RICH + "y" * 300)]
    page.ask("z" * 300)
    page.click(".thoughts summary")
    for area in ("documentElement", "getElementById('scroll')"):
        widths = page.script(f"const e = document.{area}; return [e.scrollWidth, e.clientWidth]")
        assert widths[0] <= widths[1]
    for selector in ("#send", "#think", "#effort", "#settings", "#menu"):
        box = page.find(selector).rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    assert page.script("return document.querySelector('.answer pre').tabIndex") == 0


def test_busy_service_can_be_asked_again(page: Browser, script: Script) -> None:
    """A refusal is a sentence with the seconds to wait and a retry, which leaves no trace of the failure."""
    script.refusals = [(429, {"Retry-After": "7"}, "slow down"), (503, {}, "draining")]
    page.ask("hello")
    assert page.text(".problem p") == "Too many requests at once. Try again in 7 s."
    page.click(".problem button")
    page.wait(lambda: "busy" in page.text(".problem p"))
    page.click(".problem button")
    page.wait(lambda: page.text(".answer-text") == "ok")
    page.settled()
    assert not page.shown(".problem")
    assert not page.all(".version")


@pytest.mark.parametrize("end", [Drop(), Ruin()], ids=["dropped", "unreadable"])
def test_broken_stream_keeps_what_came(page: Browser, script: Script, end: Drop | Ruin) -> None:
    """A stream that ends early says so, keeps its text and offers another try."""
    script.reply = [Text("The beginning"), end]
    page.ask("hello")
    assert page.text(".answer-text") == "The beginning"
    assert "incomplete" in page.text(".problem p") or "complete" in page.text(".problem p")
    script.reply = [Text("All of it")]
    page.click(".problem button")
    page.wait(lambda: page.text(".answer-text") == "All of it")


def test_waiting_in_the_queue_is_shown(page: Browser, script: Script) -> None:
    """Keep-alive comments are no events: they only say that the request waits."""
    gate = Gate()
    script.reply = [KeepAlive(), gate, Text("there")]
    page.write("hello")
    page.wait(lambda: "queue" in page.text(".wait"))
    gate.open()
    page.wait(lambda: page.text(".answer-text") == "there")


def test_key_is_asked_for_and_kept_for_the_tab(page: Browser, script: Script) -> None:
    """Without a key the page asks for one; with it everything works, also after a reload, and no storage keeps it."""
    script.key = "let-me-in"
    page.reload()
    page.wait(lambda: "API key" in page.text("#notice"))
    page.click("#notice .text-button")
    page.find("#setting-key").send_keys("let-me-in")
    page.click("#settings-dialog [type=submit]")
    page.wait(lambda: page.shown("#only-model"))
    page.reload()
    page.ask("hello")
    assert page.text(".answer-text") == "ok"
    assert "let-me-in" not in page.script("return JSON.stringify(localStorage)")


def test_settings_reach_the_service(page: Browser, script: Script) -> None:
    """System prompt, temperature, length and thinking budget are sent; but for the temperature only where set."""
    page.ask("before")
    assert not {"max_tokens", "thinking_budget"} & set(script.asked[-1])
    assert script.asked[-1]["temperature"] == 0.6
    page.click("#settings")
    for name, value in {"system": "Be brief.", "temperature": "0.9", "maxTokens": "50", "budget": "20"}.items():
        page.find(f"#setting-{name}").send_keys(value)
    page.click("#settings-dialog [type=submit]")
    page.ask("after")
    asked = script.asked[-1]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["temperature"], asked["max_tokens"], asked["thinking_budget"]) == (0.9, 50, 20)


def test_usage_is_shown(page: Browser, script: Script) -> None:
    """Tokens, those of thought, and the share of the context come from the service's usage."""
    gate = Gate()
    script.reply = [Thoughts("a"), gate, Text("b"), Text("c")]
    page.write("count")
    page.wait(lambda: page.text(".thoughts .prose") == "a")
    gate.open()
    page.settled()
    assert "3 tokens (1 of thought)" in page.text(".figures")
    assert "tokens/s" in page.text(".figures")
    assert "prompt 12 (8 cached)" in page.text(".figures")
    assert page.text("#context") == "15 of 4,096 tokens of context"


def test_conversations_are_renamed_exported_and_deleted(page: Browser, script: Script) -> None:
    """A new name stays, the file holds messages and thoughts, and a deleted conversation is gone after a reload."""
    script.reply = [Thoughts("why"), Text("because")]
    page.ask("why?")
    page.click(".row-menu summary")
    page.click(".row-menu .menu button:nth-child(1)")
    page.find("#rename-field").send_keys("Reasons/of mine", Keys.ENTER)
    page.wait(lambda: page.text("#title") == "Reasons/of mine")
    page.click(".row-menu summary")
    page.click(".row-menu .menu button:nth-child(2)")
    file = page.wait(lambda: next(page.downloads.glob("*.json"), None))
    exported = json.loads(file.read_text(encoding="utf-8"))
    assert exported["title"] == "Reasons/of mine"
    assert exported["messages"][1] == {"role": "assistant", "content": "because", "reasoning_content": "why"}
    page.reload()
    assert page.text(".open-conversation .title") == "Reasons/of mine"
    page.click(".row-menu summary")
    page.click(".row-menu .menu button:nth-child(3)")
    page.click("#delete-dialog [type=submit]")
    page.wait(lambda: not page.all("#conversations li"))
    page.reload()
    assert not page.all("#conversations li")
    assert "because" not in page.script("return JSON.stringify(localStorage)")


def test_full_storage_is_said_and_the_chat_goes_on(page: Browser) -> None:
    """When the browser keeps nothing more, a notice says so, and the answer is shown all the same."""
    page.script("localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 200))")
    page.ask("hello")
    assert "storage is full" in page.text("#notice")
    assert page.text(".answer-text") == "ok"


@pytest.mark.parametrize("stored", ["{", "7", '{"id": "a", "title": "t", "nodes": {"b": {}}, "leaf": "b"}', "circle"])
def test_unreadable_storage_is_survived(page: Browser, stored: str) -> None:
    """A conversation that cannot be read says so and can be taken off the list."""
    node = {"id": "b", "parent": "b", "role": "user", "content": "x"}
    circle = {"id": "a", "title": "t", "nodes": {"b": node}, "leaf": "b"}
    page.script(
        "localStorage.setItem('fathom.conversation.a', arguments[0])", stored.replace("circle", json.dumps(circle))
    )
    page.script("localStorage.setItem('fathom.index', arguments[0])", '[{"id": "a", "title": "t", "updated": 1}, 5]')
    page.reload()
    page.click(".open-conversation")
    assert "cannot be read" in page.text("#notice")
    page.click("#notice .text-button")
    page.wait(lambda: not page.all("#conversations li"))
    page.ask("hello")
    assert page.text(".answer-text") == "ok"


def test_keyboard_alone_is_enough(page: Browser, script: Script) -> None:
    """Shift+Enter breaks the line, Enter sends, and the first stop of the Tab key leads past the list to the field."""
    page.find("#prompt").send_keys("one", Keys.SHIFT + Keys.ENTER + Keys.NULL, "two", Keys.ENTER)
    page.settled()
    page.wait(lambda: page.text(".answer-text") == "ok")
    assert script.asked[-1]["messages"][0]["content"] == "one\ntwo"
    page.find("#new").send_keys(Keys.SHIFT, Keys.TAB)
    assert page.script("return document.activeElement.className") == "skip"
    assert page.find(".skip").rect["y"] >= 0
    ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    page.wait(lambda: page.script("return document.activeElement.id") == "prompt")


def test_screen_reader_hears_the_end(page: Browser, script: Script) -> None:
    """The polite live region says what is going on, and at the end the answer without the thoughts."""
    gate = Gate()
    script.reply = [Thoughts("private"), gate, Text("public")]
    page.write("hello")
    page.wait(lambda: page.text("#status") == "Waiting for the answer")
    gate.open()
    page.wait(lambda: page.text("#status") == "Answer: public")
    assert page.find("#status").get_attribute("aria-live") == "polite"


def test_answer_goes_on_behind_another_conversation(page: Browser, script: Script) -> None:
    """Leaving a conversation does not stop its answer; coming back shows all of it, still growing."""
    first, second = Gate(), Gate()
    script.reply = [Text("one "), first, Text("two "), second, Text("three")]
    page.write("count")
    page.wait(lambda: page.text(".answer-text").strip() == "one")
    page.click("#new")
    first.open()
    assert not page.all(".answer")
    page.click("#conversations .open-conversation")
    page.wait(lambda: page.text(".answer-text").strip() == "one two")
    second.open()
    page.settled()
    assert page.text(".answer-text") == "one two three"


def test_theme_is_kept(page: Browser) -> None:
    """The button goes from the system's theme to light and dark, and the choice is there before the first drawing."""
    page.click("#theme")
    page.click("#theme")
    page.reload()
    assert page.script("return document.documentElement.dataset.theme") == "dark"
    assert page.script("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 29)"


def test_draft_is_kept_with_its_conversation(page: Browser, script: Script) -> None:
    """Unsent words are there after a reload, in the conversation they were written for alone; sent ones are not."""
    page.write("for a new one", send=False)
    page.reload()
    assert page.find("#prompt").get_property("value") == "for a new one"
    page.find("#prompt").clear()
    page.ask("sent")
    page.reload()
    assert page.find("#prompt").get_property("value") == ""
    page.write("for this one", send=False)
    page.click("#new")
    assert page.find("#prompt").get_property("value") == ""
    page.click("#conversations .open-conversation")
    assert page.find("#prompt").get_property("value") == "for this one"


def test_single_newlines_are_line_breaks(page: Browser, script: Script) -> None:
    """In thoughts and answers alike; code keeps its lines as text, and the items of a list get none between them."""
    script.reply = [Thoughts("first\nthen"), Text("Roses\nViolets\n\n- one\n- two\n  more\n\n```\na\nb\n```\n")]
    page.ask("verse")
    assert len(page.all(".thoughts .prose p br")) == 1
    assert page.script("return document.querySelector('.answer-text p').innerText") == "Roses\nViolets"
    assert [len(item.find_elements("css selector", "br")) for item in page.all(".answer-text li")] == [0, 1]
    assert page.text(".answer-text pre") == "a\nb\n"
    assert not page.all(".answer-text pre br")


def test_temperature_unless_set(page: Browser, script: Script) -> None:
    """The settings say what is asked for when nothing is set, and a zero of one's own counts as set."""
    page.click("#settings")
    assert page.find("#setting-temperature").get_attribute("placeholder") == "0.6 unless set"
    page.find("#setting-temperature").send_keys("0")
    page.click("#settings-dialog [type=submit]")
    page.ask("one")
    assert script.asked[-1]["temperature"] == 0


@pytest.mark.parametrize("width", [1200, 360])
def test_model_s_name_is_not_cut(page: Browser, script: Script, width: int) -> None:
    """The one model's name stands in the header in full, on a phone in the title's place; several can be chosen."""
    script.models = ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",)
    page.reload()
    page.resize(width, 740)
    assert page.text("#only-model") == script.models[0]
    assert page.script("const n = document.querySelector('#only-model'); return n.scrollWidth <= n.clientWidth")
    assert page.script("return document.documentElement.scrollWidth <= innerWidth")
    assert page.script("return document.querySelector('#title').getBoundingClientRect().width > 1") or width < 500
    script.models = ("one", "two")
    page.reload()
    assert page.shown("#model")
    assert not page.shown("#only-model")


def test_phone_has_no_dead_switch(page: Browser, script: Script) -> None:
    """A model without think tags has no DeepThink on a phone, where there is no room to say why."""
    script.thinking = False
    page.reload()
    assert page.shown("#think")
    page.resize(360, 740)
    assert not page.shown("#think")
    assert not page.shown("#think-hint")
    assert page.violations() == []
