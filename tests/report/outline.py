"""What a page is made of, for tests to ask."""

import html
import re
from html.parser import HTMLParser
from typing import Any


class Outline(HTMLParser):
    """Elements and their text; fails for one that is closed in another's place."""

    EMPTY = {"meta", "link", "br", "img"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text_of(markup: str) -> str:
    """What is read of it."""
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def headings(page: str, level: int) -> list[str]:
    """Those of one level, in their order."""
    return [text_of(found) for found in re.findall(rf"<h{level}\b[^>]*>(.*?)</h{level}>", page, re.DOTALL)]


def table_of(page: str, caption: str) -> list[list[str]]:
    """The cells of the table with this caption, row by row."""
    body = re.search(rf"<caption[^>]*>{re.escape(html.escape(caption))}</caption>(.*?)</table>", page, re.DOTALL)
    assert body is not None, caption
    rows = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def references(page: str) -> list[str]:
    """Everything outside of quoted text that would make a reader fetch or run something."""
    said = re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL).replace("http://www.w3.org/2000/svg", "")
    return re.findall(r"https?:|\b(?:src|href|action|onload|onclick)\s*=|url\(|@import|<script|<iframe|<link", said)
