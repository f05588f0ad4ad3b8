"""The paper's corpora as lists of tracks for data.py: MTG-Jamendo for training (SSMTTM IV-A), and
MusicCaps for the test. Nothing is decoded here."""

import csv
import itertools
import re
from pathlib import Path

import numpy as np

from curate import VOCAL, audio_files, find_caption, new_track
from paper.captions import mentions_vocals, read_table, sentence_from_tags

# -------------------------------------------------------------------------------- MTG-Jamendo ----


def jamendo_tracks(metadata, audio, song_describer, options):
    """metadata: a clone of github.com/MTG/mtg-jamendo-dataset; audio: the folder of raw_30s, with
    00/7400.mp3 and so on, or the smaller 00/7400.low.mp3.

    Left out: the Song Describer Dataset, which is test material. `song_describer` is its
    song_describer.csv; without it, split-0's whole test set is left out, which contains it.
    Validation: split-0's validation set. The splits separate artists. A track in no split goes
    where its artist is, or else where data.py puts the artist.
    """
    metadata = Path(metadata)
    rows = read_jamendo(metadata / "data" / "raw_30s.tsv")
    splits = read_splits(metadata / "data" / "splits" / "split-0")
    if song_describer:
        excluded, why = read_song_describer(song_describer), "belongs to the Song Describer Dataset"
    elif splits["test"]:
        excluded, why = splits["test"], "is in split-0's test set, which holds Song Describer"
    else:
        raise ValueError(
            f"{metadata} has no data/splits/split-0: clone github.com/MTG/mtg-jamendo-dataset, or "
            "name Song Describer's tracks with --song-describer song_describer.csv"
        )
    valid_artists = {row["artist"] for row in splits["validation"].values()}
    train_artists = {r["artist"] for name in ("train", "test") for r in splits[name].values()}
    licences = read_licences(metadata / "audio_licenses.txt")
    table = read_table(options.captions) if options.captions else {}
    tracks = []
    for number, row in rows.items():
        name, file = f"track_{number:07}", row.pop("path")
        path = Path(audio) / file
        if not path.exists() and path.with_suffix(".low.mp3").exists():
            path = path.with_suffix(".low.mp3")
        caption = find_caption(path, (file, name, str(number), f"{number}.mp3"), table)
        if not caption[0] and options.captioner == "none":
            caption = sentence_from_tags(row["tags"], options.keep_vocals), "tags"
        about = dict(source="MTG-Jamendo") | row | licences.get(file, {})
        if row["artist"] in valid_artists or row["artist"] in train_artists:
            about["split"] = "valid" if row["artist"] in valid_artists else "train"
        missing = f"is not in {audio}, the folder of raw_30s: 00/7400.mp3 and so on"
        skip = why if number in excluded else "" if path.is_file() else missing
        tracks.append(new_track(path, name, caption, options, skip, **about))
    return tracks


def read_jamendo(tsv):
    """A table of MTG-Jamendo -> {track number: artist, album, path, seconds, tags}. Its lines are
    TRACK_ID ARTIST_ID ALBUM_ID PATH DURATION TAGS; all further columns are tags."""
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


def read_splits(folder):
    names = ("train", "validation", "test")
    files = {name: folder / f"autotagging-{name}.tsv" for name in names}
    return {name: read_jamendo(file) if file.is_file() else {} for name, file in files.items()}


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
            elif path and line.strip("-") and "credit" not in licences[path]:
                licences[path]["credit"] = line
            elif path and (found := re.search(r"https?://\S+", line)):
                licences[path]["licence"] = found[0]
    return licences


def read_song_describer(file):
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            return {_number(row["track_id"]) for row in csv.DictReader(lines)}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is not Song Describer's song_describer.csv ({error!r})") from None


# ---------------------------------------------------------------------------------- MusicCaps ----


def musiccaps_tracks(table, audio, choose, options):
    """table: musiccaps-public.csv; audio: a folder of clips named by the ytid. Of the clips that
    are there, and whose captions do not mention vocals, `choose` are drawn by the seed."""
    rows, files = read_musiccaps(table), musiccaps_files(audio)
    usable = [
        name
        for name, caption in sorted(rows.items())
        if name in files and (options.keep_vocal_captions or not mentions_vocals(caption))
    ]
    if not usable:
        raise ValueError(f"no clip of {table} is in {audio}: expected files such as YTID.wav")
    order = np.random.default_rng(options.seed).permutation(len(usable))
    chosen = {usable[i] for i in order[:choose]}
    tracks = []
    for name, caption in sorted(rows.items()):
        skip = "" if name in chosen else f"is not among the {choose} chosen"
        if name not in files:
            skip = f"has no audio in {audio}"
        elif name not in usable:
            skip = VOCAL
        about = dict(source="MusicCaps", split="test")
        path = files.get(name, name)
        tracks.append(new_track(path, name, (caption, "MusicCaps"), options, skip, **about))
    return tracks


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
    """-> {ytid: path}; downloaders put the ytid first in the name, after one character, or in
    brackets."""
    files = {}
    for path, problem in audio_files(audio):
        stem = Path(path).stem
        for name in (stem[:11], stem[1:12], *re.findall(r"\[([\w-]{11})\]", stem)):
            if not problem:
                files.setdefault(name, path)
    return files
