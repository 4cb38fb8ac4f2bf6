"""What installing and importing the package does, and what it does not do. Each in a process of its own."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

INSTALLED = any(entry.name == "fused_post" for entry in metadata.entry_points(group="torch_dynamo_backends"))
OURS = "[name for name in sys.modules if name.split('.')[0] in ('fusion_backend', 'patterns', 'kernels')]"


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


def succeeds(code: str, cwd: Path, **environment: str) -> None:
    done = python(code, cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    not INSTALLED, reason="this checkout is used without being installed, so torch cannot know the name"
)
def test_the_name_is_known_and_works_without_an_import_of_ours(tmp_path):
    succeeds(
        f"""
import sys, torch
assert not {OURS}
assert "fused_post" in torch._dynamo.list_backends()
assert not {OURS}
conv, x = torch.nn.ConvTranspose2d(4, 4, 3).eval(), torch.randn(1, 4, 5, 5)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(conv, backend="fused_post")(x), conv(x))
assert {OURS}
""",
        tmp_path,
    )


def test_importing_torch_does_not_import_us(tmp_path):
    succeeds(f"import sys, torch, torch._dynamo; assert not {OURS}", tmp_path)


def test_importing_us_imports_no_triton_and_starts_no_gpu(tmp_path):
    succeeds(
        """
import sys, torch, torch._dynamo
before = "triton" in sys.modules
import fusion_backend
assert ("triton" in sys.modules) == before
assert not torch.cuda.is_initialized()
""",
        tmp_path,
        PYTHONPATH=str(ROOT),
    )


@pytest.mark.parametrize("kernel", ["auto", "fused", "epilogue", "inductor"])
def test_the_backend_works_where_triton_is_not_installed(tmp_path, kernel):
    succeeds(
        f"""
import sys
sys.modules["triton"] = None  # `import triton` raises ImportError, and find_spec finds nothing
import torch, fusion_backend
conv, x = torch.nn.ConvTranspose2d(4, 4, 3).eval(), torch.randn(1, 4, 5, 5)
model = lambda x: torch.relu(conv(x) + 1.0) * 2.0
options = {{"fused_post.kernel": "{kernel}", "fused_post.strict": True}}
with torch.no_grad():
    compiled = torch.compile(model, backend=fusion_backend.fused_post, options=options)
    torch.testing.assert_close(compiled(x), model(x))
    (site,) = fusion_backend.explain(model, x).sites
assert site.matched and site.kernel == "inductor", site
""",
        tmp_path,
        PYTHONPATH=str(ROOT),
    )


@pytest.mark.parametrize("name", ["patterns", "kernels"])
def test_the_folders_cannot_be_imported_under_their_bare_names(name):
    done = python(f"import {name}", ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert f"fusion_backend.{name}" in done.stderr


def test_the_links_to_the_two_folders_are_relative():
    for name in ("patterns", "kernels"):
        assert os.readlink(ROOT / "fusion_backend" / name) == f"../{name}"


def test_the_tables_are_those_of_the_data() -> None:
    from benchmarks.tables import written

    for name, marks in {"README.md": ("inference", "training"), "docs/performance.md": ("growth", "counters")}.items():
        text = (ROOT / name).read_text()
        assert all(f"<!-- {mark} -->" in text for mark in marks)
        assert written(text) == text, "python -m benchmarks.tables"
