"""Data folders: what goes in comes out, batches repeat, and bad files are named, not fatal."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import curate
import data
from audio import audio_blocks, lock_folder, read_audio
from curate import Options, Writer
from data import Clips
from paper import captions, sources

CODEC = SimpleNamespace(name="toy", codebooks=9, codebook_size=1024, sample_rate=44100, hop=512)
ROOT = Path(__file__).parents[1]


def some_clips(n, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        codes = rng.integers(1024, size=(9 if i % 2 else 1, 40 + i))
        yield codes, dict(split="valid" if i % 5 == 0 else "train", caption=f"clip {i}")


def describe(row, rng):
    return row["caption"]


def test_clips_come_back_as_written_over_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "SHARD_BYTES", 2000)
    written = list(some_clips(20))
    for part in (written[:7], written[7:]):  # the second writer goes on where the first ended
        Writer(tmp_path, CODEC).add(part)
    assert len(list(tmp_path.glob("codes-*.bin"))) > 2
    for split in ("train", "valid"):
        clips = Clips(tmp_path, split, codebooks=1)
        expected = [(c, r) for c, r in written if r["split"] == split]
        assert len(clips) == len(expected)
        for i, (codes, row) in enumerate(expected):
            assert clips.rows[i]["caption"] == row["caption"]
            assert (clips.codes(i) == codes[:1]).all()
            assert (clips.codes(i, 5, 10) == codes[:1, 5:15]).all()
    assert clips.meta["frame_rate"] == pytest.approx(86.13, abs=0.01)
    full = Clips(tmp_path, "train", codebooks=9)
    assert [r["caption"] for r in full.rows] == [
        r["caption"] for c, r in written if r["split"] == "train" and len(c) == 9
    ]


def test_a_clip_that_was_being_written_when_the_process_died_is_gone(tmp_path):
    written = list(some_clips(6))
    Writer(tmp_path, CODEC).add(written[:4])
    with open(tmp_path / "manifest.jsonl", "a") as file:
        file.write('{"shard": 0, "off')
    with open(tmp_path / "codes-00000.bin", "ab") as file:
        file.write(b"half a clip")
    Writer(tmp_path, CODEC).add(written[4:])
    clips = Clips(tmp_path, "train")
    assert [r["caption"] for r in clips.rows] == [f"clip {i}" for i in range(1, 5)]
    assert (clips.codes(3) == written[4][0][:1]).all()


def test_batches_are_a_function_of_seed_and_sample_number(tmp_path):
    Writer(tmp_path, CODEC).add(some_clips(20))
    clips = Clips(tmp_path, "train")
    codes, captions = clips.batch(0, 40, 32, 1, describe)
    assert codes.shape == (40, 1, 32)
    assert sorted(captions[:16]) == sorted(r["caption"] for r in clips.rows)  # an epoch: each once
    assert captions[:16] != captions[16:32]
    halves = [clips.batch(first, 20, 32, 1, describe) for first in (0, 20)]
    assert (np.concatenate([c.numpy() for c, _ in halves]) == codes.numpy()).all()
    other, _ = clips.batch(0, 40, 32, 2, describe)
    assert (other != codes).any()


def test_a_crop_is_the_beginning_of_a_window_of_its_clip(tmp_path):
    Writer(tmp_path, CODEC).add(some_clips(20))
    clips = Clips(tmp_path, "train")

    def starts(window):
        codes, captions = clips.batch(0, 40, 8, 1, describe, window=window)
        names = [row["caption"] for row in clips.rows]
        for crop, caption in zip(codes.numpy(), captions):
            clip = clips.codes(names.index(caption))
            yield next(s for s in range(60) if (clip[:, s : s + 8] == crop).all())

    assert set(starts(window=100)) == {0}
    assert max(starts(window=50)) < 10 < max(starts(window=0)), "anywhere in the clip"


def test_short_clips_are_padded_with_the_special_token(tmp_path):
    Writer(tmp_path, CODEC).add(some_clips(2))
    codes, _ = Clips(tmp_path, "train").batch(0, 1, 100, 0, describe)
    assert (codes[0, :, 41:] == 1024).all() and (codes[0, :, :41] < 1024).all()


def test_captions_are_dropped_at_the_rate_asked(tmp_path):
    Writer(tmp_path, CODEC).add(some_clips(20))
    _, captions = Clips(tmp_path, "train").batch(0, 4000, 4, 0, describe, caption_dropout=0.1)
    assert captions.count("") / 4000 == pytest.approx(0.1, abs=0.015)


def test_bad_folders_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no data at"):
        Clips(tmp_path / "none", "train")
    Writer(tmp_path, CODEC).add(some_clips(3))
    with pytest.raises(ValueError, match="made by the codec 'toy'"):
        Clips(tmp_path, "train", codec="dac")
    with pytest.raises(ValueError, match="no test clips"):
        Clips(tmp_path, "test")
    with pytest.raises(ValueError, match="begun with another codec"):
        Writer(tmp_path, SimpleNamespace(**{**vars(CODEC), "name": "dac"}))
    (tmp_path / "manifest.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="broken"):
        Clips(tmp_path, "train")


# ----------------------------------------------------------------------- from audio to clips ----


def tone(seconds, rate=44100, pitch=440.0):
    return 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def write_song(path, audio, rate=44100, caption="a tone", **format):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # soundfile itself takes no names that are not text
        soundfile.write(file, audio, rate, **{"format": "WAV", **format})
    if caption is not None:
        path.with_suffix(".txt").write_bytes(
            caption if isinstance(caption, bytes) else caption.encode()
        )


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FINISHED = {
    ".lock", "codes-00000.bin", "manifest.jsonl", "meta.json", "plan.json",
    "skipped.jsonl", "summary.json", "tracks",
}  # fmt: skip


@pytest.fixture(scope="module")
def torture(tmp_path_factory):
    """A folder with everything that people's music folders hold; -> the folder, {bad: reason}."""
    music = tmp_path_factory.mktemp("music")
    two = tone(2)
    write_song(music / "plain.wav", two)
    write_song(music / "deep/two words.flac", np.stack([two, two], 1), 48000, format="FLAC")
    write_song(music / "quo\"te's $HOME.wav", two)
    write_song(music / "new\nline.wav", two)
    write_song(Path(os.fsdecode(os.fsencode(music) + b"/caf\xe9.wav")), two)
    write_song(music / "ünï.ogg", two, format="OGG")
    write_song(music / "song.mp3", two, format="MP3")
    write_song(music / "CAPITAL.WAV", two)
    write_song(music / "8-bit.wav", two, subtype="PCM_U8")
    write_song(music / "5.1.wav", np.stack([two] * 6, 1))
    write_song(music / "192k.wav", tone(2, 192000), 192000, subtype="FLOAT")
    write_song(music / "flac in truth.wav", two, format="FLAC")
    write_song(music / "beyond full scale.wav", 9 * two, subtype="FLOAT")
    write_song(music / "a long one.wav", tone(40, 8000), 8000)
    write_song(music / "bom.wav", two, caption=b"\xef\xbb\xbfa tone")
    whole = (music / "deep/two words.flac").read_bytes()
    (music / "cut.flac").write_bytes(whole[: 3 * len(whole) // 4])  # what is there is read
    (music / "cut.txt").write_text("a tone, cut off")
    (music / "link.wav").symlink_to(music / "plain.wav")
    (music / "link.txt").write_text("a tone")
    (music / "deep/up").symlink_to(music)  # a loop of folders
    (music / "folder.wav").mkdir()
    good = 17

    bad = {}
    for name, audio, reason in [
        ("silent.wav", 0 * two, "is silent"),
        ("empty.wav", two[:0], "holds no samples"),
        ("one sample.wav", two[1:2], "is shorter than a second"),
        (
            "nan.wav",
            np.where(np.arange(len(two)) == 9, np.nan, two),
            "samples that are not numbers",
        ),
        ("nan at the end.wav", np.r_[tone(9), np.nan], "samples that are not numbers"),
        ("infinite.wav", np.r_[two, np.inf], "samples that are not numbers"),
    ]:
        write_song(music / name, audio, subtype="FLOAT")
        bad[name] = reason
    for name, caption, reason in [
        ("latin.wav", "caf\xe9".encode("latin-1"), "has a caption that is not UTF-8 text"),
    ]:
        write_song(music / name, two, caption=caption)
        bad[name] = reason
    noise = np.random.default_rng(0).bytes(5000)
    for name, content, reason in [
        ("text.mp3", b"This is no music.", "is not readable audio"),
        ("zero.wav", b"", "is not readable audio"),
        ("noise.ogg", noise, "is not readable audio"),
        ("corrupt.flac", b"fLaC" + noise, "is not readable audio"),
        ("cut.wav", (music / "plain.wav").read_bytes()[:30], "is not readable audio"),
        ("no rate.wav", _with_rate(music / "plain.wav", 0), "is not readable audio"),
        (
            "mad rate.wav",
            _with_rate(music / "plain.wav", 2**31 - 1),
            "claims a sample rate of 2147483647 Hz",
        ),
        ("video.m4a", noise, "is not readable audio"),
    ]:
        (music / name).write_bytes(content)
        (music / name).with_suffix(".txt").write_text("a caption")
        bad[name] = reason
    (music / "loop.wav").symlink_to(music / "loop.wav")
    (music / "dangling.wav").symlink_to(music / "nowhere")
    os.mkfifo(music / "pipe.wav")  # reading it would wait for ever
    bad |= dict.fromkeys(
        ["loop.wav", "dangling.wav", "pipe.wav"], "broken or circular link, or no file"
    )
    if os.geteuid():
        write_song(music / "unreadable.wav", two)
        (music / "unreadable.wav").chmod(0)
    else:  # root reads all but this
        (music / "unreadable.wav").symlink_to("/proc/self/mem")
        (music / "unreadable.txt").write_text("a caption")
    bad["unreadable.wav"] = "is not readable audio"
    return music, good, bad


def _with_rate(path, rate):
    header = bytearray(path.read_bytes())
    header[24:28] = rate.to_bytes(4, "little")
    return bytes(header)


def test_a_torture_folder_keeps_what_is_good_and_names_what_is_bad(torture, tmp_path):
    music, good, bad = torture
    before = sorted(os.walk(music))
    data.main(
        ["folder", str(music), "--out", str(tmp_path / "data"), "--seconds", "2", "--valid", "0.3"]
    )
    assert {p.name for p in (tmp_path / "data").iterdir()} == FINISHED
    assert sorted(os.walk(music)) == before and good + len(bad) >= 25
    skipped = {
        os.path.basename(s["path"]): s["reason"] for s in lines(tmp_path / "data/skipped.jsonl")
    }
    assert skipped.keys() == bad.keys()
    for name, reason in bad.items():
        told = skipped[name]
        assert reason in told and "\n" not in told and str(music) not in told
    rows = lines(tmp_path / "data/manifest.jsonl")
    assert len({row["path"] for row in rows}) == good
    assert all(os.path.isfile(row["path"]) for row in rows), "names come back, whatever their bytes"
    assert all(row["licence"] == "unknown" and row["source"] == "folder" for row in rows)
    long = [row["start"] for row in rows if row["track"] == "a long one.wav"]
    assert len(long) == 20 and np.allclose(np.diff(long), 172 * 512 / 44100)
    train, valid = (Clips(tmp_path / "data", split, 9, "toy") for split in ("train", "valid"))
    assert len(train) + len(valid) == len(rows) and train.meta["codebooks"] == 9
    tracks = [{row["track"] for row in clips.rows} for clips in (train, valid)]
    assert not tracks[0] & tracks[1], "a track is on one side"


def encode(path, audio, codec):
    """Writes audio (S,) by FFmpeg's encoders, which soundfile does not have."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100, layout="mono")
        size = stream.codec_context.frame_size or 1024
        for start in range(0, len(audio), size):
            piece = np.ascontiguousarray(audio[None, start : start + size], dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(piece, "fltp", "mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("name, codec", [("song.m4a", "aac"), ("song.opus", "libopus")])
def test_formats_that_libsndfile_does_not_write_are_read(tmp_path, name, codec):
    if codec == "libopus":
        pytest.importorskip("av")
        soundfile.write(tmp_path / name, tone(2), 48000, format="OGG", subtype="OPUS")
        seconds = 2 * 44100 / 48000
    else:
        encode(tmp_path / name, tone(2), codec)
        seconds = 2
    heard = read_audio(tmp_path / name)[0]
    assert len(heard) / 44100 == pytest.approx(seconds, abs=0.06)
    assert heard.square().mean().sqrt() == pytest.approx(np.sqrt(np.mean(tone(2) ** 2)), rel=0.05)


def test_a_cut_mp3_is_what_is_left_of_it_the_same_every_time(tmp_path):
    """libsndfile reads on to the announced length, with repeated or uninitialised samples."""
    soundfile.write(tmp_path / "whole.mp3", tone(20), 44100)
    whole = (tmp_path / "whole.mp3").read_bytes()
    for name, share in (("half.mp3", 0.5), ("short.mp3", 0.1)):
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        heard = read_audio(tmp_path / name)[0]
        assert len(heard) / 44100 == pytest.approx(20 * share, abs=0.3)
        assert (heard == read_audio(tmp_path / name)[0]).all()
        assert heard[-2000:].abs().max() > 0.1 * heard.abs().max()


def test_an_mp3_without_a_length_in_its_header_is_read_to_its_end(tmp_path):
    """A variable bit rate without a Xing header: a reader that estimates the length is wrong."""
    quiet = np.concatenate([tone(10) * 1e-3, np.random.default_rng(0).normal(0, 0.1, 441000)])
    soundfile.write(tmp_path / "a.mp3", quiet, 44100, bitrate_mode="VARIABLE")
    data = (tmp_path / "a.mp3").read_bytes()
    at = max(data.find(b"Xing"), data.find(b"Info"))
    assert at > 0
    (tmp_path / "b.mp3").write_bytes(data[:at] + b"    " + data[at + 4 :])
    assert len(read_audio(tmp_path / "b.mp3")[0]) / 44100 == pytest.approx(20, abs=0.2)


@pytest.mark.parametrize("rate", [8000, 44100, 48000, 192000])
def test_blocks_are_the_samples_of_the_whole(rate, tmp_path):
    import soxr

    audio = np.random.default_rng(rate).uniform(-1, 1, size=(3 * rate + 17, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", audio, rate, "FLOAT")
    whole = soxr.resample(audio.mean(1), rate, 44100)
    assert np.abs(np.concatenate(list(audio_blocks(tmp_path / "a.wav"))) - whole).max() < 1e-6


def test_memory_does_not_grow_with_a_file(tmp_path):
    """Ten minutes, in FLAC at 48 kHz, made and read by blocks: less than 60 MB of them are held."""
    import tracemalloc

    with soundfile.SoundFile(tmp_path / "long.flac", "w", 48000, 2) as file:
        for _ in range(60):
            file.write(np.stack([tone(10, 48000)] * 2, 1))
    tracemalloc.start()
    seconds = sum(
        audio.shape[1] for _, audio in curate.clips_of(tmp_path / "long.flac", 30 * 44100)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds == 600 * 44100 and peak < 60e6  # the whole would be 106 MB, four times over


# ------------------------------------------------------------- killed, divided, gone on with ----


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Eight songs, two of them bad; -> their folder, the command, an undisturbed result."""
    music, out = tmp_path_factory.mktemp("songs"), tmp_path_factory.mktemp("whole") / "data"
    for i in range(8):
        write_song(music / f"{i}.wav", tone(1.2 + 0.4 * i, pitch=200 + 30 * i), caption=f"tune {i}")
    (music / "3.wav").write_text("no music")
    write_song(music / "7.wav", 0 * tone(3))
    command = ["folder", str(music), "--seconds", "2", "--valid", "0.3", "--out"]
    data.main([*command, str(out)])
    return music, command, contents(out)


def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "data.py"), *map(str, command)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Killed(BaseException):
    pass


def killed_at(monkeypatch, point, command):
    """Runs a command whose renaming number `point` fails as if the process was killed; -> whether
    it came so far."""
    replace, left = os.replace, [point]

    def until_killed(a, b):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_killed)
        try:
            data.main(command)
        except Killed:
            return True
    return False


def test_killed_wherever_a_file_appears_and_begun_again_the_result_is_the_same(
    songs, tmp_path, monkeypatch
):
    _, command, whole = songs
    for point in itertools.count():
        out = tmp_path / str(point)
        if not killed_at(monkeypatch, point, [*command, str(out)]):
            break
        assert not (out / "manifest.jsonl").exists(), "the manifest comes last"
        if point % 4 == 0:
            data.main([*command, str(out)])
            assert contents(out) == whole
    assert point > 12 and contents(out) == whole


def test_kill_9_at_a_random_moment_with_two_workers(songs, tmp_path):
    _, command, whole = songs
    run = start(*command, tmp_path / "data", "--workers", 2)
    wait_until(lambda: any((tmp_path / "data/tracks").glob("*.npz")) or run.poll() is not None)
    time.sleep(np.random.default_rng().uniform(0, 0.3))
    run.kill()
    run.communicate()
    run = start(*command, tmp_path / "data", "--workers", 2)
    assert run.wait() == 0, run.stderr.read()
    assert contents(tmp_path / "data") == whole


def test_killed_while_a_finished_folder_is_built_again_no_code_is_wrong(
    songs, tmp_path, monkeypatch
):
    _, command, whole = songs
    out = tmp_path / "d"
    data.main([*command, str(out)])
    for point in itertools.count():
        next((out / "tracks").glob("*.npz")).unlink()  # as if that song was new
        if not killed_at(monkeypatch, point, [*command, str(out)]):
            break
        if (out / "manifest.jsonl").exists():
            for name in ("manifest.jsonl", "codes-00000.bin"):
                assert (out / name).read_bytes() == whole[name]
    assert point > 7 and contents(out) == whole


def test_music_that_was_added_is_added_and_the_rest_stays(songs, tmp_path, monkeypatch):
    music, command, whole = songs
    copy, out = tmp_path / "music", str(tmp_path / "data")
    shutil.copytree(music, copy)
    command = [command[0], str(copy), *command[2:], out]
    (copy / "5.wav").rename(tmp_path / "5.wav")
    data.main(command)
    before = contents(tmp_path / "data")
    made = []
    real = curate.make_track
    monkeypatch.setattr(
        curate, "make_track", lambda track, *a: made.append(track["track"]) or real(track, *a)
    )
    data.main(command)
    assert made == ["3.wav", "7.wav"], "what gave nothing is tried again"
    assert contents(tmp_path / "data") == before
    (tmp_path / "5.wav").rename(copy / "5.wav")
    (copy / "2.txt").write_text("another caption")
    write_song(copy / "3.wav", tone(1.5), caption="now it is music")
    data.main(command)
    assert made[2:] == ["3.wav", "5.wav", "7.wav"], "a caption costs no encoding"
    rows = {row["track"]: row for row in lines(tmp_path / "data/manifest.jsonl")}
    assert rows["2.wav"]["caption"] == "another caption" and "3.wav" in rows
    assert {p.name for p in (tmp_path / "data").iterdir()} == FINISHED
    (copy / "2.txt").write_text("tune 2")
    (copy / "3.wav").write_text("no music")
    data.main(command)
    assert (tmp_path / "data/codes-00000.bin").read_bytes() == whole["codes-00000.bin"]
    for row, old in zip(
        lines(tmp_path / "data/manifest.jsonl"), whole["manifest.jsonl"].splitlines(), strict=True
    ):
        assert row | {"path": ""} == json.loads(old) | {"path": ""}
    assert len(list((tmp_path / "data/tracks").iterdir())) == 6, "and no more than is used"


def test_another_command_does_not_spoil_a_folder(songs, tmp_path):
    _, command, _ = songs
    data.main([*command, str(tmp_path / "d")])
    before = contents(tmp_path / "d")
    with pytest.raises(ValueError, match="was made with --seconds 2.0, not 3.0: choose another"):
        data.main([*command, str(tmp_path / "d"), "--seconds", "3"])
    Writer(tmp_path / "other", CODEC).add(some_clips(3))
    with pytest.raises(ValueError, match="files that this command did not make"):
        data.main([*command, str(tmp_path / "other")])
    assert contents(tmp_path / "d") == before
    data.main([*command, str(tmp_path / "d"), "--valid", "0"])
    assert {row["split"] for row in lines(tmp_path / "d/manifest.jsonl")} == {"train"}


def test_a_start_that_failed_does_not_lock_the_folder(songs, tmp_path, monkeypatch):
    _, command, whole = songs
    monkeypatch.setitem(sys.modules, "demucs", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install demucs"):
        data.main([*command, str(tmp_path / "d"), "--no-keep-vocals"])
    data.main([*command, str(tmp_path / "d")])
    assert contents(tmp_path / "d") == whole


def test_a_full_disk_is_told_before_anything_is_written(songs, tmp_path, monkeypatch):
    _, command, _ = songs
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="needs about 0 MB of disk; 0 MB are free"):
        data.main([*command, str(tmp_path / "d")])
    assert not (tmp_path / "d").exists()


def test_the_hours_announced_are_those_of_the_files(tmp_path, capsys):
    write_song(tmp_path / "music/a.wav", np.stack([tone(90)] * 2, 1), format="FLAC")
    write_song(tmp_path / "music/b.wav", tone(90, 8000), 8000, subtype="PCM_U8")
    data.main(["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d")])
    assert "2 usable files; 0.05 hours to encode" in capsys.readouterr().out


def test_two_processes_do_not_work_on_one_folder(songs, tmp_path):
    _, command, _ = songs
    lock = lock_folder(tmp_path / "d")
    with pytest.raises(ValueError, match="another process is writing to"):
        data.main([*command, str(tmp_path / "d")])
    lock.close()
    data.main([*command, str(tmp_path / "d")])


def children(process):
    """The worker processes of a command: {pid}"""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and b"spawn_main" in (stat.parent / "cmdline").read_bytes():
                found.add(int(stat.parent.name))
        except OSError:  # it has just ended
            pass
    return found


def wait_until(true, seconds=60):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "too late"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "ended, by, code", [("worker", "KILL", 2), ("command", "INT", 130), ("command", "KILL", -9)]
)
def test_however_it_ends_no_worker_is_left(tmp_path, ended, by, code):
    """A worker that dies is one sentence; Ctrl-C ends quickly."""
    write_song(tmp_path / "music/a short.wav", tone(2))
    for i in range(2):
        long = np.tile(tone(1, 8000), 3600)
        write_song(tmp_path / f"music/long {i}.wav", long, 8000, subtype="PCM_U8")
    run = start("folder", tmp_path / "music", "--out", tmp_path / "d", "--workers", 2)
    made = lambda: any((tmp_path / "d/tracks").glob("*.npz"))  # the short one: now both work
    wait_until(lambda: made() and len(children(run)) == 2 or run.poll() is not None)
    workers = children(run)
    os.kill(min(workers) if ended == "worker" else run.pid, getattr(signal, f"SIG{by}"))
    _, err = run.communicate(timeout=20)
    assert run.returncode == code, err
    assert "Traceback" not in err
    if ended == "worker":
        assert "a worker died (out of memory?): repeat the command" in err
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)


def test_one_clip_a_track_is_drawn_by_seed(songs, tmp_path):
    _, command, _ = songs
    command = [*command[:-1], "--seconds", "1", "--out"]
    drawn = []
    for seed in (0, 0, 1):
        out = tmp_path / str(len(drawn))
        data.main([*command, str(out), "--one-clip", "--seed", str(seed)])
        rows = lines(out / "manifest.jsonl")
        drawn.append({row["path"]: row["start"] for row in rows})
        assert len(rows) == len(drawn[-1]) == 6
        assert len({row["frames"] for row in rows}) == 1, "no shorter rests of a song"
    assert drawn[0] == drawn[1] != drawn[2]
    data.main([*command, str(tmp_path / "every")])
    every = {(row["path"], row["start"]) for row in lines(tmp_path / "every/manifest.jsonl")}
    assert drawn[0].items() <= every and len(every) > 6


def test_silent_clips_go_and_are_named(tmp_path):
    quiet = np.r_[tone(2), 0 * tone(2.8), tone(3.2), 1e-3 * tone(2)]
    write_song(tmp_path / "music/a.wav", quiet)
    command = ["folder", str(tmp_path / "music"), "--seconds", "2", "--out"]
    data.main([*command, str(tmp_path / "d")])
    kept = [round(row["start"]) for row in lines(tmp_path / "d/manifest.jsonl")]
    skipped = [(round(s["start"]), s["reason"]) for s in lines(tmp_path / "d/skipped.jsonl")]
    silent = "is silent for more than half of its length"
    assert kept == [0, 4, 6] and skipped == [(2, silent), (8, silent)]
    data.main([*command, str(tmp_path / "all"), "--keep-silence"])
    assert len(lines(tmp_path / "all/manifest.jsonl")) == len(kept) + len(skipped)


def test_other_music_of_the_same_size_is_encoded_again(tmp_path):
    command = ["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), "--seconds", "2"]
    for pitch in (300, 900):
        write_song(tmp_path / "music/a.wav", tone(4, pitch=pitch))
        data.main(command)
        codes = (tmp_path / "d/codes-00000.bin").read_bytes()
        data.main([*command[:3], str(tmp_path / f"{pitch}"), *command[4:]])
        assert codes == (tmp_path / f"{pitch}/codes-00000.bin").read_bytes()


def test_a_data_folder_inside_the_music_is_no_music(tmp_path):
    write_song(tmp_path / "music/a.wav", tone(4))
    out = tmp_path / "music/data"
    command = ["folder", str(tmp_path / "music"), "--out", str(out), "--seconds", "2"]
    data.main(command)
    data.main(["show", str(out), "--n", "1"])
    data.main(command)
    assert {row["track"] for row in lines(out / "manifest.jsonl")} == {"a.wav"}


def test_audio_that_cannot_be_decoded_is_named_and_stops_nothing(tmp_path):
    write_song(tmp_path / "music/a.wav", tone(4))
    wav = bytearray((tmp_path / "music/a.wav").read_bytes())
    wav[34:36] = bytes(2)  # no bits a sample: no decoder
    (tmp_path / "music/b.wav").write_bytes(wav)
    data.main(["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), "--seconds", "2"])
    (skipped,) = lines(tmp_path / "d/skipped.jsonl")
    assert skipped["path"].endswith("b.wav") and "cannot be decoded" in skipped["reason"]


@pytest.mark.parametrize(
    "file, text",
    [
        ("meta.json", "null"),
        ("meta.json", '{"codec": "toy"}'),
        ("manifest.jsonl", "null\n"),
        ("manifest.jsonl", '{"split": "train", "codebooks": "9"}\n'),
        ("manifest.jsonl", '{"split": "train", "codebooks": 9, "shard": 0, "frames": null}\n'),
    ],
)
def test_a_damaged_data_folder_is_one_sentence(tmp_path, file, text):
    Writer(tmp_path, CODEC).add(some_clips(2))
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match="meta.json of .* is broken"):
        Clips(tmp_path, "train")


@pytest.mark.parametrize("codes", [b"", b"\xff" * 2000])
def test_damaged_codes_are_one_sentence(tmp_path, codes):
    Writer(tmp_path, CODEC).add(some_clips(2))
    (tmp_path / "codes-00000.bin").write_bytes(b"\0\0" + codes)
    with pytest.raises(ValueError, match="codes-00000.bin is damaged"):
        Clips(tmp_path, "train").codes(0)


def test_of_two_links_to_one_folder_one_is_read(tmp_path):
    write_song(tmp_path / "elsewhere/a.wav", tone(2))
    (tmp_path / "music").mkdir()
    for name in "xyz":
        (tmp_path / "music" / name).symlink_to(tmp_path / "elsewhere")
    assert curate.audio_files(tmp_path / "music") == [(str(tmp_path / "music/x/a.wav"), "")]


def test_output_that_nobody_reads_to_its_end_is_no_error(songs, tmp_path):
    _, command, _ = songs
    data.main([*command, str(tmp_path / "d")])
    shell = f"{sys.executable} data.py show {tmp_path / 'd'} --n 2 | head -c 1; exit $PIPESTATUS"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_files_of_other_programs_are_left_alone(songs, tmp_path):
    """Also where --out is a folder of the user's, even that of the music."""
    _, command, _ = songs
    write_song(tmp_path / "music/a.wav", tone(2))
    for name in ("new/thesis.tex", "tracks/route.gpx", "plan.json"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("[]")
    before = contents(tmp_path)
    for out in ("mine", "music"):
        with pytest.raises(ValueError, match="holds files that this command did not make"):
            data.main([*command, str(tmp_path / out)])
    assert contents(tmp_path) == before


def test_a_caption_that_comes_later_wins_over_what_was_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(
        curate, "Musicnn", lambda: SimpleNamespace(facts=lambda a: {"pace": "slow"})
    )
    curate.load_models.cache_clear()
    write_song(tmp_path / "music/a.wav", tone(4))
    command = ["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), "--seconds", "2"]
    for words, origin in ((None, "musicnn"), ("my own words", "sidecar"), (None, "musicnn")):
        sidecar = tmp_path / "music/a.txt"
        sidecar.write_text(words) if words else sidecar.unlink(missing_ok=True)
        data.main([*command, "--captioner", "musicnn"])
        assert {r["caption_from"] for r in lines(tmp_path / "d/manifest.jsonl")} == {origin}
    curate.load_models.cache_clear()


def test_a_song_with_another_end_is_encoded_again(tmp_path):
    song = np.concatenate([tone(10), tone(10)])
    command = ["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), "--seconds", "5"]
    codes = []
    for end in (1, 0):
        song[-44100:] *= end
        write_song(tmp_path / "music/a.wav", song)
        data.main(command)
        codes.append((tmp_path / "d/codes-00000.bin").read_bytes())
    assert codes[0] != codes[1]


def test_lines_of_a_table_that_name_no_file_are_told(tmp_path, capsys):
    write_song(tmp_path / "music/sub/cafe\u0301.wav", tone(2))
    table = tmp_path / "t.CSV"
    table.write_text("path,caption\r\n.\\sub\\caf\u00e9.wav,a waltz\r\nnone.wav,x\r\n", "utf-8-sig")
    command = ["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), "--seconds", "1"]
    data.main([*command, "--captions", str(table)])
    assert (
        "1 of 2 captions in the table name no file, such as 'none.wav'" in capsys.readouterr().out
    )
    assert {row["caption"] for row in lines(tmp_path / "d/manifest.jsonl")} == {"a waltz"}
    table.write_text("Path;Caption\nnone.wav;x\n")
    captions.read_table.cache_clear()
    with pytest.raises(ValueError, match="its columns are Path;Caption"):
        data.main([*command, "--captions", str(table)])


def test_show_lists_plays_and_plots(songs, tmp_path, capsys):
    _, command, _ = songs
    data.main([*command, str(tmp_path / "d")])
    capsys.readouterr()
    data.main(["show", str(tmp_path / "d"), "--n", "2", "--out", str(tmp_path / "look")])
    printed = capsys.readouterr().out
    assert printed.count('"caption": "tune ') == 2 and printed.count('"licence": "unknown"') == 2
    found = sorted((tmp_path / "look").iterdir())
    assert [p.suffix for p in found] == [".png", ".wav"] * 2
    assert all(1 <= soundfile.info(p).duration <= 2 for p in found if p.suffix == ".wav")
    with pytest.raises(ValueError, match="no data at"):
        data.main(["show", str(tmp_path / "nowhere")])


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    closed, scandir = str(tmp_path / "closed"), os.scandir
    os.mkdir(closed)

    def refuse(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert curate.audio_files(tmp_path) == [(closed, "cannot be read: Permission denied")]


def test_no_audio_is_one_sentence(tmp_path):
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="no audio below"):
        data.main(["folder", str(tmp_path), *out])
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        data.main(["folder", str(tmp_path / "nowhere"), *out])
    with pytest.raises(ValueError, match="--seconds must be in .1, 3600., not inf"):
        data.main(["folder", str(tmp_path), *out, "--seconds", "inf"])
    assert not (tmp_path / "out").exists()


def tagged(path, **tags):
    """A file of two seconds with tags, in the format that its extension says."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".mp3": "mp3", ".ogg": "libopus", ".m4a": "aac", ".flac": "flac"}[path.suffix]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=48000, layout="mono")
        out.metadata.update(tags)
        samples = (10000 * np.sin(np.arange(96000) / 20)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 48000
        resampler = av.AudioResampler(stream.format, "mono", 48000, stream.frame_size or 4096)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            out.mux(stream.encode(part))


def test_words_come_from_what_the_files_know(tmp_path, capsys):
    music = tmp_path / "music"
    tagged(music / "a.mp3", genre="Folk", TBPM="96", artist="Ann", title="Rain")
    tagged(music / "b.flac", genre="Dark Ambient", initialkey="Am", date="1994-03-01")
    tagged(music / "c.ogg", genre="Unknown", artist="Ann", license="CC-BY-4.0")
    tagged(music / "game/boss-fight_02.m4a", title="Track 2")
    tagged(music / "d/01.mp3")
    write_song(music / "e.wav", tone(2), caption="a tone")
    write_song(music / "f.wav", tone(2), caption=" \n")
    data.main(["folder", str(music), "--out", str(tmp_path / "d")])
    rows = {row["track"]: row for row in data.Clips(tmp_path / "d", None).rows}
    facts = {track: row.get("facts") for track, row in rows.items()}
    assert facts == {
        "a.mp3": {"genre": "folk", "bpm": "96"},
        "b.flac": {"genre": "dark ambient", "key": "A minor", "decade": "1990s"},
        "c.ogg": {},
        "game/boss-fight_02.m4a": {"name": "boss fight"},
        "d/01.mp3": {},
        "e.wav": None,
        "f.wav": {},
    }
    origins = {row["caption_from"]: track for track, row in rows.items()}
    assert origins.keys() == {"tags", "names", "nothing", "sidecar"}
    assert rows["c.ogg"]["caption"] == "music" and rows["c.ogg"]["licence"] == "CC-BY-4.0"
    assert rows["a.mp3"]["artist"] == rows["c.ogg"]["artist"] == "Ann"
    assert "3 clips are only called" in capsys.readouterr().out
    drawn = [data.caption_of(rows["b.flac"], np.random.default_rng(i)) for i in range(40)]
    assert len(set(drawn)) > 10 and all(
        "ambient" in c or "in A minor" in c or "1990s" in c for c in drawn
    )
    assert not any(
        "Rain" in data.caption_of(rows["a.mp3"], np.random.default_rng(i)) for i in range(20)
    )

    data.main(["folder", str(music), "--out", str(tmp_path / "t"), "--titles"])
    rows = {row["track"]: row for row in data.Clips(tmp_path / "t", None).rows}
    drawn = [data.caption_of(rows["a.mp3"], np.random.default_rng(i)) for i in range(40)]
    assert any('"Rain"' in caption and "by Ann" in caption for caption in drawn)


def test_music_that_gives_no_clip_is_refused_and_other_options_may_follow(tmp_path):
    write_song(tmp_path / "music/a.wav", 0 * tone(4))
    (tmp_path / "music/b.mp3").write_text("no music")
    (tmp_path / "music/b.txt").write_text("a tone")
    command = ["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), "--seconds", "2"]
    with pytest.raises(ValueError, match="no clip can be used: is silent.*; is not readable audio"):
        data.main(command)
    data.main([*command, "--keep-silence"])
    assert len(lines(tmp_path / "d/manifest.jsonl")) == 2


# --------------------------------------------------------------------- training and validation ----


def splits(*tracks, valid=0.1):
    """tracks: (number of clips, more of the manifest) -> the splits of each track's clips, as a
    string of their first letters."""
    rows = []
    for number, (clips, about) in enumerate(tracks):
        track = dict(path=f"/music/{number}.wav", track=f"{number}.wav") | about
        rows += [track | dict(codes=("file", i)) for i in range(clips)]
    curate.share_out(rows, valid)
    return [
        "".join(row["split"][0] for row in rows if row["path"] == f"/music/{number}.wav")
        for number in range(len(tracks))
    ]


def test_of_few_tracks_the_end_of_each_is_for_validation():
    assert splits((40, {})) == ["t" * 35 + "g" + "v" * 4], "one long recording, with a gap"
    assert splits((2, {}), (9, {}), (10, {}), (1, {})) == [
        "tv", "ttttttttv", "ttttttttgv", "t"
    ]  # fmt: skip
    assert splits((4, {}), (3, {}), valid=0.5) == ["ttvv", "tvv"]
    assert splits((4, {}), (3, {}), valid=0.0) == ["tttt", "ttt"]
    assert splits((1, {})) == ["t"] == splits((1, {}), valid=0.99)
    assert splits((24, {}), valid=0.99) == ["t" + "v" * 23], "something is left to train on"
    assert sorted(splits(*[(1, {})] * 20, valid=0.99)) == ["t"] + ["v"] * 19
    assert sorted(splits((1, {}), (1, {}), (1, {}))) == ["t", "t", "v"], "clips cannot be divided"


def test_of_many_tracks_whole_ones_are_for_validation_and_artists_are_on_one_side():
    found = splits(*[(3, {})] * 200)
    assert set(found) == {"ttt", "vvv"} and found.count("vvv") == 20
    before = splits(*[(3, {})] * 100)
    assert sum(a != b for a, b in zip(before, found)) < 8, "new tracks move few others"
    assert "vvv" in splits(*[(3, {})] * 10, valid=0.001)
    artists = [(1, dict(artist=f"artist {i % 12}")) for i in range(120)]
    found = splits(*artists, valid=0.3)
    assert found.count("v") == 30 and found[:12] * 10 == found


def test_the_share_for_validation_is_right_whatever_the_artists():
    one = [(3, dict(artist="the only one"))] * 30
    assert splits(*one).count("vvv") == 3, "one artist's tracks are divided"
    large = [(40 if i % 5 == 0 else 1, dict(artist=str(i))) for i in range(40)]
    assert 0.05 < "".join(splits(*large)).count("v") / 352 < 0.16


def test_a_split_of_the_source_stays():
    assert splits((3, dict(split="valid")), (3, dict(split="train"))) == ["vvv", "ttt"]


def test_one_recording_gives_both_splits_and_names_the_gap(tmp_path):
    write_song(tmp_path / "music/a.wav", tone(26))
    data.main(["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), "--seconds", "2"])
    train, valid = (Clips(tmp_path / "d", split, 9) for split in ("train", "valid"))
    assert len(train) == 11 and len(valid) == 1
    assert valid.rows[0]["start"] > train.rows[-1]["start"] + 3.9
    (gap,) = lines(tmp_path / "d/skipped.jsonl")
    assert "gap between training and validation" in gap["reason"] and "start" in gap


# ------------------------------------------------------------------------------- the corpora ----

JAMENDO = """TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS
track_0000775\tartist_000104\talbum_000126\t75/775.mp3\t198.1\tgenre---easylistening\tgenre---lounge
track_0001729\tartist_000264\talbum_000252\t29/1729.mp3\t270.2\tgenre---pop\tgenre---poprock\tgenre---rock
track_0003524\tartist_000530\talbum_000552\t24/3524.mp3\t266.1\tmood/theme---melodic
track_0603752\tartist_002485\talbum_069778\t52/603752.mp3\t235.0\tgenre---punkrock\tinstrument---bass\tinstrument---electricguitar\tinstrument---voice
track_1082554\tartist_352844\talbum_128963\t54/1082554.mp3\t298.1\tgenre---classical\tinstrument---cello\tinstrument---violin\tmood/theme---emotional\tmood/theme---sad
track_1395508\tartist_491731\talbum_163455\t08/1395508.mp3\t274.8\tgenre---funk\tgenre---hiphop
"""  # noqa: E501
LICENCES = """75/775.mp3
Slow Motion by Somebody from Jamendo: http://www.jamendo.com/track/775
Available under a Creative Commons Attribution-NonCommercial-ShareAlike license: http://creativecommons.org/licenses/by-nc-sa/3.0/

54/1082554.mp3
A license to sing by Somebody Else from Jamendo: http://www.jamendo.com/track/1082554
Available under a Creative Commons Attribution license: http://creativecommons.org/licenses/by/3.0/
"""  # noqa: E501


@pytest.fixture
def jamendo(tmp_path):
    """Lines of MTG-Jamendo as they are, in a copy of its repository, with some audio."""
    folder = tmp_path / "mtg-jamendo-dataset"
    (folder / "data/splits/split-0").mkdir(parents=True)
    (folder / "data/raw_30s_cleantags.tsv").write_text(JAMENDO)
    (folder / "audio_licenses.txt").write_text(LICENCES)
    header, *rows = JAMENDO.splitlines()
    for name, numbers in dict(train=[0, 1], validation=[4], test=[2, 3]).items():
        chosen = [header, *(rows[i] for i in numbers)]
        text = "".join(line + "\r\n" for line in chosen)  # some of the split files end lines so
        (folder / f"data/splits/split-0/autotagging-{name}.tsv").write_text(text, newline="")
    for number in (775, 1729, 3524, 603752, 1082554):
        path = tmp_path / f"audio/{number % 100:02}/{number}.mp3"
        path = path.with_suffix(".low.mp3") if number == 1729 else path
        write_song(path, tone(4), caption=None, format="MP3")
    return folder, tmp_path / "audio"


def test_jamendos_table_is_read_with_all_its_tags(jamendo):
    rows = sources.read_jamendo(jamendo[0] / "data/raw_30s_cleantags.tsv")
    assert list(rows) == [775, 1729, 3524, 603752, 1082554, 1395508]
    assert rows[1082554] == dict(
        source="MTG-Jamendo", artist="artist_352844", album="album_128963",
        path="54/1082554.mp3", seconds=298.1,
        tags=["genre---classical", "instrument---cello", "instrument---violin",
              "mood/theme---emotional", "mood/theme---sad"],
    )  # fmt: skip
    assert all(row["path"] == f"{n % 100:02}/{n}.mp3" for n, row in rows.items())
    split = sources.read_jamendo(jamendo[0] / "data/splits/split-0/autotagging-validation.tsv")
    assert split[1082554] == rows[1082554], "no carriage return in the last tag"
    (jamendo[0] / "data/raw_30s_cleantags.tsv").write_text(JAMENDO + "track_1\tartist_2\n")
    with pytest.raises(ValueError, match="raw_30s_cleantags.tsv is missing or broken"):
        sources.read_jamendo(jamendo[0] / "data/raw_30s_cleantags.tsv")


def test_jamendos_splits_licences_and_exclusions(jamendo, tmp_path):
    tracks = {t["track"]: t for t in sources.jamendo_tracks(*jamendo, "", Options())}
    reasons = {name: t.get("skip") for name, t in tracks.items()}
    assert reasons["track_0003524"] == reasons["track_0603752"]
    assert "split-0's test set" in reasons["track_0003524"], "Song Describer is in there somewhere"
    assert "raw_30s" in reasons["track_1395508"]
    assert not reasons["track_0000775"] and tracks["track_0001729"]["path"].endswith(
        "29/1729.low.mp3"
    )
    assert tracks["track_1082554"]["split"] == "valid"
    assert tracks["track_0000775"]["split"] == "train"
    about = tracks["track_1082554"]
    assert about["licence"] == "http://creativecommons.org/licenses/by/3.0/"
    assert about["credit"].startswith("A license to sing by Somebody Else from Jamendo: http")
    assert about["source"] == "MTG-Jamendo"
    assert tracks["track_0001729"]["licence"] == "unknown"

    listed = tmp_path / "song_describer.csv"
    listed.write_text(
        "caption_id,track_id,caption,is_valid_subset,familiarity,artist_id,album_id,path,duration\n"
        '859,603752,"loud, fast",True,0,2485,69778,52/603752.mp3,235.0\n'
    )
    tracks = {t["track"]: t for t in sources.jamendo_tracks(*jamendo, listed, Options())}
    assert tracks["track_0603752"]["skip"] == "belongs to the Song Describer Dataset"
    assert "skip" not in tracks["track_0003524"] and tracks["track_0003524"]["split"] == "train"
    shutil.rmtree(jamendo[0] / "data/splits")
    with pytest.raises(ValueError, match="autotagging-train.tsv is missing or broken: `git clone"):
        sources.jamendo_tracks(*jamendo, "", Options())


def test_jamendo_without_any_model_makes_captions_from_tags(jamendo, tmp_path):
    offline = ["--captioner", "none", "--keep-vocals", "--seconds", "2", "--out", tmp_path / "d"]
    data.main(["jamendo", *map(str, [*jamendo, *offline])])
    rows = {row["track"]: row for row in lines(tmp_path / "d/manifest.jsonl")}
    assert rows.keys() == {"track_0000775", "track_0001729", "track_1082554"}, "one clip a track"
    facts = dict(genre="classical", instrument="cello and violin", mood="emotional and sad")
    assert rows["track_1082554"]["facts"] == facts
    assert "emotional and sad classical" in rows["track_1082554"]["caption"]
    assert rows["track_1082554"]["split"] == "valid"
    summary = json.loads((tmp_path / "d/summary.json").read_text())
    assert summary["licences"]["http://creativecommons.org/licenses/by/3.0/"] == 1
    assert summary["captions"] == {"tags": 3} and summary["files_found"] == 6


def test_musiccaps_are_chosen_by_seed_among_those_without_vocals(tmp_path):
    table = ["ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval"]  # fmt: skip # noqa: E501
    for i in range(12):
        caption = "A woman sings over drums" if i % 4 == 3 else f"Drums, number {i}"
        table.append(
            f'-abcdefgh{i:02},30,40,"/m/04rlf,/m/0l14md","[\'drums\']","{caption}",4,False,True'
        )
        if i != 5:
            name = [f"-abcdefgh{i:02}", f"[-abcdefgh{i:02}]-[30-40]", f"Song [-abcdefgh{i:02}]"][
                i % 3
            ]
            write_song(tmp_path / f"audio/{name}.wav", tone(3), caption=None)
    (tmp_path / "musiccaps-public.csv").write_text("\n".join(table))
    command = ["musiccaps", str(tmp_path / "musiccaps-public.csv"), str(tmp_path / "audio")]
    chosen = []
    for seed in ("0", "0", "1"):
        out = tmp_path / str(len(chosen))
        data.main([*command, "--choose", "4", "--seconds", "2", "--seed", seed, "--out", str(out)])
        clips = Clips(out, "test", 9)
        chosen.append({row["track"] for row in clips.rows})
        assert len(clips) == 4 and not any("sings" in row["caption"] for row in clips.rows)
    assert chosen[0] == chosen[1] != chosen[2]
