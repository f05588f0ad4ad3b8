"""Music as training tokens: the data folder, its reader, and the road from audio to it.

A data folder holds

    meta.json         {"codec": "toy", "codebooks": 9, "codebook_size": 1024, "frame_rate": 86.13}
    manifest.jsonl    one clip a line: shard, offset, codebooks K, frames T, split, caption (or the
                      factors it is drawn from), and its source (path, track, start in seconds,
                      licence)
    codes-00000.bin   uint16 codes, clip after clip, each a (K, T) table in C order
    skipped.jsonl     one line for each file that was left out, with the reason, and one for each
                      clip ("start") that was left out of a file
    summary.json      hours, clips, tracks, licences, reasons; histogram.png shows the clips
    plan.json         the command's options, so that another command does not spoil the folder

Clips are memory-mapped. Batches are a pure function of (seed, number of the first sample): the data
order, the crops, the captions drawn and dropped. So a run that is resumed sees what it would have
seen, and G processes see together what one would have seen.

    python data.py folder ~/music --out data/mine      song.wav + song.txt, song.mp3 + song.txt, ...
    python data.py jamendo mtg-jamendo-dataset /audio --out data/jamendo        the paper's corpus
    python data.py musiccaps musiccaps-public.csv /clips --out data/musiccaps   the paper's test set
    python data.py show data/mine                      look at the data, and listen to it

What becomes of a track: decode -> mono, 44.1 kHz -> clips of 30 s -> silent clips out -> vocals
out, and clips that are silent without them -> captions -> captions that mention vocals out -> one
clip a track -> codec tokens. Every stage is an option. A track is one unit of work. Its result is a
small file in `parts/`, written under another name and renamed, and depends on the track and the
options alone; when all are there, they are joined in the tracks' order, and the manifest appears
last. So a run may be killed anywhere and begun again with the same command, split over --workers
and over the ranks of torchrun, and the folder is the same to the last byte. When music has been
added, the same command adds it.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import zlib
from collections import Counter
from dataclasses import asdict, fields
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import SAMPLE_RATE, Picture, audio_blocks, write_audio, write_text
from codec import load_codec
from options import add_arguments, entry
from paper import captions
from paper.sources import VOCAL, Options, folder_tracks, jamendo_tracks, musiccaps_tracks

SHARD_BYTES = 256 << 20

# ------------------------------------------------------------------------ reading the folder ----


def read_lines(path):  # -> the JSON of each line
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class Clips:
    """The clips of one split of a data folder, those with at least `codebooks` codebooks.

    ValueError, one sentence, if the folder is missing, broken, empty or made by another codec.
    """

    def __init__(self, folder, split, codebooks=1, codec=None):
        folder = Path(folder)
        if not (folder / "manifest.jsonl").is_file() or not (folder / "meta.json").is_file():
            raise ValueError(
                f"no data at {folder}: make some with `python data.py folder MUSIC --out {folder}`"
            )
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            rows = read_lines(folder / "manifest.jsonl")
            self.rows = [r for r in rows if r["split"] == split and r["codebooks"] >= codebooks]
        except (ValueError, KeyError) as error:
            raise ValueError(f"the manifest of {folder} is broken ({error!r})") from None
        if codec and self.meta["codec"] != codec:
            raise ValueError(
                f"{folder} was made by the codec {self.meta['codec']!r}, the model reads {codec!r}"
            )
        if not self.rows:
            raise ValueError(f"{folder} has no {split} clips with {codebooks} codebook(s)")
        self.codebooks = codebooks
        self.shards = {
            shard: np.memmap(folder / f"codes-{shard:05}.bin", np.uint16, "r")
            for shard in {row["shard"] for row in self.rows}
        }

    def __len__(self):
        return len(self.rows)

    def codes(self, i, start=0, frames=None):
        """Codes (codebooks, frames) of clip i from frame `start`, padded with the special token."""
        row = self.rows[i]
        K, T = row["codebooks"], row["frames"]
        clip = self.shards[row["shard"]][row["offset"] : row["offset"] + K * T].reshape(K, T)
        clip = clip[: self.codebooks, start : T if frames is None else start + frames]
        missing = 0 if frames is None else frames - clip.shape[1]
        clip = np.pad(clip, ((0, 0), (0, missing)), constant_values=self.meta["codebook_size"])
        return clip.astype(np.int64)

    def batch(self, first, count, frames, seed, describe, caption_dropout=0.0, window=0):
        """Samples `first` ... `first + count - 1` of the endless seeded shuffle.

        describe(row, rng) -> caption. Returns codes (count, K, frames) int64, the beginning of a
        random `window` (of so many frames, at least `frames`) of each clip, and `count` captions,
        some dropped to the empty string (classifier-free guidance).
        """
        codes, captions = [], []
        for sample in range(first, first + count):
            epoch, place = divmod(sample, len(self))
            i = _permutation(len(self), seed, epoch)[place]
            rng = np.random.default_rng([seed, sample])
            start = rng.integers(max(self.rows[i]["frames"] - max(frames, window), 0) + 1)
            codes.append(self.codes(i, start, frames))
            caption = describe(self.rows[i], rng)
            captions.append("" if rng.random() < caption_dropout else caption)
        return torch.from_numpy(np.stack(codes)), captions


@functools.lru_cache(2)
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


class Writer:
    """Appends clips to a data folder. What the manifest names is on disk whole; codes of a clip
    that was being written when the process died are overwritten by the next."""

    def __init__(self, folder, codec):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = dict(
            codec=codec.name,
            codebooks=codec.codebooks,
            codebook_size=codec.codebook_size,
            frame_rate=codec.sample_rate / codec.hop,
        )
        path = self.folder / "meta.json"
        if path.exists() and json.loads(path.read_text()) != meta:
            raise ValueError(f"{folder} was begun with another codec; choose another --out")
        path.write_text(json.dumps(meta))
        self.shard, self.offset = 0, 0  # offset in codes, of two bytes
        for row in self.rows():
            self.shard, self.offset = row["shard"], row["offset"] + row["codebooks"] * row["frames"]

    def rows(self):
        path = self.folder / "manifest.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        if lines[-1]:  # a line that was being written
            path.write_bytes(b"\n".join(lines[:-1]) + b"\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def add(self, clips):
        """clips: [(codes (K, T), row)]; all of them enter the manifest, or none."""
        lines = []
        for codes, row in clips:
            if 2 * self.offset > SHARD_BYTES:
                self.shard, self.offset = self.shard + 1, 0
            path = self.folder / f"codes-{self.shard:05}.bin"
            with open(path, "r+b" if path.exists() else "wb") as file:
                file.seek(2 * self.offset)
                file.write(np.ascontiguousarray(codes, np.uint16).tobytes())
            where = dict(shard=self.shard, offset=self.offset)
            lines.append(where | dict(codebooks=codes.shape[0], frames=codes.shape[1]) | row)
            self.offset += codes.size
        with open(self.folder / "manifest.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------- what becomes of a track ----

SILENT = "is silent for more than half of its length"
ONLY_VOCALS = "is silent without its vocals"


class Stages:
    """The models that the options call for, loaded once in a process. ValueError if one cannot be
    had."""

    def __init__(self, tracks, options):
        self.codec = load_codec(options.codec)
        heavy = torch.cuda.is_available() and options.codec != "toy"
        self.device = "cuda" if heavy else "cpu"
        self.codec.to(self.device)
        self.separate = None if options.keep_vocals else captions.Separator()
        self.caption = self.rephrase = None
        untold = any("caption" not in track.about and not track.reason for track in tracks)
        if untold and options.captioner != "none":
            here = "cuda" if torch.cuda.is_available() else "cpu"
            self.caption = captions.LPMusicCaps(options.captioner).to(here)
            if options.rephraser != "none":
                self.rephrase = captions.Rephraser(options.rephraser)


def clips_of(path, length):
    """Yields (start, audio (1, length)), clip after clip, in samples; the last may be shorter, but
    not than a second. Memory does not grow with the file."""
    held, start = np.zeros(0, np.float32), 0
    for block in audio_blocks(path):
        held = np.concatenate([held, block])
        while len(held) >= length:
            yield start, torch.from_numpy(held[:length].copy())[None]
            held, start = held[length:], start + length
    if len(held) >= SAMPLE_RATE:
        yield start, torch.from_numpy(held)[None]
    elif start == 0:
        raise ValueError(f"{path} is shorter than a second: {len(held)} samples")


def clips_by_lot(path, length, seed):
    """The same clips in a random order that depends on the seed and the track's name alone, as far
    as the caller asks: the file is read through once for each, and only one clip is held."""
    lot, done = [zlib.crc32(os.fsencode(os.path.basename(path))), seed], set()
    while True:
        drawn = None
        for start, audio in clips_of(path, length):
            draw = np.random.default_rng([*lot, start]).random()
            if start not in done and (drawn is None or draw > drawn[0]):
                drawn = draw, start, audio
        if drawn is None:
            return
        done.add(drawn[1])
        yield drawn[1:]


def silent(audio):
    """Whether more than half of audio (1, S) is silent: tenths of a second with a level (RMS) more
    than 60 dB below full scale."""
    tenths = audio[0, : audio.shape[1] // 4410 * 4410].view(-1, 4410)
    return float((tenths.square().mean(1).sqrt() < 1e-3).float().mean()) > 0.5


def words_for(audio, track, stages, options):
    """-> a clip's caption, "" if there is none, and where it is from: given, heard or from tags."""
    if "caption" in track.about:
        return track.about["caption"], track.about["caption_from"]
    if stages.caption:
        heard = stages.caption(audio)
        if stages.rephrase and len(heard) > 1:
            return stages.rephrase(heard), f"{options.captioner}, {options.rephraser}"
        return captions.join(heard), options.captioner
    return captions.sentence_from_tags(track.about.get("tags", []), options.keep_vocals), "tags"


def process(track, part, stages, options):
    """Makes the part of a track: the codes of its clips, then a line of JSON with their manifest
    rows and what was left out, then that line's length. -> {stage: seconds taken, "audio": seconds
    of it}, to tell how fast it goes."""
    clock, rows, dropped, reason = Counter(), [], [], track.reason
    temporary = part.with_name(f".{part.name}-{os.getpid()}")

    def timed(stage, function, *args):
        begun = time.perf_counter()
        result = function(*args)
        clock[stage] += time.perf_counter() - begun
        return result

    def finish(start, audio):  # -> codes, row; or why the clip is dropped
        if not options.keep_silence and silent(audio):
            return SILENT
        if stages.separate:
            audio = timed("separate", stages.separate, audio)
            if not options.keep_silence and silent(audio):
                return ONLY_VOCALS
        caption, origin = timed("caption", words_for, audio, track, stages, options)
        if not caption:
            beside = f"{Path(track.path).stem}.txt beside it"
            given = "it in --captions, or a --captioner"
            expected = beside if track.about["source"] == "folder" else given
            raise ValueError(f"has no caption: expected {expected}")
        if not options.keep_vocal_captions and captions.mentions_vocals(caption):
            return VOCAL
        codes = timed("encode", stages.codec.encode, audio.to(stages.device))[0]
        row = dict(start=start / SAMPLE_RATE, caption=caption, caption_from=origin)
        shape = dict(codebooks=codes.shape[0], frames=codes.shape[1])
        return codes.cpu().numpy().astype(np.uint16), shape | track.about | row

    length = round(options.seconds * SAMPLE_RATE / stages.codec.hop) * stages.codec.hop
    with open(temporary, "wb") as file:
        try:
            if reason:
                clips = iter(())
            elif options.one_clip:
                clips = clips_by_lot(track.path, length, options.seed)
            else:
                clips = clips_of(track.path, length)
            while clip := timed("decode", next, clips, None):
                start, audio = clip
                clock["audio"] += audio.shape[1] / SAMPLE_RATE
                with torch.inference_mode():
                    result = finish(start, audio)
                if isinstance(result, str):
                    dropped.append(dict(path=track.path, start=start / SAMPLE_RATE, reason=result))
                    continue
                file.write(result[0].tobytes())
                rows.append(result[1])
                if options.one_clip:
                    break
        except ValueError as error:  # the file breaks off somewhere: none of it is trusted
            reason, rows = str(error).removeprefix(f"{track.path} "), []
            file.seek(0)
            file.truncate()
        if not rows:
            reasons = sorted({clip["reason"] for clip in dropped})
            reason = reason or "; ".join(reasons)
            dropped = [dict(path=track.path, reason=reason)]
        _end_part(file, rows, dropped)
    os.replace(temporary, part)
    return clock


def _end_part(file, rows, skipped):
    line = json.dumps(dict(rows=rows, skipped=skipped)).encode()
    file.write(line + len(line).to_bytes(8, "little"))


def read_part(part):
    """-> its manifest rows, what it skipped, and a function that gives the codes (K, T) of each."""
    with open(part, "rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(), "little")
        file.seek(-8 - length, os.SEEK_END)
        found = json.loads(file.read(length))

    def codes():
        with open(part, "rb") as file:
            for row in found["rows"]:
                K, T = row["codebooks"], row["frames"]
                yield np.frombuffer(file.read(2 * K * T), np.uint16).reshape(K, T)

    return found["rows"], found["skipped"], codes


# --------------------------------------------------------------- many tracks, many processes ----


def build(tracks, out, source, options, workers=1):
    """Tracks -> the data folder `out`, or the rest of it. `source` names the command that lists the
    tracks. Under torchrun each rank does its share, and rank 0 joins all."""
    out, parts = Path(out), Path(out) / "parts"
    rank, ranks = (int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    keys = [track.key for track in tracks]
    plan = dict(source=source) | asdict(options)
    state = hashlib.sha1(json.dumps([plan, keys]).encode()).hexdigest()
    check_plan(out, plan)
    if is_finished(out, state):
        if rank == 0:
            shutil.rmtree(parts, ignore_errors=True)  # killed while they were removed
            print_summary(out)
        return
    codec = load_codec(options.codec)
    if rank == 0:
        check_space(out, tracks, codec, options)
    parts.mkdir(parents=True, exist_ok=True)
    lock = lock_rank(parts, rank)
    if rank == 0:
        write_json(out / "plan.json", plan)
        if (out / "manifest.jsonl").exists():  # finished once; but music has been added or changed
            take_apart(out, parts, tracks)
        (parts / "ready").write_text(state)
    ready = parts / "ready"
    while not is_finished(out, state) and not (ready.exists() and ready.read_text() == state):
        time.sleep(0.5)

    todo = [(t, parts / key) for t, key in zip(tracks[rank::ranks], keys[rank::ranks])]
    todo = [(track, part) for track, part in todo if not part.exists()]
    if is_finished(out, state):  # all parts were there, and rank 0 was quicker
        shutil.rmtree(parts, ignore_errors=True)
        return
    todo.sort(key=lambda pair: -pair[0].about["bytes"])  # the longest first: none is left for last
    clock, begun = Counter(), time.perf_counter()
    with tqdm(total=len(todo), unit="track", disable=None) as bar:
        for times in work(todo, options, workers):
            clock.update(times)
            bar.update()
    print_speed(clock, time.perf_counter() - begun)
    if rank == 0:
        with tqdm(total=len(keys), desc="other ranks", unit="track", disable=None) as bar:
            while missing := set(keys) - set(os.listdir(parts)):
                bar.update(len(keys) - len(missing) - bar.n)
                time.sleep(0.5)
        pairs = [(track, parts / key) for track, key in zip(tracks, keys)]
        merge(out, parts, pairs, codec, state, options.valid)
        print_summary(out)
    del lock


def check_plan(out, plan):
    """ValueError if `out` was begun by another command."""
    if (out / "plan.json").exists():
        old = json.loads((out / "plan.json").read_text())
        for name in {**old, **plan}:
            if old.get(name) != plan.get(name):
                raise ValueError(
                    f"{out} was begun with another {name} ({old.get(name)!r}, now "
                    f"{plan.get(name)!r}); choose another --out"
                )
    elif (out / "manifest.jsonl").exists():
        raise ValueError(f"{out} holds clips that this command did not make; choose another --out")


def is_finished(out, state):
    if not (out / "manifest.jsonl").exists() or not (out / "summary.json").exists():
        return False
    return json.loads((out / "summary.json").read_text())["state"] == state


def check_space(out, tracks, codec, options):
    """Says how much disk the folder takes, while it is made; ValueError if there is less."""
    seconds = 0
    for about in (track.about for track in tracks if not track.reason):
        slow = about["path"].lower().endswith((".wav", ".aiff", ".aif", ".flac", ".au", ".w64"))
        length = about.get("seconds") or about["bytes"] / (88_000 if slow else 16_000)
        seconds += min(length, options.seconds) if options.one_clip else length
    need = 2 * seconds * codec.codebooks * 2 * codec.sample_rate / codec.hop  # parts, then shards
    place = next(p for p in (out, *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    told = f"about {need / 1e6:,.0f} MB of disk while it works; {free / 1e6:,.0f} MB are free"
    if need > free:
        raise ValueError(f"{out} needs {told}: choose another --out")
    print(f"{len(tracks):,} tracks, about {seconds / 3600:.2f} hours; needs {told}")


def lock_rank(parts, rank):
    """An open file that nobody else can lock while it lives: the same command run twice at once
    would only do everything twice."""
    file = open(parts / f"lock-{rank}", "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows
    except OSError:
        raise ValueError(f"another process is at work on {parts.parent}; let it finish") from None
    return file


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def work(todo, options, workers):
    """Makes the parts of [(track, part)]; yields the clock of each. A process uses one thread: sums
    in another order have other last digits, and a code that hangs on them would be another."""
    if workers <= 1 or len(todo) <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            stages = Stages([track for track, _ in todo], options) if todo else None
            for track, part in todo:
                yield process(track, part, stages, options)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    running = {}
    for i in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(
            target=_worker, args=(todo[i::workers], options, theirs), daemon=True
        )
        child.start()
        theirs.close()
        running[ours] = child
    while running:
        for pipe in wait(list(running)):
            try:
                message = pipe.recv()
            except EOFError:
                ended = running.pop(pipe)
                ended.join()
                if ended.exitcode:
                    raise ValueError(
                        f"a worker died (exit {ended.exitcode}; out of memory?): the same command "
                        "goes on, perhaps with fewer --workers"
                    ) from None
                continue
            if isinstance(message, str):
                raise ValueError(message)
            yield message


def _worker(todo, options, pipe):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; and with it, this ends
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        for clock in work(todo, options, 1):
            pipe.send(clock)
    except (ValueError, OSError) as error:
        pipe.send(str(error))


def take_apart(out, parts, tracks):
    """A finished folder -> parts again, of those tracks that are as they were; the manifest goes
    last, so this may be killed as well."""
    rows, skipped = read_lines(out / "manifest.jsonl"), read_lines(out / "skipped.jsonl")
    wanted = {track.path: track for track in tracks if not track.reason}
    for path, group in itertools.groupby(rows, key=lambda row: row["path"]):
        group = [dict(row) for row in group]
        track = wanted.get(path)
        if track is None or not track.about.items() <= group[0].items():
            continue
        part = parts / track.key
        temporary = part.with_name(f".{part.name}-{os.getpid()}")
        with open(temporary, "wb") as file:
            for row in group:
                shard, offset = row.pop("shard"), row.pop("offset")
                size = row["codebooks"] * row["frames"]
                codes = np.fromfile(
                    out / f"codes-{shard:05}.bin", np.uint16, size, offset=2 * offset
                )
                file.write(codes.tobytes())
                if "split" not in track.about:
                    del row["split"]  # `merge` says it again
            _end_part(file, group, [s for s in skipped if s["path"] == path])
        os.replace(temporary, part)
    (out / "manifest.jsonl").unlink()


def merge(out, parts, pairs, codec, state, valid):
    """Joins the parts [(track, part)] in their order. Everything is written aside and then moved,
    the manifest last: from there on the folder is finished."""
    aside = parts / "merged"
    shutil.rmtree(aside, ignore_errors=True)
    writer = Writer(aside, codec)
    splits = share_out([track.about for track, part in pairs if read_part(part)[0]], valid)
    (aside / "manifest.jsonl").touch()
    with open(aside / "skipped.jsonl", "w", encoding="utf-8") as file:
        for track, part in tqdm(pairs, "joining", unit="track", disable=None):
            rows, skipped, codes = read_part(part)
            for row in rows:
                row.setdefault("split", splits.get(track.path))
            writer.add(zip(codes(), rows))
            file.write("".join(json.dumps(line) + "\n" for line in skipped))
    summarise(aside, len(pairs), state)
    for old in out.glob("codes-*.bin"):
        old.unlink()
    for new in sorted(aside.iterdir(), key=lambda path: path.name == "manifest.jsonl"):
        os.replace(new, out / new.name)
    shutil.rmtree(parts, ignore_errors=True)


def share_out(abouts, valid):
    """-> {path: "train" or "valid"}. A track belongs to one side as a whole, and so do all of an
    artist, where one is known. A checksum of the name decides, the same on every machine. Were one
    side left empty by it, the nearest to the border goes there."""
    draws = {
        about["path"]: zlib.crc32(os.fsencode(about.get("artist", about["track"]))) / 2**32
        for about in abouts
        if "split" not in about
    }
    if draws and len(draws) == len(abouts) and 0 < valid < 1:
        low, high = min(draws.values()), max(draws.values())
        valid = min(max(valid, math.nextafter(low, 1)), high) if low < high else 0
    return {path: "valid" if draw < valid else "train" for path, draw in draws.items()}


# ----------------------------------------------------------------------- looking at the data ----


def summarise(folder, tracks, state):
    """summary.json and histogram.png of a folder that is about to be finished."""
    rows, skipped = read_lines(folder / "manifest.jsonl"), read_lines(folder / "skipped.jsonl")
    rate = json.loads((folder / "meta.json").read_text())["frame_rate"]
    seconds = np.array([row["frames"] / rate for row in rows])
    count = lambda values: dict(Counter(values).most_common())
    reasons = lambda clip: count(
        line["reason"].partition(":")[0] for line in skipped if ("start" in line) == clip
    )
    summary = dict(
        hours=round(seconds.sum() / 3600, 4),
        clips=len(rows),
        tracks=len({row["path"] for row in rows}),
        of=tracks,
        splits=count(row["split"] for row in rows),
        licences=count(row["licence"] for row in rows),
        captions=count(row["caption_from"] for row in rows),
        files_left_out=reasons(False),
        clips_left_out=reasons(True),
        state=state,
    )
    write_json(folder / "summary.json", summary)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    axes[0].hist(seconds, bins=30, color="C0")
    axes[0].set(title=f"{len(rows):,} clips", xlabel="seconds", ylabel="clips")
    axes[1].hist([len(row["caption"].split()) for row in rows], bins=30, color="C1")
    axes[1].set(title="captions", xlabel="words", ylabel="clips")
    figure.tight_layout()
    figure.savefig(folder / "histogram.png", dpi=110)
    plt.close(figure)


def print_summary(folder):
    summary = json.loads((folder / "summary.json").read_text())
    told = lambda name: "; ".join(f"{reason} {n:,}" for reason, n in summary[name].items()) or "-"
    print(
        f"{folder}: {summary['hours']:.2f} hours in {summary['clips']:,} clips of "
        f"{summary['tracks']:,} tracks, of {summary['of']:,} found\n"
        f"  splits          {told('splits')}\n"
        f"  licences        {told('licences')}\n"
        f"  captions from   {told('captions')}\n"
        f"  files left out  {told('files_left_out')}\n"
        f"  clips left out  {told('clips_left_out')}\n"
        f"  one by one in skipped.jsonl; histogram.png; `python data.py show {folder}` plays some"
    )


def print_speed(clock, elapsed):
    """How many seconds of audio a second each stage did, in its process; and all of them."""
    audio = clock.pop("audio", 0.0)
    if audio:
        stages = ", ".join(f"{s} {audio / t:,.0f} x" for s, t in sorted(clock.items()) if t > 0.01)
        print(f"{audio / elapsed:,.0f} x real time ({stages}; start of the processes included)")


def show(folder, n, out, seed):
    """Lists n random clips with their captions, writes what their tokens say, and plots it."""
    folder, out = Path(folder), Path(out or Path(folder) / "show")
    if not (folder / "manifest.jsonl").is_file():
        raise ValueError(
            f"no data at {folder}: make some with `python data.py folder MUSIC --out {folder}`"
        )
    rows = read_lines(folder / "manifest.jsonl")
    if not rows:
        raise ValueError(f"{folder} has no clips; skipped.jsonl says why")
    codebooks = max(row["codebooks"] for row in rows)
    parts = [Clips(folder, split, codebooks) for split in sorted({row["split"] for row in rows})]
    picks = [(clips, i) for clips in parts for i in range(len(clips))]
    codec = load_codec(parts[0].meta["codec"])
    out.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(picks))[:n]
    for number, (clips, i) in enumerate(picks[j] for j in order):
        row = clips.rows[i]
        track = row.get("track", "toy")
        path = out / f"{number}-{re.sub(r'[^0-9A-Za-z]+', '-', track).strip('-')[:60]}.wav"
        words = row.get("caption") or str(row["factors"])
        seconds = row["frames"] * codec.hop / codec.sample_rate
        about = [f"from {row['start']:.0f} s" if "start" in row else "", f"{seconds:.1f} s"]
        about += [row["split"], row.get("licence", ""), row.get("credit", "")]
        print(f"{path}: {track!r}, {', '.join(filter(None, about))}\n  {words!r}")
        with torch.inference_mode():
            audio = codec.decode(codec.from_codes(torch.from_numpy(clips.codes(i))[None]))[0]
        write_audio(path, audio)
        picture = Picture(len(audio))
        for _ in picture.watch([audio]):
            pass
        title = words if len(words) < 100 else words[:97] + "..."
        picture.save(path.with_suffix(".png"), title, codec.sample_rate)


# -------------------------------------------------------------------------- the command line ----

SOURCES = {  # what differs from the options' defaults
    "folder": {},
    "jamendo": dict(
        keep_vocals=False, keep_vocal_captions=False, one_clip=True,
        captioner=captions.CAPTIONER, rephraser=captions.REPHRASER,
    ),
    "musiccaps": dict(keep_vocal_captions=False, seconds=10.0, one_clip=True),
}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    folder = commands.add_parser("folder", help="audio with a .txt beside each file, or a table")
    folder.add_argument("music", help="folder of audio, searched to any depth")
    jamendo = commands.add_parser("jamendo", help="MTG-Jamendo, the paper's training corpus")
    jamendo.add_argument("metadata", help="a clone of github.com/MTG/mtg-jamendo-dataset")
    jamendo.add_argument("audio", help="folder of raw_30s: 00/7400.mp3 and so on")
    jamendo.add_argument("--song-describer", default="", help="its song_describer.csv, to exclude")
    musiccaps = commands.add_parser("musiccaps", help="MusicCaps, the paper's test set")
    musiccaps.add_argument("table", help="musiccaps-public.csv")
    musiccaps.add_argument("audio", help="folder of clips that you have: YTID.wav and so on")
    musiccaps.add_argument("--choose", type=int, default=200, help="so many, by seed [200]")
    for name, command in dict(folder=folder, jamendo=jamendo, musiccaps=musiccaps).items():
        command.add_argument("--out", required=True, help="data folder to make, or to go on with")
        command.add_argument(
            "--workers", type=int, default=1, help="processes, one thread each [1]"
        )
        add_arguments(command, Options, **SOURCES[name])
    look = commands.add_parser("show", help="list, play and plot random clips")
    look.add_argument("folder", help="data folder")
    look.add_argument("--n", type=int, default=4, help="how many [4]")
    look.add_argument("--out", default="", help="folder for audio and pictures [FOLDER/show]")
    look.add_argument("--seed", type=int, default=0, help="others [0]")
    args = parser.parse_args(argv)
    if args.command == "show":
        return show(args.folder, args.n, args.out, args.seed)
    options = Options(**{f.name: getattr(args, f.name) for f in fields(Options)})
    if not options.seconds >= 1:
        raise ValueError(f"--seconds must be 1 or more, not {options.seconds}")
    if not 0 <= options.valid <= 1:
        raise ValueError(f"--valid is a share between 0 and 1, not {options.valid}")
    if args.command == "folder":
        tracks, names = folder_tracks(args.music, options), [args.music]
    elif args.command == "jamendo":
        names = [args.metadata, args.audio, args.song_describer]
        tracks = jamendo_tracks(*names, options)
    else:
        names = [args.table, args.audio, args.choose]
        tracks = musiccaps_tracks(*names, options)
    build(tracks, args.out, [args.command, *names], options, args.workers)


if __name__ == "__main__":
    entry(main)
