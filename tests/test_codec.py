"""What codec.py promises, on synthetic chords and a random DAC: no download, no fluidsynth."""

import math
import sys

import numpy as np
import pytest
import soundfile
import torch

import audio
from audio import HOP, SAMPLE_RATE, mel_spectrogram, read_audio, write_audio
from checkpoint import load_weights, write_tensors
from codec import DACCodec, decode_stream, load_codec
from toy.codec import FILE, ToyCodec, load, nearest_entry, neighbours


def chords(seed, seconds=2.0):
    """Plucked chords of a few harmonics over a hiss, (samples,)"""
    rng = np.random.default_rng(seed)
    audio = rng.normal(size=int(seconds * SAMPLE_RATE)) * 0.01
    for start in np.arange(0, seconds, 0.25):
        rest = audio[int(start * SAMPLE_RATE) :][:SAMPLE_RATE]  # after a second it has faded away
        since = np.arange(len(rest)) / SAMPLE_RATE
        for pitch in rng.choice(np.arange(45, 80), 3, replace=False):
            phase = 2 * math.pi * 440 * 2 ** ((pitch - 69) / 12) * since
            rest += np.exp(-8 * since) * sum(np.sin(h * phase) / h for h in range(1, 5))
    return torch.tensor(audio / np.abs(audio).max() * 0.7, dtype=torch.float32)


def mel_distance(reference, audio):
    """Mean absolute difference in dB of the mel spectrograms of two batches (B, S), clamped
    at 80 dB below the maximum of the reference, so that a wrong loudness counts."""
    a, b = (mel_spectrogram(x[..., : reference.shape[-1]]) for x in (reference, audio))
    floor = a.amax((1, 2), keepdim=True) - 80
    return float((a.maximum(floor) - b.maximum(floor)).abs().mean())


@pytest.fixture(scope="module", autouse=True)
def one_thread():  # two threads on a busy machine wait for each other most of the time
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy():
    clips = [chords(seed) for seed in range(20)]
    clips += [clip * 0.05 for clip in clips[:4]] + [torch.zeros(2 * SAMPLE_RATE)]
    return ToyCodec.fit(clips, seed=0, codebook_size=128, bands=96)


@pytest.fixture(scope="module")
def held_out():
    return torch.stack([chords(seed) for seed in (100, 101)])


@pytest.fixture(scope="module")
def random_dac():
    from transformers import DacConfig, DacModel

    torch.manual_seed(0)
    config = DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=32,
        downsampling_ratios=[2, 4, 8, 8],
        upsampling_ratios=[8, 8, 4, 2],
        n_codebooks=9,
        codebook_size=64,
        codebook_dim=8,
    )
    model = DacModel(config).eval()
    with torch.no_grad():  # initial weights of 0.02 would fade to nothing on the way
        for name, weight in model.named_parameters():
            if weight.dim() == 3 and name.startswith(("encoder", "quantizer")):
                weight.mul_(3)
            elif weight.dim() == 3:
                weight.mul_(2)
    return model


@pytest.mark.parametrize("samples", [1, 511, 512, 513, 44100])
def test_frames_are_hops_rounded_up(toy, samples):
    audio = torch.rand(2, samples) - 0.5
    codes = toy.encode(audio)
    assert codes.shape == (2, 9, math.ceil(samples / HOP)) and codes.dtype == torch.int64
    z = toy.from_codes(codes[:, :3])
    assert z.shape == (2, 96, codes.shape[2])
    assert toy.vectors(codes[:, :3]).shape == (2, 3, 8, codes.shape[2])
    decoded = toy.decode(z)
    assert decoded.shape == (2, codes.shape[2] * HOP) and decoded.isfinite().all()


def test_every_further_codebook_brings_the_spectrum_closer(toy, held_out):
    bands = toy.features(held_out).mT
    codes = toy.encode(held_out)
    errors = [(toy.from_codes(codes[:, :k]) - bands).square().mean().item() for k in range(1, 10)]
    assert all(a > b for a, b in zip(errors, errors[1:])), errors
    one, nine = (mel_distance(held_out, toy.decode(toy.from_codes(codes[:, :k]))) for k in (1, 9))
    assert nine < 0.8 * one and nine < 4


def test_fit_encode_and_decode_are_deterministic(toy, held_out):
    clips = [chords(seed, 1.0) for seed in range(3)]
    a, b = (ToyCodec.fit(clips, seed=1, codebook_size=16, codebooks=2, bands=32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    torch.manual_seed(1)
    codes = toy.encode(held_out)
    first = toy.decode(toy.from_codes(codes))
    torch.manual_seed(2)
    assert torch.equal(codes, toy.encode(held_out))
    assert torch.equal(first, toy.decode(toy.from_codes(codes)))


def test_snap_undoes_vectors(toy, random_dac, held_out):
    for one in (toy, DACCodec(random_dac)):
        codes = one.encode(held_out[:, :20000])
        noisy = one.vectors(codes)[:, 2:] * 1.0001
        assert torch.equal(one.snap(noisy, first=2), codes[:, 2:])


def test_snap_makes_up_in_later_levels_for_what_earlier_ones_round_away(toy, held_out):
    codes = toy.encode(held_out[:, :40000])
    shifted = toy.vectors(codes)
    shifted[:, 1:] += 3 * torch.randn(
        shifted[:, 1:].shape, generator=torch.Generator().manual_seed(0)
    )
    wanted = toy.from_codes(codes[:, :1]) - toy.mean[:, None]
    for vectors, out in zip(shifted[:, 1:].unbind(1), toy.out[1:]):
        wanted = wanted + (neighbours(vectors.mT) @ out).mT
    alone = [
        nearest_entry(v.mT.flatten(0, 1), e).view(len(v), -1)
        for v, e in zip(shifted[:, 1:].unbind(1), toy.entries[1:])
    ]
    error = lambda fine: (
        (toy.from_codes(torch.cat([codes[:, :1], fine], 1)) - toy.mean[:, None] - wanted)
        .square()
        .mean()
    )
    assert error(toy.snap(shifted[:, 1:], first=1)) < 0.9 * error(torch.stack(alone, 1))


def test_stream_gives_the_same_bytes_however_it_is_cut(toy, monkeypatch):
    monkeypatch.setattr(toy, "rounds", 4, raising=False)  # quicker; the seams are the same
    codes = toy.encode(chords(7, 5.0)[None])[0]  # (9, 431): three windows and a rest
    for one in (codes[:1], codes[:, :100]):
        whole = torch.cat(list(decode_stream(toy, [one])))
        assert whole.shape == (one.shape[1] * HOP,)
        for cut in (1, 144, 159):
            chunks = iter(one.split(cut, 1))
            assert torch.equal(whole, torch.cat(list(decode_stream(toy, chunks))))


def test_decode_and_stream_make_the_same_music(toy):
    audio = chords(8, 5.0)[None]
    codes = toy.encode(audio)
    streamed = torch.cat(list(decode_stream(toy, codes[0].split(50, 1))))[None]
    decoded = toy.decode(toy.from_codes(codes))
    assert torch.allclose(streamed[:, : 100 * HOP], decoded[:, : 100 * HOP], atol=1e-2)
    assert abs(mel_distance(audio, streamed) - mel_distance(audio, decoded)) < 0.1


def test_stream_is_lazy_and_its_memory_does_not_grow(toy, monkeypatch):
    monkeypatch.setattr(toy, "rounds", 4, raising=False)
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield torch.zeros(1, 50, dtype=torch.int64)

    stream = decode_stream(toy, endless())
    sizes = [len(next(stream)) for _ in range(4)]
    assert sizes == [audio.STEP * HOP] * 4 and asked <= (4 * audio.STEP + toy.overlap) / 50 + 1


def test_a_steady_tone_crosses_the_seams_without_a_click(toy):
    time = torch.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    z = toy.features(torch.sin(2 * math.pi * 441 * time)[None] * 0.3).mT
    audio = toy.decode(z)[0]
    inside = audio[8 * HOP : -8 * HOP]
    level = inside.unfold(0, 400, 100).square().mean(1).sqrt()
    assert level.min() > 0.6 * level.median() and level.max() < 1.5 * level.median()
    jump = inside.diff().abs()
    assert jump.max() < 2 * jump.unfold(0, 2000, 2000).amax(1).median()


def test_silence_stays_silent(toy):
    audio = toy.decode(toy.from_codes(toy.encode(torch.zeros(1, 3 * SAMPLE_RATE))))
    assert audio.abs().max() < 1e-3
    assert not list(decode_stream(toy, []))


def test_loudness_survives(toy, held_out):
    for gain in (1.0, 0.05):
        decoded = toy.decode(toy.from_codes(toy.encode(held_out * gain)))
        rms = [x.square().mean().sqrt() for x in (decoded, held_out * gain)]
        assert abs(20 * torch.log10(rms[0] / rms[1])) < 3


def test_mel_spectrogram_is_what_its_docstring_says(held_out):
    audio = held_out[:1, :5000]
    found = mel_spectrogram(audio)
    assert found.shape == (1, 128, 10)
    mel = lambda hz: 2595 * math.log10(1 + hz / 700)
    edges = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, mel(22050), 130)]
    padded = np.concatenate([np.zeros(768), audio[0].double().numpy(), np.zeros(2048)])
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(2048) / 2048)
    for t in (0, 4, 9):
        spectrum = np.abs(np.fft.rfft(padded[512 * t : 512 * t + 2048] * window)) ** 2 / 512**2
        for band in (0, 5, 80, 127):
            low, middle, high = edges[band : band + 3]
            total = weight = 0.0
            for i, power in enumerate(spectrum):
                hz = i * SAMPLE_RATE / 2048
                up = 1 + (hz - middle) / max(middle - low, SAMPLE_RATE / 2048)
                down = 1 - (hz - middle) / max(high - middle, SAMPLE_RATE / 2048)
                share = max(0.0, min(up, down))
                total, weight = total + share * power, weight + share
            expected = max(10 * math.log10(max(total / weight, 1e-10)), float(found.max()) - 80)
            assert abs(float(found[0, band, t]) - expected) < 1e-2


def test_dac_adapter_gives_the_models_own_codes_and_audio(random_dac):
    adapter = DACCodec(random_dac)
    audio = torch.rand(2, 40 * HOP) - 0.5
    with torch.no_grad():
        own = random_dac.encode(audio[:, None])
        codes = adapter.encode(audio)
        assert torch.equal(codes, own.audio_codes) and len(codes.unique()) > 10
        assert adapter.encode(audio[:, : 39 * HOP + 1]).shape == codes.shape
        for k in (1, 4, 9):
            z = random_dac.quantizer.from_codes(codes[:, :k])[0]
            assert torch.allclose(adapter.from_codes(codes[:, :k]), z, atol=1e-5)
            expected = random_dac.decode(z).audio_values
            assert torch.allclose(adapter.decode(z), expected, atol=1e-5)
        assert torch.allclose(
            adapter.vectors(codes)[:, 3],
            random_dac.quantizer.quantizers[3].codebook(codes[:, 3]).mT,
        )


def test_both_packages_give_the_same_codes_for_the_same_weights(random_dac):
    """In the environment of requirements-paper.txt, where descript-audio-codec can be imported."""
    dac = pytest.importorskip("dac")
    theirs = dac.DAC(
        encoder_dim=4, encoder_rates=[2, 4, 8, 8], decoder_dim=32, decoder_rates=[8, 8, 4, 2],
        n_codebooks=9, codebook_size=64, codebook_dim=8, sample_rate=44100,
    ).eval()  # fmt: skip
    has_weights = lambda m: "alpha" in m._parameters or hasattr(m, "weight")
    with torch.no_grad():
        for layer in theirs.modules():
            if hasattr(layer, "weight_g"):
                torch.nn.utils.remove_weight_norm(layer)
        for part in ("encoder", "decoder"):  # both list their layers in the order they are run
            pairs = zip(
                *(filter(has_weights, getattr(m, part).modules()) for m in (random_dac, theirs))
            )
            for ours, other in pairs:
                for name, value in ours._parameters.items():
                    other._parameters[name].copy_(value)
        for ours, other in zip(random_dac.quantizer.quantizers, theirs.quantizer.quantizers):
            other.load_state_dict(ours.state_dict())
    audio = torch.stack([chords(seed)[: 512 * 40] for seed in (1, 2)])
    one, two = DACCodec(random_dac), DACCodec(theirs)
    codes = one.encode(audio)
    assert torch.equal(two.encode(audio), codes)
    assert torch.equal(theirs.encode(audio[:, None])[1], codes)
    for k in (1, 9):
        expected = one.decode(one.from_codes(codes[:, :k]))
        torch.testing.assert_close(two.decode(two.from_codes(codes[:, :k])), expected)


def test_dac_decodes_long_audio_in_windows_as_if_at_once(random_dac):
    adapter = DACCodec(random_dac)
    codes = torch.randint(64, (9, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = random_dac.decode(audio_codes=codes[None]).audio_values[0]
    assert expected.std() > 1e-3
    streamed = torch.cat(list(decode_stream(adapter, codes.split(77, 1))))
    assert torch.allclose(streamed, expected, atol=1e-4 * float(expected.abs().max()) + 1e-6)


def test_saved_codec_is_the_same_codec(toy, tmp_path):
    write_tensors(tmp_path / "codec", toy.state_dict(), dtype=torch.half)
    again = ToyCodec(codebook_size=128, bands=96)
    load_weights(again, tmp_path / "codec")
    assert all(torch.equal(a, b) for a, b in zip(toy.buffers(), again.buffers()))


def test_a_damaged_or_missing_codec_is_one_sentence(toy, tmp_path):
    with pytest.raises(ValueError, match="none is missing"):
        load(tmp_path / "none")
    for bad in (FILE.read_bytes()[:1000], b"", b"garbage" * 100):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="bad is .*cut short") as error:
            load(tmp_path / "bad")
        assert "\n" not in str(error.value)
    write_tensors(tmp_path / "small", toy.state_dict())
    with pytest.raises(ValueError, match="small holds weights of another shape"):
        load(tmp_path / "small")


def test_an_unknown_codec_names_the_choices_and_one_out_of_reach_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match="toy or dac"):
        load_codec("mp3")

    def no_network(name):
        raise OSError(f"cannot reach the hub for {name}")

    monkeypatch.setitem(sys.modules, "dac", None)
    monkeypatch.setattr("transformers.DacModel.from_pretrained", no_network)
    with pytest.raises(ValueError, match="hf download descript/dac_44khz"):
        load_codec("dac")


@pytest.mark.parametrize(
    "rate, channels, subtype",
    [(44100, 1, "PCM_U8"), (44100, 6, "PCM_16"), (192000, 2, "FLOAT"), (8000, 1, "PCM_16")],
)
def test_any_rate_width_and_channels_become_mono_at_44100(tmp_path, rate, channels, subtype):
    time = np.arange(rate) / rate
    audio = np.repeat(np.sin(2 * math.pi * 440 * time)[:, None] * 0.5, channels, 1)
    soundfile.write(tmp_path / "a.wav", audio, rate, subtype=subtype)
    found = read_audio(tmp_path / "a.wav")
    assert found.shape == (1, SAMPLE_RATE) and found.dtype == torch.float32
    expected = torch.sin(2 * math.pi * 440 * torch.arange(SAMPLE_RATE) / SAMPLE_RATE) * 0.5
    assert (found[0] - expected)[500:-500].abs().max() < 0.02


def test_unreadable_audio_is_one_sentence_with_its_reason(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 44100)
    (tmp_path / "text.wav").write_text("This is not music.")
    (tmp_path / "nothing.wav").write_bytes(b"")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 44100, subtype="FLOAT")
    reasons = {
        "empty": "no samples",
        "text": "is not readable audio",
        "nothing": "is not readable audio",
        "nan": "not numbers",
        "gone": "No such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason) as error:
            read_audio(tmp_path / f"{name}.wav")
        assert f"{name}.wav" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg"])
def test_written_audio_reads_back(tmp_path, held_out, extension):
    path = tmp_path / f"a.{extension}"
    write_audio(path, held_out[0])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = read_audio(path)
    assert found.shape == (1, held_out.shape[1])
    assert (found[0] - held_out[0]).square().mean().sqrt() < 0.03


def test_unknown_extension_names_the_known_ones(tmp_path, held_out):
    with pytest.raises(ValueError, match=".wav, .flac, .ogg"):
        write_audio(tmp_path / "a.mp3", held_out[0])
    assert not list(tmp_path.iterdir())
