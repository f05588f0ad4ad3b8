"""Training at scale: several processes make one process's steps, nothing that goes wrong loses a
checkpoint, and what a run will cost is told beforehand."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_data import CODEC, Writer, some_clips
from test_model import tiny
from test_train import losses

import model
import sample
import train
from checkpoint import (
    load_checkpoint,
    load_trainer,
    read_config,
    save_checkpoint,
    save_trainer,
)
from data import seen_before
from paper import budget
from paper.distributed import Processes

ROOT = Path(__file__).parents[1]
RUN = """--preset toy --blocks 2 --d-model 32 --d-state 8 --headdim 16 --attention-heads 4
 --seconds 0.4 --crop 0.4 --batch 3 --accumulate 3 --valid-every 3 --valid-clips 2 --warmup 10
 --train-text-encoder 0""".split()


@pytest.fixture
def data(tmp_path):
    Writer(tmp_path / "data", CODEC).add(some_clips(20))
    return tmp_path / "data"


@pytest.fixture
def alone(monkeypatch):
    """Training in this process, without the music at its end; pytest's signal handlers stay. In
    fp32: bf16, which some CPUs multiply, rounds a batch in two parts otherwise than in one."""
    monkeypatch.setattr(sample, "main", lambda argv: None)
    monkeypatch.setattr(train, "multiplies_bf16", lambda device: False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda *args: train.main([str(a) for a in args])


def together(tmp_path, *args):
    """The same in two processes."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport sample, train\n"
        "sample.main = lambda argv: None\ntrain.multiplies_bf16 = lambda device: False\n"
        "train.main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run = subprocess.run(
        [*command, script, *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_make_the_steps_of_one_and_one_goes_on_where_they_stopped(
    tmp_path, data, alone, options
):
    alone("--data", data, *RUN, "--steps", 6, "--out", tmp_path / "one")
    together(tmp_path, "--data", data, *RUN, *options, "--steps", 3, "--out", tmp_path / "two")
    # While the learning rate warms up it does not depend on the number of steps.
    go_on(tmp_path / "two", alone)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def go_on(run, alone):
    """Resumes a run of three steps and takes it to six."""
    config = read_config(run / "last")
    config["train"]["steps"] = 6
    (run / "last/config.json").write_text(json.dumps(config))
    alone("--resume", run)


def test_a_refiner_may_be_sharded_too(tmp_path, data, alone):
    """Its noise depends on the number of processes, so that the losses are near, not equal."""
    refiner = " ".join(RUN).replace("--blocks", "--variant refiner --ema 0 --layers").split()
    alone(*refiner, "--data", data, "--steps", 6, "--out", tmp_path / "one")
    together(tmp_path, *refiner, "--data", data, "--fsdp", "--steps", 3, "--out", tmp_path / "two")
    go_on(tmp_path / "two", alone)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.2)


def test_every_clip_of_a_step_belongs_to_one_process():
    config = train.TrainConfig(steps=8, seconds=10.0, crop=2.5, crop_until=0.5, batch=3)
    config.accumulate = 2
    for step in range(8):
        first, (frames, batch) = seen_before(step, config)[0], train.shape_at(step, config)
        for ranks in (1, 2, 4, 6):
            parts = [p for r in range(ranks) for p in train.share(step, config, r, ranks)]
            clips = [i for begin, count, _ in parts for i in range(begin, begin + count)]
            assert clips == list(range(first, first + 2 * batch))
            assert all(count <= batch and f == frames for _, count, f in parts)
    with pytest.raises(ValueError, match="7 processes are too many for 6 clips"):
        train.share(7, config, 0, 7)


def test_recomputed_blocks_have_the_same_gradients_and_keep_less():
    found, kept = {}, {}
    for recompute in (0, 2):
        lm, _ = tiny(dropout=0.3)
        lm.train().recompute = recompute
        codes = torch.randint(50, (2, 1, 40), generator=torch.Generator().manual_seed(0))
        text, mask = torch.ones(2, 5, 64), torch.ones(2, 5, dtype=torch.bool)
        torch.manual_seed(1)
        logits, kept[recompute] = budget.saved(lm, (codes, text, mask))
        logits.square().mean().backward()
        found[recompute] = {k: p.grad for k, p in lm.named_parameters()}
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[2][name], gradient)
    assert kept[2] < 0.5 * kept[0]


# ------------------------------------------------------------------------- nothing is ever lost --


def test_a_checkpoint_survives_kill_9_at_any_moment(tmp_path):
    """A child saves one checkpoint after the other until it is killed; each time there is one."""
    lm, encoder = tiny(d_model=128)
    folder, lives = tmp_path / "last", random.Random(0)
    one = Processes("cpu")
    objective = train.Objective(lm, encoder, None, train.TrainConfig())
    named = train.trained_parameters(objective)
    optimizer = train.make_optimizer(objective, train.TrainConfig())

    def save(step):
        for p in named.values():
            p.data.fill_(step)
        save_checkpoint(folder, lm, encoder, dict(step=step))
        about = dict(step=step, best=1.0, data="")
        save_trainer(folder, named, optimizer, None, about, one)

    save(0)
    newest = 0
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            for step in range(newest + 1, newest + 10_000):
                save(step)
            os._exit(0)
        time.sleep(lives.uniform(0.02, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        played = load_checkpoint(folder).state_dict()
        weights = {v.flatten()[0].item() for v in played.values()}
        assert len(weights) == 1 and read_config(folder)["step"] in (*weights, min(weights) - 1)
        step = load_trainer(folder, named, optimizer, None, one)["step"]
        assert step >= newest and all((p == step).all() for p in named.values())
        newest = step
    assert newest > 3, "the children had time to save"


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path):
    lm, encoder = tiny()
    save_checkpoint(tmp_path / "last", lm, encoder, dict(step=1))
    pid = os.fork()
    if pid == 0:  # no file may grow beyond 20 kB here
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_checkpoint(tmp_path / "last", lm, encoder, dict(step=2))
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert read_config(tmp_path / "last")["step"] == 1
    load_checkpoint(tmp_path / "last")
    save_checkpoint(tmp_path / "last", lm, encoder, dict(step=3))  # there is room again
    assert read_config(tmp_path / "last")["step"] == 3


def test_a_full_disk_is_told_in_one_sentence(tmp_path, data, alone, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.checkpoint, "save_checkpoint", full)
    with pytest.raises(ValueError, match="No space left .* continue with"):
        alone("--data", data, *RUN, "--steps", 3, "--out", tmp_path / "r")


# ----------------------------------------------------------------------------- what it will cost --


@pytest.mark.parametrize("preset", ["toy", "paper", "authors", "large"])
@pytest.mark.parametrize("variant", [*model.VARIANTS, "refiner"])
def test_a_dry_run_tells_the_cost_of_every_preset(variant, preset, capsys, monkeypatch):
    monkeypatch.setattr(budget, "products_per_second", lambda device: 1e12)
    options = f"--variant {variant} --preset {preset} --dry-run --no-compile".split()
    if preset not in train.PRESETS["refiner" if variant == "refiner" else "lm"]:
        with pytest.raises(ValueError, match="a refiner has no preset"):
            train.main(options)
        return
    train.main(options)
    text = capsys.readouterr().out
    for words in ("M parameters", "tokens", "FLOPs", "memory on a GPU", "activations", "RTX 3090"):
        assert words in text


def test_the_papers_simba_fits_a_24_gb_card():
    config, run = model.LMConfig(), train.TrainConfig(**train.PRESETS["lm"]["paper"])
    count = budget.parameters(config)
    parts = budget.memory(config, run, budget.FLAN_T5_BASE)
    assert parts["weights, gradients, AdamW"] == 16 * count
    assert 10e9 < sum(parts.values()) < 20e9


def test_what_is_counted_without_contents_is_what_is_kept():
    """The count of a model of shapes alone is that of the same model with numbers in it."""
    config = model.LMConfig(variant="transformer", blocks=1, d_model=64, d_text=32, headdim=16)
    counted = budget.kept(config, 50, 2, compiled=False)
    lm = model.MusicLM(config).train()
    codes = torch.zeros(2, 1, 50, dtype=torch.long)
    text = (
        torch.zeros(2, budget.TYPICAL_LENGTH, 32),
        torch.ones(2, budget.TYPICAL_LENGTH, dtype=torch.bool),
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits, size = budget.saved(lm, (codes, *text))
    assert counted == pytest.approx(size + 16 * logits.numel(), rel=0.05)
