"""From audio files to a data folder (data.py): what `python data.py folder` and the others run.

A track becomes clips, each clip codes and a caption, all of them one folder. A file that cannot be
used is left out, with the reason, and does not stop the others.
"""

import functools
import hashlib
import itertools
import json
import multiprocessing as mp
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import av  # FFmpeg's libraries
import numpy as np
import torch
from tqdm import tqdm

import data
from audio import (
    FRAME_RATE,
    SAMPLE_RATE,
    audio_blocks,
    lock_folder,
    replacing,
    write_stream,
    write_text,
)
from codec import load_codec
from options import add_arguments, check, check_value, flag, new_parser, option
from paper.captions import Describer, Separator, mentions_vocals, plain_name, read_table
from paper.musicnn import Musicnn

# --------------------------------------------------------------------- files and their words ----
#
# A track is a dict of what the manifest will say about it; "skip" says why it is left out. What
# only the paper's corpora need is in paper/sources.py. A file's words are what you wrote: a line of
# a table, or a .txt file. Where you wrote none, they are what its tags say, or else the names of
# the file and its folders: "facts", from which a caption is drawn at each visit.

AUDIO = """.wav .flac .ogg .oga .opus .spx .mp3 .mp2 .mp1 .mpc .m4a .m4b .m4r .mp4 .aac .ac3 .eac3
.mka .mkv .webm .wma .asf .3gp .ape .wv .tta .tak .shn .aiff .aif .aifc .afc .au .caf .w64 .dsf
.dff""".split()
NO_CAPTION = "has no caption: add a .txt file of the same name, a --captions table or a --captioner"
VOCAL = "has a caption that mentions vocals"
SHARD_BYTES = 256 << 20  # of a codes file


@dataclass(frozen=True)
class Options:
    """What becomes of a track."""

    codec: str = option("toy", "toy (ships with this code) or dac (the paper's)", ["toy", "dac"])
    seconds: float = option(30.0, "length of a clip", "[1, 3600]")
    valid: float = option(0.1, "share kept for validation, if the source has no splits", "[0, 1)")
    captions: str = option("", "table with columns path and caption")
    titles: bool = option(False, "captions made from tags may name title and artist")
    captioner: str = option("none", "for clips without one: musicnn or seungheondoh/lp-music-caps")
    rephraser: str = option("none", "chat model of the hub that sums up the captioner's sentences")
    keep_vocals: bool = option(True, "leave vocals in; otherwise HTDemucs removes them")
    keep_vocal_captions: bool = option(True, "keep clips whose captions mention vocals")
    keep_silence: bool = option(False, "keep clips that are mostly silent")
    one_clip: bool = option(False, "one random clip a track instead of all")
    licence: str = option("unknown", "of the music, if the source does not say")
    seed: int = option(0, "of --one-clip and --choose", "[0, 4294967296)")
    workers: int = option(1, "processes", "[1, 1000]")

    def __post_init__(self):
        check(self)


def audio_files(root):
    """Audio files below `root`, sorted: [(path, why it cannot be used or "")]. Follows links to
    folders, but enters each folder once."""
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder")
    seen, found = {os.path.realpath(root)}, []
    failed = lambda error: found.append((error.filename, f"cannot be read: {error.strerror}"))
    for folder, names, files in os.walk(root, followlinks=True, onerror=failed):
        for name in sorted(names):
            real = os.path.realpath(os.path.join(folder, name))
            # Not into data folders: `show` writes clips there.
            if real in seen or os.path.exists(f"{real}/manifest.jsonl"):
                names.remove(name)
            seen.add(real)
        names.sort()
        for path in (os.path.join(folder, name) for name in files):
            if os.path.splitext(path)[1].lower() in AUDIO:
                usable = os.path.isfile(path)
                found.append((path, "" if usable else "is a broken or circular link, or no file"))
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def folder_tracks(music, options):
    """Your own music: audio files with captions in .txt files or in a table, or without any."""
    tracks, table = [], read_table(options.captions)
    unknown = {*table}  # lines of the table that name no file
    for path, problem in audio_files(music):
        name = Path(os.path.relpath(path, music)).as_posix()
        names = [*map(plain_name, [name, path, Path(path).name, Path(path).stem])]
        unknown -= {*names}
        caption = find_caption(path, names, table)
        tags = {} if problem else header(path)[0]
        about = {key: tags[key] for key in ("artist", "licence") if key in tags}
        if not caption[0] and options.captioner in ("none", "musicnn"):
            about["facts"], origin = facts_of(tags, name, options)
            caption = sentence(about["facts"], np.random.default_rng(0)), origin
        tracks.append(new_track(path, name, caption, options, problem, source="folder", **about))
    if not tracks:
        raise ValueError(f"no audio below {music}: expected files such as song.wav with song.txt")
    if unknown:
        example = f"such as {min(unknown)!r}"
        print(f"{len(unknown):,} of {len(table):,} captions in the table name no file, {example}")
    return tracks


def find_caption(path, names, table):
    """A file's caption, and where it comes from; both are empty if there is none. The --captions
    table comes first, which knows the file by one of `names`, then the .txt file of its name."""
    for name in names:
        if name in table:
            return table[name], "table"
    sidecar = Path(path).with_suffix(".txt")
    if not sidecar.is_file():
        return "", ""
    return sidecar.read_text(encoding="utf-8-sig", errors="replace").strip(), "sidecar"


TAGS = {  # what FFmpeg, and so PyAV, calls the tags of the many formats
    "genre": ("genre",), "mood": ("mood", "tmoo"), "bpm": ("bpm", "tbpm", "tmpo"),
    "key": ("initialkey", "initial_key", "tkey", "key"), "title": ("title",),
    "artist": ("artist", "album_artist"), "year": ("date", "year", "tyer"),
    "licence": ("license", "licence", "wcop"),
}  # fmt: skip
EMPTY = set("track audio music song untitled unknown various artists other misc none demo".split())
EMPTY |= set("game games video soundtrack ost".split())


@functools.lru_cache(None)
def header(path):
    """What a file's header says -> ({tag: text} by the names of TAGS, without those that say
    nothing; seconds or 0)"""
    try:
        with av.open(f"file:{path}", metadata_errors="ignore") as opened:
            sources = [*opened.streams.audio[:1], opened]  # Ogg has tags in its stream
            found = {k.lower(): v for one in sources for k, v in one.metadata.items()}
            seconds = (opened.duration or 0) / 1e6
    except av.FFmpegError:  # what is wrong with it is said when it is decoded
        return {}, 0
    found = {tag: next(filter(None, map(found.get, names)), "") for tag, names in TAGS.items()}
    found = {tag: " ".join(text.split())[:100] for tag, text in found.items()}
    return {tag: text for tag, text in found.items() if set(text.lower().split()) - EMPTY}, seconds


def facts_of(tags, name, options):
    """What tags or, if they tell nothing, names of file and folders say -> ({fact: text}, where it
    comes from)."""
    facts = {tag: tags[tag].lower() for tag in ("genre", "mood") if tag in tags}
    if tempo := re.match(r"[1-9]\d{1,2}\b", tags.get("bpm", "")):
        facts["bpm"] = tempo[0]
    if key := re.fullmatch(r"([A-G][#b]?) ?(m|min|minor|maj|major|)", tags.get("key", "")):
        facts["key"] = f"{key[1]} {'minor' if key[2] in ('m', 'min', 'minor') else 'major'}"
    if year := re.search(r"(19|20)\d\d", tags.get("year", "")):
        facts["decade"] = f"{year[0][:3]}0s"
    if options.titles:
        facts |= {tag: tags[tag] for tag in ("title", "artist") if tag in tags}
    if {*facts} - {"decade"}:
        return facts, "tags"
    words = re.findall(r"[^\W\d_]{3,}", Path(name).with_suffix("").as_posix().lower())
    words = [word for word in dict.fromkeys(words) if word not in EMPTY]
    return (facts | {"name": " ".join(words)}, "names") if words else (facts, "nothing")


def sentence(facts, rng):
    """A caption from facts, some of them, in varied words; "music" if there are none."""
    if not facts:
        return "music"
    some = {k: v for k, v in facts.items() if rng.random() < 0.75} or dict(facts)
    some["kind"] = rng.choice(["music", "piece", "track", "tune"])
    forms = dict(
        mood="{}", pace="{}", genre="{}", name="{}", kind="{}", instrument="with {}",
        bpm="at {} bpm", key="in {}", decade="from the {}", title='"{}"', artist="by {}",
    )  # fmt: skip
    return " ".join(form.format(some[k]) for k, form in forms.items() if k in some)


def new_track(path, name, caption, options, skip="", **about):
    """-> a track. caption: the text, and where it comes from; about: more for the manifest."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    track = dict(path=str(path), track=name, licence=options.licence, bytes=size) | about
    text, origin = caption
    if text:
        track |= dict(caption=text, caption_from=origin)
    if "\N{REPLACEMENT CHARACTER}" in text or "\0" in text:
        skip = skip or "has a caption that is not UTF-8 text"
    elif text or options.captioner == "none":
        skip = skip or fault(text, options)
    return track | (dict(skip=skip) if skip else {})


def fault(caption, options):
    """Why a caption, maybe an empty one, cannot be used, or "" if it can"""
    vocal = not options.keep_vocal_captions and mentions_vocals(caption)
    return VOCAL if vocal else "" if caption else NO_CAPTION


# --------------------------------------------------------------------- from a track to clips ----


@functools.lru_cache(1)
def load_models(options):
    """-> codec, separator, captioner; the last two are None unless asked for."""
    torch.set_num_threads(1)  # sums in another order can change a code
    codec = load_codec(options.codec)
    if options.codec != "toy" and torch.cuda.is_available():
        codec.to("cuda")
    separate = None if options.keep_vocals else Separator()
    describe = None
    if options.captioner == "musicnn":
        describe = Musicnn().facts
    elif options.captioner != "none":
        describe = Describer(options.captioner, options.rephraser)
    return codec, separate, describe


def clips_of(path, length):
    """Yields (start, audio (1, length)), both in samples; the last may be shorter, but is at least
    a second long. Memory does not grow with the file."""
    held, start = np.zeros(0, np.float32), 0
    for block in audio_blocks(path):
        held = np.concatenate([held, block])
        while len(held) >= length:
            yield start, torch.from_numpy(held[:length].copy())[None]
            held, start = held[length:], start + length
    if len(held) >= SAMPLE_RATE:
        yield start, torch.from_numpy(held)[None]
    elif start == 0:
        raise ValueError(f"{path} is shorter than a second")


def random_clips(path, length, seed):
    """The same clips in an order drawn by the seed and the file's name; short ones only if there is
    no other. Each is read when it is asked for, so only one is in memory."""
    whole = sum(map(len, audio_blocks(path))) // length
    rng = np.random.default_rng([zlib.crc32(os.fsencode(os.path.basename(path))), seed])
    for i in rng.permutation(max(1, whole)):
        yield next(itertools.islice(clips_of(path, length), i, None))


def is_silent(audio):
    """Whether more than half of audio (1, S) is silent: tenths of a second with a level (RMS) more
    than 60 dB below full scale."""
    tenths = audio[0, : audio.shape[1] // 4410 * 4410].view(-1, 4410)
    return (tenths.square().mean(1).sqrt() < 1e-3).float().mean() > 0.5


@torch.inference_mode()
def make_clip(audio, track, options):
    """audio (1, S) -> codes (K, T) uint16, and its caption if the track has none. Of a clip that is
    left out: None, and the reason."""
    codec, separate, describe = load_models(options)
    if not options.keep_silence and is_silent(audio):
        return None, dict(reason="is silent for more than half of its length")
    if separate:
        audio = separate(audio)
        if not options.keep_silence and is_silent(audio):
            return None, dict(reason="is silent without its vocals")
    about = {}
    if options.captioner == "musicnn" and ("caption" not in track or "facts" in track):
        heard, origin = describe(audio[0].numpy()), track.get("caption_from", "nothing")
        about["facts"] = heard | track.get("facts", {})
        about["caption"] = sentence(about["facts"], np.random.default_rng(0))
        both = "musicnn" if origin == "nothing" else f"musicnn and {origin}"
        about["caption_from"] = both if heard else origin
    elif "caption" not in track:
        about["caption"], about["caption_from"] = describe(audio)
    if reason := fault((track | about)["caption"], options):
        return None, dict(reason=reason)
    device = next(codec.parameters(), audio).device
    return codec.encode(audio.to(device))[0].cpu().numpy().astype(np.uint16), about


def make_track(track, file, options):
    """Writes a track's result: the codes of its clips, and in JSON more about the clips and what
    was left out."""
    hop, path = load_models(options)[0].hop, track["path"]
    length = round(options.seconds * SAMPLE_RATE / hop) * hop
    parts = random_clips(path, length, options.seed) if options.one_clip else clips_of(path, length)
    made = []  # codes or None, and about them
    try:
        for start, audio in parts:
            codes, about = make_clip(audio, track, options)
            made.append((codes, dict(start=start / SAMPLE_RATE) | about))
            if options.one_clip and codes is not None:
                break
    except ValueError as error:  # the file is damaged somewhere: none of it is trusted
        made = [(None, dict(reason=str(error).removeprefix(path).lstrip(": ")))]
    codes = [codes for codes, _ in made if codes is not None]
    clips = [about for _, about in made if "reason" not in about]
    skipped = [about for _, about in made if "reason" in about]
    if not clips:
        skipped = [dict(reason="; ".join(sorted({about["reason"] for about in skipped})))]
    about = json.dumps(dict(clips=clips, skipped=skipped))
    with replacing(file) as temporary, open(temporary, "wb") as part:
        np.savez(part, *codes, about=about)  # its arrays are arr_0, arr_1, ...


def make_tracks(todo, options):
    """Makes the results [(track, file)] in this process or in several; yields after each."""
    if options.workers == 1:
        yield from (make_track(*pair, options) for pair in todo)
        return
    with ProcessPoolExecutor(options.workers, mp.get_context("spawn"), begin_worker) as pool:
        try:
            for job in as_completed([pool.submit(make_track, *pair, options) for pair in todo]):
                yield job.result()
        except BrokenExecutor:
            advice = "repeat the command, maybe with fewer --workers"
            raise ValueError(f"a worker died (out of memory?): {advice}") from None
        except BaseException:  # an error in a worker, or Ctrl-C
            for process in mp.active_children():
                process.terminate()
            raise


def begin_worker():
    """A worker leaves Ctrl-C to its parent, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: os._exit(mp.parent_process().join() or 1), daemon=True).start()


# ------------------------------------------------------------------- from tracks to a folder ----


class Writer:
    """Appends clips to a data folder. A clip is in the manifest once its codes are on disk; the
    next Writer overwrites what a process left unfinished when it died."""

    def __init__(self, folder, codec):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = dict(codec=codec.name, codebooks=codec.codebooks, codebook_size=codec.codebook_size)
        meta["frame_rate"] = codec.sample_rate / codec.hop
        path = self.folder / "meta.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != meta:
            raise ValueError(f"{folder} was begun with another codec; choose another --out")
        write_text(path, json.dumps(meta))
        self.manifest = self.folder / "manifest.jsonl"
        self.manifest.touch()
        with open(self.manifest, "r+b") as file:  # an unfinished line is cut off
            file.truncate(file.read().rfind(b"\n") + 1)
        self.shard, self.offset = 0, 0  # offset in codes, of two bytes
        for row in self.rows()[-1:]:
            self.shard, self.offset = row["shard"], row["offset"] + row["codebooks"] * row["frames"]

    def rows(self):
        return data.read_jsonl(self.manifest)

    def add(self, clips):
        """clips: [(codes (K, T), row)]; all of them enter the manifest, or none."""
        lines = ""
        for codes, row in clips:
            if 2 * self.offset > SHARD_BYTES:
                self.shard, self.offset = self.shard + 1, 0
            path = self.folder / f"codes-{self.shard:05}.bin"
            with open(path, "r+b" if path.exists() else "wb") as file:
                file.seek(2 * self.offset)
                file.write(np.asarray(codes, np.uint16).tobytes())
            K, T = codes.shape
            place = dict(shard=self.shard, offset=self.offset, codebooks=K, frames=T)
            lines += json.dumps(place | row) + "\n"
            self.offset += codes.size
        with open(self.manifest, "a", encoding="utf-8") as file:
            file.write(lines)


def build(tracks, out, plan, options):
    """Makes the data folder `out`, or what is missing of it. plan: the options that made it."""
    skipped = [dict(path=t["path"], reason=t["skip"]) for t in tracks if "skip" in t]
    usable = [(t, result_file(out, t, options)) for t in tracks if "skip" not in t]
    if not usable:
        raise ValueError(f"no file can be used: {listed(line['reason'] for line in skipped)}")
    check_plan(out, plan)
    codec = load_codec(options.codec)
    check_space(out, usable, codec, options)
    with lock_folder(out):
        write_text(out / "plan.json", json.dumps(plan, indent=1) + "\n")
        (out / "tracks").mkdir(exist_ok=True)
        todo = [(track, file) for track, file in usable if not file.exists()]
        if all("caption" in track and "facts" not in track for track, _ in todo):
            options = replace(options, captioner="none")  # it would have nothing to do
        made = make_tracks(todo, options)
        every = 0.1 if sys.stderr.isatty() else 30  # seconds
        list(tqdm(made, total=len(todo), unit="track", mininterval=every, disable=not todo))
        join(out, usable, skipped, codec, options.valid)


def result_file(out, track, options):
    """A track's file in tracks/: other audio, or a first caption where a captioner listens, has
    another name."""
    some = b""
    # Its beginning, middle and end; what cannot be read is told when it is decoded.
    with suppress(OSError), open(track["path"], "rb") as audio:
        for place in (0, track["bytes"] // 2, max(0, track["bytes"] - (1 << 16))):
            audio.seek(place)
            some += audio.read(1 << 16)
    written = "caption" in track and ("facts" not in track or options.captioner == "none")
    name = json.dumps([track["path"], track["bytes"], zlib.crc32(some), written])
    return out / "tracks" / f"{hashlib.sha1(name.encode()).hexdigest()}.npz"


def check_plan(out, plan):
    """ValueError if the folder holds what other options, or another program, made."""
    old = {}
    with suppress(OSError, ValueError, TypeError):  # none, or of another program
        old = dict(json.loads((out / "plan.json").read_text(encoding="utf-8")))
    if "codec" not in old and any(path.name != ".lock" for path in out.glob("*")):
        raise ValueError(f"{out} holds files that this command did not make: choose another --out")
    held = any(out.glob("tracks/*.npz")) or (out / "manifest.jsonl").exists()
    for name, value in plan.items() if held else ():
        if old.get(name) != value:
            said = flag(name) if hasattr(Options, name) else name
            changed = f"{said} {old.get(name)!r}, not {value!r}"
            raise ValueError(f"{out} was made with {changed}: choose another --out")


def check_space(out, usable, codec, options):
    """Prints how much there is to do, as far as it is known. ValueError if the disk is full."""
    seconds = 0
    for track in (track for track, file in usable if not file.exists()):
        # Some headers promise too much: no format needs less than 8 kbit/s.
        known = track.get("seconds") or min(header(track["path"])[1], track["bytes"] / 1000)
        seconds += min(known, options.seconds) if options.one_clip else known
    size = 2 * 2 * codec.codebooks * seconds * codec.sample_rate / codec.hop  # tracks/, codes-*
    size += sum(file.stat().st_size for _, file in usable if file.exists())
    free = shutil.disk_usage(next(p for p in (out, *out.resolve().parents) if p.exists())).free
    space = f"needs about {size / 1e6:,.0f} MB of disk; {free / 1e6:,.0f} MB are free"
    if size > free:
        raise ValueError(f"{out} {space}: choose another --out")
    print(f"{len(usable):,} usable files; {seconds / 3600:.2f} hours to encode; {space}")


def join(out, usable, skipped, codec, valid):
    """Builds the folder from the tracks' results, in the tracks' order. Everything is written to a
    folder of its own and then moved, the manifest last."""
    rows = []
    for track, file in usable:
        result = json.loads(np.load(file)["about"].item())
        rows += [track | clip | dict(codes=(file, i)) for i, clip in enumerate(result["clips"])]
        skipped += [dict(path=track["path"]) | line for line in result["skipped"]]
    for file in {*out.glob("tracks/*.npz")} - {row["codes"][0] for row in rows}:
        file.unlink()  # of other tracks, or without a clip: those are tried again
    if not rows:
        raise ValueError(f"no clip can be used: {listed(line['reason'] for line in skipped)}")
    share_out(rows, valid)
    new = out / "new"
    shutil.rmtree(new, ignore_errors=True)
    writer = Writer(new, codec)
    for row in rows:
        file, i = row.pop("codes")
        if row["split"] == "gap":
            reason = "is the gap between training and validation"
            skipped.append(dict(path=row["path"], start=row["start"], reason=reason))
            continue
        writer.add([(np.load(file)[f"arr_{i}"], row)])
    write_text(new / "skipped.jsonl", "".join(json.dumps(line) + "\n" for line in skipped))
    summarise(new)
    for old in [out / "manifest.jsonl", *out.glob("codes-*.bin")]:
        old.unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == "manifest.jsonl"):
        os.replace(file, out / file.name)
    new.rmdir()


def share_out(rows, valid):
    """Gives clips a "split" if their source gives none. Of fewer than ten tracks, the end of each
    is for validation; before it there is a gap of one clip, if the track has ten. Of more tracks,
    whole ones are, or all of an artist if there are ten artists: in the order of a checksum of
    their names, those that fit into the share that is asked for.
    """
    free = [row for row in rows if "split" not in row]
    sizes = Counter(row["path"] for row in free)
    by_time = len(sizes) < 10 and len(free) == len(rows) > len(sizes)
    names = [row.get("artist", row["track"]) for row in free]
    if len({*names}) < 10:
        names = [row["track"] for row in free]
    groups, wanted, held_out = Counter(names), valid * len(free), set()
    for name in sorted(groups, key=lambda name: zlib.crc32(os.fsencode(name))):
        if groups[name] <= 1.5 * wanted:
            held_out.add(name)
            wanted -= groups[name]
    if groups and len(held_out) == len(groups):
        held_out.discard(name)  # something to train on
    if not held_out and len(groups) > 1:
        held_out = {min(groups, key=groups.get)}
    for row, name in zip(free, names):
        i, size = row["codes"][1], sizes[row["path"]]
        first = size - min(max(1, round(valid * size)), size - 1)
        chosen = i >= first if by_time else name in held_out
        gap = by_time and size >= 10 and i == first - 1 > 0
        row["split"] = "train" if not valid else "gap" if gap else "valid" if chosen else "train"


def listed(values):
    return "; ".join(f"{value} ({n:,})" for value, n in Counter(values).most_common()) or "-"


def summarise(folder):
    """Prints a summary of a folder and writes it there."""
    rows, skipped = (data.read_jsonl(folder / f"{name}.jsonl") for name in ("manifest", "skipped"))
    used, unused = {row["path"] for row in rows}, [s for s in skipped if "start" not in s]
    summary = dict(
        hours=round(sum(row["frames"] for row in rows) / FRAME_RATE / 3600, 4),
        clips=len(rows),
        tracks=len(used),
        files_found=len(used) + len(unused),
        splits=Counter(row["split"] for row in rows),
        licences=Counter(row["licence"] for row in rows),
        captions=Counter(row["caption_from"] for row in rows),
        files_left_out=Counter(line["reason"] for line in unused),
        clips_left_out=Counter(line["reason"] for line in skipped if "start" in line),
    )
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    for name, value in summary.items():
        print(f"  {name:15} {listed(value) if isinstance(value, Counter) else value}")
    if unknown := summary["captions"]["nothing"]:
        print(f'{unknown:,} clips are only called "music": add .txt files, a table or tags')
    if {*summary["splits"]} == {"train"}:
        print("train.py also needs clips for validation: try a smaller --seconds, or add music")


def show(folder, n, out, seed):
    """Writes n random clips, as their tokens sound, and their pictures; prints the manifest."""
    from paper.figures import Picture

    clips = data.Clips(folder, None, None)
    codec = load_codec(clips.meta["codec"])
    out.mkdir(parents=True, exist_ok=True)
    for number, i in enumerate(np.random.default_rng(seed).permutation(len(clips))[:n]):
        with torch.inference_mode():
            audio = codec.decode(codec.from_codes(torch.from_numpy(clips.codes(i))[None]))[0]
        path = out / f"{number}.wav"
        picture = Picture(len(audio))
        write_stream(path, picture.watch([audio]))
        picture.save(path.with_suffix(".png"), clips.rows[i].get("track", "toy"), SAMPLE_RATE)
        print(path, json.dumps(clips.rows[i], ensure_ascii=False))


# -------------------------------------------------------------------------- the command line ----

DEFAULTS = {  # of the paper's corpora, where they differ from the options'
    "jamendo": dict(
        keep_vocals=False, keep_vocal_captions=False, one_clip=True,
        captioner="seungheondoh/lp-music-caps", rephraser="meta-llama/Meta-Llama-3-8B-Instruct",
    ),
    "musiccaps": dict(keep_vocal_captions=False, seconds=10.0, one_clip=True),
}  # fmt: skip


def main(argv=None):
    from paper.sources import jamendo_tracks, musiccaps_tracks

    parser = new_parser(data.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=new_parser)
    folder = commands.add_parser("folder", help="your own music, captions in .txt files or a table")
    folder.add_argument("music", type=os.path.abspath, help="audio, searched to any depth")
    jamendo = commands.add_parser("jamendo", help="MTG-Jamendo, the paper's training corpus")
    jamendo.add_argument("metadata", help="a clone of github.com/MTG/mtg-jamendo-dataset")
    jamendo.add_argument("audio", help="folder of raw_30s: 00/7400.mp3 and so on")
    jamendo.add_argument("--song-describer", default="", help="its song_describer.csv, to exclude")
    musiccaps = commands.add_parser("musiccaps", help="MusicCaps, the paper's test set")
    musiccaps.add_argument("table", help="musiccaps-public.csv")
    musiccaps.add_argument("audio", help="folder of clips that you have: YTID.wav and so on")
    musiccaps.add_argument("--choose", type=int, default=200, help="how many, by seed [200]")
    for name, command in commands.choices.items():
        command.add_argument("--out", type=Path, required=True, help="data folder to make or grow")
        add_arguments(command, Options, **DEFAULTS.get(name, {}))
    look = commands.add_parser("show", help="play and plot random clips")
    look.add_argument("folder", type=Path, help="data folder")
    look.add_argument("--n", type=int, default=4, help="how many [4]")
    look.add_argument("--out", type=Path, help="folder for audio and pictures [FOLDER/show]")
    look.add_argument("--seed", type=int, default=0, help="another seed shows others [0]")
    args = parser.parse_args(argv)
    if os.path.isfile(getattr(args, "captions", "")):
        args.captions = os.path.abspath(args.captions)
    if args.command == "show":
        check_value("n", args.n, "[1, 1e9]")
        check_value("seed", args.seed, "[0, 4294967296)")
        return show(args.folder, args.n, args.out or args.folder / "show", args.seed)
    options = Options(**{f.name: getattr(args, f.name) for f in fields(Options)})
    plan = {k: v for k, v in vars(args).items() if k not in ("out", "workers", "valid")}
    if args.command == "folder":
        tracks = folder_tracks(args.music, options)
    elif args.command == "jamendo":
        tracks = jamendo_tracks(args.metadata, args.audio, args.song_describer, options)
    else:
        check_value("choose", args.choose, "[1, 1e9]")
        tracks = musiccaps_tracks(args.table, args.audio, args.choose, options)
    build(tracks, args.out, plan, options)
