"""check_wheel.py from_sdist.whl from_checkout.whl sdist.tar.gz: the wheel is pure, whole, and the same either way."""

import sys
import tarfile
import zipfile
from pathlib import Path


def contents(wheel: str) -> dict[str, bytes]:
    """Every file of the wheel but RECORD, which lists hashes in an order of its own."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def expected() -> set[str]:
    """Names in the wheel of every source file in the checkout, through the links."""
    root = Path(__file__).parent.parent
    names = {"fusion_backend/py.typed"}
    for folder, prefix in (("fusion_backend", ""), ("patterns", "fusion_backend/"), ("kernels", "fusion_backend/")):
        for suffix in ("*.py", "*.json"):
            names |= {prefix + str(path.relative_to(root)) for path in (root / folder).rglob(suffix)}
    return names


def main(from_sdist: str, from_checkout: str, sdist: str) -> None:
    assert from_sdist.endswith("-py3-none-any.whl"), f"not a pure-Python wheel: {from_sdist}"
    files = contents(from_sdist)

    package = {name for name in files if ".dist-info/" not in name}
    assert package == expected(), f"wheel and checkout differ in {sorted(package ^ expected())}"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files), "no LICENSE in the wheel"
    assert files == contents(from_checkout), "the wheel from the sdist and the wheel from the checkout differ"

    with tarfile.open(sdist) as archive:
        links = [member.name for member in archive if member.issym() or member.islnk()]
    assert not links, f"links in the sdist, which some unpackers drop: {links}"
    print(f"{from_sdist}: {len(package)} files, whole and pure Python, the same from sdist and checkout")


if __name__ == "__main__":
    main(*sys.argv[1:])
