"""Captions: a clip's factors in words, differently at every call. The phrases are in words.txt.

A caption is a few words, a sentence, or a paragraph like MusicCaps'. It may leave factors out, but
what it says is true.
"""

import re
from pathlib import Path

import numpy as np

from toy.songbook import FAST_FROM, GENRES, LEADS, MOODS, SLOW_BELOW, pick

LENGTHS = ("words", "sentence", "paragraph")
PHRASES = {}  # name: alternatives, each as often as it is likely
for _line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
    if _line and _line[0] != "#":
        _name, _phrases = _line.split(": ", 1)
        _split = [phrase.rpartition("*") for phrase in _phrases.split("|")]
        PHRASES[_name] = [text for times, _, text in _split for _ in range(int(times or 1))]
BLANK = re.compile(r"\{(.*?)\}")


def caption(factors: dict, rng: np.random.Generator, length: str | None = None) -> str:
    """length: "words", "sentence", "paragraph", or None for a mix of the three."""
    length = length or str(rng.choice(LENGTHS, p=[0.35, 0.4, 0.25]))
    text = expand(length, worded(factors, rng), rng)
    text = re.sub(r"[\s,.]*([,.])", r"\1 ", text)  # of commas that enclose nothing, one stays
    text = " ".join(text.split()).strip(" ,.").replace("lead lead", "lead")
    text = re.sub(r"\b([Aa]) (?=(?!one)[aeiou])", r"\1n ", text)
    if rng.random() < (0.6 if length == "words" else 0.3):
        return text.lower()  # as people type
    text = re.sub(r"(^|\. )([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text + "." if length != "words" and rng.random() < 0.7 else text


def expand(name: str, words: dict, rng) -> str:
    """One of the phrases of that name, filled in. Words that were said become None."""
    drawn = (PHRASES[name][i] for i in rng.permutation(len(PHRASES[name])))
    fits = (p for p in drawn if all(words.get(n, n) for n in BLANK.findall(p)))
    parts = next(fits, "").split("/")
    rng.shuffle(parts)

    def fill(match):
        if match[1] not in words:
            return expand(match[1], words, rng)
        word = words[match[1]]
        same = ("tempo", "number", "pace")
        words.update(dict.fromkeys(same if match[1] in same else match.groups()))
        return word

    parts = [BLANK.sub(fill, part) for part in parts]
    return " ".join(part for part in parts if part.strip(" ,"))


def worded(factors: dict, rng) -> dict:
    """{name in words.txt: what this caption calls it}; None if there is nothing to say."""
    genre, rhythm, tempo = (factors[k] for k in ("genre", "rhythm", "tempo"))
    beneath = GENRES[rhythm or genre]
    key = factors["key"].replace("#", " sharp" if rng.random() < 0.5 else "#")
    plain = None if rhythm else pick(rng, GENRES[genre].words)
    mood, feel = rng.choice(MOODS[factors["mood"]].words, 2, replace=False)
    return dict(
        genre=genre,
        rhythm=rhythm,
        plain=plain,
        name=plain or f"{genre} {rhythm}",  # the genre of the harmony first
        tempo=pick(rng, PHRASES[tempo_word(tempo)]),
        pace=pick(rng, PHRASES[f"{tempo_word(tempo)} pace"]),
        number=f"{tempo} {pick(rng, PHRASES['bpm'])}",
        key=re.sub(r"^([A-G])b", r"\1 flat" if rng.random() < 0.5 else r"\1b", key),
        lead=pick(rng, LEADS[factors["lead"]][3]),
        mood=mood,
        feel=feel,
        beat=pick(rng, beneath.beat),
        band=pick(rng, GENRES[genre].band),
        place=beneath.place,
    )


def tempo_word(bpm: int) -> str:
    return "slow" if bpm < SLOW_BELOW else "mid-tempo" if bpm < FAST_FROM else "fast"


def names_lead(text: str, factors: dict) -> bool:
    return any(name in text.lower() for name in LEADS[factors["lead"]][3])


def caption_with_lead(factors: dict, rng: np.random.Generator) -> str:
    """A caption that names the lead instrument in 19 of 20 cases; `caption` does in 2 of 3."""
    for _ in range(3):
        text = caption(factors, rng)
        if names_lead(text, factors):
            break
    return text
