"""The programs in the documentation run as they stand; docs/continual-learning.md does in peft/test_continual.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    "getting-started",
    "migration",
    "routers",
    "losses",
    "generation",
    "training",
    "monitoring",
    "static-mixtures",
    "loha-lokr",
    "checkpoints",
    "validation",
)


@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")
@pytest.mark.parametrize("page", [f"docs/{name}.md" for name in PAGES])
def test_code_blocks_of_a_page_are_one_program_that_runs(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out
