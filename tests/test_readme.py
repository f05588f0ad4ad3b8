"""README and docs say what is so: commands parse, links lead somewhere, imports run one way."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELL = ("", "bash", "sh")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """Our commands in the text, and in the code blocks that have no language or are shell:
    [(module, argv)]"""
    found = []
    for page in PAGES:
        for inline in re.findall(r"`(python [^`]+)`", page.read_text()):
            found += command(shlex.split(inline))
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines() if language in SHELL else []:
                if re.search(r"(^|&& )(python|torchrun) ", line.strip()):
                    line = re.split(r"\s{3,}(?=[^-\s])", line.strip())[0]  # what follows explains
                    words = shlex.split(line, comments=True)
                    for part in re.split(r"\0(?:&&|\||;)\0", "\0".join(words)):
                        found += command(part.split("\0"))
    return sorted(set(found))


def command(words):
    """["python", "train.py", ...], ["python", "-m", "toy", ...] or torchrun -> [(module, argv)]"""
    if words[0] not in ("python", "torchrun"):
        return []
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if words[1] == "-m":
        module, script = words[2], 2
        if (ROOT / module.replace(".", "/")).is_dir():
            module += ".__main__"
    elif script:
        module = words[script][:-3]
    if script is None or module.startswith(("docs.", "tests.")):  # those take no options
        return []
    return [(module, tuple(words[script + 1 :]))]


class Understood(Exception):
    pass


@pytest.mark.parametrize(
    "module, argv", commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v)[:60]
)
def test_commands_parse(module, argv, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *args):
        parse(self, *args)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    # sample.py takes its defaults from the checkpoint, which must exist.
    stand_in = lambda word: word.endswith(".ckpt") or word == "someone/model"
    argv = [str(ROOT / "toy/lm") if stand_in(word) else word for word in argv]
    monkeypatch.setattr("sys.argv", [module, *argv])
    with pytest.raises(SystemExit if "--help" in argv else Understood):
        importlib.import_module(module).main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    files = [link.split("#")[0] for link in links if not re.match(r"https?:|mailto:|#", link)]
    assert not [file for file in files if not (page.parent / file).exists()]


def test_readme_is_short_and_names_every_file_at_the_top():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2400
    files = [file.name for file in [*ROOT.glob("*.py"), *ROOT.glob("docs/*.*")]]
    assert not [name for name in files if name not in text]


def test_names_that_other_programs_use_are_there():
    names = """model.LMConfig model.MusicLM model.ssd_recurrent model.ssd_chunked ssd_kernel.ssd
        checkpoint.load_checkpoint checkpoint.load_text_encoder checkpoint.read_config
        codec.load_codec evaluate.frechet_distance evaluate.kl_divergence
        sample.System data.Clips"""
    for name in names.split():
        module, attribute = name.split(".")
        assert hasattr(importlib.import_module(module), attribute), name


def python_files():
    """{path: text} of the Python files under version control, without tests."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    names = [n for n in listed.stdout.split() if not re.search(r"^tests/|(^|/)test_", n)]
    if not names:
        pytest.skip("not a git checkout")
    return {name: (ROOT / name).read_text() for name in names}


def test_imports_run_one_way():
    files = python_files()
    modules = {
        name[:-3].replace("/", ".").removesuffix(".__init__"): t for name, t in files.items()
    }
    uses = {}
    for module, text in modules.items():
        names = set()
        for line in ast.parse(text).body:  # imports inside functions are allowed
            if isinstance(line, ast.ImportFrom):
                names |= {line.module} | {f"{line.module}.{alias.name}" for alias in line.names}
            elif isinstance(line, ast.Import):
                names |= {alias.name for alias in line.names}
        uses[module] = names & set(modules) - {module}
    TopologicalSorter(uses).prepare()  # raises CycleError, with the cycle
