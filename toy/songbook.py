"""The songbook: what the toy world knows about music, and how a clip is drawn from it.

A clip begins as six factors: genre, rhythm, tempo (bpm), key, lead, mood. `rhythm` is None or a
second genre, whose drums, bass and timing carry the harmony and melody of the first: genre "jazz"
with rhythm "reggae" is "jazz reggae". The tables, genres and moods are in songbook.toml.

Pitches are MIDI numbers, levels dB. A step is a sixteenth note, one column of the tablature. A
chord is (root above the tonic, tones above the root) in semitones. g is a genre's page.
"""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TEMPO_STEP = 4  # bpm
SLOW_BELOW, FAST_FROM = 88, 132  # bpm: what captions call slow and fast, in every genre
MIXTURES = 0.15  # share of clips whose rhythm section belongs to another genre
RMS = 0.08  # loudness of every clip
TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]

_BOOK = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
LEADS = _BOOK["leads"]  # lowest and highest pitch; whether it sustains; its names
SCALES = _BOOK["scales"]
DRUMS = _BOOK["drums"]  # letter: key of a MIDI drum kit
LOUDNESS = dict(_BOOK["loudness"])  # program: dB


def chord_of(numeral: str) -> tuple:
    """'bVImaj7' -> (8, [0, 4, 7, 11])"""
    flat, roman, quality = re.fullmatch(r"(b?)([IViv]+)(.*)", numeral).groups()
    degree = ["I", "II", "III", "IV", "V", "VI", "VII"].index(roman.upper())
    tones = _BOOK["chords"][quality or "triad"]
    if roman.islower():
        tones = [3 if tone == 4 else tone for tone in tones]
    return SCALES["major"][degree] - len(flat), tones


def page(settings: dict) -> SimpleNamespace:
    """The page of a genre or a mood."""
    g = SimpleNamespace(**_BOOK["default"] | settings)
    g.comp = [SimpleNamespace(**voice) for voice in g.comp]
    return g


GENRES = {name: page(settings) for name, settings in _BOOK["genre"].items()}
MOODS = {name: page(settings) for name, settings in _BOOK["mood"].items()}
for _g in GENRES.values():
    _g.tempo = range(_g.tempo[0], _g.tempo[1] + 1, TEMPO_STEP)
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
    minor = getattr(MOODS[mood], "minor", GENRES[genre].minor)
    key = f"{pick(rng, TONICS)} {'minor' if rng.random() < minor else 'major'}"
    lead = pick(rng, list(GENRES[genre].leads))
    return dict(genre=genre, rhythm=rhythm, tempo=pick(rng, tempos), key=key, lead=lead, mood=mood)


def sample_clip(index: int, split_seed: int = 0, mixtures=MIXTURES) -> tuple[dict, int]:
    """Clip `index` of a split -> its factors and the seed that composes it."""
    rng = np.random.default_rng([split_seed, index])
    return sample_factors(rng, mixtures), int(rng.integers(2**31))
