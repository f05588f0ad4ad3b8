"""The listening test: people give marks to music without knowing which system made it.

    python -m paper.listening page mamba/ transformer/ --prompts prompts.txt --out test.html
    python -m paper.listening tally answers/

`page` makes one web page that contains everything, audio included. Listeners open it from disk, on
a computer or a phone. A session has three questions, as in the paper (SSMTTM, IV-B). Each shows a
prompt and one clip of each system under a letter, in a random order, and asks for marks from 1 to 5
for consistency, alignment and overall quality. Prompts are drawn at random. Answers survive a
reload, and are downloaded as JSON at the end. `tally` reads a folder of such files and prints mean
± standard deviation of each system.

Systems are folders of 000.wav, 001.wav ... Clip NNN plays line NNN of the prompts, from 0. The page
does not contain their names: it knows clips by codes. The key to the codes is written to
test.key.json: do not send it to the listeners.
"""

import base64
import io
import json
import secrets
from pathlib import Path

import numpy as np

from audio import FORMATS, SAMPLE_RATE, read_audio, write_text
from options import entry, new_parser, read_lines

SCALES = {  # the paper's three
    "Consistency": "Does the music hang together, in detail and as a whole: melody, rhythm, form?",
    "Alignment": "Is what the text describes (instruments, tempo, mood, style) what you hear?",
    "Overall": "How musical, natural and pleasant to listen to is it?",
}
QUESTIONS = 3  # in a session


def make_page(systems, prompts, out, count=24):
    """Writes the page `out` and its key, for folders and lines of text -> the number of prompts: at
    most `count`, drawn at random. Every listener's browser draws three of them."""
    if len(systems) < 2 or len({Path(s).name for s in systems}) < len(systems):
        raise ValueError("a listening test compares two or more folders of different names")
    clips = {}
    for system in systems:
        files = [p for p in Path(system).iterdir() if p.suffix.lower() in (*FORMATS, ".mp3")]
        clips[Path(system).name] = {int(p.stem): p for p in files if p.stem.isdigit()}
    shared = [i for i in range(len(prompts)) if all(i in files for files in clips.values())]
    if len(shared) < QUESTIONS:
        raise ValueError(
            f"the folders share clips of {len(shared)} prompts, and a session asks {QUESTIONS}:"
            " clip NNN.wav plays line NNN (from 0) of the prompts"
        )
    rng = np.random.default_rng()
    chosen = sorted(rng.permutation(shared)[:count].tolist())
    key, questions = {}, []
    for i in chosen:
        codes = {}
        for name in rng.permutation(sorted(clips)):
            code = secrets.token_hex(6)
            key[code] = dict(system=str(name), prompt=i)
            codes[code] = as_ogg(clips[name][i])
        questions.append(dict(prompt=prompts[i], clips=codes))
    test = dict(id=secrets.token_hex(4), scales=SCALES, questions=questions, perSession=QUESTIONS)
    data = json.dumps(test).replace("</", "<\\/")  # no caption can close the script
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page.replace("/*TEST*/null", data))
    key = json.dumps(dict(id=test["id"], clips=key), indent=1)
    write_text(out.with_suffix(".key.json"), key)
    return len(questions)


def as_ogg(path):
    """A file as a data: address, in Ogg Vorbis. All have one loudness: louder is not better."""
    import soundfile

    audio = read_audio(path)[0].numpy()
    audio = audio * (0.08 / max(float(np.sqrt(np.mean(audio**2))), 1e-6))
    audio = audio / max(1.0, float(np.abs(audio).max()))
    memory = io.BytesIO()
    with soundfile.SoundFile(memory, "w", SAMPLE_RATE, 1, format="OGG") as file:
        for start in range(0, len(audio), SAMPLE_RATE):  # one large write fails in Vorbis
            file.write(audio[start : start + SAMPLE_RATE])
    return "data:audio/ogg;base64," + base64.b64encode(memory.getvalue()).decode()


def tally(folder, key=None):
    """Answers (JSON files in `folder`), the page's key -> {system: {scale: marks}}, listeners."""
    keys = [Path(key)] if key else sorted(Path(folder).glob("*.key.json"))
    answers = sorted(set(Path(folder).glob("*.json")) - set(Path(folder).glob("*.key.json")))
    if not keys or not answers:
        raise ValueError(
            f"{folder} needs the listeners' answers and the page's key (NAME.key.json), or --key"
        )
    codes = {}
    for path in keys:
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            codes |= {(known["id"], code): clip["system"] for code, clip in known["clips"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the key of a page ({error!r})") from None
    marks, listeners = {}, set()
    for path in answers:
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            listener = given["listener"]
            found = [
                (codes[given["test"], a["clip"]], scale, mark)
                for a in given["answers"]
                for scale, mark in a["marks"].items()
            ]
            if any(scale not in SCALES or mark not in (1, 2, 3, 4, 5) for _, scale, mark in found):
                raise ValueError("a mark that is no number from 1 to 5")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not an answer to this page ({error!r})") from None
        if listener in listeners:
            continue  # the same session, sent twice
        listeners.add(listener)
        for system, scale, mark in found:
            marks.setdefault(system, {s: [] for s in SCALES})[scale].append(mark)
    return marks, len(listeners)


def table(marks, listeners):
    lines = [f"| {listeners} listeners | {' | '.join(SCALES)} | clips |", "|---" * 5 + "|"]
    for system, scales in sorted(marks.items(), key=lambda m: -np.mean(m[1]["Overall"])):
        cells = [f"{np.mean(s):.2f} ± {np.std(s, ddof=len(s) > 1):.2f}" for s in scales.values()]
        lines.append(f"| {system} | {' | '.join(cells)} | {len(scales['Overall'])} |")
    return "\n".join(lines)


def main():
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("page", help="make the page")
    page.add_argument("systems", nargs="+", help="folders of 000.wav, 001.wav ...")
    page.add_argument("--prompts", required=True, help="text file, one prompt a line")
    page.add_argument("--count", type=int, default=24, help="largest number of prompts [24]")
    page.add_argument("--out", default="listening-test.html")
    answers = commands.add_parser("tally", help="mean and standard deviation of the answers")
    answers.add_argument("folder", help="the listeners' JSON files, and the key")
    answers.add_argument("--key", help="NAME.key.json, if it is elsewhere")
    args = parser.parse_args()
    if args.command == "tally":
        return print(table(*tally(args.folder, args.key)))
    count = make_page(args.systems, read_lines(args.prompts), args.out, args.count)
    print(f"{args.out}: {count} prompts; keep {Path(args.out).with_suffix('.key.json')} private")


if __name__ == "__main__":
    entry(main)
