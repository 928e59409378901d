"""The Python sources of sympy, which every installation of torch has: checked to be those of one version.

sympy is under the BSD licence. Its files are read where they are installed, and nothing of it is imported.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

VERSION = "1.14.0"
TEXT_SHA256 = "1771aeca3619bdf3b46449f08c81f22bfbc856e70e0ee33c1c02612543454b85"
#: Held-out sub-packages, each time about 5 % of the text.
VALIDATION = ("geometry", "logic", "ntheory")
TEST = ("codegen", "sets", "stats")
#: Folders that are left out, at any depth.
SKIPPED = {"tests", "__pycache__"}


def packages() -> dict[str, bytes]:
    """The sources by sub-package, in the order of their names; modules outside of any are under "".

    Raises:
        ValueError: sympy is not installed, has another version, or other sources than that version was published with.
    """
    try:
        installed = version("sympy")
    except PackageNotFoundError:
        raise ValueError(f"--data sympy needs the sources of sympy {VERSION}: pip install sympy=={VERSION}") from None
    spec = find_spec("sympy")
    if installed != VERSION or spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"--data sympy is the sources of sympy {VERSION}, and {installed} is installed, whose losses could not be "
            f"compared: pip install sympy=={VERSION}"
        )
    root = Path(spec.submodule_search_locations[0])
    texts = read(root)
    if hashlib.sha256(b"".join(texts.values())).hexdigest() != TEXT_SHA256:
        raise ValueError(
            f"--data sympy: the sources in {root} are not those that sympy {VERSION} was published with (sha256 "
            f"{TEXT_SHA256}): pip install --force-reinstall sympy=={VERSION}"
        )
    return texts


def read(root: Path) -> dict[str, bytes]:
    """The Python sources below a folder, joined by sub-package."""
    texts: dict[str, bytes] = {}
    for path in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        if not SKIPPED & {*path.parts}:
            package = path.parts[0] if len(path.parts) > 1 else ""
            texts[package] = texts.get(package, b"") + (root / path).read_bytes()
    return dict(sorted(texts.items()))
