"""The site: it builds without a warning, and needs nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT

pytest.importorskip("mkdocs", reason="pip install milan-pretrain[docs]: the site is not built")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: broken links, and pages that `nav` lacks, are errors."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_every_page_is_there(site: Path) -> None:
    """Those of docs/ and those from the top; the API page knows every public name."""
    import milan

    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    pages |= {"index", "changelog", "contributing", "security"}
    assert pages <= {path.stem for path in site.glob("*.html")}
    assert [path.name for path in site.rglob("*.py*")] == []
    told = set(re.findall(r'id="milan\.(\w+)"', (site / "api.html").read_text()))
    assert set(milan.__all__) - {"__version__"} == told
    assert "Run the teacher over K views" in (site / "api.html").read_text()


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """No fonts, scripts or pictures of other servers: what a page shows is in the folder."""
    loads = re.compile(r"<(?:script|img|source|iframe|link)\b[^>]*?(?:src|href)=\"?(\S+?)[\"\s>]")
    for page in site.glob("*.html"):
        found = loads.findall(page.read_text())
        assert len(found) > 3
        assert [url for url in found if re.match(r"(https?:)?//", url)] == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text()), sheet.name
