"""`moelora run`: a program runs as Python runs it, and its PEFT is patched."""

import os
import subprocess
import sys

import pytest

ROUTED = """
def routed():
    import torch, transformers
    from peft import LoraConfig, MoELoraConfig, get_peft_model
    sizes = dict(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = torch.arange(5)[None]
    with model.disable_adapter():
        base = model(ids).logits
    return torch.allclose(model(ids, routing_weights=torch.zeros(1)).logits, base, atol=1e-6)

"""


def python(*arguments, cwd=None, check=True, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=120,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture
def script(tmp_path):
    def write(source, name="script.py"):
        path = tmp_path / name
        path.write_text(source)
        return path

    return write


FACTS = """
import os, sys
print(__name__, __file__, __spec__, __package__, sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals())
print(sorted(name for name in globals() if not name.startswith("__")), "torch" in sys.modules, "numpy" in sys.modules)
"""


class TestLikePython:
    @pytest.mark.parametrize("arguments", [[], ["-h"], ["--help", "-m", "x"], ["--", "-x", "--", "run"]])
    def test_a_script_sees_what_python_shows_it(self, script, arguments):
        path = script(FACTS)
        assert python("-m", "moelora", "run", path, *arguments).stdout == python(path, *arguments).stdout

    def test_a_relative_path(self, script, tmp_path):
        script(FACTS)
        (tmp_path / "link.py").symlink_to("script.py")
        for name in ("script.py", "link.py"):
            expected = python(name, cwd=tmp_path).stdout
            assert python("-m", "moelora", "run", name, cwd=tmp_path).stdout == expected

    def test_a_module_sees_what_python_shows_it(self, tmp_path, script):
        (tmp_path / "package").mkdir()
        script("import sys, package; print(__name__, __spec__.name, sys.argv, sys.path[0])", "package/__main__.py")
        script("from package import here; import sys; print(__name__, sys.argv)", "package/inner.py")
        script("here = 1", "package/__init__.py")
        for name in ("package", "package.inner"):
            expected = python("-m", name, "-h", cwd=tmp_path).stdout
            assert python("-m", "moelora", "run", "-m", name, "-h", cwd=tmp_path).stdout == expected

    def test_safe_path(self, script):
        path = script("import sys; print(sys.path[0])")
        expected = python("-P", path).stdout
        assert python("-P", "-m", "moelora", "run", path).stdout == expected

    @pytest.mark.parametrize(
        "source",
        ["import sys; sys.exit(7)", "raise SystemExit", "raise SystemExit('no')", "print(1)", "exit(3)"],
    )
    def test_the_exit_status_is_the_programs(self, script, source):
        expected = python(script(source), check=False)
        got = python("-m", "moelora", "run", script(source), check=False)
        assert (got.returncode, got.stdout, got.stderr) == (expected.returncode, expected.stdout, expected.stderr)

    @pytest.mark.parametrize(
        "source",
        [
            "def f():\n    raise ValueError('bad')\n\nf()",
            "x = (",
            "import nowhere",
            "open('nowhere')",
            "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e",
        ],
    )
    def test_a_traceback_is_the_programs(self, script, source):
        expected = python(script(source), check=False)
        got = python("-m", "moelora", "run", script(source), check=False)
        assert got.returncode == expected.returncode == 1
        assert got.stderr == expected.stderr

    def test_an_excepthook_of_the_program_is_called(self, script):
        path = script("import sys\nsys.excepthook = lambda *e: print('hook', e[0].__name__)\n1 / 0")
        got = python("-m", "moelora", "run", path, check=False)
        assert (got.returncode, got.stdout) == (1, "hook ZeroDivisionError\n")

    def test_future_imports_are_not_inherited(self, script):
        path = script("def f(x: 1 + 1): pass\nprint(f.__annotations__)")
        assert python("-m", "moelora", "run", path).stdout == "{'x': 2}\n"

    def test_functions_at_exit_still_find_their_names(self, script):
        path = script("import atexit, __main__\nx = 5\natexit.register(lambda: print(x, __main__.x))")
        assert python("-m", "moelora", "run", path).stdout == "5 5\n"


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.py"], "No such file or directory: '.*nowhere.py'"),
            (["-m", "nowhere"], "No module named 'nowhere'"),
            (["-m", "nowhere.inside"], "No module named 'nowhere'"),
            (["."], "Is a directory"),
            ([], "the following arguments are required: SCRIPT"),
        ],
    )
    def test_what_can_not_be_run_is_an_error_with_status_2(self, tmp_path, arguments, message):
        got = python("-m", "moelora", "run", *arguments, cwd=tmp_path, check=False)
        assert got.returncode == 2
        assert message.split("'")[0] in got.stderr
        assert "Traceback" not in got.stderr

    def test_help_before_the_program_is_ours(self, script):
        path = script("print('ran')")
        assert "usage: moelora run [-h]" in python("-m", "moelora", "run", "-h", path).stdout


class TestPatched:
    def test_a_script_is_routed(self, script):
        path = script(ROUTED + "print(routed())\nimport peft; print(peft.__spec__.loader is peft.__loader__)")
        assert python("-m", "moelora", "run", path).stdout.split() == ["True", "True"]

    def test_a_module_is_routed_that_imports_moelora_first(self, script, tmp_path):
        script("import moelora\nmoelora.LoraConfig\n" + ROUTED + "print(routed())", "inner.py")
        assert python("-m", "moelora", "run", "-m", "inner", cwd=tmp_path).stdout.split() == ["True"]

    def test_processes_of_multiprocessing_are_routed(self, script):
        lines = [
            "from concurrent.futures import ProcessPoolExecutor",
            "from multiprocessing import get_context",
            "def apply(start, function, *arguments):",
            "    with ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:",
            "        return pool.submit(function, *arguments).result()",
            "if __name__ == '__main__':",
            "    print(apply('spawn', apply, 'fork', routed), apply('forkserver', routed))",
        ]
        path = script(ROUTED + "\n".join(lines))
        assert python("-m", "moelora", "run", path).stdout.split() == ["True", "True"]

    def test_workers_of_torchrun_are_routed(self, script):
        # No collective: gloo's threads may abort a process that ends right after one (pytorch/pytorch#179291).
        line = "f'{os.environ[\"RANK\"]} {routed()} {sys.argv[1:]}\\n'"  # in one piece: torchrun's workers don't buffer
        path = script(ROUTED + f"import os, sys; sys.stdout.write({line})")
        options = ["--standalone", "--nproc_per_node=2", "-m", "moelora", "run", path, "-h"]
        lines = python("-m", "torch.distributed.run", *options).stdout.splitlines()
        assert sorted(lines) == ["0 True ['-h']", "1 True ['-h']"]
