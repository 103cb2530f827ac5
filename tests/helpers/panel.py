"""A served folder, and what is read off the panel in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Locator, Page

from circuit_tracer_qk.frontend import server

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


class Served(NamedTuple):
    """A served folder and the document of its graph."""

    url: str
    slug: str
    document: dict[str, Any]
    folder: Path

    def address(self, **parameters: str) -> str:
        query = "&".join(f"{k}={v}" for k, v in ({"slug": self.slug} | parameters).items())
        return f"{self.url}/index.html?{query}"


def serve(folder: Path, slug: str, **options: Any) -> tuple[server.Server, Served]:
    running = server.serve(folder, port=server.next_free_port(18_100), **options)
    document = json.loads((folder / f"{slug}.json").read_bytes())
    return running, Served(running.url, slug, document, folder)


def part(page: Page, name: str) -> Locator:
    return page.locator(f'.qk-panel [data-qk="{name}"]')


def values(found: Locator) -> list[float]:
    return found.evaluate_all("all => all.map(d => +d.dataset.value)")


def number(text: str | None) -> float:
    """The first number of a text, as a reader sees it."""
    found = re.search(r"[+-]\d[\d.]*", text or "")
    assert found is not None
    return float(found[0])


def selection(page: Page) -> str | None:
    """The selection in the address."""
    return page.evaluate("new URL(location).searchParams.get('qk')")
