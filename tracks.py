"""Which music a data folder is made from: audio files and their captions, as a list of tracks.

A track is a dict of what the manifest will say about it; "skip" says why it is left out. What only
the paper's corpora need is in paper/sources.py. Nothing is decoded here.

A file's words are what you wrote: a line of a table, or a .txt file. Where you wrote none, they are
what its tags say, or else the names of the file and its folders: "facts", from which a caption is
drawn at each visit.
"""

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from options import check, option

AUDIO = """.wav .flac .ogg .oga .opus .spx .mp3 .mp2 .mpc .m4a .m4b .mp4 .aac .mka .wma .ape .wv
.tta .aiff .aif .aifc .au .caf .w64""".split()
NO_CAPTION = "has no caption: add a .txt file of the same name, a --captions table or a --captioner"
VOCAL = "has a caption that mentions vocals"


@dataclass(frozen=True)
class Options:
    """What becomes of a track."""

    codec: str = option("toy", "toy (ships with this code) or dac (the paper's)", ["toy", "dac"])
    seconds: float = option(30.0, "length of a clip", "[1, inf)")
    valid: float = option(0.1, "share kept for validation, if the source has no splits", "[0, 1)")
    captions: str = option("", "table with columns path and caption, or a name on the hub")
    titles: bool = option(False, "captions made from tags may name title and artist")
    captioner: str = option("none", "for clips without a caption: seungheondoh/lp-music-caps")
    rephraser: str = option("none", "chat model of the hub that sums up the captioner's sentences")
    keep_vocals: bool = option(True, "leave vocals in; otherwise HTDemucs removes them")
    keep_vocal_captions: bool = option(True, "keep clips whose captions mention vocals")
    keep_silence: bool = option(False, "keep clips that are mostly silent")
    one_clip: bool = option(False, "one random clip a track instead of all")
    licence: str = option("unknown", "of the music, if the source does not say")
    seed: int = option(0, "of --one-clip and --choose", "[0, 4294967296)")

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
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(names)}
        names[:] = [name for name in real if real[name] not in seen]
        seen.update(real.values())
        for path in (os.path.join(folder, name) for name in files):
            if os.path.splitext(path)[1].lower() in AUDIO:
                usable = os.path.isfile(path)
                found.append((path, "" if usable else "is a broken or circular link, or no file"))
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def folder_tracks(music, options):
    """Your own music: audio files with captions in .txt files or in a table, or without any."""
    tracks = []
    for path, problem in audio_files(music):
        name = Path(os.path.relpath(path, music)).as_posix()
        caption = find_caption(path, [name, path, Path(path).name, Path(path).stem], options)
        tags = {} if problem else tags_of(path)
        about = dict(source="folder")
        about |= {key: tags[key] for key in ("artist", "licence") if key in tags}
        if not caption[0] and options.captioner == "none":
            facts, origin = facts_of(tags, name, options)
            about |= dict(facts=facts)
            caption = sentence(facts, np.random.default_rng(zlib.crc32(name.encode()))), origin
        tracks.append(new_track(path, name, caption, options, problem, **about))
    if not tracks:
        raise ValueError(f"no audio below {music}: expected files such as song.wav with song.txt")
    return tracks


def find_caption(path, names, options):
    """A file's caption, and where it comes from; both are empty if there is none. The --captions
    table comes first, which knows the file by one of `names`, then the .txt file of its name."""
    if options.captions:
        from paper.captions import read_table

        table = read_table(options.captions)
        for name in names:
            if name in table:
                return table[name], "table"
    try:
        text = Path(path).with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return "", ""
    return text.strip(), "sidecar"


TAGS = {  # what FFmpeg, and so PyAV, calls the tags of the many formats
    "genre": ("genre",), "mood": ("mood", "tmoo"), "bpm": ("bpm", "tbpm", "tmpo"),
    "key": ("initialkey", "initial_key", "tkey", "key"), "title": ("title",),
    "artist": ("artist", "album_artist"), "year": ("date", "year", "tyer"),
    "licence": ("license", "licence", "wcop"),
}  # fmt: skip
EMPTY = set("track audio music song untitled unknown various artists other misc none demo".split())


def tags_of(path) -> dict:
    """{tag: text} of an audio file, by the names of TAGS; without those that say nothing."""
    import av

    try:
        with av.open(f"file:{path}", metadata_errors="ignore") as opened:
            sources = [*opened.streams.audio[:1], opened]  # Ogg has tags in its stream
            found = {k.lower(): v for one in sources for k, v in one.metadata.items()}
    except av.FFmpegError:  # what is wrong with it is said when it is decoded
        return {}
    found = {tag: next(filter(None, map(found.get, names)), "") for tag, names in TAGS.items()}
    found = {tag: " ".join(text.split())[:100] for tag, text in found.items()}
    return {tag: text for tag, text in found.items() if set(text.lower().split()) - EMPTY}


def facts_of(tags, name, options):
    """What tags or, if they tell nothing, names of file and folders say -> ({fact: text}, where it
    comes from)."""
    facts = {tag: tags[tag].lower() for tag in ("genre", "mood") if tag in tags}
    if tempo := re.match(r"\d{2,3}(?=\.|$)", tags.get("bpm", "")):
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
    some = {k: v for k, v in facts.items() if rng.random() < 0.75} or facts
    kind = rng.choice(["music", "piece", "track", "tune"])
    if not some:
        return "music"
    words = [some[k] for k in ("mood", "genre") if k in some]
    if "name" in some:
        words = [*words, some["name"]]
    text = " ".join([*words, kind])
    ends = dict(bpm="at {} bpm", key="in {}", decade="from the {}", title='"{}"', artist="by {}")
    parts = [form.format(some[k]) for k, form in ends.items() if k in some]
    return " ".join([text, *parts])


def new_track(path, name, caption, options, skip="", **about):
    """-> a track. caption: the text, and where it comes from; about: more for the manifest."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    track = dict(path=str(path), track=name, licence=options.licence, bytes=size) | about
    text, origin = caption
    if text:
        track |= dict(caption=text, caption_from=origin)
    if "\N{REPLACEMENT CHARACTER}" in text:
        skip = skip or "has a caption that is not UTF-8 text"
    elif not text and options.captioner == "none":
        skip = skip or NO_CAPTION
    elif is_vocal(text, options):
        skip = skip or VOCAL
    return track | (dict(skip=skip) if skip else {})


def is_vocal(caption, options):
    if options.keep_vocal_captions:
        return False
    from paper.captions import mentions_vocals

    return mentions_vocals(caption)
