"""Reads HTML strictly: every element is closed, in order, and what files hold is no more than text."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}
EVIL = "<script>alert(1)<" + "img src=x onerror=alert(2)>&\"'"


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order, and no attribute is there twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data):
        assert self.open or not data.strip()
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def told(self, tag: str) -> str:
        return "".join(self.texts.get(tag, []))

    def all_of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
