"""The paper's corpora as lists of tracks for curate.py: MTG-Jamendo for training (SSMTTM IV-A), and
MusicCaps for the test. Nothing is decoded here."""

import re
from pathlib import Path

import numpy as np

from curate import audio_files, find_caption, new_track, sentence
from paper.captions import explained, facts_of, mentions_vocals, read_rows, read_table

CLONE = "is missing or broken: `git clone https://github.com/MTG/mtg-jamendo-dataset`"


def jamendo_tracks(metadata, audio, song_describer, options):
    """metadata: a clone of github.com/MTG/mtg-jamendo-dataset; audio: the folder of raw_30s, with
    00/7400.mp3 and so on, or the smaller 00/7400.low.mp3.

    Left out: the Song Describer Dataset, which is test material. `song_describer` is its
    song_describer.csv; without it, split-0's test set is left out, which contains it. Validation:
    split-0's. Splits separate artists: a track in none goes where its artist is, or else where
    data.py puts the artist.
    """
    rows = read_jamendo(f"{metadata}/data/raw_30s_cleantags.tsv")  # synonyms are one tag
    split = lambda name: read_jamendo(f"{metadata}/data/splits/split-0/autotagging-{name}.tsv")
    train, valid, test = split("train"), split("validation"), split("test")
    excluded, why = test, "is in split-0's test set, which holds Song Describer"
    if song_describer:
        with explained(f"{song_describer} is not Song Describer's song_describer.csv"):
            excluded = {int(row["track_id"]) for row in read_rows(song_describer)}
        why = "belongs to the Song Describer Dataset"
    splits = {row["artist"]: dict(split="train") for row in (train | test).values()}
    splits |= {row["artist"]: dict(split="valid") for row in valid.values()}
    licences = read_licences(f"{metadata}/audio_licenses.txt")
    tracks, table = [], read_table(options.captions)
    for number, row in rows.items():
        name, file = f"track_{number:07}", row.pop("path")
        path = Path(audio, file)
        if not path.is_file():
            path = path.with_suffix(".low.mp3")
        caption = find_caption(path, [file, name, str(number), f"{number}.mp3"], table)
        facts = facts_of(row["tags"], options.keep_vocals)
        if facts and not caption[0] and options.captioner in ("none", "musicnn"):
            caption = sentence(facts, np.random.default_rng(0)), "tags"
            row["facts"] = facts
        about = row | licences.get(file, {}) | splits.get(row["artist"], {})
        missing = f"is not in {audio}, the folder of raw_30s: 00/7400.mp3 and so on"
        skip = why if number in excluded else "" if path.is_file() else missing
        tracks.append(new_track(path, name, caption, options, skip, **about))
    return tracks


def read_jamendo(tsv):
    """A table of MTG-Jamendo -> {track number: artist, album, path, seconds, tags}"""
    with explained(f"{tsv} {CLONE}"):
        return {
            int(row["TRACK_ID"].removeprefix("track_")): dict(
                source="MTG-Jamendo", artist=row["ARTIST_ID"], album=row["ALBUM_ID"],
                path=row["PATH"], seconds=float(row["DURATION"]),
                tags=[row["TAGS"], *row.get(None, [])],
            )
            for row in read_rows(tsv)  # which has what is in no named column at None
        }  # fmt: skip


def read_licences(file):
    """audio_licenses.txt -> {path: licence (a URL), credit ("Title by Artist from Jamendo: URL")}.
    Its blocks are a path, the credit, and a sentence that ends with the licence."""
    with explained(f"no clip may go without its licence, and {file} {CLONE}"):
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    blocks = re.findall(r"^(\d\d/\d+\.mp3)\s+(.+)\n\s*.*?(https?://\S+)", text, re.M)
    return {path: dict(credit=credit, licence=licence) for path, credit, licence in blocks}


def musiccaps_tracks(table, audio, choose, options):
    clips = read_musiccaps(table, audio, options.seed, options.keep_vocal_captions)[:choose]
    more = dict(source="MusicCaps", split="test")
    return [new_track(path, key, (text, "MusicCaps"), options, **more) for key, text, path in clips]


def read_musiccaps(table, audio, seed, vocals=False):
    """Clips of musiccaps-public.csv whose captions mention no vocals, and whose files in the folder
    `audio` have the ytid in their names -> [(ytid, caption, path)], in an order drawn by seed"""
    with explained(f"{table} is not musiccaps-public.csv with columns ytid and caption"):
        captions = {row["ytid"]: row["caption"].strip() for row in read_rows(table)}
    stems = {path: Path(path).stem for path, problem in audio_files(audio) if not problem}
    found = {stem[i : i + 11]: path for path, stem in stems.items() for i in range(len(stem) - 10)}
    clips = [
        (ytid, caption, found[ytid])
        for ytid, caption in captions.items()
        if ytid in found and (vocals or not mentions_vocals(caption))
    ]
    if not clips:
        raise ValueError(f"no clip of {table} is in {audio}: expected files such as YTID.wav")
    return [clips[i] for i in np.random.default_rng(seed).permutation(len(clips))]
