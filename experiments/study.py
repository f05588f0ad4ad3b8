"""The paper's questions, asked in the toy world by anyone with an evening.

    python -m experiments.study              three seeds: an evening on two cores
    python -m experiments.study --seeds 1    the first of them; more can follow
    python -m experiments.study --quick      one seed, an eighth of the steps: half an hour

  RQ1   Which language model learns fastest: by tokens, by FLOPs, by time?
  RQ2   Two stages, or one language model of all nine codebooks?
  RQ3   How small can a model be? Four, two and one blocks, for the paper's 24, 12 and 6
  more  EinFFT instead of the feed-forward layer; a frozen text encoder; SSD or attention in the
        refiner; music past the ten seconds of training

All language models get the same steps of the same clips. They are train.py's toy preset without its
metronome, which the paper's models do not have. Runs are folders in out/study, with one thread each
and as many at once as there are cores. A stopped study continues with the same command. Tables and
figures are written to results/study, with a README.md that has all of them. Brackets after a loss
are the least and the greatest of the seeds; others are 95% intervals.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.contrib.concurrent import thread_map

import evaluate
from audio import write_text
from checkpoint import load_checkpoint
from codec import load_codec
from data import Clips, read_jsonl
from diffusion import load_refiner
from evaluate import Cell
from experiments import words
from model import VARIANTS
from options import check_value, entry, new_parser
from sample import ROOT, SHIPPED, SHIPPED_REFINER
from toy import questions
from toy.judge import load_judge
from train import begun

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
        self.data, self.seeds = data, seeds or (1 if quick else 3)
        self.every = 125 // part  # steps between validations
        self.steps = 10 * self.every
        self.early = 4 * self.every  # a checkpoint to compare, as in the paper's Table I
        self.refiner_steps = 1500 // part
        self.prompts = 32 // part
        self.sections = []  # of the report
        if data != "toy" and "factors" not in Clips(data, "valid").rows[0]:
            raise ValueError(f"{data} was not made by `python -m toy build`, which the study needs")

    def run(self):
        """Trains what is missing, then writes all tables."""
        train_all(self.jobs())
        self.losses()
        self.race()
        early, ships = f"step-{self.early}", SHIPPED_REFINER
        models = {f"{v}, {early}": f"{self.folder(v)}/{early}+{ships}" for v in VARIANTS}
        models |= {label: f"{self.folder(label)}/best+{ships}" for label in LMS}
        new = f"{self.folder('simba')}/best+{self.folder('refiner, SSD')}/best"
        models["simba, new refiner"] = new
        longer = {k: models[k] for k in ("simba", "simba, new refiner", "transformer", NINE)}
        refiners = {label: f"{SHIPPED}+{self.folder(label)}/best" for label in REFINERS}
        self.hear("judge", "What the judge hears, 10 s", models)
        self.hear("longer", "One stage or two, 25 s", longer, seconds=25.0)
        self.hear("refined", "Refiners after the model that ships", refiners)
        minute, curves = words.measure({v: models[v] for v in VARIANTS}, 60.0, self.prompts // 4)
        self.table("minute", "A minute of music", minute, f"{self.prompts // 4} prompts.")
        words.draw(curves, self.results / "minute.png")
        self.sections.append("![How far the text moves the predictions](minute.png)\n")
        self.write()

    def folder(self, label, seed=0):
        return self.out / f"{label.replace(', ', '-').replace(' ', '-')}-{seed}"

    def jobs(self):
        """{folder: options of train.py}, one seed of all runs before the next. Refiners have one
        seed, and nine codebooks too: they are slow, and their loss compares with no other."""
        lms = f"--steps {self.steps} --valid-every {self.every} --keep-every {self.early}"
        refiners = f"--steps {self.refiner_steps} --valid-every {self.refiner_steps // 5}"
        jobs = {}
        for seed in range(self.seeds):
            for label, options in (LMS | REFINERS).items():
                if seed == 0 or label not in (NINE, *REFINERS):
                    options += f" {refiners}" if label in REFINERS else f" {lms} --clock music"
                    options = [*options.split(), "--seed", str(seed), "--data", self.data]
                    jobs[self.folder(label, seed)] = options
        return jobs

    def logs(self, label):
        """-> parameters; {unit: spent at each validation (V,)}; for each seed the validations"""
        load = load_refiner if label in REFINERS else load_checkpoint
        parameters = sum(p.numel() for p in load(self.folder(label) / "best").parameters())
        files = [self.folder(label, seed) / "log.jsonl" for seed in range(self.seeds)]
        logs = [read_jsonl(file) for file in files if file.exists()]
        valid = [[row for row in log if "right" in row] for log in logs]
        steps = [[(row["tokens"], row["seconds"]) for row in log if "loss" in row] for log in logs]
        at = [row["step"] - 1 for row in valid[0]]
        tokens, seconds = np.mean(steps, 0).cumsum(0)[at].T
        spent = {"tokens": tokens, "FLOPs": 6 * parameters * tokens, "minutes": seconds / 60}
        return parameters, spent, valid

    def losses(self):
        """What each model has cost and learned."""
        table = {}
        for label in LMS | REFINERS:
            parameters, spent, valid = self.logs(label)
            cost = {"parameters, M": Cell(parameters / 1e6), "minutes": Cell(spent["minutes"][-1])}
            cells = {kind: over_seeds([rows[-1][kind] for rows in valid]) for kind in valid[0][-1]}
            table[label] = cost | cells
        about = "Minutes of one core. Losses as train.py names them (`validate`); that of nine"
        about += " codebooks is their mean, and compares with no other."
        self.table("losses", "Losses", table, about)

    def race(self):
        """How much of the Transformer's budget do the others need until its last loss?"""
        figure = Figure(figsize=(15, 4.2), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        curves, table = {}, {}
        for label in VARIANTS:
            _, spent, valid = self.logs(label)
            losses = np.array([[row["right"] for row in rows] for rows in valid])  # (seeds, V)
            curves[label] = spent, losses
            for axis, (unit, x) in zip(axes, spent.items()):
                axis.plot(x, losses.mean(0), "o-", label=label)
                axis.fill_between(x, losses.min(0), losses.max(0), alpha=0.15)
                axis.set(xlabel=unit, ylabel="validation loss, nats per token")
        theirs, losses = curves.pop("transformer")
        goal = losses[:, -1].mean()
        for label, (spent, losses) in curves.items():
            table[label] = {
                unit: over_seeds([reached(spent[unit], run, goal) / end[-1] for run in losses])
                for unit, end in theirs.items()
            }
        about = f"The share of the Transformer's budget until its last loss, {goal:.3f}."
        self.table("race", "Time to beat the Transformer", table, about)
        axes[0].legend()
        figure.savefig(self.results / "losses.png", dpi=80)
        self.sections.append("![Validation loss against the cost of training](losses.png)\n")

    def hear(self, name, title, systems, seconds=10.0):
        """What the judge hears in {label: system of evaluate.py}"""
        codec = load_codec("toy")
        asked = questions.ask(codec, self.prompts, ["sentence"])
        task = evaluate.Task(seconds=seconds, codec=codec, **asked)
        task = task._replace(repeated=None, training=None)
        labels = {system: label for label, system in systems.items()}
        measured = evaluate.measure(systems.values(), load_judge(), task)
        table = {labels.get(row, row): cells for row, cells in measured.items()}
        self.table(name, title, table, f"{self.prompts} sentences, seed 0. The reference: 10 s.")

    def table(self, name, title, table, about):
        self.sections.append(evaluate.report(f"{self.name}/{name}", f"## {title}", table, about))

    def write(self):
        """All tables on one page, with the command, the machine and the commit."""
        commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty")
        head = f"# The study\n\n`python {' '.join(sys.orig_argv[1:])}`, {os.cpu_count()} cores, "
        head += f"torch {torch.__version__}, commit {commit}\n"
        write_text(self.results / "README.md", "\n".join([head, *self.sections]))
        print(f"{self.results}/README.md")


def train_all(jobs):
    """Trains {folder: options} with one thread each, as many at once as there are cores. Finished
    runs are left alone, stopped ones are resumed. Their output is in FOLDER/train.log."""

    def train(job):
        folder, options = job
        if (folder / "loss.png").exists():
            return
        argv = ["--resume", str(folder)] if begun(folder) else ["--out", str(folder), *options]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "train.log", "a") as log:
            command = [sys.executable, str(ROOT / "train.py"), *argv]
            environment = os.environ | dict(OMP_NUM_THREADS="1")
            if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
                raise ValueError(f"a run failed; its output is in {folder}/train.log")

    at_once = 1 if torch.cuda.is_available() else os.cpu_count()
    thread_map(train, jobs.items(), max_workers=at_once, desc="training", disable=None)


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
    check_value("seeds", args.seeds, "[1, 1e9]")
    Study(args.quick, args.data, args.seeds).run()


if __name__ == "__main__":
    entry(main)
