"""Which music a data folder is made from: audio files and their captions, as a list of tracks.

A track is a dict of what the manifest will say about it; "skip" says why it is left out. What only
the paper's corpora need is in paper/sources.py. Nothing is decoded here.
"""

import os
from dataclasses import dataclass
from pathlib import Path

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
    """Your own music: audio files with captions in .txt files or in a table."""
    tracks = []
    for path, problem in audio_files(music):
        name = Path(os.path.relpath(path, music)).as_posix()
        caption = find_caption(path, [name, path, Path(path).name, Path(path).stem], options)
        tracks.append(new_track(path, name, caption, options, problem, source="folder"))
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
