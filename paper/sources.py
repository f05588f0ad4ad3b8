"""Where music comes from: each source as a list of tracks, with all that is known of them.

  folder      your own music, a caption beside each file or in a table: the general case
  jamendo     MTG-Jamendo, the paper's training corpus (SSMTTM IV-A)
  musiccaps   MusicCaps, its test set

A track is a file and what the manifest will say of it; one that cannot be used says why. Nothing
is decoded here. data.py makes training tokens of the tracks.
"""

import csv
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from options import option
from paper import captions

AUDIO = ".wav .flac .ogg .mp3 .aiff .aif .opus .m4a .aac .wma .au .caf .w64 .mp4".split()
VOCAL = "has a caption that mentions vocals"


@dataclass
class Options:
    """What becomes of a track. Every stage can be left out."""

    codec: str = option("toy", "toy (ships here) or dac (the paper's)")
    seconds: float = option(30.0, "length of a clip", "(0, inf)")
    valid: float = option(
        0.1, "share of tracks kept for validation, where the source does not say", "[0, 1]"
    )
    captions: str = option(
        "", "table (.csv, .tsv, .jsonl, .parquet) with path and caption, or on the hub"
    )
    captioner: str = option(
        "none", "model that describes what has no caption: none, or LP-MusicCaps' name"
    )
    rephraser: str = option(
        "none", "chat model that makes one caption of a clip's three; none: joins them"
    )
    keep_vocals: bool = option(True, "leave vocals in; without, HTDemucs takes them out")
    keep_vocal_captions: bool = option(True, "keep clips whose captions mention vocals")
    keep_silence: bool = option(
        False, "keep clips that are silent for more than half of their length"
    )
    one_clip: bool = option(False, "one random clip of each track, not all")
    licence: str = option("unknown", "of the music, where the source does not say")
    seed: int = option(0, "of the choices of --one-clip and --choose", "[0, 4294967296)")


class Track(NamedTuple):
    """A unit of work."""

    about: dict  # goes into the manifest: path, track, source, licence, bytes, caption, tags ...
    reason: str = option("", "why it is left out, where its source knows already")

    @property
    def path(self):
        return self.about["path"]

    @property
    def key(self):
        """Names its part: other captions or another size make another part."""
        return hashlib.sha1(json.dumps(self).encode()).hexdigest()


def audio_files(root):
    """Audio below `root`, sorted: [(path, why it cannot be used or "")]. Links to folders are
    followed, each folder once, so that loops end."""
    if not os.path.isdir(root):
        raise ValueError(f"{root} is no folder")
    seen, found = {os.path.realpath(root)}, []
    failed = lambda error: found.append((error.filename, f"cannot be read: {error.strerror}"))
    for folder, names, files in os.walk(root, followlinks=True, onerror=failed):
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(names)}
        names[:] = [n for n in real if real[n] not in seen and not seen.add(real[n])]
        for path in (os.path.join(folder, name) for name in files):
            if os.path.splitext(path)[1].lower() in AUDIO:
                usable = os.path.isfile(path)
                found.append((path, "" if usable else "is a broken or circular link, or no file"))
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def describe_file(path, track, options, **more):
    """The manifest's entries for a file."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    return dict(path=str(path), track=track, licence=options.licence, bytes=size) | more


def folder_tracks(music, options):
    """The general case: audio with a caption beside each file, or in a table."""
    table = captions.read_table(options.captions) if options.captions else {}
    tracks = []
    for path, reason in audio_files(music):
        name = Path(os.path.relpath(path, music)).as_posix()
        about = describe_file(path, name, options, source="folder")
        names = (name, path, os.path.basename(path), Path(path).stem)
        caption, origin = next((table[n] for n in names if n in table), None), "table"
        if not caption and not reason:
            caption, reason = _sidecar(path)
            origin = "sidecar"
        if caption:
            about |= dict(caption=caption, caption_from=origin)
        tracks.append(Track(about, reason))
    if not tracks:
        raise ValueError(f"no audio below {music}: expected files such as song.wav with song.txt")
    return tracks


def _sidecar(path):  # -> caption or None, why the file cannot be used or ""
    text = Path(path).with_suffix(".txt")
    try:
        caption = text.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        return None, f"has a caption that is not UTF-8 text: {text.name}"
    except OSError:
        return None, ""
    return caption, "" if caption else f"has an empty caption: {text.name}"


def jamendo_tracks(metadata, audio, song_describer, options):
    """MTG-Jamendo: `metadata` is a copy of github.com/MTG/mtg-jamendo-dataset, `audio` the folder
    of raw_30s (00/7400.mp3 ..., or the smaller 00/7400.low.mp3).

    Left out: the tracks of the Song Describer Dataset, for they are test material. `song_describer`
    is its song_describer.csv; without it, all of split-0's test set, inside which they lie.
    Validation: split-0's validation set. The splits separate artists, and so does the rule for
    tracks that are in no split: they go where their artist is, else by the artist's name.
    """
    metadata = Path(metadata)
    rows = read_jamendo(metadata / "data" / "raw_30s.tsv")
    splits = {}
    for name in ("train", "validation", "test"):
        file = metadata / "data" / "splits" / "split-0" / f"autotagging-{name}.tsv"
        splits[name] = read_jamendo(file) if file.is_file() else {}
    if song_describer:
        excluded, why = _song_describer(song_describer), "belongs to the Song Describer Dataset"
    elif splits["test"]:
        excluded = splits["test"]
        why = "is in split-0's test set, where Song Describer's tracks are"
    else:
        raise ValueError(
            f"{metadata} has no data/splits/split-0: clone github.com/MTG/mtg-jamendo-dataset, or "
            "name Song Describer's tracks with --song-describer song_describer.csv"
        )
    valid_artists = {row["artist"] for row in splits["validation"].values()}
    train_artists = {r["artist"] for name in ("train", "test") for r in splits[name].values()}
    licences = read_licences(metadata / "audio_licenses.txt")
    table = captions.read_table(options.captions) if options.captions else {}
    tracks = []
    for number, row in rows.items():
        path = Path(audio) / row["path"]
        if not path.exists() and path.with_suffix(".low.mp3").exists():
            path = path.with_suffix(".low.mp3")
        known = licences.get(row["path"], {})
        about = describe_file(path, f"track_{number:07}", options, source="MTG-Jamendo")
        about |= {k: v for k, v in row.items() if k != "path"} | known
        if row["artist"] in valid_artists or row["artist"] in train_artists:
            about["split"] = "valid" if row["artist"] in valid_artists else "train"
        names = (row["path"], f"track_{number:07}", str(number), f"{number}.mp3")
        if caption := next((table[n] for n in names if n in table), None):
            about |= dict(caption=caption, caption_from=options.captions)
        reason = why if number in excluded else "" if path.is_file() else "is not there"
        tracks.append(Track(about, reason))
    return tracks


def read_jamendo(tsv):
    """A table of MTG-Jamendo -> {track number: artist, album, path, seconds, tags}. Its lines are
    TRACK_ID ARTIST_ID ALBUM_ID PATH DURATION TAGS, the tags being all further columns."""
    rows = {}
    try:
        with open(tsv, encoding="utf-8") as lines:
            for line in itertools.islice(lines, 1, None):
                track, artist, album, path, seconds, *tags = line.rstrip("\r\n").split("\t")
                rows[_number(track)] = dict(
                    artist=artist, album=album, path=path, seconds=float(seconds), tags=tags
                )
    except FileNotFoundError:
        raise ValueError(
            f"{tsv} is missing: `git clone https://github.com/MTG/mtg-jamendo-dataset`"
        ) from None
    except ValueError:
        raise ValueError(
            f"{tsv}, line {len(rows) + 2}: expected TRACK_ID ARTIST_ID ALBUM_ID PATH DURATION TAGS"
        ) from None
    return rows


def _number(name):  # "track_0000214" or "214" -> 214
    return int(name.removeprefix("track_"))


def read_licences(file):
    """audio_licenses.txt -> {path: licence (a URL), credit ("Title by Artist from Jamendo: URL")}.
    Its blocks are a path, the credit, and a sentence that ends with the licence."""
    licences, path = {}, None
    if not Path(file).is_file():
        raise ValueError(
            f"{file} is missing, and no clip may go without its licence: "
            "`git clone https://github.com/MTG/mtg-jamendo-dataset`"
        )
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in map(str.strip, lines):
            if re.fullmatch(r"\d\d/\d+\.mp3", line):
                path = line
                licences[path] = {}
            elif path and (found := re.search(r"license:? *(https?://\S+)", line)):
                licences[path]["licence"] = found[1]
            elif path and line.strip("-"):
                licences[path].setdefault("credit", line)
    return licences


def _song_describer(file):
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            return {_number(row["track_id"]) for row in csv.DictReader(lines)}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is not Song Describer's song_describer.csv ({error!r})") from None


def musiccaps_tracks(table, audio, choose, options):
    """MusicCaps: `table` is musiccaps-public.csv (ytid, start_s, end_s, ..., aspect_list, caption),
    `audio` a folder of clips whose names begin with the ytid, or hold it in brackets. Of those that
    are there, and whose caption does not mention vocals, `choose` by seed."""
    rows, files = read_musiccaps(table), musiccaps_files(audio)
    tracks = []
    for name, caption in sorted(rows.items()):
        about = describe_file(files.get(name, name), name, options, source="MusicCaps")
        about |= dict(split="test", caption=caption, caption_from="MusicCaps")
        reason = "" if name in files else f"has no audio in {audio}"
        if not options.keep_vocal_captions and captions.mentions_vocals(caption):
            reason = VOCAL
        tracks.append(Track(about, reason))
    usable = [i for i, track in enumerate(tracks) if not track.reason]
    if not usable:
        raise ValueError(f"no clip of {table} is in {audio}: expected files such as YTID.wav")
    order = np.random.default_rng(options.seed).permutation(len(usable))
    chosen = {usable[i] for i in order[:choose]}
    return [
        t if t.reason or i in chosen else Track(t.about, f"is not among the {choose} chosen")
        for i, t in enumerate(tracks)
    ]


def read_musiccaps(table):
    """-> {ytid: caption}"""
    try:
        with open(table, encoding="utf-8-sig", newline="") as lines:
            return {row["ytid"]: row["caption"].strip() for row in csv.DictReader(lines)}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{table} is not MusicCaps' table, musiccaps-public.csv with columns ytid and caption "
            f"({error!r})"
        ) from None


def musiccaps_files(audio):
    """-> {ytid: path}; as downloaders name files, by the ytid: first, behind one character, or in
    brackets"""
    files = {}
    for path, reason in audio_files(audio):
        stem = Path(path).stem
        for name in (stem[:11], stem[1:12], *re.findall(r"\[([\w-]{11})\]", stem)):
            if not reason:
                files.setdefault(name, path)
    return files
