"""The listening test: people give marks to music without knowing which system made it.

    python -m paper.listening page mamba/ transformer/ --prompts prompts.txt --out test.html
    python -m paper.listening tally answers/

`page` makes one web page with all audio in it, which listeners open from disk. A session has three
questions, as in the paper (SSMTTM, IV-B): a prompt, and one clip of each system under a letter, in
a random order. Each clip gets marks from 1 to 5 for consistency, alignment and overall quality.
Answers survive a reload, and are downloaded as JSON at the end. `tally` reads a folder of answers
with the page's key, and prints mean ± standard deviation of each system.

Systems are folders of 000.wav, 001.wav ... Clip NNN plays line NNN of the prompts, from 0. The page
knows clips by codes only. The key to them is test.key.json: do not send it to the listeners.
"""

import base64
import json
import random
import secrets
from collections import defaultdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from audio import FORMATS, read_audio, write_audio, write_text
from options import entry, new_parser, read_lines
from paper.captions import explained

SCALES = ("Consistency", "Alignment", "Overall")
QUESTIONS = 3  # in a session


def make_page(systems, prompts, out, count=24):
    """Writes the page `out` and its key, for folders and lines of text -> the number of prompts: at
    most `count`, drawn at random. Every listener's browser draws three of them."""
    out, clips = Path(out), {}
    for system in map(Path, systems):
        files = [p for p in system.iterdir() if p.suffix.lower() in (*FORMATS, ".mp3")]
        clips[system.resolve().name] = {int(p.stem): p for p in files if p.stem.isdecimal()}
    shared = [i for i in range(len(prompts)) if all(i in files for files in clips.values())]
    shared = [i for i in shared if prompts[i]]
    if len(clips) < max(2, len(systems)) or len(shared) < QUESTIONS:
        raise ValueError(
            f"a listening test needs folders of different names, two or more, that share clips of"
            f" {QUESTIONS} prompts: clip NNN.wav plays line NNN (from 0) of the prompts"
        )
    key, questions = {}, []  # key: {code of a clip: its system}
    for i in random.sample(shared, min(count, len(shared))):
        codes = {secrets.token_hex(6): name for name in random.sample([*clips], len(clips))}
        key |= codes
        audio = {code: as_ogg(clips[name][i]) for code, name in codes.items()}
        questions.append(dict(prompt=prompts[i], clips=audio))
    test = json.dumps(dict(id=secrets.token_hex(4), questions=questions))
    test = test.replace("</", "<\\/")  # no caption can close the script
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page.replace("/*TEST*/null", test))
    write_text(out.with_suffix(".key.json"), json.dumps(key, indent=1))
    return len(questions)


def as_ogg(path):
    """A file as a data: address, in Ogg Vorbis. All have one loudness: louder is not better."""
    audio = read_audio(path)[0]
    audio = audio * (0.08 / audio.square().mean().sqrt().clamp(min=1e-6))
    with TemporaryDirectory() as folder:
        file = Path(folder, "clip.ogg")
        write_audio(file, audio / audio.abs().max().clamp(min=1))
        return "data:audio/ogg;base64," + base64.b64encode(file.read_bytes()).decode()


def tally(folder):
    """A folder of answers and the page's key -> {system: {scale: marks}}, number of listeners"""
    keys, files = ({*Path(folder).glob(end)} for end in ("*.key.json", "*.json"))
    if not keys or keys == files:
        raise ValueError(f"{folder} needs the listeners' answers and the page's key, NAME.key.json")
    systems, listeners = {}, set()
    marks = defaultdict(lambda: defaultdict(list))
    for path in [*keys, *sorted(files - keys)]:
        with explained(f"{path} is not {'the key of' if path in keys else 'an answer to'} a page"):
            given = json.loads(path.read_text(encoding="utf-8"))
            if path in keys:
                systems |= given
            elif given["listener"] not in listeners:  # who sent two counts once
                listeners.add(given["listener"])
                for answer, scale in product(given["answers"], SCALES):
                    if answer["marks"][scale] not in (1, 2, 3, 4, 5):
                        raise ValueError("a mark that is no number from 1 to 5")
                    marks[systems[answer["clip"]]][scale].append(answer["marks"][scale])
    if not marks:
        raise ValueError(f"the answers in {folder} hold no marks")
    return marks, len(listeners)


def table(marks, listeners):
    lines = [f"| {listeners} listeners | {' | '.join(SCALES)} | clips |", "|---" * 5 + "|"]
    for system, scales in sorted(marks.items(), key=lambda m: -np.mean(m[1]["Overall"])):
        cells = [f"{np.mean(s):.2f} ± {np.std(s, ddof=len(s) > 1):.2f}" for s in scales.values()]
        lines.append(f"| {system} | {' | '.join(cells)} | {len(scales['Overall'])} |")
    return "\n".join(lines)


def main():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("command", choices=["page", "tally"])
    add("folders", nargs="+", help="page: of 000.wav ..., one a system; tally: answers and the key")
    add("--prompts", default="prompts.txt", help="text file, one prompt a line [prompts.txt]")
    add("--out", default="listening-test.html", help="[listening-test.html]")
    args = parser.parse_args()
    if args.command == "tally" and len(args.folders) > 1:
        raise ValueError("tally reads one folder: put all answers and the key there")
    if args.command == "tally":
        return print(table(*tally(args.folders[0])))
    count = make_page(args.folders, read_lines(args.prompts, empty=True), args.out)
    print(f"{args.out}: {count} prompts; keep {Path(args.out).with_suffix('.key.json')} private")


if __name__ == "__main__":
    entry(main)
