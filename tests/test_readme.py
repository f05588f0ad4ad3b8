"""What the README says is so: its commands are understood, its map of the code is the code's."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    """The lines of the README's code blocks that run a script of ours: [(script, argv)]"""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S):
        if language:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            line = re.split(r"\s{3,}(?=[^-\s])|\s+[#|]\s|\s+&&\s+pytest", line.strip())[0]
            line = line.split("&&")[-1].strip()
            words = shlex.split(line) if line.startswith(("python ", "torchrun ")) else []
            if words:
                at = next(i for i, word in enumerate(words) if word.endswith(".py"))
                found.append((words[at][:-3], words[at + 1 :]))
    return found


class Understood(Exception):
    pass


@pytest.mark.parametrize(
    "script, argv", commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v)[:60]
)
def test_the_command_line_understands(script, argv, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *args):
        parse(self, *args)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *argv])
    with pytest.raises(SystemExit if argv == ["--help"] else Understood):
        importlib.import_module(script).main()


def code_map():
    """Who imports whom, as the README draws it: an arrow from a file to one that builds on it, left
    out where a longer way leads there."""
    uses = {}
    for file in sorted(ROOT.glob("*.py")):
        if not file.stem.startswith(("test_", "conftest")):
            lines = ast.parse(file.read_text()).body
            names = {line.module for line in lines if isinstance(line, ast.ImportFrom)}
            names |= {a.name for line in lines if isinstance(line, ast.Import) for a in line.names}
            uses[file.stem] = names
    uses = {name: used & set(uses) for name, used in uses.items()}

    def all_of(name):
        return uses[name].union(*map(all_of, uses[name]))

    lines = ["```mermaid", "graph LR"]
    for name, used in uses.items():
        for other in sorted(used):
            if not any(other in all_of(between) for between in used - {other}):
                lines.append(f"  {other} --> {name}")
    return "\n".join([*lines, "```"])


def test_the_map_of_the_code_is_that_of_its_imports():
    assert code_map() in README, f"paste this into the README:\n{code_map()}"


def test_every_file_is_in_the_readme():
    files = [f.name for f in ROOT.glob("*.py") if not f.stem.startswith(("test_", "conftest"))]
    assert not [name for name in files if f"`{name}`" not in README]
