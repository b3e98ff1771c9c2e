"""What several files of tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Compiled programs, for all children."
    return tmp_path_factory.mktemp("compiled")
