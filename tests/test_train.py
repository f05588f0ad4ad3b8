"""Training: it learns, it can be stopped anywhere, and what goes wrong is said in one sentence."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_data import some_clips

import sample
import train
from checkpoint import load_checkpoint, read_config, read_tensors
from data import seen_before
from options import entry
from train import PRESETS, TrainConfig, learning_rate, shape_at

ROOT = Path(__file__).parents[1]
TINY = """--preset toy --blocks 1 --d-model 32 --d-state 8 --headdim 16 --attention-heads 4
 --seconds 0.4 --crop 0.2 --batch 2 --valid-every 4 --valid-clips 2 --warmup 2""".split()


@pytest.fixture
def data(tmp_path):
    from test_data import CODEC, Writer

    Writer(tmp_path / "data", CODEC).add(some_clips(20))
    return tmp_path / "data"


def run(*args, wait=True, cwd=None):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd
    )
    if not wait:
        return process
    out, err = process.communicate()
    return process.returncode, out, err


def losses(folder):
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("variant", ["simba", "transformer"])
def test_a_resumed_run_has_the_losses_of_one_never_stopped(tmp_path, data, variant):
    options = ["--variant", variant, "--data", data, "--dropout", "0.3", *TINY]
    options += ["--valid-every", 30]
    code, out, err = run(*options, "--steps", 60, "--out", tmp_path / "whole")
    assert code == 0, err
    assert "parameters" in out and "FLOPs" in out and "valid" in out
    assert (tmp_path / "whole/loss.png").stat().st_size > 1000
    assert list((tmp_path / "whole").glob("*.wav")), "a finished run plays something"

    stopped = run(*options, "--steps", 60, "--out", tmp_path / "cut", wait=False)
    while not (tmp_path / "cut/log.jsonl").exists() or len(losses(tmp_path / "cut")) < 2:
        time.sleep(0.02)
        assert stopped.poll() is None, stopped.communicate()
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate()
    if stopped.returncode == 130:  # else it was quicker than the signal
        assert "--resume" in out
        assert len(losses(tmp_path / "cut")) == read_config(tmp_path / "cut/last")["step"] < 60
        code, _, err = run("--resume", tmp_path / "cut")
        assert code == 0, err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (read_tensors(tmp_path / f / "last/model.safetensors") for f in ("whole", "cut"))
    assert all((whole[k] == cut[k]).all() for k in whole)


def test_nine_codebooks_train_and_play_and_checkpoints_are_kept(tmp_path, data):
    code, _, err = run(
        "--codebooks", 9, "--data", data, *TINY, "--steps", 8, "--keep-every", 4,
        "--out", tmp_path / "r",
    )  # fmt: skip
    assert code == 0, err
    assert [read_config(tmp_path / "r" / f"step-{n}")["step"] for n in (4, 8)] == [4, 8]
    assert load_checkpoint(tmp_path / "r/best").config.codebooks == 9


def test_fine_tuning_keeps_weights_shape_and_sampling_options_of_its_checkpoint(
    tmp_path, data, monkeypatch
):
    import sample

    monkeypatch.setattr(sample, "main", lambda argv: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's handlers stay
    train.main(
        f"--data {data} --init-from toy --out {tmp_path / 'r'} --seconds 0.4 --crop 0.4 "
        "--valid-clips 2 --steps 1 --lr 1e-30".split()
    )
    shipped, tuned = (ROOT / "toy/lm", tmp_path / "r/best")
    assert load_checkpoint(tuned).config == load_checkpoint(shipped).config
    before, after = (load_checkpoint(f).state_dict() for f in (shipped, tuned))
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    plays = read_config(shipped)["sampling"]
    assert all(read_config(tmp_path / "r" / f)["sampling"] == plays for f in ("best", "last"))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--init-from", "toy", "--blocks", "6"], "toy/lm has --blocks 4, not 6"),
        (["--init-from", "toy", "--variant", "mamba"], "--variant simba, not mamba"),
        (["--init-from", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_another_shape_than_the_checkpoints_is_one_sentence(tmp_path, data, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train.main([*options, "--data", str(data), "--out", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def test_fine_tuning_needs_data_of_the_checkpoints_codec(tmp_path, data):
    meta = json.loads((data / "meta.json").read_text()) | {"codec": "dac"}
    (data / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="made by the codec 'dac', the model reads 'toy'"):
        train.main(["--init-from", "toy", "--data", str(data), "--out", str(tmp_path / "r")])


def test_a_batch_is_learned_by_heart():
    from test_model import CAPTIONS, tiny

    lm, encoder = tiny(dropout=0.0)
    codes = torch.randint(50, (4, 1, 16), generator=torch.Generator().manual_seed(0))
    objective = train.Objective(lm, encoder, None, TrainConfig(lr=1e-2, compile=False))
    optimizer = train.make_optimizer(objective, objective.config)
    first = None
    for _ in range(60):
        loss = objective(codes, CAPTIONS)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_weight_decay_spares_vectors_and_biases_and_the_text_encoder_has_its_own_rate():
    from test_model import tiny

    lm, encoder = tiny(mixer="einfft")
    config = TrainConfig(lr=1e-3, train_text_encoder=1e-4)
    objective = train.Objective(lm, encoder, None, config)
    groups = train.make_optimizer(objective, config).param_groups
    names = {id(p): n for n, p in train.trained_parameters(objective).items()}
    for group in groups:
        group["names"] = [names.pop(id(p)) for p in group["params"]]
        texts = {name.startswith("text.") for name in group["names"]}
        assert texts == ({True} if group["scale"] == pytest.approx(0.1) else {False})
    assert not names, "every parameter is in one group"
    spared = {n.rsplit(".", 1)[-1] for g in groups if not g["weight_decay"] for n in g["names"]}
    assert {"A_log", "D", "dt_bias", "bias", "biases"} <= spared
    decayed = [p for g in groups if g["weight_decay"] == 2e-2 for p in g["params"]]
    assert decayed and all(p.ndim >= 2 for p in decayed)


def test_a_frozen_text_encoder_stays_as_it_was(tmp_path, data):
    from toy import corpus

    options = ["--data", data, *TINY, "--steps", 2, "--train-text-encoder", 0]
    code, _, err = run(*options, "--out", tmp_path / "r")
    assert code == 0, err
    trained = train.load_text_encoder(tmp_path / "r/best").state_dict()
    assert all((trained[k] == v).all() for k, v in corpus.text_encoder().state_dict().items())


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=1000, warmup=100, lr=1.0)
    assert learning_rate(0, config) == pytest.approx(0.01)
    assert learning_rate(100, config) == pytest.approx(1.0)
    assert learning_rate(550, config) == pytest.approx(0.5)
    assert learning_rate(999, config) < 1e-5


def test_crops_double_until_clips_are_whole():
    config = TrainConfig(steps=100, seconds=10.0, crop=2.5, crop_until=0.8, batch=4)
    assert shape_at(0, config) == shape_at(39, config) == (215, 13)
    assert shape_at(40, config) == shape_at(79, config) == (430, 7)
    assert shape_at(80, config) == shape_at(99, config) == (861, 4)
    assert shape_at(0, TrainConfig(batch=3)) == (2584, 3)  # the paper's: no crops


def test_samples_are_counted_without_gaps():
    config = TrainConfig(steps=10, seconds=10.0, crop=2.5, crop_until=0.75, batch=4, accumulate=3)
    samples = tokens = 0
    for step in range(10):
        assert seen_before(step, config) == (samples, tokens)
        frames, clips = shape_at(step, config)
        samples, tokens = samples + 3 * clips, tokens + 3 * clips * frames


def test_presets_name_real_options():
    from dataclasses import fields

    known = {f.name for kind in (train.LMConfig, TrainConfig) for f in fields(kind)}
    assert all(set(preset) <= known for preset in PRESETS.values())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--variant", "rnn"], "unknown --variant"),
        (["--data", "nowhere"], "no data at nowhere"),
        (["--resume", "nowhere"], "nowhere holds no run"),
        (["--resume", "out/simba", "--steps", "20000"], "leave out --steps"),
        (["--preset", "huge"], "invalid choice"),
        (["--valid-every", "0"], "--valid-every must be in [1, inf), not 0"),
        (["--d-conv", "1"], "--d-conv must be in [2, inf), not 1"),
        (["--headdim", "0"], "--headdim must be in [1, inf), not 0"),
        (["--device", "gpu"], "--device gpu"),
        (["--text-encoder", "./no-such-t5", "--data", "{data}"], "text encoder ./no-such-t5"),
    ],
)
def test_bad_options_get_one_sentence(tmp_path, data, options, sentence, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [o.format(data=data) for o in options]
    options += [] if "--resume" in options else ["--steps", "1"]
    with pytest.raises(SystemExit, match="2"):
        entry(lambda: train.main(options))
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten(tmp_path, data):
    (tmp_path / "run/last").mkdir(parents=True)
    (tmp_path / "run/last/trainer.safetensors").touch()
    with pytest.raises(ValueError, match="--resume"):
        train.main(["--data", str(data), "--out", str(tmp_path / "run")])


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path, data, monkeypatch):
    """Its log goes, the last line of which may be half a line; and Ctrl-C is the shell's again."""
    monkeypatch.setattr(sample, "main", lambda argv: None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text('{"step": 1, "loss": 99.0}\n{"step": 2, "lo')
    before = signal.getsignal(signal.SIGINT)
    train.main(["--data", str(data), *TINY, "--steps", "4", "--out", str(tmp_path / "run")])
    assert len(losses(tmp_path / "run")) == 4 and max(losses(tmp_path / "run")) < 99
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_refiner_trains_on_a_gpu(tmp_path):
    options = "--layers 1 --d-model 32 --d-state 8 --headdim 16 --steps 2 --valid-clips 2"
    code, _, err = run("--variant", "refiner", *options.split(), "--out", tmp_path / "r")
    assert code == 0, err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("learning rate", "codebooks modelled", "columns of a head's state"):
        assert words in text


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(train, "refiner_loss", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's handlers stay
    losses = train.token_losses
    monkeypatch.setattr(train, "token_losses", lambda *a: losses(*a) * float("inf"))
    with pytest.raises(ValueError, match="10 bad steps"):
        options = [*TINY, "--steps", "30", "--valid-every", "30", "--out", str(tmp_path / "r")]
        train.main(["--data", str(data), *options])
    assert capsys.readouterr().out.count("skipped") == 10


def test_a_run_that_diverges_says_so(tmp_path, data, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    scores = dict(right=float("nan"), shuffled=1.0, empty=1.0)
    monkeypatch.setattr(train, "validate", lambda *_: scores)
    with pytest.raises(ValueError, match="diverged: validation loss nan"):
        train.main(["--data", str(data), *TINY, "--steps", "4", "--out", str(tmp_path / "r")])


def test_the_averaged_weights_are_the_average_and_are_what_is_validated_and_kept(
    tmp_path, data, monkeypatch
):
    monkeypatch.setattr(sample, "main", lambda argv: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    seen, validated = [], []
    update, validate = train.Trainer.update, train.validate

    def spy(trainer):
        update(trainer)
        seen.append(trainer.objective.model.heads[0].weight.detach().clone())

    def look(model, *rest):
        validated.append(model.heads[0].weight.detach().clone())
        return validate(model, *rest)

    monkeypatch.setattr(train.Trainer, "update", spy)
    monkeypatch.setattr(train, "validate", look)
    options = [*TINY, "--steps", "4", "--ema", "0.5", "--out", str(tmp_path / "r")]
    train.main(["--data", str(data), *options])
    average = seen[0]
    for weight in seen[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(validated[-1], average)
    stored = read_tensors(tmp_path / "r/last/model.safetensors")["lm.heads.0.weight"]
    assert torch.equal(stored, validated[-1]) and not torch.equal(stored, seen[-1])


def test_the_text_encoder_learns_at_its_own_rate(tmp_path, data, monkeypatch):
    monkeypatch.setattr(sample, "main", lambda argv: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    rates, update = [], train.Trainer.update

    def spy(trainer):
        rates.append({g["lr"] for g in trainer.optimizer.param_groups})
        update(trainer)

    monkeypatch.setattr(train.Trainer, "update", spy)
    options = [*TINY, "--steps", "3", "--lr", "1e-3", "--train-text-encoder", "1e-4"]
    train.main(["--data", str(data), *options, "--out", str(tmp_path / "r")])
    assert sorted(rates[1]) == pytest.approx([1e-4, 1e-3])  # the warm-up has two steps


def test_a_run_is_not_resumed_on_other_data(tmp_path, data, monkeypatch):
    monkeypatch.setattr(sample, "main", lambda argv: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    train.main(["--data", str(data), *TINY, "--steps", "4", "--out", str(tmp_path / "r")])
    manifest = data / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ValueError, match="has changed since"):
        train.main(["--resume", str(tmp_path / "r")])


def test_two_runs_do_not_share_a_folder(tmp_path, data):
    lock = train.lock_folder(tmp_path / "r")
    code, _, err = run("--data", data, *TINY, "--steps", 2, "--out", tmp_path / "r")
    assert code == 2 and "another process is writing" in err
    lock.close()


def test_a_damaged_log_is_named(tmp_path, data, monkeypatch):
    monkeypatch.setattr(sample, "main", lambda argv: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    train.main(["--data", str(data), *TINY, "--steps", "4", "--out", str(tmp_path / "r")])
    (tmp_path / "r/log.jsonl").write_text("[1]\nnonsense\n")
    with pytest.raises(ValueError, match="log.jsonl is damaged"):
        train.main(["--resume", str(tmp_path / "r")])


def test_training_on_real_data_loads_no_composer(tmp_path, data):
    options = ["--data", str(data), *TINY, "--steps", "2", "--out", str(tmp_path / "r")]
    code = (
        "import sys, signal, sample, train; sample.main = lambda argv: None\n"
        f"train.main({options!r})\n"
        "assert not {'mido', 'toy.composer', 'toy.band'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_refiner_is_distilled(tmp_path):
    options = "--variant refiner --steps 1 --batch 2 --valid-every 1 --valid-clips 2".split()
    with pytest.raises(ValueError, match="--distill needs --init-from"):
        train.main([*options, "--distill"])
    with pytest.raises(ValueError, match="--distill is for --variant refiner"):
        train.main(["--init-from", "toy", "--distill"])
    run = train.parse_arguments(
        [*options, "--init-from", "toy", "--distill", "--out", str(tmp_path)]
    )
    train.train(*run[:3], train.join_processes("cpu"))
    stored = read_config(tmp_path / "last")["sampling"]
    assert stored["guidance"] == stored["sketch_guidance"] == 1

    more = ["--init-from", str(tmp_path / "last"), "--out", str(tmp_path / "again")]
    run = train.parse_arguments([*options, *more])  # on data, not on a teacher
    train.train(*run[:3], train.join_processes("cpu"))
    assert read_config(tmp_path / "again/last")["sampling"] == {}
