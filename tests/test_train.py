"""Training: it learns, it can be stopped anywhere, and what goes wrong is said in one sentence."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_data import CODEC, Writer, some_clips
from test_model import CAPTIONS, tiny

import sample
import train
from checkpoint import load_checkpoint, load_text_encoder, read_config, read_tensors
from data import seen_before
from options import entry
from toy import corpus
from train import PRESETS, TrainConfig, learning_rate, shape_at

ROOT = Path(__file__).parents[1]
TINY = """--preset toy --blocks 1 --d-model 32 --d-state 8 --headdim 16 --attention-heads 4
 --seconds 0.4 --crop 0.2 --batch 2 --valid-every 4 --valid-clips 2 --warmup 2""".split()


@pytest.fixture
def data(tmp_path):
    Writer(tmp_path / "data", CODEC).add(some_clips(20))
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, data, monkeypatch):
    """Trains a tiny model in this process, without the music at its end -> the run's folder."""
    monkeypatch.setattr(sample, "main", lambda argv: None)

    def run(*options, out="r"):
        options = ["--data", data, *TINY, *options, "--out", tmp_path / out]
        train.main([str(option) for option in options])
        return tmp_path / out

    return run


def rows(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def scores(folder):
    return [row for row in rows(folder) if "right" in row]


def losses(folder):
    return [row["loss"] for row in rows(folder) if "loss" in row]


def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """A signal reaches training between this step and the next, which is the last."""
    real = train.Log.step

    def step(self, step, **row):
        real(self, step, **row)
        if step == steps:
            signal.raise_signal(number)

    monkeypatch.setattr(train.Log, "step", step)


@pytest.mark.parametrize("variant", ["simba", "transformer"])
def test_a_resumed_run_has_the_losses_of_one_never_stopped(run, monkeypatch, variant, capsys):
    """Stopped where it would validate and keep a checkpoint: it does so when it is resumed."""
    options = ["--variant", variant, "--dropout", "0.3", "--steps", 8, "--keep-every", 4]
    whole = run(*options, out="whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(SystemExit, match="130"):
        run(*options, out="cut")
    cut = whole.parent / "cut"
    assert f"--resume {cut}" in capsys.readouterr().out
    assert len(losses(cut)) == read_config(cut / "last")["step"] == 4
    train.main(["--resume", str(cut)])
    assert losses(cut) == losses(whole) and len(losses(cut)) == 8
    assert scores(cut) == scores(whole) and len(scores(cut)) == 2
    assert read_config(cut / "step-4")["best"] == read_config(whole / "step-4")["best"]
    a, b = (read_tensors(folder / "last/model.safetensors") for folder in (whole, cut))
    assert all((a[k] == b[k]).all() for k in a)


def test_a_run_from_the_shell_writes_all_that_it_promises_and_plays(tmp_path, data):
    """And SIGTERM ends it as it should; nine codebooks, which are one stage."""
    options = ["--codebooks", 9, "--data", data, *TINY, "--steps", 8, "--keep-every", 4]
    command = [sys.executable, ROOT / "train.py", *options, "--out", tmp_path / "r"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("parameters", "FLOPs", "valid", "best validation loss"):
        assert words in done.stdout
    assert (tmp_path / "r/loss.png").stat().st_size > 1000
    assert list((tmp_path / "r").glob("*.wav")), "a finished run plays something"
    assert [read_config(tmp_path / "r" / f"step-{n}")["step"] for n in (4, 8)] == [4, 8]
    assert load_checkpoint(tmp_path / "r/best").config.codebooks == 9


@pytest.mark.parametrize("crop_until", [0.0, 1.0])
def test_validation_reads_windows_as_long_as_those_of_training(run, monkeypatch, crop_until):
    """Clips have 60 frames, training reads 34 of them, or 17 where clips never become whole."""
    lengths = {True: set(), False: set()}  # of training, of validation
    real = train.token_losses

    def look(lm, encoder, codes, *rest, **options):
        lengths[lm.training].add(codes.shape[2])
        return real(lm, encoder, codes, *rest, **options)

    monkeypatch.setattr(train, "token_losses", look)
    run("--steps", 4, "--crop-until", crop_until)
    assert lengths[False] == {max(lengths[True])} == {17 if crop_until else 34}


def test_validation_is_the_mean_over_all_windows_of_all_clips(data, monkeypatch):
    monkeypatch.setattr(train, "multiplies_bf16", lambda device: False)
    lm, encoder = tiny(codebook_size=1024)
    config = TrainConfig(str(data), seconds=0.2, crop=0.2, compile=False, valid_clips=2, batch=3)
    objective = train.Objective(lm, encoder, None, config)
    clips = train.Clips(data, "valid")
    expected = []
    for i in np.random.default_rng(17).permutation(len(clips))[:2]:
        for start in range(0, clips.rows[i]["frames"] - 16, 17):
            codes = torch.from_numpy(clips.codes(i, start, 17))[None]
            expected.append(train.token_losses(lm, encoder, codes, [clips.rows[i]["caption"]]))
    read = SimpleNamespace(valid=clips, describe=lambda row, rng: row["caption"])
    found = train.validate(lm, objective, read, config)
    assert found["right"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)


def test_a_refiner_is_validated_with_all_of_codebook_1_and_without(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "refiner_loss", lambda *a: seen.append(a[5]) or torch.zeros(()))
    parts = SimpleNamespace(encoder=None, codec=None, teacher=None)
    assert {*train.refiner_losses(None, parts, torch.zeros(3), [], 0)} == {"", "_blind"}
    assert seen == [0.0, 1.0]


def test_overfitting_is_said_at_the_end(run, monkeypatch, capsys):
    scores = iter([5.0, 1.0, 9.0])
    names = ("right", "right_1s", "shuffled", "shuffled_1s", "empty", "empty_1s")
    monkeypatch.setattr(train, "validate", lambda *_: dict.fromkeys(names, next(scores)))
    monkeypatch.setattr(train.Log, "recent_loss", lambda self: 0.75)
    folder = run("--steps", 12)
    out = capsys.readouterr().out
    assert "best validation loss 1.000 nats per token, at step 8" in out
    assert f"training loss is 0.250 lower; {folder}/best plays" in out
    assert read_config(folder / "best")["step"] == 8


def test_fine_tuning_keeps_weights_shape_and_sampling_options_of_its_checkpoint(
    tmp_path, data, monkeypatch
):
    monkeypatch.setattr(sample, "main", lambda argv: None)
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
        (["--init-from", "toy", "--text-encoder", "toy"], "brings its own --text-encoder"),
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


def test_a_frozen_text_encoder_stays_as_it_was(run):
    folder = run("--steps", 2, "--train-text-encoder", 0)
    trained = load_text_encoder(folder / "best").state_dict()
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
    known = {f.name for kind in (train.LMConfig, TrainConfig) for f in fields(kind)}
    assert all(set(preset) <= known for preset in PRESETS["lm"].values())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--variant", "rnn"], "invalid choice: 'rnn' (choose from 'mamba'"),
        (["--data", "nowhere"], "no data at nowhere"),
        (["--resume", "nowhere"], "nowhere holds no run"),
        (["--resume", "out/simba", "--steps", "20000"], "leave out --steps"),
        (["--preset", "huge"], "invalid choice"),
        (["--valid-every", "0"], "--valid-every must be in [1, 1e9], not 0"),
        (["--d-conv", "1"], "--d-conv must be in [2, 1e9], not 1"),
        (["--headdim", "0"], "--headdim must be in [1, 1e9], not 0"),
        (["--device", "meta"], "unknown --device 'meta'"),
        (["--seconds", "1e300"], "--seconds must be in (0, 3600], not 1e+300"),
        (["--trained-frames", "1" + 23 * "0"], "--trained-frames must be in [1, 1e9]"),
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


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried ...")])
def test_too_little_memory_is_one_sentence(error, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit, match="2"):
        entry(fail)
    assert "out of memory: smaller sizes, --batch" in capsys.readouterr().err
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        entry(fail)


def test_a_run_is_not_overwritten(tmp_path, run):
    (tmp_path / "r/last").mkdir(parents=True)
    (tmp_path / "r/last/trainer.safetensors").touch()
    with pytest.raises(ValueError, match="--resume"):
        run("--steps", 2)


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, run):
    """Its log goes, the last line of which may be half a line; and Ctrl-C is the shell's again."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r/log.jsonl").write_text('{"step": 1, "loss": 99.0}\n{"step": 2, "lo')
    before = signal.getsignal(signal.SIGINT)
    folder = run("--steps", 4)
    assert len(losses(folder)) == 4 and max(losses(folder)) < 99
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_refiner_trains_on_a_gpu(tmp_path):
    options = "--layers 1 --d-model 32 --d-state 8 --headdim 16 --steps 2 --valid-clips 2"
    train.main(["--variant", "refiner", *options.split(), "--out", str(tmp_path / "r")])


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("learning rate", "codebooks modelled", "columns of a head's state"):
        assert words in text


def test_ten_bad_steps_in_a_row_stop_the_run(run, monkeypatch, capsys):
    losses = train.token_losses
    infinite = lambda *parts, **options: losses(*parts, **options) * float("inf")
    monkeypatch.setattr(train, "token_losses", infinite)
    with pytest.raises(ValueError, match="10 bad steps"):
        run("--steps", 30, "--valid-every", 30)
    assert capsys.readouterr().out.count("skipped") == 9


def test_a_run_that_diverges_says_so(run, monkeypatch):
    scores = dict(right=float("nan"), shuffled=1.0, empty=1.0)
    monkeypatch.setattr(train, "validate", lambda *_: scores)
    with pytest.raises(ValueError, match="diverged: validation loss nan"):
        run("--steps", 4)


def test_the_averaged_weights_are_the_average_and_are_what_is_validated_and_kept(run, monkeypatch):
    seen, validated = [], []
    update, validate = train.Trainer.update, train.validate

    def spy(trainer, rate):
        norm = update(trainer, rate)
        seen.append(trainer.objective.model.heads[0].weight.detach().clone())
        return norm

    def look(model, *rest):
        validated.append(model.heads[0].weight.detach().clone())
        return validate(model, *rest)

    monkeypatch.setattr(train.Trainer, "update", spy)
    monkeypatch.setattr(train, "validate", look)
    folder = run("--steps", 4, "--ema", 0.5)
    average = seen[0]
    for weight in seen[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(validated[-1], average)
    stored = read_tensors(folder / "last/model.safetensors")["lm.heads.0.weight"]
    assert torch.equal(stored, validated[-1]) and not torch.equal(stored, seen[-1])


def test_the_text_encoder_learns_at_its_own_rate(run, monkeypatch):
    rates, update = [], train.Trainer.update

    def spy(trainer, rate):
        norm = update(trainer, rate)
        rates.append({g["lr"] for g in trainer.optimizer.param_groups})
        return norm

    monkeypatch.setattr(train.Trainer, "update", spy)
    run("--steps", 3, "--lr", 1e-3, "--train-text-encoder", 1e-4)
    assert sorted(rates[1]) == pytest.approx([1e-4, 1e-3])  # the warm-up has two steps


def test_a_run_is_not_resumed_on_other_data_or_with_a_damaged_log(run, data):
    folder = run("--steps", 4)
    (folder / "log.jsonl").write_text("[1]\nnonsense\n")
    with pytest.raises(ValueError, match="log.jsonl is damaged"):
        train.main(["--resume", str(folder)])
    (folder / "log.jsonl").write_text('{"step": 4, "right": null}\n')
    with pytest.raises(ValueError, match="log.jsonl is damaged"):
        train.main(["--resume", str(folder)])
    manifest = data / "manifest.jsonl"
    manifest.write_text(manifest.read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match="has changed since"):
        train.main(["--resume", str(folder)])


def test_two_runs_do_not_share_a_folder(tmp_path, run):
    lock = train.lock_folder(tmp_path / "r")
    with pytest.raises(ValueError, match="another process is writing"):
        run("--steps", 2)
    lock.close()


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
    options += "--seconds 0.5 --crop 0.5".split()
    with pytest.raises(ValueError, match="--distill needs --init-from"):
        train.main([*options, "--distill"])
    with pytest.raises(ValueError, match="--distill is for --variant refiner"):
        train.main(["--init-from", "toy", "--distill"])
    run = train.parse_arguments(
        [*options, "--init-from", "toy", "--distill", "--out", str(tmp_path)]
    )
    train.train(*run[:3], train.Processes("cpu"))
    stored = read_config(tmp_path / "last")["sampling"]
    assert stored["guidance"] == stored["sketch_guidance"] == 1

    more = ["--init-from", str(tmp_path / "last"), "--out", str(tmp_path / "again")]
    run = train.parse_arguments([*options, *more])  # on data, not on a teacher
    train.train(*run[:3], train.Processes("cpu"))
    assert read_config(tmp_path / "again/last")["sampling"] == {}


def test_a_codebook_of_another_size_than_the_datas_is_told_before_training(run):
    with pytest.raises(ValueError, match="have 1024 entries: --codebook-size must be 1024"):
        run("--codebook-size", "1025", "--steps", "1")


def test_a_damaged_config_is_one_sentence_when_resumed(run):
    folder = run("--steps", "2", "--no-compile")
    file = folder / "last/config.json"
    for name, value in dict(steps="4", valid_every=None, unknown=1).items():
        config = json.loads(file.read_text())
        config["train"][name] = value
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match="must be int|is damaged"):
            train.main(["--resume", str(folder)])


@pytest.mark.parametrize("metadata", [None, {}, dict(about="{}"), dict(about='{"step": "x"}')])
def test_a_trainer_without_its_step_is_one_sentence(run, metadata):
    folder = run("--steps", "2", "--no-compile")
    file = folder / "last/trainer.safetensors"
    save_file(load_file(file), file, metadata)
    with pytest.raises(ValueError, match="does not fit the run"):
        train.main(["--resume", str(folder)])


def test_captions_are_shuffled_between_clips_of_different_tracks(monkeypatch):
    """In the manifest, clips of one track are neighbours: their captions are nearly the same."""

    class Valid:
        rows = [dict(frames=17, caption=str(i // 10)) for i in range(200)]
        __len__ = lambda self: len(self.rows)
        codes = lambda self, i, start, length: np.zeros((1, length), int)

    texts = []

    def losses(lm, objective, codes, captions, seed):
        texts.extend(captions)
        return {"": torch.zeros(len(captions))}

    monkeypatch.setattr(train, "lm_losses", losses)
    read = SimpleNamespace(valid=Valid(), describe=lambda row, rng: row["caption"])
    config = TrainConfig(seconds=0.2, crop=0.2, compile=False, valid_clips=100, batch=100)
    objective = train.Objective(*tiny(), None, config)
    train.validate(objective.model, objective, read, config)
    Valid.rows, varied = [dict(frames=17, caption="music")] * 50, texts.copy()
    one = train.validate(objective.model, objective, read, config)
    assert {*one} == {"right", "empty"}, "there is nothing to shuffle"
    right, shuffled, empty = varied[:100], varied[100:200], varied[200:]
    assert len({*right}) > 15  # of all tracks, not of the first ten
    assert np.mean(np.array(right) == np.array(shuffled)) < 0.2 and not any(empty)


def test_a_checkpoint_says_what_it_is(run, data):
    (data / "manifest.jsonl").write_text(
        "".join(
            json.dumps(row | dict(licence="CC-BY-4.0" if i % 2 else "unknown")) + "\n"
            for i, row in enumerate(map(json.loads, open(data / "manifest.jsonl")))
        )
    )
    card = (run("--steps", "2", "--no-compile") / "best/README.md").read_text()
    assert "CC-BY-4.0 (" in card and "unknown (" in card and "Validation loss" in card
    command = re.search(r"^`python train.py (.*)`$", card, re.M)[1].split()
    saved = read_config(data.parent / "r/best")
    model, config, _, _ = train.parse_arguments(command)  # the same options again
    assert asdict(model) == saved["model"]
    ignored = dict(data="", out="")
    assert asdict(config) | ignored == saved["train"] | ignored


def test_a_checkpoint_of_the_hub_plays_and_is_tuned(tmp_path, data, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if name == "someone/model":
            return str(ROOT / "toy/lm")
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    out = tmp_path / "x.wav"
    sample.main(["a", "--checkpoint", "someone/model", "--seconds", "0.5", "--out", str(out)])
    assert out.exists() and set(asked) == {"someone/model"}
    options = ["--init-from", "someone/model", "--data", str(data), "--steps", "1"]
    train.main([*options, "--seconds", "0.4", "--crop", "0.4", "--out", str(tmp_path / "r")])
    with pytest.raises(ValueError, match="no checkpoint at else/where: neither a folder"):
        sample.main(["a", "--checkpoint", "else/where"])
