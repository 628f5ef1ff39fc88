"""What ``import moelora`` costs and brings along."""

import sys
from importlib.metadata import version

import pytest

import moelora
from moelora import cli


def test_import_brings_no_torch(run_code):
    code = "import sys, moelora.functional; print({'torch', 'transformers', 'peft', 'scipy'} & set(sys.modules))"
    assert run_code(sys.executable, code).strip() == "set()"


def test_import_takes_less_than_a_tenth_of_a_second_over_numpy(run_code):
    code = (
        "import time, numpy; start = time.perf_counter(); import moelora, moelora.functional;"
        "print(time.perf_counter() - start)"
    )
    assert min(float(run_code(sys.executable, code)) for _ in range(5)) < 0.1


def test_the_command_says_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"moelora {moelora.__version__}\n"


def test_version_is_that_of_the_distribution():
    assert moelora.__version__ == version("moelora")
