"""The songbook."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# ------------------------------------------------------------------------------ the songbook ----
#
# toy/songbook.txt has a page of tablature for each genre; how to read it stands at its head.

SONGBOOK = re.sub(r"^#.*\n", "", (Path(__file__).with_suffix(".txt")).read_text(), flags=re.M)

DRUMS = dict(K=36, S=38, E=40, R=37, P=39, H=42, F=44, O=46, D=51, B=53, C=49, L=45, M=48)
DRUMS |= dict(T=54, A=70, W=56, G=63, g=64, V=75, I=65, J=73, Y=81)
# K kick, S E snares, R cross-stick, P clap, H F O closed, foot and open hi-hat, D B ride and its
# bell, C crash, L M toms, T tambourine, A maracas, W cowbell, G g congas, V claves, I timbale, J
# guiro, Y triangle

# An instrument of the melody: its range, whether it sustains (and so gets vibrato), its names.
LEADS = {
    "piano": (62, 88, False, ["piano", "grand piano"]),
    "organ": (60, 84, False, ["organ"]),
    "accordion": (62, 86, False, ["accordion"]),
    "harmonica": (62, 84, True, ["harmonica"]),
    "acoustic guitar": (55, 79, False, ["acoustic guitar"]),
    "electric guitar": (55, 81, True, ["electric guitar"]),
    "violin": (62, 91, True, ["violin", "fiddle"]),
    "trumpet": (60, 82, True, ["trumpet"]),
    "saxophone": (54, 80, True, ["saxophone", "sax"]),
    "flute": (67, 93, True, ["flute"]),
    "synth lead": (60, 88, True, ["synth lead", "lead synth", "synthesizer", "synth"]),
    "vibraphone": (62, 88, False, ["vibraphone", "vibes"]),
}

# A mood: velocity added; density of lead and comping, times; register added to lead and comping;
# length of notes, times; how often minor (None: as the genre); the part of the tempo range; its own
# voice (as a `comp` line) and percussion (as a `drums` line); its names.
MOOD_FIELDS = "velocity density register length minor tempo voice drums words"
MOODS = {
    "happy": (6, 1.15, 4, 0.7, 0.0, (0.2, 1), "9 arp 84-100 -7 x.....x...x.x...",
              "T ..x...x...x...x.", ["happy", "cheerful", "joyful", "sunny", "playful"]),
    "sad": (-16, 0.55, -3, 1.3, 1.0, (0, 0.5), "42 arp 48-64 +1 x-------x-------", "",
            ["sad", "melancholic", "sorrowful", "mournful", "wistful"]),
    "calm": (-30, 0.5, 0, 1.4, None, (0, 0.5), "89 block 57-78 -5 x---------------", "",
             ["calm", "peaceful", "relaxed", "gentle", "soothing"]),
    "energetic": (22, 1.6, 7, 0.85, None, (0.5, 1), "", "A xoxoxoxoxoxoxoxo C X...............",
                  ["energetic", "lively", "powerful", "high-energy", "intense"]),
    "dark": (0, 0.8, -9, 1.1, 1.0, (0, 0.8), "44 block 33-50 -2 x---------------",
             "L X.......x.......", ["dark", "brooding", "ominous", "gloomy", "sinister"]),
}  # fmt: skip
MOODS = {name: SimpleNamespace(**dict(zip(MOOD_FIELDS.split(), m))) for name, m in MOODS.items()}

TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
TEMPO_STEP = 4  # bpm
SLOW_BELOW, FAST_FROM = 88, 132  # what captions call slow and fast, whatever the genre
MIXTURES = 0.15  # the share of clips whose rhythm section belongs to another genre

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

# Loudness of the font's presets in dB, measured with one velocity (the others: about 2).
LOUD = {0: 0, 2: 0, 3: -2, 4: 5, 5: 1, 9: 1, 17: 7, 19: 3, 21: 0, 25: 0, 26: 5, 27: 6, 28: 0, 29: 4}
LOUD |= {30: 7, 32: -1, 33: 2, 36: -1, 38: -1, 39: 5, 44: -2, 56: 4, 57: 9, 59: 5, 61: 8, 65: 4}
LOUD |= {66: 4, 80: 6, 81: 6, 82: 0, 84: 7, 87: 3, 89: -9, 94: 0, 95: 4, 91: 5, 98: -6}
TR808 = 25  # a drum kit louder than the others


def chord(numeral: str) -> tuple:
    """'bVImaj7' -> (8, (0, 4, 7, 11)): semitones of the root above the tonic, tones above it."""
    flat, roman, quality = re.fullmatch(r"(b?)([IViv]+)(.*)", numeral).groups()
    degree = ["I", "II", "III", "IV", "V", "VI", "VII"].index(roman.upper())
    root = SCALES["major"][degree] - len(flat)
    return root, QUALITIES[quality][roman.islower()]


def progression(text: str) -> list:
    """'I | IV V' -> a list of bars, each a list of chords."""
    return [[chord(c) for c in bar.split()] for bar in text.split("|")]


def voice(line: str) -> SimpleNamespace:
    """A `comp` line of the songbook."""
    programs, style, span, level, parts = line.split(None, 4)
    low, high = map(int, span.split("-"))
    programs, parts = [int(p) for p in programs.split("|")], parts.split(" / ")
    return SimpleNamespace(
        programs=programs, style=style, low=low, high=high, level=int(level), parts=parts
    )


def page(text: str) -> tuple[str, SimpleNamespace]:
    """Read one genre's page of the songbook."""
    head, *lines = text.strip().split("\n")
    name, settings = head.split(": ")
    settings = settings.split()
    g = dict(swing="8/.5", drums=[], comp=[], fill="") | dict(zip(settings[::2], settings[1::2]))
    for key, value in (line.split(None, 1) for line in lines):
        if key in ("major", "minor"):
            g["chords_" + key] = [progression(p) for p in value.split(" / ")]
        elif key == "drums":
            letters = value.split()
            g["drums"].append(dict(zip(letters[::2], letters[1::2])))
        elif key == "comp":
            g["comp"].append(voice(value))
        elif key == "bass":
            programs, parts = value.split(": ")
            g |= dict(bass_programs=[int(p) for p in programs.split("|")], bass=parts.split(" / "))
        elif key == "line":
            g["line"] = value.split(" / ")
        elif key == "leads":
            g["leads"] = {k: int(p) for k, p in (i.rsplit(None, 1) for i in value.split(", "))}
        elif key in ("words", "beat", "band"):
            g[key] = value.split(", ")
        else:
            g[key] = value.split() if key == "scale" else value
    low, high = g["tempo"].split("-")
    unit, ratio = g["swing"].split("/")
    g |= dict(tempo=range(int(low), int(high) + 1, TEMPO_STEP), swing=(int(unit), float(ratio)))
    for k in ("minor", "room", "loose", "beats", "kit"):
        g[k] = int(g[k]) if k in ("beats", "kit") else float(g[k])
    return name, SimpleNamespace(**g)


GENRES = dict(page(text) for text in SONGBOOK.strip().split("\n\n"))

# ----------------------------------------------------------------------------------- factors ----


def pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def sample_factors(rng: np.random.Generator, mixtures: float = MIXTURES) -> dict:
    """Draw a clip: genre and tonic uniform, the rest plausible for that genre."""
    genre, rhythm = pick(rng, list(GENRES)), None
    # A waltz is its rhythm: in four beats nothing of it would be left.
    if rng.random() < mixtures * len(GENRES) / (len(GENRES) - 1) and genre != "waltz":
        rhythm = pick(rng, [name for name, g in GENRES.items() if g.drums and name != genre])
    g, mood = GENRES[genre], pick(rng, list(MOODS))
    tempos, (slowest, fastest) = GENRES[rhythm or genre].tempo, MOODS[mood].tempo
    tempos = tempos[int(slowest * len(tempos)) : int(np.ceil(fastest * len(tempos)))]
    minor = g.minor if MOODS[mood].minor is None else MOODS[mood].minor
    key = f"{pick(rng, TONICS)} {'minor' if rng.random() < minor else 'major'}"
    lead = pick(rng, list(g.leads))
    return dict(genre=genre, rhythm=rhythm, tempo=pick(rng, tempos), key=key, lead=lead, mood=mood)


def sample_clip(index: int, split_seed: int = 0, mixtures=MIXTURES) -> tuple[dict, int]:
    """Clip `index` of a split -> its factors and the seed that composes it."""
    rng = np.random.default_rng([split_seed, index])
    return sample_factors(rng, mixtures), int(rng.integers(2**31))
