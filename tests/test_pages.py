"""What a reader of the pages meets."""

import json
import re
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (root / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.parts))
LINK = re.compile(r"\]\(((?!https?:|mailto:|#|data:|attachment:)[^)\s#]+)[^)]*\)")


@pytest.mark.parametrize("page", [*notebooks, root / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    assert not [link for link in LINK.findall(text) if not (page.parent / link).exists()]
