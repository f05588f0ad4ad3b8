"""The paper's questions, and a few it left open, asked in the toy world by anyone with an evening.

    python evaluate.py study             three seeds; an evening on two cores
    python evaluate.py study --seeds 1   the first of them; more may follow
    python evaluate.py study --quick     one seed, an eighth of the steps: half an hour

RQ1     mamba, simba, cross-simba, transformer: the loss against tokens, FLOPs and time, and how
        much of the Transformer's budget the others need to reach its last loss
RQ2     two stages (simba and transformer, refined) against one (simba with nine codebooks)
RQ3     four, two and one blocks, for the paper's 24, 12 and 6
and     EinFFT for the feed-forward layer; the text encoder frozen or trained; codebooks 1 ... 9;
        SSD or attention in the refiner; a refiner tuned to a language model's own tokens; how far
        past its training length each language model stays musical

All runs get the same steps of the same clips. They are `train.py`'s toy preset, but count no beats,
as the paper's models do not; one thread each, as many at once as there are cores, in out/study.
What is there already is not made again, so the same command goes on after Ctrl-C, a crash, or a
night. Tables (CSV) and figures land in results/study, and its README.md has them all on one page.
Brackets are the least and the greatest of the seeds where there is a loss in front of them, and
elsewhere bootstrap 95% intervals over clips.
"""

import functools
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import train
from audio import SAMPLE_RATE, write_text
from checkpoint import load_checkpoint, load_text_encoder, read_config
from codec import load_codec
from data import Clips, Writer
from diffusion import load_refiner
from evaluate import following, quality
from experiments import refining
from paper import budget, figures
from sample import ROOT, SHIPPED, SHIPPED_REFINER, generate, sample_tokens
from toy import band, composer, corpus, songbook, words


@dataclass
class Size:
    name: str
    steps: int  # of a language model; the preset's schedule is stretched over them
    refiner_steps: int  # of a new refiner
    tuning_steps: int  # of one that is tuned
    seeds: int
    count: int  # prompts that every system answers, held-out clips that are refined
    minute: int  # pieces of a minute
    valid_clips: int


FULL = Size("study", 1250, 1500, 500, seeds=3, count=32, minute=8, valid_clips=64)
QUICK = Size("study-quick", 160, 160, 60, seeds=1, count=8, minute=2, valid_clips=16)

VARIANTS = ("mamba", "simba", "cross-simba", "transformer")
NINE = "simba, 9 codebooks"
NEW = "simba, new refiner"  # of the study's own, with few steps
STAGES = ("simba", NEW, "transformer", NINE)  # Table II's
LMS = {variant: f"--variant {variant}" for variant in VARIANTS} | {
    NINE: "--codebooks 9",
    "simba, 2 blocks": "--blocks 2",
    "simba, 1 block": "--blocks 1",
    "simba, EinFFT": "--mixer einfft",
    "simba, frozen text encoder": "--train-text-encoder 0",
}
REFINERS = {
    "refiner, SSD": "--variant refiner",
    "refiner, attention": "--variant refiner --backbone attention --layers 8",  # as many parameters
}
OWN = "refiner, tuned to own tokens"
TUNED = {
    "refiner, tuned to real tokens": "--variant refiner --init-from toy",
    OWN: "--variant refiner --init-from toy",
}
EARLY = 0.4  # the share of the steps after which Table I's models are heard a first time


def study(quick=False, data="toy", seeds=None):
    size = QUICK if quick else FULL
    Study(replace(size, seeds=seeds or size.seeds), data).run()


class Study:
    def __init__(self, size, data):
        self.size, self.data, self.out = size, data, Path("out") / size.name
        self.results, self.sections, self.started = Path("results") / size.name, [], time.time()
        self.results.mkdir(parents=True, exist_ok=True)
        self.codec, self.judge = load_codec("toy"), evaluate.load_judge()
        self.task = evaluate.toy_task(self.judge, size.count, self.codec)
        self.captions = self.task.prompts["sentence"]
        # One set of prompts; no four samples of each, which diversity would want, and no copying.
        self.task = varied(self.task, prompts=dict(sentence=self.captions), alike=None, tokens=None)

    @property
    def usual(self):
        """The size that this one is, but perhaps for its seeds."""
        return QUICK if self.size.name == QUICK.name else FULL

    def run(self):
        own_tokens(self.out / "own-tokens", train.data_folder(self.data))
        self.train()
        self.play()
        self.losses()
        self.race()
        self.heard()
        self.longer()
        self.refiners()
        self.minutes()
        self.codebooks()
        self.write()

    # -------------------------------------------------------------------------- the trainings -----

    def folder(self, label, seed=0):
        return self.out / f"{label.replace(', ', '-').replace(' ', '-')}-{seed}"

    def best(self, label):
        """The checkpoint that is heard."""
        return self.folder(label) / "best"

    def seeds(self, label):
        """Those of a language model. One with nine codebooks is slow, and its loss is compared to
        no other's: it is heard, and one run is enough for that."""
        return range(1 if label == NINE else self.size.seeds)

    def train(self):
        """Every run to its end; a seed of all of them before the next."""
        size = self.size
        every, early = size.steps // 10, round(EARLY * size.steps)
        jobs = {}
        for seed in range(size.seeds):
            for label, options in LMS.items():
                if seed not in self.seeds(label):
                    continue
                more = f"--clock music --steps {size.steps} --seed {seed} --data {self.data}"
                more += f" --valid-every {every} --keep-every {early}"
                more += f" --valid-clips {size.valid_clips}"
                jobs[self.folder(label, seed)] = f"{options} {more}".split()
        for label, options in (REFINERS | TUNED).items():
            steps = size.refiner_steps if label in REFINERS else size.tuning_steps
            data = self.out / "own-tokens" if label == OWN else self.data
            more = f"--steps {steps} --valid-every {steps // 5} --valid-clips {size.valid_clips}"
            jobs[self.folder(label)] = f"{options} {more} --data {data}".split()
        in_parallel([["--out", str(out), *options] for out, options in jobs.items()])

    def runs(self, label):
        """[(rows of steps, rows of validations)] of the label's seeds, one pair a run"""
        found = []
        for seed in self.seeds(label):
            with open(self.folder(label, seed) / "log.jsonl") as lines:
                rows = [json.loads(line) for line in lines]
            found.append(([r for r in rows if "loss" in r], [r for r in rows if "right" in r]))
        return found

    @functools.cached_property
    def budgets(self):
        """{label: (parameters of its runs; {axis: what was spent by each validation}; the losses
        there (seeds, validations))}"""
        return {label: self.spent(label) for label in LMS}

    def spent(self, label):
        model, training, *_ = train.parse_arguments(["--resume", str(self.folder(label))])
        runs = self.runs(label)
        at = [row["step"] for row in runs[0][1]]
        tokens = np.array([train.seen_before(step, training)[1] for step in at], float)
        seconds = [np.cumsum([row["seconds"] for row in steps]) for steps, _ in runs]
        count = budget.parameters(model)
        spent = {
            "steps": np.array(at, float),
            "tokens": tokens,
            "FLOPs": 6 * count * tokens,
            "seconds of one core": np.mean([s[np.array(at) - 1] for s in seconds], 0),
        }
        return count, spent, np.array([[row["right"] for row in valid] for _, valid in runs])

    # ------------------------------------------------------------------------------ RQ1, RQ3 ------

    def losses(self):
        rows = []
        for label in LMS:
            count, spent, losses = self.budgets[label]
            last = [valid[-1] for _, valid in self.runs(label)]
            rows.append((label, {
                "parameters, M": plain(count / 1e6),
                "minutes": plain(spent["seconds of one core"][-1] / 60),
                "loss, whole clips": over_seeds(losses[:, -1]),
                "loss, first second": over_seeds([row["right_1s"] for row in last]),
                "... with another's caption": over_seeds([row["shuffled_1s"] for row in last]),
            }))  # fmt: skip
        self.table(
            "losses", "The language models", rows,
            f"Nats per token over held-out clips, after {self.size.steps} steps; "
            f"{self.size.seeds} seed(s), with nine codebooks one; minutes of one core. With nine "
            "codebooks the loss is the mean over all nine, and not to be compared.",
        )  # fmt: skip
        axes = ["tokens", "FLOPs", "seconds of one core"]
        plt = figures.pyplot()
        figure, panels = plt.subplots(1, 3, figsize=(15, 4.2), sharey=True)
        for axis, panel in zip(axes, panels):
            for i, label in enumerate(VARIANTS):
                _, spent, losses = self.budgets[label]
                style = dict(color=figures.COLOURS[i], marker=figures.MARKERS[i], markersize=4)
                panel.plot(spent[axis], losses.mean(0), label=label, **style)
                low, high = losses.min(0), losses.max(0)
                panel.fill_between(spent[axis], low, high, color=figures.COLOURS[i], alpha=0.15)
            panel.set(xlabel=axis)
            panel.grid(alpha=0.25)
        panels[0].set(ylabel="validation loss, nats per token")
        panels[0].legend(frameon=False)
        self.figure(figure, "losses", "Validation loss against what training has cost")

    def race(self):
        """How much of the Transformer's budget does each need to reach its last loss?"""
        _, theirs, losses = self.budgets["transformer"]
        goal, rows = losses[:, -1].mean(), []
        for label in VARIANTS[:-1]:
            _, spent, mine = self.budgets[label]
            cells = {}
            for axis in theirs:
                shares = [reached(spent[axis], run, goal) / theirs[axis][-1] for run in mine]
                cells[axis] = over_seeds(shares)
            rows.append((label, cells))
        self.table(
            "race", "Time to beat the Transformer", rows,
            f"The share of the Transformer's budget after which its last loss, {goal:.3f}, is "
            "reached (between two validations: by a straight line); inf: it was not.",
        )  # fmt: skip

    # ------------------------------------------------------------------------------- the judge ----

    def systems(self):
        early = round(EARLY * self.size.steps)
        found = {}
        if self.usual is not QUICK:
            for label in VARIANTS:
                found[f"{label}, {early} steps"] = self.folder(label) / f"step-{early}"
        found |= {label: self.best(label) for label in LMS}
        systems = {label: system_of(folder) for label, folder in found.items()}
        return systems | {NEW: f"{found['simba']}+{self.best('refiner, SSD')}"}

    def hear(self, systems, seconds=10.0, **changes):
        """{label: system} -> rows of the quality table, and of the table of factors, of the task
        with these changes."""
        task = varied(self.task, seconds=seconds, **changes)
        tables = evaluate.measure([*systems.values()], self.judge, task)
        real = len(task.real)
        return [
            [*rows[:real], *((label, cells) for label, (_, cells) in zip(systems, rows[real:]))]
            for rows in tables
        ]

    def merged(self, systems, seconds=10.0):
        """The same without the rows of real clips, both tables in one."""
        rows, factors = self.hear(systems, seconds, real=[])
        return [(label, cells | more) for (label, cells), (_, more) in zip(rows, factors)]

    def play(self):
        """Makes all that will be heard, in as many processes as there are cores: what so small a
        model does in a step is not worth dividing among threads."""
        if torch.cuda.is_available():
            return  # one process at a time; each system is played when its turn comes
        systems, minute = self.systems(), self.captions[: self.size.minute]
        jobs = [(systems[label], minute, 60.0) for label in VARIANTS]  # the longest first
        jobs += [(systems[label], self.captions, 25.0) for label in STAGES]
        jobs += [(each, self.captions, 10.0) for each in (systems | self.refined()).values()]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), spawn, alone) as pool:
            made = pool.map(evaluate.music, *zip(*jobs))
            for _ in tqdm(made, "playing", len(jobs), unit="system", disable=None):
                pass

    def heard(self):
        rows, factors = self.hear(self.systems())
        about = (
            f"{self.size.count} sentences of held-out clips, 10 s, seed 0 of each run, guidance 3, "
            "temperature 1.2, top 250. One codebook is refined by the refiner that ships; the new "
            f"refiner has had {self.size.refiner_steps} steps."
        )
        self.table("judge", "What the judge hears in them", rows, about)
        self.table("factors", "What was asked", factors, about)

    def longer(self):
        """Table II's other half."""
        systems = self.systems()
        rows = self.merged({label: systems[label] for label in STAGES}, 25.0)
        about = "The reference is of 10 s, and so was training; the judge's windows are of 10 s."
        self.table("longer", "One stage or two, 25 s", rows, about)

    # ----------------------------------------------------------------------------- the refiners ---

    def second_stages(self):
        folders = {label: self.best(label) for label in REFINERS | TUNED}
        return folders | {"refiner that ships": SHIPPED_REFINER}

    def refined(self):
        """The systems of the language model that ships and each of them."""
        return {f"after simba: {k}": f"{SHIPPED}+{v}" for k, v in self.second_stages().items()}

    def refiners(self):
        """From true first codebooks; and after the language model that ships."""
        true = torch.from_numpy(self.task.codes)
        rows = [refining.measure("codebook 1 alone", self.codec, true, true[:, :1])]
        for label, folder in self.second_stages().items():
            made, seconds = refining.refine_all(folder, self.codec, true, self.captions, label)
            name, cells = refining.measure(label, self.codec, true, made, seconds)
            size = sum(p.numel() for p in load_refiner(folder).parameters()) / 1e6
            rows.append((name, {"parameters, M": plain(size)} | cells))
        about = (
            f"{self.size.refiner_steps} steps for the new ones, {self.size.tuning_steps} for those "
            f"tuned, 25 steps of DDIM; {len(true)} held-out clips. Own tokens are those that the "
            "language model that ships draws at each frame after the true ones."
        )
        self.table("refiners", "The second stage, from true first codebooks", rows, about)
        curves = refining.loss_curves([self.best(label) for label in REFINERS])
        self.figure(curves, "refiner-loss", "The new refiners' losses in training")
        rows = self.merged(self.refined())
        about = (
            f"{self.size.count} sentences, 10 s, the language model that ships. The new refiners "
            "play with 25 steps and guidance 2, those tuned as the one that ships."
        )
        self.table("refined", "The second stage, after a language model", rows, about)

    # ------------------------------------------------------------------------ beyond ten seconds --

    def minutes(self):
        """A minute of music by models that have seen ten seconds."""
        count, judge, frames, window = self.size.minute, self.judge, 6 * 862, 862
        captions = self.captions[:count]
        task = varied(self.task, factors=self.task.factors[:count], tags=self.task.tags[:count])
        real = self.real_minutes(count, frames)
        losses, follows, costs = [], [], []
        for label in VARIANTS:
            folder = self.best(label)
            lm, encoder = load_checkpoint(folder), load_text_encoder(folder)
            if real is not None:
                found = []  # (clips, frames) nats
                for codes, caption in zip(real, captions):
                    with torch.inference_mode():
                        logits = lm(codes[None], *encoder([caption]))[0, 0]
                    found.append(F.cross_entropy(logits, codes[0], reduction="none").numpy())
                parts = np.array(found).reshape(count, -1, window).mean(2)  # (clips, windows)
                cells = {
                    f"{10 * i}-{10 * i + 10} s": (part.mean(), evaluate.interval(part))
                    for i, part in enumerate(parts.T)
                }
                losses.append((label, cells))
            files, _ = evaluate.music(system_of(folder), captions, 60.0, f"{label}, 60 s")
            audio = np.stack([evaluate.read_audio(f)[0][: 60 * SAMPLE_RATE].numpy() for f in files])
            for i in (0, 2, 5):
                part = torch.from_numpy(audio[:, 10 * i * SAMPLE_RATE :][:, : 10 * SAMPLE_RATE])
                heard = judge.listen(part)
                cells = dict(CLAP_toy=quality(judge, task, heard, captions)["CLAP_toy"])
                told = following(task, heard, captions)
                cells |= {k: told[k] for k in ("genre", "lead", "mood") if k in told}
                follows.append((f"{label}, {10 * i}-{10 * i + 10} s", cells))
            costs.append((label, cost_of_a_minute(lm, encoder, captions[0], frames)))
        if losses:
            about = f"Nats per token on {count} real clips of a minute; training clips end at 10 s."
            self.table("minute-loss", "The loss past the training length", losses, about)
        about = f"{count} prompts; the judge hears ten seconds of each minute."
        self.table("minute-judge", "Music past the training length", follows, about)
        about = "Language model alone, one piece, guidance 3 (two rows), one minute, all cores."
        self.table("minute-cost", "What a minute takes", costs, about)

    def real_minutes(self, count, frames):
        """The held-out clips' pieces, played for a minute: first codebooks (clips, 1, frames).
        None where there is no FluidSynth to play them."""
        midis = [
            composer.compose(*songbook.sample_clip(corpus.VALID * i), 60.2) for i in range(count)
        ]
        try:
            audio = band.render_many(midis, 60.2)
        except ValueError as missing:
            print(f"left out, the loss past the training length: {missing}")
            return None
        codes = [self.codec.encode(torch.from_numpy(a)[None])[0, :1] for a in audio]
        return torch.stack([c[:, :frames] for c in codes])

    def codebooks(self):
        """The forerunner's Figure 1."""
        rows = evaluate.by_codebooks(self.judge, self.task, self.codec)
        about = f"{self.size.count} held-out clips through the codec."
        self.table("kappa", "How many codebooks?", rows, about)

    # ----------------------------------------------------------------------------- what it wrote --

    def table(self, name, title, rows, about):
        text = f"## {title}\n\n{evaluate.markdown(rows)}\n\n{about}\n"
        print("\n" + text)
        self.sections.append(text)
        head = f"# {title}; {provenance()}\n"
        write_text(self.results / f"{name}.csv", head + evaluate.sheet(rows))

    def figure(self, figure, name, title):
        figures.keep(figure, self.results / name)
        self.sections.append(f"![{title}]({name}.png)\n")

    def write(self):
        spent = sum(
            self.budgets[label][1]["seconds of one core"][-1] * len(self.seeds(label))
            for label in LMS
        )
        command = "python evaluate.py study" + " --quick" * (self.usual is QUICK)
        command += f" --data {self.data}" * (self.data != "toy")
        command += f" --seeds {self.size.seeds}" * (self.size.seeds != self.usual.seeds)
        head = (
            f"# The study\n\n`{command}`, on {provenance()}. Training of the language models took "
            f"{spent / 3600:.1f} hours of one core; this run of the command "
            f"{(time.time() - self.started) / 60:.0f} minutes.\n"
        )
        write_text(self.results / "README.md", "\n".join([head, *self.sections]))
        print(f"{self.results}/README.md")


# ------------------------------------------------------------------------------------ its parts ---


def in_parallel(jobs):
    """Runs of train.py that are not yet complete, each by one thread, as many at once as there are
    cores; their output in train.log beside their checkpoints."""
    todo = []
    for job in jobs:
        out, steps = Path(job[1]), int(job[job.index("--steps") + 1])
        begun = train.begun(out)
        if begun and "--data" in job:
            asked, had = job[job.index("--data") + 1], read_config(out / "last")["train"]["data"]
            if asked != had:
                raise ValueError(
                    f"{out} was trained on {had}, not {asked}: move it away, or --data {had}"
                )
        if not begun or read_config(out / "last")["step"] < steps:
            todo.append((out, steps, ["--resume", str(out)] if begun else job))
    bar = tqdm(total=sum(steps for _, steps, _ in todo), desc="training", unit="step", disable=None)
    at_once = 1 if torch.cuda.is_available() else os.cpu_count()
    running, waiting = {}, todo[:]
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                out, _, job = waiting.pop(0)
                out.mkdir(parents=True, exist_ok=True)
                running[out] = subprocess.Popen(
                    [sys.executable, "-m", "experiments.study", *job], stdout=open(out / "train.log", "a"),
                    stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
                )  # fmt: skip
            time.sleep(1)
            bar.n = sum(done(out) for out, *_ in todo)
            bar.refresh()
            for out, process in [*running.items()]:
                if process.poll() is None:
                    continue
                if running.pop(out).returncode:
                    raise ValueError(f"a run failed; what it said is in {out}/train.log")
    finally:
        for process in running.values():  # they save, and go on next time
            process.terminate()
            process.wait()
        bar.close()


def done(run):
    """Steps that a run has logged."""
    if not (run / "log.jsonl").exists():
        return 0
    with open(run / "log.jsonl", "rb") as file:
        file.seek(max(0, os.path.getsize(run / "log.jsonl") - 1000))
        lines = file.read().split(b"\n")
    try:
        return json.loads(lines[-2])["step"]
    except (ValueError, IndexError, KeyError):
        return 0


def own_tokens(folder, data):
    """A corpus with a first codebook as the language model that ships would have it: at every
    frame a token is drawn from what it expects after the true ones; codebooks 2 ... 9 stay.
    ValueError if the data are not the toy world's."""
    sides = [Clips(data, split, 9, "toy") for split in ("train", "valid")]
    if not all("factors" in row for side in sides for row in side.rows):
        raise ValueError(f"the study is of the toy world: {data} was not made by `toy.py build`")
    writer = Writer(folder, load_codec("toy"))
    lm, encoder = load_checkpoint(SHIPPED), load_text_encoder(SHIPPED)
    options = read_config(SHIPPED).get("sampling", {})
    options = {k: options[k] for k in ("temperature", "top_k", "top_p") if k in options}
    have = len(writer.rows())
    todo = [(side, i) for side in sides for i in range(len(side))][have:]
    for number, (side, i) in enumerate(tqdm(todo, "own tokens", disable=None, leave=False), have):
        codes, row = side.codes(i), side.rows[i]
        rng = np.random.default_rng([23, number])
        with torch.inference_mode():
            text = encoder([words.caption(row["factors"], rng)])
            logits = lm(torch.from_numpy(codes[None, :1]), *text)[0].transpose(0, 1)  # (L, 1, V)
            uniform = torch.from_numpy(rng.random((len(logits), 1), np.float32))
            codes[0] = sample_tokens(logits, uniform, **options)[:, 0].numpy()
        writer.add([(codes.astype(np.uint16), dict(split=row["split"], factors=row["factors"]))])


def system_of(folder):
    """A checkpoint as evaluate.py plays it: with the refiner that ships, whatever lies in out/."""
    nine = read_config(folder)["model"]["codebooks"] > 1
    return str(folder) if nine else f"{folder}+{SHIPPED_REFINER}"


def alone():
    """Prepares a process that plays beside others."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, not its clip alone
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # their progress bars would write over each other


def varied(task, **changes):
    return SimpleNamespace(**vars(task) | changes)


def plain(value):
    return value, None


def over_seeds(values):
    return np.mean(values), (np.min(values), np.max(values)) if len(values) > 1 else None


def reached(spent, losses, goal):
    """How much is spent when the losses first are as low as the goal."""
    below = np.flatnonzero(losses <= goal)
    if not len(below):
        return np.inf
    i = below[0]
    if i == 0:
        return spent[0]
    part = (losses[i - 1] - goal) / (losses[i - 1] - losses[i])
    return spent[i - 1] + part * (spent[i] - spent[i - 1])


def cost_of_a_minute(lm, encoder, prompt, frames):
    """-> cells: milliseconds of a step in the first ten seconds and in the last, and the bytes that
    are remembered by then."""
    times = [time.time()]
    for _ in generate(lm, encoder, [prompt], frames, [0], block=862):
        times.append(time.time())
    first, last = (1000 * (b - a) / 862 for a, b in (times[:2], times[-2:]))
    with torch.inference_mode():
        _, state = lm.prefill(*encoder([prompt]), room=frames)
    kept = sum(v.nbytes for block in state.blocks for layer in block for v in layer)
    return {
        "ms a step, first 10 s": plain(first),
        "ms a step, last 10 s": plain(last),
        "state, KB": plain(2 * kept / 1000),
    }


@functools.cache
def provenance():
    """Machine and commit, in a line."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "describe", "--always"]).stdout.strip()
    if git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode == 1:
        commit += "-dirty"  # not for tables that it has written itself
    try:
        cpu = open("/proc/cpuinfo").read().split("model name\t: ")[1].split("\n")[0]
    except (OSError, IndexError):
        cpu = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return (
        f"{device}, {os.cpu_count()} cores, torch {torch.__version__}, commit {commit or 'unknown'}"
    )


def one_run(argv):
    """train.py without the samples at its end."""
    if not argv:
        raise ValueError("the study is `python evaluate.py study`; this makes one of its runs")
    model_config, config, run, _ = train.parse_arguments(argv)
    train.train(model_config, config, run, train.join_processes(config.device))


if __name__ == "__main__":
    evaluate.entry(lambda: one_run(sys.argv[1:]))
