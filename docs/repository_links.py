"""A hook of MkDocs: pages link to files of the repository by relative paths, which work on GitHub and in the site.

A link that leads out of `docs/` is rewritten to a copy of that file in the site. Markdown files become pages, so that
reports and the examples' READMEs can be read there. A link to a file that does not exist stays as it is, and
`mkdocs build --strict` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)#\s]+)")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page links to, and what those link to in turn."""
    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    known: set[Path] = set()
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            path = (page.parent / target).resolve()
            if path in known or not path.is_file() or not _is_outside_docs(path):
                continue
            known.add(path)
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, _site_uri(uri), abs_src_path=str(path)))
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with links into the repository pointing to the copies in the site."""
    del config, files
    source = Path(str(page.file.abs_src_path))
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        path = (source.parent / match[2]).resolve()
        if not path.is_file() or not path.is_relative_to(ROOT):
            return match[0]
        uri = path.relative_to(ROOT).as_posix()
        inside = uri.removeprefix("docs/") if not _is_outside_docs(path) else _site_uri(uri)
        return match[1] + posixpath.relpath(inside, folder or ".")

    return _outside_code(markdown, rewritten)


def _targets(page: Path) -> list[str]:
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    return [target for _, target in _LINK.findall(text) if "://" not in target]


def _outside_code(markdown: str, rewritten: Callable[[re.Match[str]], str]) -> str:
    """Rewrite links, but not inside of code blocks."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else _LINK.sub(rewritten, part) for index, part in enumerate(parts))


def _is_outside_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs")


def _site_uri(uri: str) -> str:
    """Where a file of the repository lies in the site."""
    return f"repository/{uri.removeprefix('.')}"
