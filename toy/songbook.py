"""The songbook: what the toy world knows about music, and how a clip is drawn from it.

A clip begins as six factors: genre, rhythm, tempo (bpm), key, lead, mood. `rhythm` is None or a
second genre, whose drums, bass and timing carry the harmony and melody of the first: genre "jazz"
with rhythm "reggae" is "jazz reggae". The tables, genres and moods are in songbook.txt.

Pitches are MIDI numbers, levels dB. A step is a sixteenth note, one column of the tablature. A
chord is (root above the tonic, tones above the root) in semitones. g is a genre's page.
"""

import re
from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TEMPO_STEP = 4  # bpm
SLOW_BELOW, FAST_FROM = 88, 132  # bpm: what captions call slow and fast, in every genre
MIXTURES = 0.15  # share of clips whose rhythm section belongs to another genre
RMS = 0.08  # loudness of every clip
TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]


def pairs(text: str) -> dict:
    """'K x..x S ..x.' -> {'K': 'x..x', 'S': '..x.'}"""
    words = text.split()
    return dict(zip(words[::2], words[1::2]))


def whole_numbers(text: str, separator: str) -> list[int]:
    return [int(number) for number in text.split(separator)]


_TEXT = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
_PAGES = re.sub("^#.*\n", "", _TEXT, flags=re.M).strip().split("\n\n")
_PAGES = dict(page.split(":", 1) for page in _PAGES)
DRUMS = {letter: int(key) for letter, key in pairs(_PAGES.pop("drum keys")).items()}
LOUDNESS = {int(program): int(dB) for program, dB in pairs(_PAGES.pop("loudness")).items()}
SCALES = {name: whole_numbers(t, ",") for name, t in pairs(_PAGES.pop("scales")).items()}
QUALITIES = {suffix: whole_numbers(t, ",") for suffix, t in pairs(_PAGES.pop("chords")).items()}
LEADS = {}  # lowest and highest pitch; whether it sustains, and so gets vibrato; its names
for _line in _PAGES.pop("leads").strip().split("\n"):
    _span, _kind, _names = _line.split(None, 2)
    _names = _names.split(", ")
    LEADS[_names[0]] = (*whole_numbers(_span, "-"), _kind == "held", _names)


def chord(numeral: str) -> tuple:
    """'bVImaj7' -> (8, [0, 4, 7, 11])"""
    flat, roman, quality = re.fullmatch(r"(b?)([IViv]+)(.*)", numeral).groups()
    degree = ["I", "II", "III", "IV", "V", "VI", "VII"].index(roman.upper())
    tones = QUALITIES[quality or "triad"]
    if roman.islower():
        tones = [3 if tone == 4 else tone for tone in tones]
    return SCALES["major"][degree] - len(flat), tones


def voice(line: str) -> SimpleNamespace:
    """A `comp` line."""
    programs, style, span, level, parts = line.split(None, 4)
    low, high = whole_numbers(span, "-")
    return SimpleNamespace(
        programs=whole_numbers(programs, "|"), style=style, low=low, high=high, level=int(level),
        parts=parts.split(" / "),
    )  # fmt: skip


def page(text: str) -> SimpleNamespace:
    """A genre's or mood's page of the songbook: its settings and lines."""
    settings, *lines = text.split("\n")
    g = dict(swing=[8, 0.5], minor=None, fill="", drums=[], comp=[])
    for key, value in pairs(settings).items():
        numbers = [literal_eval(number) for number in re.split(r"(?<=\d)[-/]", value)]
        g[key] = numbers if len(numbers) > 1 else numbers[0]
    if "tempo" in g:
        g["tempo"] = range(g["tempo"][0], g["tempo"][1] + 1, TEMPO_STEP)
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
            g["bass_programs"] = whole_numbers(programs, "|")
            g["bass"] = parts.split(" / ")
        elif key == "leads":
            leads = [lead.rsplit(None, 1) for lead in value.split(", ")]
            g["leads"] = {lead: int(program) for lead, program in leads}
        elif key in ("fill", "place"):
            g[key] = value
        else:
            g[key] = value.split({"line": " / ", "scale": " "}.get(key, ", "))
    return SimpleNamespace(**g)


GENRES = {name: page(text) for name, text in _PAGES.items() if text.startswith(" tempo")}
MOODS = {name: page(text) for name, text in _PAGES.items() if name not in GENRES}
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
