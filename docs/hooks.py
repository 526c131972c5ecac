"""What mkdocs cannot say in YAML: pages from the top of the repository, without a second copy."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""File of the repository -> page of the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; their links into docs/ and to each other become links of the site."""
    root = Path(str(config.config_file_path)).parent
    for name, page in TOP.items():
        text = (root / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, its_page in TOP.items():
            text = text.replace(f"]({other}", f"]({its_page}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links from docs/ to those pages: in the repository they begin with `../`."""
    for name, page in TOP.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown
