"""Reads a page as strictly as a validator would, and finds things on it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "link", "br", "hr", "img", "input"}
INLINE = {"data", "span", "strong", "code", "a"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    def walk(self) -> Iterator["Node"]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str) -> list["Node"]:
        return [node for node in self.walk() if node.tag == tag]

    def first(self, **wanted: str) -> "Node":
        wanted = {name.replace("_", "-"): value for name, value in wanted.items()}
        return next(n for n in self.walk() if wanted.items() <= n.attributes.items())

    @property
    def text(self) -> str:
        return " ".join("".join(self._pieces()).split())

    def _pieces(self) -> Iterator[str]:
        yield "" if self.tag in INLINE else " "
        for child in self.children:
            yield from [child] if isinstance(child, str) else child._pieces()
        yield "" if self.tag in INLINE else " "

    @property
    def data(self) -> list[float]:
        return [float(node.attributes["value"]) for node in self.all("data")]


class TreeBuilder(HTMLParser):
    """A strict reader: every tag that opens is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> at line {self.getpos()[0]} closes another tag"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(html: str) -> Node:
    builder = TreeBuilder()
    builder.feed(html)
    builder.close()
    assert builder.open == [builder.root]
    return builder.root


def check_form(page: Node, elsewhere: tuple[str, ...] = ()) -> None:
    """Language, landmarks, references and headings; links lead to the page itself, or end in one of
    `elsewhere`."""
    assert page.all("html")[0].attributes["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]
    identities = [n.attributes["id"] for n in page.walk() if "id" in n.attributes]
    assert len(identities) == len(set(identities))
    for name in ("aria-labelledby", "aria-describedby"):
        for node in page.walk():
            assert node.attributes.get(name, identities[0]) in identities
    for link in page.all("a"):
        target = link.attributes["href"]
        assert target.removeprefix("#") in identities or target.endswith(elsewhere or ("#",))
    levels = [int(n.tag[1]) for n in page.walk() if n.tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for table in page.all("table"):
        assert table.all("caption")
        assert all("scope" in heading.attributes for heading in table.all("th"))
    for plot in (node for node in page.walk() if node.attributes.get("role") == "img"):
        assert {"aria-labelledby", "aria-describedby"} <= set(plot.attributes)
