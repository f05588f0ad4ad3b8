"""The weights that the paper's authors published, under the names of `model.py`.

    python sample.py "jazz reggae" --checkpoint simba.ckpt

Their file is a Lightning checkpoint of Prefix SiMBA (SSMTTM, Fig. 1 (b)): a pickled dict whose
"state_dict" holds the language model as `music_model.*`. The architecture is that of
`model.MusicLM`, tensor by tensor, so only names change. Captions are filled up to 60 tokens with
</s>, and the language model reads the filling as if it were text: `TextEncoder.fill`. A pickle may
run any code when it is opened. Here nothing but tensors and plain values is unpickled
(`weights_only`), and nothing but the tensors in use is read from the disk (`mmap`).
"""

import pickle

import torch

FILL = 60  # tokens that their captions have at least
RENAMED = {  # part of their name: part of ours, in this order
    "music_model": "lm", "condition_linear": "text_proj", "condition_norm": "text_norm",
    ".embedding.": ".embeddings.", "lm_head": "heads", "backbone": "blocks",
    "mamba.mamba": "layers.0", "mamba.norm": "norms.0", "ff.norm": "norms.1",
    "ff.feed_forward.0": "layers.1.up", "ff.feed_forward.3": "layers.1.down",
}  # fmt: skip


def read_authors(file):
    """-> config, like the config.json of our checkpoints, and tensors {"lm." + our name: tensor}.
    ValueError, one sentence, if the file is cut short, would run code, or holds another model."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors = checkpoint["state_dict"]
        for theirs, ours in RENAMED.items():
            tensors = {name.replace(theirs, ours): v for name, v in tensors.items()}
        return config_of(tensors), tensors
    except pickle.UnpicklingError:
        holds = "objects that might run code, which are not loaded"
    except KeyError as missing:
        holds = f"no {missing}"
    except Exception:  # what torch raises depends on where the file breaks off
        holds = "part of a file, or another model"
    raise ValueError(
        f"no checkpoint at {file}: it holds {holds}; take simba.ckpt from the drive that"
        " https://github.com/Lonian6/SSM-TTM links to"
    )


def config_of(tensors):
    """What is not said here is as in LMConfig, whose defaults are the paper's."""
    count = lambda part: len({name.split(".")[2] for name in tensors if name.startswith(part)})
    width = tensors["lm.embeddings.0.weight"].shape[1]
    mamba = "lm.blocks.0.layers.0."
    channels = tensors[mamba + "conv1d.weight"].shape[0]  # 2 d_model + 2 d_state
    model = dict(
        variant="simba", codebooks=count("lm.embeddings."), blocks=count("lm.blocks."),
        d_model=width, d_state=channels // 2 - width,
        headdim=2 * width // len(tensors[mamba + "dt_bias"]),
        d_text=tensors["lm.text_proj.weight"].shape[1], trained_frames=2584 + FILL, dropout=0.0,
    )  # fmt: skip
    return {"model": model, "text": {"name": "google/flan-t5-base", "fill": FILL}, "codec": "dac"}
