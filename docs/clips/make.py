"""Makes the clips of the README: NAME.png, a spectrogram, and NAME.mp4, the same with the sound.

python -m docs.clips.make          needs ffmpeg; a minute on two cores
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from audio import mel_spectrogram, read_audio

CLIPS = {
    "jazz-reggae": "jazz reggae",
    "piano-waltz": "a slow calm piano waltz",
    "techno": "dark techno at 132 bpm",
    "bossa-nova": "happy bossa nova with a flute",
}
HERE = Path(__file__).parent
HERTZ = {"200 Hz": 200, "1 kHz": 1000, "4 kHz": 4000, "16 kHz": 16000}
FILM = "color=white:2x190,fps=10[playhead];[0][playhead]overlay=56+568*t/10:26"

for name, prompt in CLIPS.items():
    with TemporaryDirectory() as folder:
        wav, png = f"{folder}/clip.wav", HERE / f"{name}.png"
        subprocess.run([sys.executable, "sample.py", prompt, "--out", wav], check=True)
        mel = mel_spectrogram(read_audio(wav))[0]  # (128, T) in dB
        axis = plt.figure(figsize=(6.4, 2.4)).add_axes((56 / 640, 0.1, 568 / 640, 190 / 240))
        axis.imshow(mel, "magma", aspect="auto", origin="lower", extent=(0, 10, 0, 1), vmin=-80)
        mels = np.log1p(np.array([*HERTZ.values()]) / 700) / np.log1p(22050 / 700)
        axis.set(title=f"“{prompt}”", yticks=mels, yticklabels=HERTZ)
        plt.savefig(png, dpi=100)
        Image.open(png).convert("RGB").quantize(64).save(png)
        film = f"-y -v error -framerate 10 -loop 1 -i {name}.png -i {wav} -filter_complex {FILM} "
        film += f"-pix_fmt yuv420p -crf 30 -b:a 112k -movflags +faststart -t 10 {name}.mp4"
        subprocess.run(["ffmpeg", *film.split()], cwd=HERE, check=True)
