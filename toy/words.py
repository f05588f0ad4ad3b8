"""Captions."""

import re
from types import SimpleNamespace

import numpy as np

from toy.songbook import FAST_FROM, GENRES, LEADS, MOODS, SLOW_BELOW, pick


def tempo_word(bpm: int) -> str:
    return "slow" if bpm < SLOW_BELOW else "mid-tempo" if bpm < FAST_FROM else "fast"


TEMPO_WORDS = {
    "slow": ["slow", "slow", "slow-paced", "unhurried"],
    "mid-tempo": ["mid-tempo", "mid-tempo", "medium-tempo", "moderate"],
    "fast": ["fast", "fast", "up-tempo", "fast-paced", "quick"],
}
NOUNS = "track track tune piece song instrumental groove music loop".split()
OPENERS = ["", "", "", "", "this is ", "play ", "i want ", "give me ", "make ", "we hear "]
MIXED = ["{}-flavoured {}", "{}-infused {}", "{} harmony over a {} groove", "{} with a {} beat"]
MIXED += ["{} chords and melody on a {} rhythm", "{} over a {} rhythm section"]


def caption(factors: dict, rng: np.random.Generator, length: str | None = None) -> str:
    """Describe a clip, anew at every call; length: words, sentence, paragraph or None (a mix)."""
    length = length or str(rng.choice(["words", "sentence", "paragraph"], p=[0.35, 0.4, 0.25]))
    text = dict(words=few_words, sentence=sentence, paragraph=paragraph)[length](factors, rng)
    text = re.sub(r"\b([Aa]) (?=[aeiou](?!ne))", r"\1n ", " ".join(text.split()).replace(" ,", ","))
    if rng.random() < (0.6 if length == "words" else 0.3):
        return text.lower()  # as people type
    text = re.sub(r"(^|\. )([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text + "." if length != "words" and rng.random() < 0.7 else text


def caption_with_lead(factors: dict, rng: np.random.Generator) -> str:
    """A caption that names the lead instrument, but for one in twenty; of others one in three
    does not."""
    for _ in range(3):
        text = caption(factors, rng)
        if names_lead(text, factors):
            break
    return text


def names_lead(text: str, factors: dict) -> bool:
    return any(name in text.lower() for name in LEADS[factors["lead"]][3])


def name(factors: dict, rng, compound: bool = True) -> str:
    """The genre or the mixture, genre first; compound: fit to stand before a noun."""
    genre, rhythm = factors["genre"], factors["rhythm"]
    if rhythm is None:
        return pick(rng, GENRES[genre].words)
    if compound or rng.random() < 0.5:
        return f"{genre} {rhythm}"
    return pick(rng, MIXED).format(genre, rhythm)


def worded(factors: dict, rng) -> SimpleNamespace:
    """Each factor in words, as this caption will call it."""
    key = factors["key"].replace("#", " sharp" if rng.random() < 0.5 else "#")
    key = re.sub(r"^([A-G])b", r"\1 flat" if rng.random() < 0.5 else r"\1b", key)
    number = pick(rng, ["{} bpm", "{} BPM", "{} beats per minute", "{} bpm"]).format(
        factors["tempo"]
    )
    return SimpleNamespace(
        key=key,
        number=number,
        tempo=pick(rng, TEMPO_WORDS[tempo_word(factors["tempo"])]),
        mood=pick(rng, MOODS[factors["mood"]].words),
        lead=pick(rng, LEADS[factors["lead"]][3]),
        beat=pick(rng, GENRES[factors["rhythm"] or factors["genre"]].beat),
        band=pick(rng, GENRES[factors["genre"]].band),
        noun=pick(rng, NOUNS),
    )


FEW_WORDS = """
{name}|{name}|{name} {noun}|{mood} {name}|{mood} {name}|{tempo} {name}|{lead} {name}|{name} {lead}
{name} with {lead}|{tempo} {lead} {name}|{mood} {lead} {name}|{tempo} {mood} {name}|{name}, {mood}
{mood} {tempo} {name}|{name} {number}|{name} at {number}|{name} in {key}|{mood} {name} {lead}
{number} {name}|{mood} {name} at {number}|{lead} {name}, {number}|{name}, {number}
""".strip().replace("\n", "|").split("|")  # fmt: skip


def few_words(factors: dict, rng) -> str:
    w = worded(factors, rng)
    if rng.random() < 0.05:  # the only captions without a genre
        return pick(rng, ["{mood} {lead}", "{tempo} {mood} {lead}", "{mood} music"]).format(
            **vars(w)
        )
    shapes = FEW_WORDS[:10] if factors["rhythm"] else FEW_WORDS
    return pick(rng, shapes).format(name=name(factors, rng), **vars(w))


def adjectives_and_tails(w, rng, keep: float) -> tuple[str, list, set]:
    """Say each factor before the noun, after it or, with probability 1 - keep, not at all."""
    adjectives, tails, said = [], [], set()
    if rng.random() < keep:
        said.add("mood")
        if rng.random() < 0.75:
            adjectives.append(w.mood)
        else:
            tails.append(
                pick(rng, ["with a {} mood", "that sounds {}", "in a {} mood"]).format(w.mood)
            )
    if rng.random() < keep:
        said.add("tempo")
        if rng.random() < 0.3:
            adjectives.append(w.tempo)
        else:
            at = [
                "at {}",
                "at {}",
                "at a tempo of {}",
                "around {}",
                f"at a {w.tempo.split('-p')[0]} tempo",
            ]
            at = at[: 4 if "tempo" in w.tempo else 5]
            tails.append(pick(rng, at).format(w.number))
    if rng.random() < keep:
        said.add("lead")
        how = [
            "with {}",
            "with a {} lead",
            "featuring {}",
            "led by a {}",
            "with a {} melody",
            "for {}",
        ]
        tails.append(pick(rng, how).format(w.lead).replace("lead lead", "lead"))
    if rng.random() < keep * 0.35:
        said.add("key")
        tails.append(pick(rng, ["in {}", "in the key of {}"]).format(w.key))
    if rng.random() < keep * 0.3:
        said.add("beat")
        tails.append("with " + pick(rng, [w.beat, w.band]))
    adjectives = [adjectives[i] for i in rng.permutation(len(adjectives))]
    tails = [tails[i] for i in rng.permutation(len(tails))]
    return pick(rng, [" ", ", ", " and "]).join(adjectives), tails, said


def is_plural(thing: str) -> bool:
    head = thing.split(" with ")[0]
    return " and " in head or bool(re.search("[^s]s$", head) and not re.match("an? ", head))


def sentence(factors: dict, rng) -> str:
    w = worded(factors, rng)
    adjectives, tails, _ = adjectives_and_tails(w, rng, keep=0.65)
    form, glue = rng.random(), pick(rng, [" ", " ", ", "])
    tail = glue.join([""] + tails) if glue == " " else " " + glue.join(tails)
    if form < 0.45:  # "play a slow jazz reggae track with saxophone"
        article = "some" if w.noun == "music" else "a"
        return f"{pick(rng, OPENERS)}{article} {adjectives} {name(factors, rng)} {w.noun}{tail}"
    if form < 0.6:  # "slow and calm jazz reggae with saxophone"
        return f"{adjectives} {name(factors, rng, False)}{tail}"
    if form < 0.8:  # "jazz reggae, calm, saxophone, 84 bpm"
        tags = [
            w.mood,
            w.lead,
            pick(rng, [w.tempo, w.number, w.number]),
            w.key,
            re.sub("^an? ", "", w.beat),
        ]
        tags = [t for t, p in zip(tags, (0.7, 0.7, 0.7, 0.3, 0.2)) if rng.random() < p]
        tags.insert(
            0 if rng.random() < 0.6 else int(rng.integers(len(tags) + 1)), name(factors, rng)
        )
        return ", ".join(tags)
    if form < 0.93:  # "a saxophone plays a calm melody over a slow jazz reggae groove"
        verb = pick(rng, ["plays", "carries", "takes", "improvises"])
        what = pick(rng, ["melody", "tune", "theme", "line"])
        where = pick(rng, ["groove", "beat", "backing", "track"])
        tempo, mood = pick(rng, [w.tempo, "", ""]), pick(rng, [w.mood, w.mood, ""])
        end = pick(rng, ["", *[f" at {w.number}" if not tempo else ""] * 2, f" in {w.key}"])
        return f"a {w.lead} {verb} a {mood} {what} over a {tempo} {name(factors, rng)} {where}{end}"
    thing = pick(rng, ["something", "music that is", "a piece that is"])
    tempo = f" and {w.tempo}" if rng.random() < 0.5 else ""
    with_lead = f", with {w.lead}" if rng.random() < 0.5 else ""
    return f"{thing} {w.mood}{tempo}: {name(factors, rng, False)}{with_lead}"


def paragraph(factors: dict, rng) -> str:
    """Two or three sentences in the manner of MusicCaps."""
    w = worded(factors, rng)
    adjectives, tails, said = adjectives_and_tails(w, rng, keep=0.45)
    opener = pick(
        rng, ["", "this is ", "this is ", "the recording is ", "here is ", "this clip is "]
    )
    noun = pick(rng, ["instrumental", "track", "piece", "tune", "instrumental piece", "song"])
    which = name(factors, rng)
    first = f"{opener}a {adjectives} {which} {noun} {', '.join(tails)}"
    more = []
    if "lead" not in said:
        how = [
            "the {lead} {plays} the {main} melody",
            "a {lead} {plays} the {main} melody over {band}",
        ]
        how += ["the melody is played by a {lead}", "a {lead} takes the lead, over {beat}"]
        plays, main = pick(rng, ["plays", "carries", "takes"]), pick(rng, ["main", "lead", w.mood])
        more.append(pick(rng, how).format(plays=plays, main=main, **vars(w)))
    if "tempo" not in said:
        how = [
            "the tempo is {tempo}",
            "it is played at {number}",
            "the tempo is {number}",
            "it moves at {number}",
        ]
        in_key = pick(rng, [f", in {w.key}", f" and the key is {w.key}", "", ""]) * (
            "key" not in said
        )
        tempo = w.tempo.removesuffix("-tempo").removesuffix("-paced")
        tempo = {"mid": "moderate", "medium": "moderate", "up": "fast"}.get(tempo, tempo)
        more.append(pick(rng, how).format(tempo=tempo, number=w.number) + in_key)
    if "beat" not in said:
        how = [
            "{beat} {keep} it moving under {band}",
            "{band} {sit} on top of {beat}",
            "there {are} {beat}",
        ]
        how += ["it features {band} and {beat}", "behind it there {are} {beat}"]
        keep, are = ("keep", "are") if is_plural(w.beat) else ("keeps", "is")
        sit = "sit" if is_plural(w.band) else "sits"
        values = dict(beat=w.beat, band=w.band, keep=keep, are=are, sit=sit)
        more.append(pick(rng, how).format(**values))
    second = pick(rng, MOODS[factors["mood"]].words)
    feel = f"{w.mood} and {second}" if second != w.mood and "mood" not in said else second
    how = [f"the mood is {feel}", f"the atmosphere is {feel}", f"it sounds {feel}"]
    more.append(pick(rng, how))
    if rng.random() < 0.5:
        place = GENRES[factors["rhythm"] or factors["genre"]].place
        more[-1] += pick(rng, [", and one might hear it {}", ", like something heard {}"]).format(
            place
        )
    more = [more[i] for i in rng.permutation(len(more))]
    count = 1 + int(rng.random() < 0.8)
    while count < len(more) and len(" ".join([first, *more[:count]]).split()) < 25:
        count += 1
    return ". ".join([first.strip(), *more[:count]])
