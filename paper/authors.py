"""The weights that the paper's authors published, under the names of `model.py`.

    python sample.py "jazz reggae" --checkpoint simba.ckpt

Their file is a Lightning checkpoint of Prefix SiMBA (SSMTTM, Fig. 1 (b)): a pickled dict whose
"state_dict" holds the language model as `music_model.*`, with a copy of Flan-T5 (`text_encoder.*`)
and the optimizer's memory in it too. The architecture is that of `model.MusicLM`, tensor by tensor,
so only names change; the sizes of the model are read from its tensors. Captions are filled up to 60
tokens with </s>, and the language model reads the filling as if it were text: `TextEncoder.fill`.

A pickle may run any code when it is opened. Here nothing but tensors and plain values is unpickled
(torch's `weights_only`), and nothing but the tensors in use is read from the disk (`mmap`).

Letters: V vocabulary    D d_model    H heads    P headdim    N d_state
"""

import pickle

import torch
from torch import Tensor

REMEDY = "take simba.ckpt from the drive that https://github.com/Lonian6/SSM-TTM links to"
FILL = 60  # tokens that their captions have at least
FRAMES = 2584  # of their 30 s clips
RENAMED = {  # part of their name: part of ours, in this order
    "music_model": "lm",
    "condition_linear": "text_proj",
    "condition_norm": "text_norm",
    ".embedding.": ".embeddings.",
    "lm_head": "heads",
    "backbone": "blocks",
    "mamba.mamba": "layers.0",
    "mamba.norm": "norms.0",
    "ff.norm": "norms.1",
    "ff.feed_forward.0": "layers.1.up",
    "ff.feed_forward.3": "layers.1.down",
}


def read_authors(file):
    """-> config, like the config.json of our checkpoints, and tensors {"lm." + our name: tensor}.

    ValueError, one sentence, if the file is cut short, would run code, or holds another model.
    """
    tensors = _state_dict(file)
    for theirs, ours in RENAMED.items():
        tensors = {name.replace(theirs, ours): v for name, v in tensors.items()}
    count = lambda part: len({k.split(".")[2] for k in tensors if k.startswith(part)})
    codebooks, blocks = count("lm.embeddings."), count("lm.blocks.")
    mamba = "lm.blocks.0.layers.0."
    try:
        V, D = tensors["lm.embeddings.0.weight"].shape
        (inner,), (heads,) = (tensors[mamba + n].shape for n in ("norm.weight", "dt_bias"))  # H P
        channels, _, taps = tensors[mamba + "conv1d.weight"].shape  # H P + 2 N
        hidden, _ = tensors["lm.blocks.0.layers.1.up.weight"].shape
        _, d_text = tensors["lm.text_proj.weight"].shape
        sizes = dict(
            codebooks=codebooks, blocks=blocks, d_model=D, d_state=(channels - inner) // 2,
            headdim=inner // heads, expand=inner // D, d_conv=taps, ff_mult=hidden // D,
            d_text=d_text, codebook_size=V - 1, trained_frames=FRAMES + FILL,
        )  # fmt: skip
    except KeyError as error:
        raise _refused(file, f"no tensor {error}") from None
    except (ValueError, ZeroDivisionError):
        sizes = {}
    if min(sizes.values(), default=0) < 1:
        raise _refused(file, "tensors of impossible shapes")
    config = {
        "model": {"variant": "simba", **sizes, "dropout": 0.0},
        "text": {"name": "google/flan-t5-base", "fill": FILL},
        "codec": "dac",
    }
    return config, tensors


def _state_dict(file):
    """The file's tensors by their own names, less the text encoder's."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise _refused(file, "objects that might run code, which are not loaded") from None
    except Exception:  # what torch raises depends on where the file breaks off
        raise _refused(file, "part of a file, or none that torch.save made") from None
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise _refused(file, "no state_dict of named tensors")
    return {name: v for name, v in state.items() if not name.startswith("text_encoder.")}


def _refused(file, what):
    return ValueError(f"no checkpoint at {file}: it holds {what}; {REMEDY}")
