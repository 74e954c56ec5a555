"""What mkdocs lacks: pages of docs/ link to results, and these belong to the site; search without a server.

Files outside docs/ that a page links to, or that such a file links to, join the site under their path in the
repository. Links are written to where the files lie in the site. mkdocs.yml names this file.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/."""
    todo = {f"docs/{file.src_uri}": Path(str(file.abs_src_path)) for file in files}
    seen = set(todo)
    while todo:
        path, source = todo.popitem()
        for _, target, _ in _LINK.findall(source.read_text()) if path.endswith(".md") else ():
            linked = _resolve(path, target)
            if linked in seen or linked.startswith("docs/") or not (ROOT / linked).is_file():
                continue
            seen.add(linked)
            todo[linked] = ROOT / linked
            files.append(File.generated(config, linked, abs_src_path=str(ROOT / linked)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Write links between docs/ and the rest of the repository as links within the site."""
    inside = page.file.src_uri
    path = inside if page.file.generated_by else f"docs/{inside}"

    def rewritten(found: re.Match[str]) -> str:
        linked = _resolve(path, found[2])
        if not (ROOT / linked).is_file():
            return found[0]
        return f"{found[1]}{posixpath.relpath(_in_site(linked), posixpath.dirname(inside) or '.')}{found[3] or ''})"

    return _LINK.sub(rewritten, markdown)


@event_priority(-100)  # after the index is there
def on_post_build(config: Any) -> None:
    """Write the search index as a script, too, which a browser may read from the file system."""
    folder = Path(config["site_dir"]) / "search"
    index = (folder / "search_index.json").read_text()
    (folder / "search_index.js").write_text(f"var __index = {index}")


def _resolve(path: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _in_site(path: str) -> str:
    return path.removeprefix("docs/")
