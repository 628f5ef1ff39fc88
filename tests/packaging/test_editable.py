"""A development install: the extension and its OpenBLAS lie in the source tree."""

import json
from pathlib import Path


def test_editable_install_loads_the_extension(build, builder, source_tree, run_code, compute):
    build("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", ".", cwd=source_tree)
    facts = json.loads(run_code(builder, compute))
    package = source_tree / "python" / "moelora"
    assert Path(facts["extension"]).parent == package
    assert [Path(path).parent for path in facts["openblas"] if "moelora" in path] == [package / "_libs"]
