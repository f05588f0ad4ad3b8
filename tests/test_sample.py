"""Playing the shipped model: any length, any format, the same audio for the same seed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.axes import Axes

import sample
from audio import FRAME_RATE
from checkpoint import load_text_encoder
from live import follow
from options import entry
from paper.figures import Picture

ROOT = Path(__file__).parents[1]


def play(*args, cwd, binary=False):
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=not binary, cwd=cwd)


def test_words_in_music_out(tmp_path):
    done = play("jazz reggae", "--seconds", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["jazz-reggae.png", "jazz-reggae.wav"]
    audio, rate = soundfile.read(tmp_path / "jazz-reggae.wav")
    assert rate == 44100 and len(audio) == round(3 * 44100 / 512) * 512
    assert 0.02 < np.sqrt(np.mean(audio**2)) < 0.5 and np.abs(audio).max() <= 1
    assert "toy/lm" in done.stdout  # it says which checkpoint it plays


def test_the_second_stage_is_used_and_can_be_left_out(tmp_path):
    both = play("waltz", "--seconds", 1, "--out", "both.wav", cwd=tmp_path)
    first = play("waltz", "--seconds", 1, "--no-refiner", "--out", "first.wav", cwd=tmp_path)
    assert "refiner" in both.stdout and "refiner" not in first.stdout
    play("waltz", "--seconds", 1, "--steps", 2, "--out", "fast.wav", cwd=tmp_path)
    audio = [soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("both", "first", "fast")]
    assert len(audio[0]) == len(audio[1]) == len(audio[2])
    assert (audio[0] != audio[1]).any() and (audio[0] != audio[2]).any()


def test_the_same_command_gives_the_same_bytes(tmp_path):
    text = "\ufeffsad blues\n\nslow piano waltz\n"  # a byte-order mark is no part of a prompt
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    for out in ("a", "b"):
        options = ["--seconds", 2, "--seed", 7, "--out", out]
        done = play("--file", "prompts.txt", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "a").glob("*.wav"))
    assert names == ["sad-blues.wav", "slow-piano-waltz.wav"]
    first, again = ([(tmp_path / out / name).read_bytes() for name in names] for out in "ab")
    assert first == again and first[0] != first[1]


def test_every_job_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompts, more in ((["jazz", "Jazz!", "jazz 1"], []), (["a", "b"], ["--n", "2"])):
        args = sample.parse_arguments([*prompts, *more, "--out", "dup"])
        jobs = [(prompt, seed) for prompt in prompts for seed in range(args.n)]
        paths = sample.output_paths(args, jobs)
        assert len(set(paths)) == len(jobs)
    args = sample.parse_arguments(["a", "b", "--out", "x.flac"])
    assert [p.name for p in sample.output_paths(args, [("a", 0), ("b", 0)])] == [
        "x-0.flac", "x-1.flac",
    ]  # fmt: skip


def test_a_folder_of_another_program_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(["[]", '{"model": null}', '{"lr": 1}', "{", '{"model": {"a": 1}}']):
        folder = tmp_path / f"out/other{i}/best"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    assert sample.newest_checkpoint() == sample.SHIPPED
    assert sample.newest_checkpoint(refiner=True) == sample.SHIPPED_REFINER


def test_a_refiner_is_heard_with_a_model_that_it_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, codec, codebooks in (("a", "toy", 1), ("b", "toy", 9), ("c", "dac", 1)):
        config = dict(model=dict(codebooks=codebooks), codec=codec, train={})
        (tmp_path / f"out/{name}/best").mkdir(parents=True)
        (tmp_path / f"out/{name}/best/config.json").write_text(json.dumps(config))
    assert sample.newest_checkpoint(codec="toy") == Path("out/a/best")
    assert sample.newest_checkpoint(codec="dac") == Path("out/c/best")
    assert sample.newest_checkpoint(codec="other") == sample.SHIPPED
    for i, (name, codec) in enumerate((("d", "dac"), ("e", "toy"))):
        config = dict(model=dict(backbone="ssd", codebooks=9), codec=codec, train={})
        (tmp_path / f"out/{name}/best").mkdir(parents=True)
        (tmp_path / f"out/{name}/best/config.json").write_text(json.dumps(config))
        os.utime(tmp_path / f"out/{name}/best", (i, i))
    lm = SimpleNamespace(config=SimpleNamespace(codebooks=1))
    for codec, refiner in dict(dac="d", toy="e").items():
        found = sample.find_refiner(lm, SimpleNamespace(name=codec))
        assert found == Path(f"out/{refiner}/best"), "the newest that fits, not the newest"


def test_prompts_that_are_no_text_do_not_end_the_music(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr("sys.stdin", open(read, encoding="ascii"))
    latest = follow.read_wishes("jazz")
    for line, expected in ((b"\xff\xfe house\n\n", "\ufffd\ufffd house"), (b"techno\n", "techno")):
        assert latest[0] != expected
        os.write(write, line)
        for _ in range(500):
            if latest[0] == expected:
                break
            time.sleep(0.01)
        assert latest[0] == expected
        assert load_text_encoder(sample.SHIPPED)(latest)[0].isfinite().all()
    os.close(write)


@pytest.mark.parametrize("codebooks", [1, 9])
def test_a_language_model_without_a_refiner_continues_audio(tmp_path, codebooks, monkeypatch):
    from test_model import tiny

    from checkpoint import save_checkpoint

    monkeypatch.chdir(tmp_path)
    lm, encoder = tiny(codebooks=codebooks, codebook_size=1024)
    save_checkpoint(tmp_path / "run", lm, encoder, dict(codec="toy"))
    soundfile.write("a.wav", 0.1 * np.random.default_rng(0).standard_normal(44100), 44100)
    options = ["--no-refiner", "--checkpoint", "run", "--seconds", "0.5", "--out", "b.wav"]
    given, real = [], sample.generate
    keep = lambda *parts, **options: given.append(options) or real(*parts, **options)
    monkeypatch.setattr(sample, "generate", keep)
    sample.main(["jazz", "--continue", "a.wav", *options])
    # It reads as much as it was trained on, and the metronome counts all of it.
    assert given[0]["codes"].shape == (1, codebooks, min(lm.config.trained_frames, 87))
    assert given[0]["before"] == 87
    assert len(soundfile.read("b.wav")[0]) == 512 * (-(-44100 // 512) + round(0.5 * 44100 / 512))


def test_help_shows_the_defaults_that_act(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without runs in out/
    with pytest.raises(SystemExit, match="0"):
        sample.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    stored = sample.read_config(sample.SHIPPED)["sampling"]
    assert f"not amplified [{stored['guidance']}]" in text


def test_the_steps_are_those_that_the_refiner_which_plays_was_stored_with(tmp_path, monkeypatch):
    """And not those of a newer refiner, which is of another codec."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out/newer/best"
    folder.mkdir(parents=True)
    about = dict(model=dict(backbone="ssd"), train={}, codec="dac", sampling=dict(steps=99))
    (folder / "config.json").write_text(json.dumps(about))
    asked, real = [], sample.refine
    keep = lambda *parts, **options: asked.append(options["steps"]) or real(*parts, **options)
    monkeypatch.setattr(sample, "refine", keep)
    for more in ([], ["--steps", "3"]):
        sample.main(["jazz", "--seconds", "0.1", "--out", "x.wav", *more])
    assert asked == [sample.read_config(sample.SHIPPED_REFINER)["sampling"]["steps"], 3]


def test_n_samples_are_those_of_n_seeds_and_formats_follow_the_extension(tmp_path):
    assert play("jazz", "--n", 2, "--seconds", 1, "--out", "x.flac", cwd=tmp_path).returncode == 0
    assert (
        play("jazz", "--seed", 1, "--seconds", 1, "--out", "y.flac", cwd=tmp_path).returncode == 0
    )
    a, b, c = (soundfile.read(tmp_path / n)[0] for n in ("x-0.flac", "x-1.flac", "y.flac"))
    assert (b == c).all() and (a != b).any()
    assert play("jazz", "--seconds", 1, "--out", "z.ogg", cwd=tmp_path).returncode == 0
    assert soundfile.info(tmp_path / "z.ogg").format == "OGG"


def test_a_continuation_begins_with_what_it_continues(tmp_path):
    play("techno", "--seconds", 3, "--out", "a.wav", cwd=tmp_path)
    done = play("techno", "--continue", "a.wav", "--seconds", 2, "--out", "b.wav", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = (soundfile.read(tmp_path / f)[0] for f in ("a.wav", "b.wav"))
    assert len(b) == len(a) + round(2 * 44100 / 512) * 512
    loudness = lambda x: np.log(
        np.square(x[: len(x) // 4096 * 4096]).reshape(-1, 4096).mean(1) + 1e-6
    )
    assert np.corrcoef(loudness(a)[:-2], loudness(b[: len(a)])[:-2])[0, 1] > 0.8


def test_streaming_gives_the_audio_of_the_file(tmp_path):
    play("house", "--seconds", 3, "--out", "a.wav", cwd=tmp_path)
    done = play("house", "--seconds", 3, "--stream", cwd=tmp_path, binary=True)
    streamed = np.frombuffer(done.stdout, "<i2") / 32768
    written = soundfile.read(tmp_path / "a.wav")[0]
    assert len(streamed) == len(written)
    assert np.abs(streamed - written).max() < 1e-3


@pytest.mark.parametrize(
    "options, sentence",
    [
        ([], "say what to play"),
        (["   "], "say what to play"),
        (["jazz", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["jazz", "--checkpoint", "model.ckpt"], "no checkpoint at model.ckpt"),
        (["jazz", "--out", "x.mp4"], "must be one of"),
        (["jazz", "blues", "--out", "x.mp4"], "must be one of"),
        (["jazz", "--seconds", "0"], "--seconds must be in (0, 1000000], not 0.0"),
        (["jazz", "--seconds", "inf"], "--seconds must be in (0, 1000000], not inf"),
        (["jazz", "--temperature", "0"], "--temperature must be in [0.01, 100], not 0.0"),
        (["jazz", "--continue", "text.wav"], "not readable audio"),
        (["jazz", "--continue", "none.wav"], "No such file"),
        (["--file", "none.txt"], "could not be read"),
        (["jazz", "--steps", "101"], "--steps must be in [1, 100], not 101"),
        (["jazz", "--temperature", "1e-39"], "--temperature must be in"),
        (["jazz", "--guidance", "1e38"], "--guidance must be in"),
        (["jazz", "--top-k", "0"], "--top-k must be in"),
        (["jazz", "--seed", str(2**64)], "--seed must be in"),
        (["jazz", "--sec", "1"], "unrecognized arguments: --sec"),
        (["jazz", "blues", "--stream"], "--stream and --play take one prompt"),
        (["jazz", "--n", "2", "--play"], "--stream and --play take one prompt"),
        (["jazz", "--stream", "--out", "x.wav"], "--stream and --play take one prompt"),
        (["\udcff"], "not valid UTF-8"),
        (["jazz", "--refiner", "nowhere"], "no checkpoint at nowhere"),
        (["jazz", "--refiner", str(sample.SHIPPED)], "holds no refiner"),
        (["jazz", "--checkpoint", str(sample.SHIPPED_REFINER)], "it goes with --refiner"),
        (["jazz", "--no-refiner", "--steps", "3"], "--steps is for a refiner"),
        (["jazz", "--no-refiner", "--refiner", "x"], "do not go together"),
        (["jazz", "--continue", "jazz.wav"], "would be replaced by its continuation"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, options, sentence, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "jazz.wav").write_text("no audio")
    (tmp_path / "model.ckpt").write_bytes(b"not a checkpoint")
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        entry(lambda: sample.main(options))
    assert sentence in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_a_prompt_may_look_like_a_formula_in_the_picture(tmp_path):
    """Or name letters that no font has, or be long."""
    prompt = "cash $_$ money \u4e2d\u6587 " + "and more " * 12
    done = play(prompt, "--seconds", 1, "--out", "x.wav", cwd=tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert (tmp_path / "x.png").exists()


def test_a_player_that_fails_is_told(tmp_path, monkeypatch):
    (tmp_path / "aplay").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "aplay").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for seconds in (0.01, 60):  # it ends after, or before, all is written
        with pytest.raises(ValueError, match="aplay could not play it"):
            follow.play([torch.zeros(int(44100 * seconds))], 44100, False)


def test_the_picture_shows_seconds(tmp_path, monkeypatch):
    shown = []
    show = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, *a, **b: shown.append(b["extent"]) or show(self, *a, **b)
    )
    picture = Picture(44100 * 3)
    list(picture.watch(torch.randn(3, 44100)))
    picture.save(tmp_path / "x.png", "noise", 44100)
    assert shown == [(0, pytest.approx(3, abs=0.05), 0, 128)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_both_stages_play_on_a_gpu(tmp_path):
    done = play("jazz", "--seconds", 4, "--out", "x.wav", cwd=tmp_path)
    assert done.returncode == 0 and "refiner" in done.stdout, done.stderr


def test_a_prompt_longer_than_the_encoder_takes_is_cut_with_a_word(tmp_path):
    done = play("jazz " * 500, "--seconds", 1, "--out", "x.wav", cwd=tmp_path)
    assert done.returncode == 0 and "a prompt is cut to 128 tokens" in done.stdout


def test_memory_does_not_grow_with_length(tmp_path):
    """Peak memory of a child process: half a minute against eleven seconds, which fill a window."""
    peaks = []
    for seconds in (11, 30):
        command = [sys.executable, str(ROOT / "sample.py"), "jazz", "--out", "x.wav"]
        script = (
            "import resource, subprocess, sys;"
            f"subprocess.run({[*command, '--seconds', str(seconds)]!r}, check=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] <= 1.05 * peaks[0]


@pytest.mark.parametrize("codebooks", [1, 3])
@pytest.mark.parametrize("variant", ["simba", "cross-simba", "transformer"])
@torch.no_grad()
def test_long_music_reads_its_text_again(variant, codebooks, monkeypatch):
    """Against the obvious way: before every column, a whole forward pass over all that counts."""
    from test_model import tiny

    asked = []

    def faithful(lm, text, recent, opening, past, began):  # tested below
        asked.append((past, began, opening.shape[2]))
        return recent

    monkeypatch.setattr(sample, "faithful", faithful)
    lm, encoder = tiny(variant=variant, codebooks=codebooks, clock="beat", trained_frames=50)
    lm.beat_proj.weight.data.normal_()  # it starts at zero
    lm, encoder = lm.double(), encoder.double()
    prompts, seeds, frames, given = ["jazz at 120 bpm", "a waltz"], [3, 4], 90, 10
    codes = torch.randint(0, lm.config.codebook_size, (2, codebooks, given))
    options = dict(guidance=2.0, temperature=1.0, top_k=20)
    blocks = sample.generate(lm, encoder, prompts, frames, seeds, codes=codes, **options, block=8)
    found = torch.cat([*blocks], 2)

    text, mask, tempo = encoder([*prompts, "", ""])
    columns = lm.delay(codes)  # with the begin token
    known = columns[:, :, given + 1 :]
    columns = columns[:, :, : given + 1]
    uniform = [torch.Generator().manual_seed(seed) for seed in seeds]
    length = given  # frames since the last reading
    for s in range(frames + codebooks - 1):
        if length == 48:  # not the last frames of a clip
            length = 15
        past = given + s - length
        recent = sample.undelay(columns[:, :, columns.shape[2] - length :])
        recent = lm.delay(recent)[:, :, : length + 1].repeat(2, 1, 1)
        h, _ = lm.read(recent, text, mask, tempo, past=past)
        logits = sample.guided(lm.logits(h[:, -1]), 2.0)
        if s % 8 == 0:
            draws = torch.stack([torch.rand(8, codebooks, generator=g) for g in uniform])
        column = sample.sample_tokens(logits, draws[:, s % 8], 1.0, 20)
        if s < codebooks - 1:
            column[:, s + 1 :] = known[:, s + 1 :, s]
        columns = torch.cat([columns, column[..., None]], 2)
        length += 1
    assert (sample.undelay(columns)[:, :, given + 1 :][..., :frames] == found).all()
    assert asked == [(33, 0, 48), (66, 0, 48)]


@torch.no_grad()
def test_music_that_has_drifted_from_its_text_hears_its_opening():
    from test_model import tiny

    lm, encoder = tiny(clock="beat", trained_frames=300)
    lm.beat_proj.weight.data.normal_()
    lm, encoder = lm.double(), encoder.double()
    prompts, past, began, T = ["jazz at 120 bpm", "a waltz", "techno, 131.5 bpm"] * 4, 777, 30, 40
    rng = torch.Generator().manual_seed(0)
    recent, opening = (
        torch.randint(0, lm.config.codebook_size, (12, 1, L), generator=rng) for L in (T, 250)
    )
    text = encoder([*prompts, *[""] * 12])
    heard = sample.faithful(lm, text, recent, opening, past, began)

    def owed(i, codes):
        nats = []
        for half in (i, 12 + i):
            h, _ = lm.read(lm.delay(codes)[..., :T], *(v[half : half + 1] for v in text), past=past)
            p = lm.heads[0](h)[0].log_softmax(-1)
            nats.append(sum(p[t, code] for t, code in enumerate(codes[0, 0])) / T)
        return nats[0] - nats[1]

    expected = []
    for i in range(12):
        bpm = (120, None, 131.5)[i % 3]
        start = int((past - began) % (240 * FRAME_RATE / bpm)) if bpm else 0
        part = opening[i : i + 1, :, start : start + T]
        drifted = owed(i, recent[i : i + 1]) < 0.8 * owed(i, part)
        part = torch.cat([part[..., :-8], recent[i : i + 1, :, -8:]], 2)
        expected.append(part if drifted else recent[i : i + 1])
    assert torch.equal(heard, torch.cat(expected))
    same = [torch.equal(a, b) for a, b in zip(heard, recent)]
    assert 0 < sum(same) < 12
