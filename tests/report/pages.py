"""Reading a page back."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "img", "br", "link", "input"}


class Balance(HTMLParser):
    """Raises where tags do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, _: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_words(page: str) -> str:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return re.sub(r"\s+", " ", " ".join(parser.words))


def outside(page: str) -> list[str]:
    """Whatever a page would fetch."""
    return re.findall(r"""(?:src|href)=["'](?!data:)([^"']+)|url\(|@import|https?://""", page)
