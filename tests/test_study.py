"""The study: it continues where it stopped, and its figures follow from its logs."""

import csv
import json
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import sample
import train
from checkpoint import read_config
from codec import load_codec
from curate import Writer
from experiments import study

OPTIONS = """--blocks 1 --d-model 32 --d-state 8 --headdim 16 --attention-heads 4 --seconds 0.4
 --crop 0.2 --batch 2 --warmup 2 --valid-clips 2"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of two variants, too small to learn."""
    monkeypatch.setattr(study, "VARIANTS", ("simba", "transformer"))
    labels = {variant: f"--variant {variant} {OPTIONS}" for variant in study.VARIANTS}
    labels[study.NINE] = f"--codebooks 9 {OPTIONS}"
    monkeypatch.setattr(study, "LMS", labels)
    monkeypatch.setattr(study, "REFINERS", {})
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path / "results")
    made = study.Study(quick=True, seeds=2)
    made.out = tmp_path
    made.steps, made.every, made.early = 6, 2, 4
    return made


def test_a_study_trains_continues_and_writes_what_came_out(small, tmp_path, monkeypatch):
    with monkeypatch.context() as here:  # in this process, one by one: a child needs 5 s to start
        here.setattr(sample, "main", lambda argv: None)  # slow
        here.setattr(signal, "signal", lambda *_: None)
        here.setattr(study.os, "cpu_count", lambda: 1)
        run = lambda command, **_: SimpleNamespace(returncode=train.main(command[2:]))
        here.setattr(study.subprocess, "run", run)
        study.train_all(small.jobs())
    runs = [tmp_path / f"{variant}-{seed}" for variant in study.VARIANTS for seed in (0, 1)]
    assert [read_config(run / "last")["step"] for run in runs] == [6] * 4
    nine = "simba-9-codebooks"
    assert [run.name for run in tmp_path.glob(f"{nine}-*")] == [f"{nine}-0"], "one seed, not two"
    assert all((run / "step-4").exists() for run in runs)
    whole = (runs[0] / "log.jsonl").read_text()
    stamp = (runs[1] / "log.jsonl").stat().st_mtime_ns
    shutil.rmtree(runs[0])
    study.train_all(small.jobs())  # makes again what is missing, in a child, and nothing else
    losses = lambda text: [json.loads(line).get("loss") for line in text.splitlines()]
    assert losses((runs[0] / "log.jsonl").read_text()) == losses(whole)
    assert (runs[1] / "log.jsonl").stat().st_mtime_ns == stamp

    small.losses()
    small.race()
    small.write()
    page = (small.results / "README.md").read_text()
    assert "| simba |" in page and "![" in page and "cores" in page and "commit" in page
    assert (small.results / "losses.png").stat().st_size > 5000
    _, valid = small.logs("simba")[1:]
    assert len(valid) == 2 and [row["step"] for row in valid[0]] == [2, 4, 6]
    with open(small.results / "losses.csv") as lines:
        table = {row[""]: row for row in csv.DictReader(lines)}
    assert [*table] == ["simba", "transformer", study.NINE] and table["simba"]["step"] == "6.0"
    last = [rows[-1]["right"] for rows in valid]
    found = [float(table["simba"]["right" + end]) for end in ("", " low", " high")]
    assert found == [np.mean(last), min(last), max(last)]
    assert table[study.NINE]["right low"] == ""
    with open(small.results / "race.csv") as lines:
        (row,) = csv.DictReader(lines)
    assert row[""] == "simba" and float(row["tokens"]) > 0


def test_a_stopped_run_is_resumed(tmp_path, monkeypatch):
    started = []
    run = lambda argv, **_: started.append(argv[2:]) or SimpleNamespace(returncode=0)
    monkeypatch.setattr(study.subprocess, "run", run)
    for name, file in (("whole", "loss.png"), ("stopped", "last/trainer.safetensors")):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).touch()
    jobs = {tmp_path / name: ["--steps", "10"] for name in ("whole", "stopped", "new")}
    study.train_all(jobs)
    new = ["--out", str(tmp_path / "new"), "--steps", "10"]
    assert sorted(started) == [new, ["--resume", str(tmp_path / "stopped")]]


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(ValueError, match="bad/train.log"):
        study.train_all({tmp_path / "bad": ["--steps", "1", "--blocks", "many"]})
    assert "blocks" in (tmp_path / "bad" / "train.log").read_text()


def test_systems_are_heard_under_their_labels(small, monkeypatch):
    asked, tables = [], {}
    row = lambda name: {"heard": evaluate.Cell(len(name))}

    def measure(systems, judge, task):
        systems = [*systems]
        asked.append((systems, task.seconds))
        return {name: row(name) for name in ("real clips", *systems)}

    report = lambda name, title, table, about: tables.setdefault(name, table) and ""
    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr(evaluate, "report", report)
    monkeypatch.setattr(study, "REFINERS", {"refiner, SSD": ""})
    for part in ("losses", "race", "write"):
        monkeypatch.setattr(small, part, lambda: None)
    monkeypatch.setattr(study, "train_all", lambda jobs: None)
    minutes = []
    monkeypatch.setattr(study.words, "measure", lambda *args: minutes.append(args) or ({}, {}))
    monkeypatch.setattr(study.words, "draw", lambda curves, file: None)
    small.run()
    judged, longer, refined = asked
    assert longer[1] == 25.0 and {judged[1], refined[1]} == {10.0}
    best = lambda name: f"{small.out}/{name}-0/best"
    table = tables["study-quick/judge"]
    assert table["simba"] == row(f"{best('simba')}+{study.SHIPPED_REFINER}")
    assert table["simba, new refiner"] == row(f"{best('simba')}+{best('refiner-SSD')}")
    assert table[study.NINE] == row(f"{best('simba-9-codebooks')}+{study.SHIPPED_REFINER}")
    assert [*table][0] == "real clips" and "transformer, step-4" in table
    assert [*tables["study-quick/refined"]] == ["real clips", "refiner, SSD"]
    ((models, seconds, pieces),) = minutes
    assert [*models] == ["simba", "transformer"] and (seconds, pieces) == (60.0, 1)


def test_the_race_is_run_between_validations():
    spent, losses = np.array([10.0, 20.0, 30.0]), np.array([3.0, 2.0, 1.0])
    assert study.reached(spent, losses, 1.5) == 25
    assert study.reached(spent, losses, 2.0) == 20
    assert study.reached(spent, losses, 4.0) == 10
    assert study.reached(spent, losses, 0.5) == np.inf
    assert study.reached(spent, np.array([3.0, 1.0, 2.0]), 1.5) == 17.5, "the first time"


def test_a_study_of_other_music_is_refused(tmp_path):
    writer = Writer(tmp_path / "mine", load_codec("toy"))
    codes = np.zeros((9, 50), np.uint16)
    writer.add([(codes, dict(split=split, caption="a song")) for split in ("train", "valid")])
    with pytest.raises(ValueError, match="mine was not made by `python -m toy build`"):
        study.Study(data=str(tmp_path / "mine"))


def test_bad_options_get_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--seeds", "0"])
    with pytest.raises(SystemExit, match="2"):
        study.entry(study.main)
    assert "--seeds must be in [1, 1e9], not 0" in capsys.readouterr().err
