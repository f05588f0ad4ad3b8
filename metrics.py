"""The figures that music is measured with: what each means, what it is blind to, and its formula.

FD asks whether a *set* of clips sounds like real music, KL whether each clip has the tags of the
real clip that its prompt describes, CLAP whether it fits the words. None of them hears whether all
clips are one clip (diversity does), or whether it was learned by heart (copying does). All are
functions of arrays; where the arrays come from is said in `judge.py` and `embedders.py`.

N clips · n, m frames · D size of an embedding · C tags
"""

import numpy as np


def frechet_distance(x, y):
    """The Fréchet distance between two clouds of embeddings, x (n, D) and y (m, D).

    Each cloud is summed up by its mean and its covariance, as if it were a Gaussian; the distance
    is the least mean squared displacement that turns one Gaussian into the other,

        |mu_x - mu_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    It is 0 where both agree, has the unit of the embedding squared (no root is taken), and sees
    sets, not clips: audio of one clip repeated scores badly however good the clip is, and a system
    that ignores its prompts can score well. x and y hold the *frames* of all files together, not a
    mean for each file; covariances divide by n - 1. With few frames it is too large (a cloud of n
    points seems flatter than it is), so only figures over equally many clips compare; and nothing
    compares between embeddings, windows, or mono and duplicated stereo, where stacking the same
    vector twice doubles it exactly.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"a Fréchet distance needs two frames a side, not {len(x)} and {len(y)}")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return _frechet(x.mean(0), np.atleast_2d(np.cov(x.T)), y.mean(0), np.atleast_2d(np.cov(y.T)))


def _frechet(mean_x, cov_x, mean_y, cov_y):
    # The eigenvalues of S_x S_y are those of the symmetric S_x^(1/2) S_y S_x^(1/2): all real, and
    # none below zero but by rounding.
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * trace)


def kl_divergences(p, q, eps=1e-6):
    """Kullback-Leibler divergences, in nats, of tag distributions p (..., C) from q (..., C).

    p is what a tagger hears in generated clips, q what it hears in the real clips that the prompts
    describe: sum p log(p / (q + eps)). It is large where the generated clip has a tag that the real
    one has not; eps bounds that at log 1e6. The other direction (which MusicGen's authors print)
    punishes what is *missing*, and its figures cannot be compared with these.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        raise ValueError(f"tag distributions come in pairs, not {p.shape} and {q.shape}")
    return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q + eps)), 0).sum(-1)


def kl_divergence(p, q, eps=1e-6):
    """The mean over clips of KL(generated || reference); see kl_divergences."""
    return float(kl_divergences(p, q, eps).mean())


def clap_scores(audio, text):
    """Cosines (N,) between embeddings of clips (N, D) and of their own captions (N, D).

    A dual encoder was trained to tell each clip's caption from the others' in its batch: 1 would be
    a perfect match, 0 no relation. Real clips stay far below 1 and are the figure to compare with.
    The checkpoint, the sample rate and the windows belong to the number: published ones differ by a
    factor of two on those alone.
    """
    audio, text = (np.asarray(x, np.float64) for x in (audio, text))
    norms = np.linalg.norm(audio, axis=1) * np.linalg.norm(text, axis=1)
    return (audio * text).sum(1) / np.maximum(norms, 1e-12)


def diversity(groups):
    """Mean distance (1 - cosine) between the samples of one prompt. groups: one array (n, D) of
    embeddings a prompt -> (prompts,). A model that plays one good piece for each prompt has 0."""
    found = []
    for x in groups:
        x = np.asarray(x, np.float64)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        found.append(1 - (x @ x.T)[np.triu_indices(len(x), 1)].mean())
    return np.array(found)


def longest_copies(clips, training):
    """How many tokens in a row each clip has in common with some place in the training set.

    clips, training: lists of 1-D arrays of first-codebook tokens -> (len(clips),) ints. A suffix
    array: all suffixes of all clips are sorted by doubling (ranks of 1, 2, 4 ... tokens), so that
    the best match of a suffix is the nearest training suffix before or after it.
    """
    clips, training = ([np.asarray(c, np.int64) for c in side] for side in (clips, training))
    ends = np.cumsum([len(c) + 1 for c in clips + training])
    text = np.empty(ends[-1], np.int64)
    for i, (clip, end) in enumerate(zip(clips + training, ends)):
        text[end - 1 - len(clip) : end - 1], text[end - 1] = clip, -1 - i  # ends match nothing
    ranks, longest = [np.unique(text, return_inverse=True)[1].astype(np.int32)], 1
    while longest < max(map(len, clips)):
        last = ranks[-1].astype(np.int64)
        later = np.pad(last[longest:], (0, longest), constant_values=-1)
        ranks.append(np.unique(last * (len(text) + 1) + later, return_inverse=True)[1])
        ranks[-1] = ranks[-1].astype(np.int32)
        longest *= 2
    order = np.argsort(ranks[-1], kind="stable")
    mine = ends[len(clips) - 1]  # here the training set begins
    place = np.arange(len(text))
    before = np.maximum.accumulate(np.where(order >= mine, place, -1))
    after = np.minimum.accumulate(np.where(order >= mine, place, len(text))[::-1])[::-1]
    best = np.zeros(mine, np.int64)
    for neighbour in (before, after):
        there = (order < mine) & (neighbour >= 0) & (neighbour < len(text))
        suffix = order[there]
        a, b = suffix, order[neighbour[there]]
        for k in reversed(range(len(ranks))):  # do the next 2^k tokens agree?
            same = (ranks[k][a] == ranks[k][b]).astype(np.int64) << k
            a, b = a + same, b + same
        np.maximum.at(best, suffix, a - suffix)
    return np.maximum.reduceat(best, np.r_[0, ends[: len(clips) - 1]])


def interval(values, statistic=np.mean, draws=500, seed=0):
    """A bootstrap 95% interval of a statistic of `values` (N, ...): clips are drawn with
    replacement, as many as there are, and the middle 95% of the results is what is printed."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    return tuple(np.percentile(found, [2.5, 97.5]))


def frechet_interval(files, reference, draws=100, seed=0):
    """The bootstrap interval of the Fréchet distance of pooled frames: files, a list of (W, D), are
    drawn with replacement; reference (M, D) stays as it is."""
    rng = np.random.default_rng(seed)
    reference = np.asarray(reference, np.float64)
    ours = reference.mean(0), np.cov(reference.T)
    files = [np.asarray(f, np.float64) for f in files]

    def distance(picks):
        x = np.concatenate([files[i] for i in picks])
        return _frechet(x.mean(0), np.cov(x.T), *ours)

    found = [distance(rng.integers(len(files), size=len(files))) for _ in range(draws)]
    return around(distance(range(len(files))), found)


def around(value, found):
    """The middle 95% of bootstrap figures, moved so that their median is the figure itself: fewer
    different clips are in a draw than there are, which alone makes a Fréchet distance larger."""
    return tuple(value + np.percentile(found, [2.5, 97.5]) - np.median(found))
