"""The songbook: what the toy world knows about music, and how a clip is drawn from it.

A clip begins as six factors: genre, rhythm, tempo (bpm), key, lead, mood. `rhythm` is None or a
second genre, whose drums, bass and timing carry the harmony and melody of the first: genre "jazz"
with rhythm "reggae" is "jazz reggae". GENRES and MOODS are the pages of songbook.txt.

Pitches are MIDI numbers, levels dB. A step is a sixteenth note, one column of the tablature. A
chord is (root above the tonic, tones above the root) in semitones. g is a page.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TEMPO_STEP = 4  # bpm
SLOW_BELOW, FAST_FROM = 88, 132  # bpm: what captions call slow and fast, in every genre
MIXTURES = 0.15  # share of clips whose rhythm section belongs to another genre
RMS = 0.08  # loudness of every clip
TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]

LEADS = {  # lowest and highest pitch; whether it sustains, and so gets vibrato; its names
    "piano": (62, 88, False, ["piano", "grand piano"]), "organ": (60, 84, False, ["organ"]),
    "accordion": (62, 86, False, ["accordion"]), "harmonica": (62, 84, True, ["harmonica"]),
    "acoustic guitar": (55, 79, False, ["acoustic guitar"]),
    "electric guitar": (55, 81, True, ["electric guitar"]),
    "violin": (62, 91, True, ["violin", "fiddle"]), "trumpet": (60, 82, True, ["trumpet"]),
    "saxophone": (54, 80, True, ["saxophone", "sax"]), "flute": (67, 93, True, ["flute"]),
    "synth lead": (60, 88, True, ["synth lead", "lead synth", "synthesizer", "synth"]),
    "vibraphone": (62, 88, False, ["vibraphone", "vibes"]),
}  # fmt: skip

SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10), "mixolydian": (0, 2, 4, 5, 7, 9, 10),
    "phrygian": (0, 1, 3, 5, 7, 8, 10), "harmonic": (0, 2, 3, 5, 7, 8, 11),
    "blues": (0, 3, 5, 6, 7, 10), "majpent": (0, 2, 4, 7, 9), "minpent": (0, 3, 5, 7, 10),
}  # fmt: skip

QUALITIES = {  # suffix: tones above the root of an upper-case and of a lower-case numeral
    "": ((0, 4, 7), (0, 3, 7)), "6": ((0, 4, 7, 9), (0, 3, 7, 9)),
    "7": ((0, 4, 7, 10), (0, 3, 7, 10)), "9": ((0, 4, 7, 10, 14), (0, 3, 7, 10, 14)),
    "5": ((0, 7), (0, 7)), "ø": ((0, 3, 6, 10),) * 2,
    "maj7": ((0, 4, 7, 11), (0, 3, 7, 11)), "maj9": ((0, 4, 7, 11, 14), (0, 3, 7, 11, 14)),
    "sus": ((0, 5, 7),) * 2, "add9": ((0, 4, 7, 14), (0, 3, 7, 14)),
}  # fmt: skip


SEPARATORS = {"words": ", ", "beat": ", ", "band": ", ", "line": " / ", "scale": " "}


def chord(numeral: str) -> tuple:
    """'bVImaj7' -> (8, (0, 4, 7, 11))"""
    flat, roman, quality = re.fullmatch(r"(b?)([IViv]+)(.*)", numeral).groups()
    degree = ["I", "II", "III", "IV", "V", "VI", "VII"].index(roman.upper())
    return SCALES["major"][degree] - len(flat), QUALITIES[quality][roman.islower()]


def voice(line: str) -> SimpleNamespace:
    """A `comp` line."""
    programs, style, span, level, parts = line.split(None, 4)
    v = SimpleNamespace(style=style, level=int(level), parts=parts.split(" / "))
    v.programs = [int(program) for program in programs.split("|")]
    v.low, v.high = map(int, span.split("-"))
    return v


def pairs(text: str) -> dict:
    """'K x..x S ..x.' -> {'K': 'x..x', 'S': '..x.'}"""
    words = text.split()
    return dict(zip(words[::2], words[1::2]))


def number(text: str):
    return int(text) if text.lstrip("-").isdigit() else float(text)


def page(text: str) -> tuple[str, SimpleNamespace]:
    """A page of the songbook -> its name, and its settings and lines."""
    head, *lines = text.split("\n")
    name, settings = head.split(": ")
    g = dict(swing=[8, 0.5], minor=None, fill="", drums=[], comp=[])
    for key, value in pairs(settings).items():
        if key == "tempo":
            slowest, fastest = map(int, value.split("-"))
            g[key] = range(slowest, fastest + 1, TEMPO_STEP)
        elif key in ("swing", "part"):
            g[key] = [number(n) for n in re.split("[-/]", value)]
        else:
            g[key] = number(value)
    for line in lines:
        key, value = line.split(None, 1)
        if key in ("major", "minor"):
            songs = [song.split("|") for song in value.split(" / ")]
            g["chords_" + key] = [[[*map(chord, bar.split())] for bar in song] for song in songs]
        elif key == "drums":
            g["drums"].append(pairs(value))
        elif key == "comp":
            g["comp"].append(voice(value))
        elif key == "bass":
            programs, parts = value.split(": ")
            g["bass_programs"] = [int(program) for program in programs.split("|")]
            g["bass"] = parts.split(" / ")
        elif key == "leads":
            leads = [lead.rsplit(None, 1) for lead in value.split(", ")]
            g["leads"] = {lead: int(program) for lead, program in leads}
        elif key in SEPARATORS:
            g[key] = value.split(SEPARATORS[key])
        else:
            g[key] = value
    return name, SimpleNamespace(**g)


_TEXT = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
_PAGES = dict(page(p) for p in re.sub("^#.*\n", "", _TEXT, flags=re.M).strip().split("\n\n"))
GENRES = {name: g for name, g in _PAGES.items() if hasattr(g, "tempo")}
MOODS = {name: g for name, g in _PAGES.items() if name not in GENRES}
TEMPI = sorted({tempo for g in GENRES.values() for tempo in g.tempo})


def pick(rng: np.random.Generator, options):
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def sample_factors(rng: np.random.Generator, mixtures: float = MIXTURES) -> dict:
    """Draw a clip's factors: genre and tonic uniform, the rest plausible for that genre."""
    genre = pick(rng, list(GENRES))
    rhythm = None
    # Another genre's rhythm would leave nothing of a waltz.
    if rng.random() < mixtures * len(GENRES) / (len(GENRES) - 1) and genre != "waltz":
        rhythm = pick(rng, [name for name, g in GENRES.items() if g.drums and name != genre])
    mood = pick(rng, list(MOODS))
    tempos = GENRES[rhythm or genre].tempo
    begin, end = MOODS[mood].part
    tempos = tempos[int(begin * len(tempos)) : int(np.ceil(end * len(tempos)))]
    minor = GENRES[genre].minor if MOODS[mood].minor is None else MOODS[mood].minor
    key = f"{pick(rng, TONICS)} {'minor' if rng.random() < minor else 'major'}"
    lead = pick(rng, list(GENRES[genre].leads))
    return dict(genre=genre, rhythm=rhythm, tempo=pick(rng, tempos), key=key, lead=lead, mood=mood)


def sample_clip(index: int, split_seed: int = 0, mixtures=MIXTURES) -> tuple[dict, int]:
    """Clip `index` of a split -> its factors and the seed that composes it."""
    rng = np.random.default_rng([split_seed, index])
    return sample_factors(rng, mixtures), int(rng.integers(2**31))
