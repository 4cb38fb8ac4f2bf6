import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "docs" / "steps.py"


def test_the_page_of_steps_is_up_to_date() -> None:
    spec = spec_from_file_location("steps_page", SCRIPT)
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run python docs/steps.py"


def test_the_script_writes_the_page() -> None:
    before = (SCRIPT.parent / "steps.md").read_text()
    subprocess.run([sys.executable, SCRIPT], check=True)
    assert (SCRIPT.parent / "steps.md").read_text() == before
