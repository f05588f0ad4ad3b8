"""The paper's corpora as lists of tracks for curate.py: MTG-Jamendo for training (SSMTTM IV-A), and
MusicCaps for the test. Nothing is decoded here."""

import csv
import re
from pathlib import Path

import numpy as np

from curate import audio_files, find_caption, is_vocal, new_track
from paper.captions import explained, sentence_from_tags

CLONE = "is missing: `git clone https://github.com/MTG/mtg-jamendo-dataset`"


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
    train, valid, test = (
        read_jamendo(metadata / "data" / "splits" / "split-0" / f"autotagging-{name}.tsv")
        for name in ("train", "validation", "test")
    )
    if song_describer:
        excluded, why = read_song_describer(song_describer), "belongs to the Song Describer Dataset"
    else:
        excluded, why = test, "is in split-0's test set, which holds Song Describer"
    splits = {row["artist"]: "train" for row in (train | test).values()}
    splits |= {row["artist"]: "valid" for row in valid.values()}
    licences = read_licences(metadata / "audio_licenses.txt")
    tracks = []
    for number, row in rows.items():
        name, file = f"track_{number:07}", row.pop("path")
        path = Path(audio) / file
        if not path.exists() and path.with_suffix(".low.mp3").exists():
            path = path.with_suffix(".low.mp3")
        caption = find_caption(path, [file, name, str(number), f"{number}.mp3"], options)
        if not caption[0] and options.captioner == "none":
            caption = sentence_from_tags(row["tags"], options.keep_vocals), "tags"
        about = dict(source="MTG-Jamendo") | row | licences.get(file, {})
        if row["artist"] in splits:
            about["split"] = splits[row["artist"]]
        missing = f"is not in {audio}, the folder of raw_30s: 00/7400.mp3 and so on"
        skip = why if number in excluded else "" if path.is_file() else missing
        tracks.append(new_track(path, name, caption, options, skip, **about))
    return tracks


def read_jamendo(tsv):
    """A table of MTG-Jamendo -> {track number: artist, album, path, seconds, tags}. Its lines are
    TRACK_ID ARTIST_ID ALBUM_ID PATH DURATION TAGS; all further columns are tags."""
    with explained(f"{tsv} {CLONE}"):
        _, *lines = Path(tsv).read_text(encoding="utf-8").rstrip().split("\n")
    rows = {}
    for number, line in enumerate(lines, 2):
        with explained(
            f"{tsv}, line {number}: expected TRACK_ID ARTIST_ID ALBUM_ID PATH DURATION TAGS"
        ):
            track, artist, album, path, seconds, *tags = line.split("\t")
            rows[_number(track)] = dict(
                artist=artist, album=album, path=path, seconds=float(seconds), tags=tags
            )
    return rows


def _number(name):  # "track_0000214" or "214" -> 214
    return int(name.removeprefix("track_"))


def read_licences(file):
    """audio_licenses.txt -> {path: licence (a URL), credit ("Title by Artist from Jamendo: URL")}.
    Its blocks are a path, the credit, and a sentence that ends with the licence."""
    with explained(f"no clip may go without its licence, and {file} {CLONE}"):
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    licences = {}
    blocks = re.split(r"^\s*(\d\d/\d+\.mp3)\s*$", text, flags=re.M)[1:]
    for path, block in zip(blocks[::2], blocks[1::2]):
        credit, *rest = [line.strip() for line in block.split("\n") if line.strip(" -")] or [""]
        licences[path] = dict(credit=credit)
        if found := re.search(r"https?://\S+", " ".join(rest)):
            licences[path]["licence"] = found[0]
    return licences


def read_song_describer(file):
    with explained(f"{file} is not Song Describer's song_describer.csv"):
        with open(file, encoding="utf-8-sig", newline="") as lines:
            return {_number(row["track_id"]) for row in csv.DictReader(lines)}


def musiccaps_tracks(table, audio, choose, options):
    """table: musiccaps-public.csv; audio: a folder of clips named by the ytid. Of the clips that
    are there, and whose captions do not mention vocals, `choose` are drawn by the seed."""
    rows, files = sorted(read_musiccaps(table).items()), musiccaps_files(audio)
    usable = [name for name, text in rows if name in files and not is_vocal(text, options)]
    if not usable:
        raise ValueError(f"no clip of {table} is in {audio}: expected files such as YTID.wav")
    rng = np.random.default_rng(options.seed)
    others = {usable[i] for i in rng.permutation(len(usable))[choose:]}
    tracks = []
    for name, text in rows:
        skip = f"is not among the {choose} chosen" if name in others else ""
        skip = skip if name in files else f"has no audio in {audio}"
        about = dict(source="MusicCaps", split="test")
        path = files.get(name, name)
        tracks.append(new_track(path, name, (text, "MusicCaps"), options, skip, **about))
    return tracks


def read_musiccaps(table):
    """-> {ytid: caption}"""
    columns = "musiccaps-public.csv with columns ytid and caption"
    with explained(f"{table} is not MusicCaps' table, {columns}"):
        with open(table, encoding="utf-8-sig", newline="") as lines:
            return {row["ytid"]: row["caption"].strip() for row in csv.DictReader(lines)}


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
