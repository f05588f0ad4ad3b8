"""Captions: a clip's factors in words, differently at every call. The phrases are in words.txt.

A caption is a few words, a sentence, or a paragraph like MusicCaps'. It may leave factors out, but
what it says is true. w is what `worded` returns: each factor as one caption calls it.
"""

import re
from pathlib import Path

import numpy as np

from toy.songbook import FAST_FROM, GENRES, LEADS, MOODS, SLOW_BELOW, pick

_LINES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n")
_LINES = [line.split(": ", 1) for line in _LINES if line and line[0] != "#"]
PHRASES = {name: phrases.split("|") for name, phrases in _LINES}
# The factors that a sentence may name: how often, and how often as an adjective if so.
NAMED = dict(mood=(1, 0.75), tempo=(1, 0.3), lead=(1, 0), key=(0.35, 0), beat=(0.3, 0))


def caption(factors: dict, rng: np.random.Generator, length: str | None = None) -> str:
    """length: "words", "sentence", "paragraph", or None for a mix of the three."""
    length = length or str(rng.choice(["words", "sentence", "paragraph"], p=[0.35, 0.4, 0.25]))
    write = dict(words=few_words, sentence=sentence, paragraph=paragraph)[length]
    text = " ".join(write(factors, worded(factors, rng), rng).split()).replace(" ,", ",")
    text = re.sub(r"\b([Aa]) (?=[aeiou](?!ne))", r"\1n ", text)
    if rng.random() < (0.6 if length == "words" else 0.3):
        return text.lower()  # as people type
    text = re.sub(r"(^|\. )([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text + "." if length != "words" and rng.random() < 0.7 else text


def caption_with_lead(factors: dict, rng: np.random.Generator) -> str:
    """A caption that names the lead instrument in 19 of 20 cases; `caption` does in 2 of 3."""
    for _ in range(3):
        text = caption(factors, rng)
        if names_lead(text, factors):
            break
    return text


def names_lead(text: str, factors: dict) -> bool:
    return any(name in text.lower() for name in LEADS[factors["lead"]][3])


def tempo_word(bpm: int) -> str:
    return "slow" if bpm < SLOW_BELOW else "mid-tempo" if bpm < FAST_FROM else "fast"


def say(rng, what: str, *genres, **w) -> str:
    """One of the phrases of that name, filled in."""
    return pick(rng, PHRASES[what]).format(*genres, **w)


def worded(factors: dict, rng) -> dict:
    """Draws the words for each factor."""
    key = factors["key"].replace("#", " sharp" if rng.random() < 0.5 else "#")
    key = re.sub(r"^([A-G])b", r"\1 flat" if rng.random() < 0.5 else r"\1b", key)
    return dict(
        key=key,
        number=f"{factors['tempo']} {say(rng, 'bpm')}",
        tempo=say(rng, tempo_word(factors["tempo"])),
        mood=pick(rng, MOODS[factors["mood"]].words),
        lead=pick(rng, LEADS[factors["lead"]][3]),
        beat=pick(rng, GENRES[factors["rhythm"] or factors["genre"]].beat),
        band=pick(rng, GENRES[factors["genre"]].band),
        noun=say(rng, "noun"),
    )


def name(factors: dict, rng, short: bool = True) -> str:
    """The genre; or the mixture, the genre of the harmony first."""
    genre, rhythm = factors["genre"], factors["rhythm"]
    if rhythm is None:
        return pick(rng, GENRES[genre].words)
    if short or rng.random() < 0.5:
        return f"{genre} {rhythm}"
    return say(rng, "mixture", genre, rhythm)


def few_words(factors: dict, w: dict, rng) -> str:
    if rng.random() < 0.05:  # the only captions without a genre
        return say(rng, "without genre", **w)
    phrase = pick(rng, PHRASES["few words"][: 10 if factors["rhythm"] else None])
    return phrase.format(name=name(factors, rng), **w)


def adjectives_and_tails(w: dict, rng, keep: float) -> tuple[str, list, list]:
    """Say each factor with probability `keep` -> adjectives, tails, names of what was said."""
    adjectives, tails, said = [], [], []
    for factor, (often, as_adjective) in NAMED.items():
        if rng.random() >= keep * often:
            continue
        said.append(factor)
        if as_adjective and rng.random() < as_adjective:
            adjectives.append(w[factor])
            continue
        phrases = PHRASES["after " + factor]
        if factor == "tempo" and "tempo" in w["tempo"]:
            phrases = phrases[:4]  # not "at a mid-tempo tempo"
        tail = pick(rng, phrases).format(pace=w["tempo"].removesuffix("-paced"), **w)
        tails.append(tail.replace("lead lead", "lead"))
    adjectives = [adjectives[i] for i in rng.permutation(len(adjectives))]
    tails = [tails[i] for i in rng.permutation(len(tails))]
    return pick(rng, [" ", ", ", " and "]).join(adjectives), tails, said


def sentence(factors: dict, w: dict, rng) -> str:
    adjectives, tails, _ = adjectives_and_tails(w, rng, keep=0.65)
    form = rng.random()
    tail = pick(rng, [" ", " ", ", "]).join(tails)
    if form < 0.45:  # "play a slow jazz reggae track with saxophone"
        request = say(rng, "request")
        article = "some" if w["noun"] == "music" else "a"
        return f"{request} {article} {adjectives} {name(factors, rng)} {w['noun']} {tail}"
    if form < 0.6:  # "slow and calm jazz reggae with saxophone"
        return f"{adjectives} {name(factors, rng, short=False)} {tail}"
    if form < 0.8:  # "jazz reggae, calm, saxophone, 84 bpm"
        tempo = say(rng, "tempo or number", **w)
        tags = [w["mood"], w["lead"], tempo, w["key"], re.sub("^an? ", "", w["beat"])]
        tags = [t for t, often in zip(tags, (0.7, 0.7, 0.7, 0.3, 0.2)) if rng.random() < often]
        place = 0 if rng.random() < 0.6 else int(rng.integers(len(tags) + 1))
        tags.insert(place, name(factors, rng))
        return ", ".join(tags)
    if form < 0.93:  # "a saxophone plays a calm melody over a slow jazz reggae groove"
        plays, melody, groove = (say(rng, what) for what in ("plays", "melody", "groove"))
        tempo = say(rng, "perhaps tempo", **w)
        mood = say(rng, "perhaps mood", **w)
        end = say(rng, "perhaps key" if tempo else "perhaps number or key", **w)
        over = f"over a {tempo} {name(factors, rng)} {groove} {end}"
        return f"a {w['lead']} {plays} a {mood} {melody} {over}"
    thing = say(rng, "something")
    tempo = f" and {w['tempo']}" if rng.random() < 0.5 else ""
    with_lead = f", with {w['lead']}" if rng.random() < 0.5 else ""
    return f"{thing} {w['mood']}{tempo}: {name(factors, rng, short=False)}{with_lead}"


def is_plural(thing: str) -> bool:
    head = thing.split(" with ")[0]
    return " and " in head or bool(re.search("[^s]s$", head) and not re.match("an? ", head))


def paragraph(factors: dict, w: dict, rng) -> str:
    """Two or more sentences; the later ones say what the first has left out."""
    adjectives, tails, said = adjectives_and_tails(w, rng, keep=0.45)
    opening = say(rng, "opening")
    piece = say(rng, "piece")
    first = f"{opening} a {adjectives} {name(factors, rng)} {piece} {', '.join(tails)}".strip()
    more = []
    if "lead" not in said:
        leads = say(rng, "leads")
        more.append(say(rng, "about lead", leads=leads, main=say(rng, "main", **w), **w))
    if "tempo" not in said:
        in_key = say(rng, "about key", **w)
        pace = w["tempo"].removesuffix("-tempo").removesuffix("-paced")
        pace = {"mid": "moderate", "medium": "moderate", "up": "fast"}.get(pace, pace)
        more.append(say(rng, "about tempo", pace=pace, **w) + ("" if "key" in said else in_key))
    if "beat" not in said:
        keep, are = ("keep", "are") if is_plural(w["beat"]) else ("keeps", "is")
        sit = "sit" if is_plural(w["band"]) else "sits"
        more.append(say(rng, "about beat", keep=keep, are=are, sit=sit, **w))
    feel = pick(rng, MOODS[factors["mood"]].words)
    if feel != w["mood"] and "mood" not in said:
        feel = f"{w['mood']} and {feel}"
    more.append(say(rng, "about mood", feel=feel))
    if rng.random() < 0.5:
        place = GENRES[factors["rhythm"] or factors["genre"]].place
        more[-1] += say(rng, "about place", place=place)
    more = [more[i] for i in rng.permutation(len(more))]
    count = 1 + int(rng.random() < 0.8)
    while count < len(more) and len(" ".join([first, *more[:count]]).split()) < 25:
        count += 1
    return ". ".join([first, *more[:count]])
