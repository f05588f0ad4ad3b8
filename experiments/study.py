"""The paper's questions, asked in the toy world by anyone with an evening.

    python -m experiments.study              three seeds: an evening on two cores
    python -m experiments.study --seeds 1    the first of them; more can follow
    python -m experiments.study --quick      one seed, an eighth of the steps: half an hour

  RQ1   Which language model learns fastest: by tokens, by FLOPs, by time?
  RQ2   Two stages, or one language model of all nine codebooks?
  RQ3   How small can a model be? Four, two and one blocks, for the paper's 24, 12 and 6
  more  EinFFT instead of the feed-forward layer; a frozen text encoder; SSD or attention in the
        refiner; music past the ten seconds of training; 1 ... 9 codebooks

All language models get the same steps of the same clips. They are train.py's toy preset without its
metronome, which the paper's models do not have. Runs are folders in out/study, with one thread each
and as many at once as there are cores. A stopped study continues with the same command. Tables and
figures are written to results/study, with a README.md that has all of them. Brackets after a loss
are the least and the greatest of the seeds; others are 95% intervals.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import evaluate
from audio import SAMPLE_RATE, read_audio, write_text
from checkpoint import load_checkpoint, load_text_encoder, read_config
from codec import load_codec
from data import Clips, read_jsonl
from diffusion import load_refiner, refine
from evaluate import Cell, mean
from options import check_value, entry, new_parser
from sample import ROOT, SHIPPED, SHIPPED_REFINER
from toy import questions
from toy.judge import load_judge

VARIANTS = ("mamba", "simba", "cross-simba", "transformer")
NINE = "simba, 9 codebooks"
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


class Study:
    def __init__(self, quick=False, data="toy", seeds=None):
        part = 8 if quick else 1
        self.name = "study-quick" if quick else "study"
        self.out = Path("out") / (self.name if data == "toy" else f"{self.name}-{Path(data).name}")
        self.results = evaluate.RESULTS / self.name
        self.data = data
        self.seeds = seeds or (1 if quick else 3)
        self.every = 125 // part  # steps between validations
        self.steps = 10 * self.every
        self.early = 4 * self.every  # a checkpoint to compare, as in the paper's Table I
        self.refiner_steps = 1500 // part
        self.pieces = 8 // part  # of a minute
        self.sections = []  # of the report
        if data != "toy" and "factors" not in Clips(data, "valid").rows[0]:
            raise ValueError(f"{data} was not made by `python -m toy build`, which the study needs")
        self.codec, self.judge = load_codec("toy"), load_judge()
        asked = questions.ask(self.codec, 32 // part, ["sentence"])
        self.task = evaluate.Task(seconds=10.0, codec=self.codec, **asked)
        self.captions = self.task.prompts["sentence"]

    def run(self):
        train_all(self.jobs())
        self.losses()
        self.hear()
        self.refiners()
        self.minute()
        self.write()

    def folder(self, label, seed=0):
        return self.out / f"{label.replace(', ', '-').replace(' ', '-')}-{seed}"

    def best(self, label):
        """The checkpoint that is heard: of seed 0"""
        return self.folder(label) / "best"

    def seeds_of(self, label):
        """Nine codebooks have one seed: they are slow, and their loss compares with no other."""
        return range(1 if label in (NINE, *REFINERS) else self.seeds)

    def jobs(self):
        """{folder: options of train.py}, one seed of all runs before the next"""
        lms = f"--steps {self.steps} --valid-every {self.every} --keep-every {self.early}"
        lms += " --clock music"
        refiners = f"--steps {self.refiner_steps} --valid-every {self.refiner_steps // 5}"
        jobs = {}
        for seed in range(self.seeds):
            for label, options in (LMS | REFINERS).items():
                if seed in self.seeds_of(label):
                    options += f" {refiners if label in REFINERS else lms} --seed {seed}"
                    jobs[self.folder(label, seed)] = [*options.split(), "--data", self.data]
        return jobs

    def logs(self, label):
        """What each seed's run logged of its steps and of its validations: [(rows, rows)]"""
        found = []
        for seed in self.seeds_of(label):
            rows = read_jsonl(self.folder(label, seed) / "log.jsonl")
            found.append(([r for r in rows if "loss" in r], [r for r in rows if "right" in r]))
        return found

    def losses(self):
        """What each language model had cost at each validation, and what it had learned."""
        curves, table = {}, {}
        for label in LMS:
            logs = self.logs(label)
            at = np.array([row["step"] for row in logs[0][1]]) - 1
            tokens, seconds = (
                np.mean([np.cumsum([row[key] for row in steps])[at] for steps, _ in logs], 0)
                for key in ("tokens", "seconds")
            )
            parameters = size(load_checkpoint(self.best(label)))
            spent = {"tokens": tokens, "FLOPs": 6 * parameters * tokens}
            spent["minutes of one core"] = seconds / 60
            losses = np.array([[row["right"] for row in valid] for _, valid in logs])
            curves[label] = spent, losses  # (V,) each, (seeds, V)
            last = [valid[-1] for _, valid in logs]
            table[label] = {
                "parameters, M": Cell(parameters / 1e6),
                "minutes": Cell(seconds[-1] / 60),
                "loss, whole clips": over_seeds(losses[:, -1]),
                "loss, first second": over_seeds([row["right_1s"] for row in last]),
                "... with another's caption": over_seeds([row["shuffled_1s"] for row in last]),
            }
        self.draw(curves)
        about = f"Nats per token of held-out clips, after {self.steps} steps; minutes of one core."
        about += " The loss of nine codebooks is their mean, and compares with no other."
        self.table("losses", "The language models", table, about)

        theirs, losses = curves["transformer"]
        goal, table = losses[:, -1].mean(), {}
        for label in VARIANTS[:-1]:
            spent, mine = curves[label]
            table[label] = {
                axis: over_seeds([reached(spent[axis], run, goal) / end[-1] for run in mine])
                for axis, end in theirs.items()
            }
        about = (
            f"The share of the Transformer's budget until its last loss, {goal:.3f}; inf: never."
        )
        self.table("race", "Time to beat the Transformer", table, about)

    def draw(self, curves):
        figure = Figure(figsize=(15, 4.2), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for label in VARIANTS:
            spent, losses = curves[label]
            for axis, (name, x) in zip(axes, spent.items()):
                axis.plot(x, losses.mean(0), "o-", label=label)
                axis.fill_between(x, losses.min(0), losses.max(0), alpha=0.15)
                axis.set(xlabel=name)
        axes[0].set(ylabel="validation loss, nats per token")
        axes[0].legend()
        self.results.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.results / "losses.png", dpi=80)
        self.sections.append("![Validation loss against the cost of training](losses.png)\n")

    def hear(self):
        """Tables of what the judge hears in systems."""
        refined = lambda folder, refiner=SHIPPED_REFINER: f"{folder}+{refiner}"
        early = f"step-{self.early}"
        models = {f"{v}, {early}": refined(self.folder(v) / early) for v in VARIANTS}
        models |= {label: refined(self.best(label)) for label in LMS}
        models[NINE] = str(self.best(NINE))
        models["simba, new refiner"] = refined(self.best("simba"), self.best("refiner, SSD"))
        longer = {k: models[k] for k in ("simba", "simba, new refiner", "transformer", NINE)}
        refiners = {label: refined(SHIPPED, self.best(label)) for label in REFINERS}
        codebooks = {f"{k} codebooks": f"codec-{k}" for k in range(1, 10)}
        for name, title, systems, seconds, about in (
            ("judge", "What the judge hears", models, 10.0, "Seed 0; with the refiner that ships."),
            (
                "longer",
                "One stage or two, 25 s",
                longer,
                25.0,
                "Training, reference, windows: 10 s.",
            ),
            ("refined", "Refiners after the model that ships", refiners, 10.0, ""),
            ("codebooks", "How many codebooks?", codebooks, 10.0, "Real clips through the codec."),
        ):
            task = self.task._replace(seconds=seconds)
            measured = evaluate.measure(systems.values(), self.judge, task)
            table = {row: cells for row, cells in measured.items() if row not in systems.values()}
            table |= {label: measured[system] for label, system in systems.items()}
            self.table(name, title, table, f"{len(self.captions)} sentences. {about}")

    def refiners(self):
        """Refiners by themselves: from the true first codebooks of held-out clips."""
        true = torch.from_numpy(self.task.codes)
        table = {"codebook 1 alone": closeness(self.codec, true, true[:, :1])}
        stages = {label: (self.best(label), {}) for label in REFINERS} | {
            "ships": (SHIPPED_REFINER, {}),
            "ships, 10 steps": (SHIPPED_REFINER, dict(steps=10)),
            "ships, no guidance": (SHIPPED_REFINER, dict(guidance=1.0, sketch_guidance=1.0)),
        }
        for label, (folder, options) in stages.items():
            refiner, encoder = load_refiner(folder), load_text_encoder(folder)
            made, started = [], time.time()
            for i, caption in enumerate(tqdm(self.captions, label, disable=None, leave=False)):
                pieces = refine(refiner, encoder, self.codec, caption, [true[i, :1]], i, **options)
                made.append(torch.cat([*pieces], 1))
            seconds = (time.time() - started) / len(made)
            cells = {"parameters, M": Cell(size(refiner) / 1e6), "seconds a clip": Cell(seconds)}
            if label in REFINERS:
                losses = [row["loss"] for row in self.logs(label)[0][0]]
                cells["error in training"] = Cell(np.mean(losses[-50:]))
            table[label] = closeness(self.codec, true, torch.stack(made)) | cells
        about = f"{len(true)} held-out clips; 25 steps of DDIM, guidance 2; the new ones had"
        about += f" {self.refiner_steps} steps. FD: of log-band frames from those of nine true"
        about += " codebooks. Flux: change from frame to frame, over that of the true codebooks."
        self.table("refiners", "Refiners from true first codebooks", table, about)

    def minute(self):
        """Pieces of a minute by models that were trained on ten seconds."""
        n, table = self.pieces, {}
        task = self.task._replace(factors=self.task.factors[:n], real=self.task.real.of(range(n)))
        for label in VARIANTS:
            system = f"{self.best(label)}+{SHIPPED_REFINER}"
            files = evaluate.music(system, self.captions[:n], 60.0)
            audio = [read_audio(file)[0] for file in files]
            for second in (0, 20, 50):
                part = slice(second * SAMPLE_RATE, (second + 10) * SAMPLE_RATE)
                heard = self.judge.listen([clip[part] for clip in audio])
                cells = evaluate.judged(self.judge, task, heard, self.captions[:n])
                table[f"{label}, {second}-{second + 10} s"] = cells
        about = f"{n} prompts; ten seconds of each minute."
        self.table("minute", "Music past the training length", table, about)

    def table(self, name, title, table, about):
        self.sections.append(evaluate.report(f"{self.name}/{name}", f"## {title}", table, about))

    def write(self):
        """All tables on one page, with the command, the machine and the commit."""
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        head = f"# The study\n\n`python {' '.join(sys.orig_argv[1:])}`, {device}, "
        head += f"{os.cpu_count()} cores, torch {torch.__version__}, commit {commit}\n"
        write_text(self.results / "README.md", "\n".join([head, *self.sections]))
        print(f"{self.results}/README.md")


def train_all(jobs):
    """Trains {folder: options} with one thread each, as many at once as there are cores. Finished
    runs are left alone, stopped ones are resumed. Their output is in FOLDER/train.log."""
    # train.py without the samples at its end
    program = "import sample, train; sample.main = lambda argv: None; train.entry(train.main)"
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))

    def train(job):
        folder, options = job
        if (folder / "last" / "config.json").exists():
            if read_config(folder / "last")["step"] == int(options[options.index("--steps") + 1]):
                return
            argv = ["--resume", str(folder)]
        else:
            argv = ["--out", str(folder), *options]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "train.log", "a") as log:
            command = [sys.executable, "-c", program, *argv]
            if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
                raise ValueError(f"a run failed; its output is in {folder}/train.log")

    at_once = 1 if torch.cuda.is_available() else os.cpu_count()
    thread_map(train, jobs.items(), max_workers=at_once, desc="training", disable=None)


def closeness(codec, true, codes):
    """{column: Cell} of refined codes (B, k, L) for clips whose true codes are (B, 9, L)."""
    with torch.inference_mode():
        nine, mine = codec.from_codes(true).mT, codec.from_codes(codes).mT  # (B, L, bands), dB
    fd = lambda i: evaluate.frechet_distance(mine[i].flatten(0, 1), nine[i].flatten(0, 1))
    picks = range(len(mine))
    value = fd(picks)
    flux = [z.diff(dim=1).abs().mean((1, 2)) for z in (mine, nine)]  # (B,)
    cells = {"FD": Cell(value, *evaluate.interval(picks, fd, 50, around=value))}
    cells["flux"] = mean(flux[0] / flux[1])
    if codes.shape[1] > 1:
        right = (codes[:, 1:] == true[:, 1:]).float().mean(2)  # (B, 8)
        cells |= {"code 2 right": mean(right[:, 0]), "codes 2-9 right": mean(right.mean(1))}
    return cells


def size(module):
    return sum(p.numel() for p in module.parameters())


def over_seeds(values):
    bounds = (np.min(values), np.max(values)) if len(values) > 1 else ()
    return Cell(np.mean(values), *bounds)


def reached(spent, losses, goal):
    """How much was spent when the losses first reached the goal, by linear interpolation."""
    return np.interp(-goal, -np.minimum.accumulate(losses), spent, right=np.inf)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, few prompts")
    parser.add_argument("--data", default="toy", help="a folder that `python -m toy build` made")
    parser.add_argument("--seeds", type=int, help="runs of each language model [3; --quick 1]")
    args = parser.parse_args()
    check_value("seeds", args.seeds, "[1, inf)")
    Study(args.quick, args.data, args.seeds).run()


if __name__ == "__main__":
    entry(main)
