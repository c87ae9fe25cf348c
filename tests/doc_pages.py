"""Reading the documentation: pages, marked tables, code blocks, headings, links, and what stands in backticks."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_TABLE = re.compile(r"<!-- table: (?P<name>[^>]+?) -->\n(?P<rows>(?:\|.*\n?)+)")
_BLOCK = re.compile(r"(?:<!-- test: (?P<mark>\w+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `mark` is that of a comment right above it, or None."""

    page: str
    language: str
    code: str
    mark: str | None


def name_of(page: Path) -> str:
    """A page by its path from the root."""
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text("utf-8")


def table(page: str, name: str) -> list[list[str]]:
    """The rows of the one table that the page marks with this name, without its heading."""
    (found,) = [match for match in _TABLE.finditer(text_of(page)) if match["name"] == name]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found["rows"].splitlines()]
    return rows[2:]


def marked_tables() -> set[tuple[str, str]]:
    """(page, name) of every marked table."""
    return {(name_of(page), match["name"]) for page in PAGES for match in _TABLE.finditer(text_of(name_of(page)))}


def codes(cell: str) -> list[str]:
    """What stands in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def first_codes(page: str, name: str) -> list[str]:
    """The names in the first column of a table, in order."""
    return [code for row in table(page, name) for code in codes(row[0])]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    return [Block(page, match["language"], match["code"], match["mark"]) for match in _BLOCK.finditer(text_of(page))]


def spans(page: str) -> list[str]:
    """What stands in backticks outside of fenced blocks."""
    return codes(_BLOCK.sub("", text_of(page)))


def links(page: str) -> list[str]:
    """Targets of all links outside of fenced blocks."""
    return [match["target"] for match in _LINK.finditer(_BLOCK.sub("", text_of(page)))]


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text_of(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell_lines() -> list[tuple[str, str]]:
    """(page, line) of every command in a bash block, without comments."""
    found = []
    for page in map(name_of, PAGES):
        for block in blocks(page):
            if block.language == "bash":
                lines = [re.sub(r"\s+#.*", "", line).strip() for line in block.code.splitlines()]
                found += [(page, line) for line in lines if line and not line.startswith("#")]
    return found


@cache
def names_of_tests(path: str) -> frozenset[str]:
    """Names of the test functions of a file, those of classes included."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))
