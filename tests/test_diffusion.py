"""The refiner: the mathematics of the noise, the mixer that looks both ways, windows, commands."""

import math
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import tiny
from test_train import losses, stop_after

import diffusion
import sample
import train
from checkpoint import read_config, save_checkpoint
from codec import load_codec
from data import Clips
from diffusion import (
    BiMamba2,
    Refiner,
    RefinerConfig,
    cosine_schedule,
    denoise,
    load_refiner,
    refine,
    refiner_loss,
    turn,
    turn_back,
)
from model import ssd_recurrent
from toy.corpus import folder as corpus

CODEC = load_codec("toy")
SCHEDULE = cosine_schedule(100)


def small(backbone="ssd"):
    """A random refiner of the toy codec, loud enough to say something, and a text encoder."""
    torch.manual_seed(0)
    config = dict(layers=2, d_model=32, d_state=8, headdim=16, chunk=16, attention_heads=4)
    refiner = Refiner(RefinerConfig(backbone, **config, d_text=64, window=64))
    refiner.fit(CODEC)
    torch.nn.init.normal_(refiner.out.weight, std=0.3)
    return refiner.eval(), tiny()[1]


def codes(L, seed=0):
    return torch.randint(1024, (9, L), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------
# The noise


def test_the_schedule_begins_clean_ends_in_noise_and_is_the_cosine_between():
    assert SCHEDULE[0] == 1 and 0 < SCHEDULE[-1] < 1e-5
    assert (SCHEDULE.diff() < 0).all()
    beta = 1 - SCHEDULE[1:] / SCHEDULE[:-1]
    assert beta.max() == pytest.approx(0.999) and (beta[:-1] < 0.999).all()
    f = lambda t: math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (1, 37, 99):
        assert SCHEDULE[t].item() == pytest.approx(f(t) / f(0))


@pytest.mark.parametrize("t", [1, 30, 100])
def test_v_and_x0_and_noise_give_each_other(t):
    x0, e = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    a, b = SCHEDULE[t].sqrt(), (1 - SCHEDULE[t]).sqrt()
    x, v = turn(x0, e, a, b)
    torch.testing.assert_close(x, a * x0 + b * e)
    torch.testing.assert_close(turn_back(x, v, a, b), (x0, e))


def ideal(x0, schedule=SCHEDULE):
    """The v of one who knows x_0: what remains of x_t is the noise."""

    def predict(x, t):
        a, b = schedule[t].sqrt(), (1 - schedule[t]).sqrt()
        e = (x - a * x0) / b
        return a * e - b * x0

    return predict


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 100])
def test_who_knows_x0_recovers_it(steps):
    x0, x = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    found = denoise(ideal(x0), x, SCHEDULE, steps, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-9)


def test_who_knows_x0_recovers_the_codes_exactly():
    refiner, _ = small()
    given = codes(50)[None]
    x0, _ = refiner.signal(CODEC, given)
    x = denoise(ideal(x0), torch.randn(x0.shape), SCHEDULE, 20, limit=refiner.limit)
    assert (refiner.snap(CODEC, x) == given[:, 1:]).all()


def test_every_dimension_of_every_codebook_has_variance_one():
    refiner, _ = small()
    every = torch.arange(1024).expand(1, 9, -1)
    x0, coarse = refiner.signal(CODEC, every)
    torch.testing.assert_close(x0.square().mean(2), torch.ones(1, 64), rtol=1e-4, atol=0)
    torch.testing.assert_close(coarse.square().mean(2), torch.ones(1, 8), rtol=1e-4, atol=0)
    assert (x0.abs() <= refiner.limit + 1e-5).all()


def test_ddim_is_deterministic_and_ddpm_is_not():
    x0, x = torch.randn(2, 1, 4, 6)
    wrong = lambda x, t: ideal(x0)(x, t) + 0.1 * x  # so that what happens on the way matters
    run = lambda steps, seed: denoise(
        wrong, x, SCHEDULE, steps, torch.Generator().manual_seed(seed)
    )
    assert (run(10, 0) == run(10, 1)).all()
    assert (run(100, 0) == run(100, 0)).all() and (run(100, 0) != run(100, 1)).any()


@pytest.mark.parametrize("t", [2, 40, 99])
def test_a_step_of_ddpm_draws_from_the_posterior(t):
    # By Monte Carlo: draw x_{t-1}, then x_t from it, and keep the pairs that hit a given x_t.
    n, x0 = 2_000_000, 0.7
    g = torch.Generator().manual_seed(t)
    normal = lambda: torch.randn(n, generator=g, dtype=torch.float64)
    before, beta = SCHEDULE[t - 1], 1 - SCHEDULE[t] / SCHEDULE[t - 1]
    earlier = before.sqrt() * x0 + (1 - before).sqrt() * normal()
    later = (1 - beta).sqrt() * earlier + beta.sqrt() * normal()
    here = float(SCHEDULE[t].sqrt() * x0 + 0.5 * (1 - SCHEDULE[t]).sqrt())
    width = 0.02 * (1 - SCHEDULE[t]).sqrt()
    drawn = earlier[(later - here).abs() < width]

    # The sampler's step from t, with the others cut away: a schedule of steps t and t - 1 only.
    two = torch.stack([torch.ones((), dtype=torch.float64), before, SCHEDULE[t]])
    seen = []

    def predict(x, step):
        seen.append(x)
        return ideal(torch.full_like(x, x0), two)(x, step)

    x = torch.full((1, 1, 200_000), here, dtype=torch.float64)
    denoise(predict, x, two, 2, g)
    made = seen[1]
    assert made.mean().item() == pytest.approx(drawn.mean().item(), abs=float(drawn.std()) / 20)
    assert made.var().item() == pytest.approx(drawn.var().item(), rel=0.05)
    formula = beta * (1 - before) / (1 - SCHEDULE[t])
    assert made.var().item() == pytest.approx(formula.item(), rel=0.02)


def test_known_frames_stay_and_a_wrong_number_of_steps_is_told():
    x0, x = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    known = torch.randn(1, 4, 2, dtype=torch.float64)
    seen = []
    predict = lambda x, t: seen.append(x) or ideal(x0)(x, t)
    denoise(predict, x, SCHEDULE, 10, torch.Generator().manual_seed(0), known)
    torch.testing.assert_close(seen[-1][..., :2], known, rtol=0, atol=1)  # at t = 10, some noise
    with pytest.raises(ValueError, match="from 1 to 100"):
        denoise(predict, x, SCHEDULE, 101)


# ------------------------------------------------------------------------------------------------
# The mixer that looks both ways


def mixer(**options):
    torch.manual_seed(1)
    config = dict(d_model=16, d_state=5, headdim=8, chunk=8, attention_heads=2) | options
    return BiMamba2(RefinerConfig(**config)).double().requires_grad_(False)


def test_it_is_two_recurrences_that_leave_the_diagonal_to_D():
    m, h = mixer(d_conv=1), torch.randn(2, 21, 16, dtype=torch.float64)
    z, xBC, dt = m.in_proj(h).split(m.sizes, -1)
    x, B, C = F.silu(m.conv1d(xBC.mT).mT).split(m.inner_sizes, -1)
    dt, A = F.softplus(dt + m.dt_bias), -m.A_log.exp()
    (dt1, dt2), (B1, B2), (C1, C2) = (v.chunk(2, -1) for v in (dt, B, C))
    x = x.unflatten(-1, (-1, 8))
    expected = m.D[:, None] * x
    forward = ssd_recurrent(x, dt1, A, B1, C1)[0]
    backward = ssd_recurrent(x.flip(1), dt2.flip(1), A, B2.flip(1), C2.flip(1))[0].flip(1)
    expected[:, 1:] += forward[:, :-1]
    expected[:, :-1] += backward[:, 1:]
    expected = m.out_proj(m.norm(expected.flatten(2) * F.silu(z)))
    torch.testing.assert_close(m(h), expected)


def test_flipping_time_flips_the_output_if_the_directions_are_exchanged():
    m, h = mixer(), torch.randn(2, 21, 16, dtype=torch.float64)
    y = m(h)
    d, n, heads = m.sizes[0], 5, m.sizes[2] // 2
    start = m.sizes[0] + d  # of B B' C C' in in_proj's output, after z and x
    order = list(range(start))
    for pair, size in ((start, n), (start + 2 * n, n), (start + 4 * n, heads)):
        order += [*range(pair + size, pair + 2 * size), *range(pair, pair + size)]
    m.in_proj.weight.copy_(m.in_proj.weight[order])
    inner = torch.tensor(order[d : start + 4 * n]) - d
    m.conv1d.weight.copy_(m.conv1d.weight[inner].flip(2))
    m.conv1d.bias.copy_(m.conv1d.bias[inner])
    m.dt_bias.copy_(m.dt_bias.roll(heads))
    torch.testing.assert_close(m(h.flip(1)).flip(1), y)


def test_shifting_the_input_shifts_the_output():
    # Silence around, and no bias: frames that are zero say nothing to the others.
    m = mixer()
    m.conv1d.bias.zero_()
    h = F.pad(torch.randn(1, 12, 16, dtype=torch.float64), (0, 0, 10, 20))
    there, later = m(h), m(h.roll(5, 1))
    torch.testing.assert_close(there.roll(5, 1)[:, 15:27], later[:, 15:27])


@pytest.mark.parametrize("backbone", ["ssd", "attention"])
def test_a_frame_sees_both_past_and_future(backbone):
    refiner, _ = small(backbone)
    x = torch.randn(1, 64, 40, requires_grad=True)
    args = torch.tensor([50]), torch.randn(1, 8, 40), torch.randn(1, 64), torch.tensor([True])
    g = torch.autograd.grad(refiner(x, *args)[..., 20].sum(), x)[0].abs().sum(1)[0]
    assert (g > 0).all()


# ------------------------------------------------------------------------------------------------
# The model


def test_the_defaults_are_49_million_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in Refiner(RefinerConfig()).parameters())
    assert count == pytest.approx(49e6, rel=0.01)


def test_padding_and_captions_and_sketch_enter_the_loss_as_they_should():
    refiner, encoder = small()
    given = codes(30)[None]
    loss = lambda codes, caption, dropout: refiner_loss(
        refiner, encoder, CODEC, codes, [caption], dropout, torch.Generator().manual_seed(0)
    ).item()
    other = given.clone()
    other[:, 0] = codes(30, seed=1)[0]  # another sketch
    assert loss(given, "a waltz", 0.0) != loss(other, "a waltz", 0.0)
    assert loss(given, "a waltz", 1.0) == loss(other, "a waltz", 1.0)
    assert loss(given, "a waltz", 0.0) != loss(given, "", 0.0)
    padded = given.clone()
    padded[..., 20:] = 1024
    assert math.isfinite(loss(padded, "a waltz", 0.0))
    # An output of zero costs the mean of v^2, which is one, and padding changes nothing in that.
    refiner.out.weight.data.zero_()
    assert loss(padded, "a waltz", 0.0) == pytest.approx(1, abs=0.1)


def test_times_of_training_are_all_of_the_schedule_and_dense_in_the_noise(monkeypatch):
    refiner, encoder = small()
    times = []
    monkeypatch.setattr(refiner, "forward", lambda x, t, *_: times.append(t) or x)
    B, T = 4000, refiner.config.timesteps
    generator = torch.Generator().manual_seed(0)
    given = codes(1)[None].expand(B, -1, -1)
    refiner_loss(refiner, encoder, CODEC, given, [""] * B, generator=generator)
    times = torch.cat(times)
    assert 1 <= times.min() and times.max() == T  # 0 is clean: nothing to learn
    for share in (0.25, 0.5, 0.75, 0.99):  # of times up to t, (t / T)^3 come up
        assert (times <= share * T).float().mean() == pytest.approx(share**3, abs=3e-3)


def test_it_learns():
    refiner, encoder = small()
    refiner.train()
    torch.nn.init.zeros_(refiner.out.weight)
    optimizer = torch.optim.AdamW(refiner.parameters(), 3e-3)
    given = codes(24)[None].expand(8, -1, -1)
    losses = []
    for i in range(60):
        loss = refiner_loss(
            refiner, encoder, CODEC, given, ["a"] * 8, generator=torch.Generator().manual_seed(i)
        )
        losses.append(loss.item())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


# ------------------------------------------------------------------------------------------------
# Refining


def test_a_refiner_is_validated_on_windows():
    refiner, encoder = small("attention")
    clips, seen = Clips(corpus(), "valid", 9, "toy"), []
    refiner.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[3])))
    config = train.TrainConfig(
        valid_clips=2, batch=26, seconds=64 * 512 / 44100, crop=64 * 512 / 44100
    )
    objective = train.Objective(refiner, encoder, CODEC, config)
    data = SimpleNamespace(valid=clips, describe=lambda row, rng: str(row["offset"]))
    scores = train.validate(refiner, objective, data, config)
    assert [tuple(x.shape[::2]) for x, _ in seen] == [(2 * (862 // 64), 64)] * 6
    assert all(np.isfinite(score) for score in scores.values())
    text = seen[0][1]  # windows have their clip's caption
    assert (text[:13] == text[0]).all() and (text[13:] == text[13]).all()
    assert (text[0] != text[13]).any()


def run(refiner, encoder, given, seed=0, cut=100, prompt="a waltz", **options):
    pieces = list(given[:1].split(cut, dim=1))
    options = dict(steps=3) | options
    return torch.cat([*refine(refiner, encoder, CODEC, prompt, pieces, seed, **options)], 1)


@pytest.fixture
def short_windows(monkeypatch):
    for name, share in dict(KNOWN=1 / 4, AHEAD=1 / 8).items():
        monkeypatch.setattr(diffusion, name, share)


@pytest.mark.parametrize("L", [1, 63, 64, 65, 150])
@pytest.mark.usefixtures("short_windows")
def test_any_length_keeps_the_sketch_and_depends_on_the_seed_alone(L):
    refiner, encoder = small()
    given = codes(L)
    made = run(refiner, encoder, given)
    assert made.shape == (9, L) and (made[0] == given[0]).all() and made.max() < 1024
    assert (made == run(refiner, encoder, given, cut=7)).all()  # however it is cut
    assert (made != run(refiner, encoder, given, seed=1)).any()


@pytest.mark.usefixtures("short_windows")
def test_a_window_goes_on_from_the_one_before_and_from_what_was_heard(monkeypatch):
    refiner, encoder = small()
    seen, real = [], diffusion.denoise

    def spy(predict, x, schedule, steps, generator, known, limit):
        seen.append(refiner.snap(CODEC, known)[0] if known.shape[2] else None)
        return real(predict, x, schedule, steps, generator, known, limit)

    monkeypatch.setattr(diffusion, "denoise", spy)
    made = run(refiner, encoder, codes(120))
    assert seen[0] is None and (seen[1] == made[1:, 40:56]).all()
    seen.clear()
    run(refiner, encoder, codes(20), heard=made)
    assert (seen[0] == made[1:, -32:]).all()


def test_guidance_of_one_is_the_conditional_and_of_zero_the_unconditional():
    refiner, encoder = small()
    given, other = codes(40), codes(40, seed=5)
    play = lambda codes, text, sketch, prompt="a waltz": run(
        refiner, encoder, codes, prompt=prompt, guidance=text, sketch_guidance=sketch
    )
    said = play(given, 1, 1)
    assert (said != play(given, 3, 1)).any() and (said != play(given, 1, 3)).any()
    # Text of zero: another changes nothing. Sketch of zero as well: nothing but the first row.
    assert (play(given, 0, 1) == play(given, 0, 1, prompt="techno")).all()
    assert (play(given, 0, 1)[1:] != play(other, 0, 1)[1:]).any()
    unsaid = play(given, 0, 0)
    assert (unsaid[1:] == play(other, 0, 0)[1:]).all()
    assert (unsaid[1:] != said[1:]).any()
    # Of one, by the general formula: u + 1 (s - u) + 1 (c - s).
    assert (play(given, 1 + 1e-6, 1 - 1e-6) == said).float().mean() > 0.999


def test_guidance_is_the_formula(monkeypatch):
    refiner, encoder = small()
    given, seen = codes(40), {}

    def look(predict, x, schedule, steps, generator, known, limit):
        seen["x"], seen["v"] = x, predict(x, 60)
        return x

    monkeypatch.setattr(diffusion, "denoise", look)
    run(refiner, encoder, given, guidance=5.0, sketch_guidance=1.5)
    t, sketch = torch.tensor([60]), refiner.signal(CODEC, given[None, :1])[1]
    with torch.inference_mode():
        c, s, u = (
            refiner(seen["x"], t, sketch, encoder.pooled([text]), torch.tensor([drawn]))
            for text, drawn in (("a waltz", True), ("", True), ("", False))
        )
    torch.testing.assert_close(seen["v"], u + 1.5 * (s - u) + 5.0 * (c - s), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_comes_back_the_same_and_another_model_is_told_apart(tmp_path):
    refiner, encoder = small()
    save_checkpoint(tmp_path / "r", refiner, encoder, dict(codec="toy"))
    again = load_refiner(tmp_path / "r")
    given = codes(30)
    assert (run(again, encoder, given) == run(refiner, encoder, given)).all()
    lm, encoder = tiny()
    save_checkpoint(tmp_path / "lm", lm, encoder)
    with pytest.raises(ValueError, match="holds no refiner"):
        load_refiner(tmp_path / "lm")


# ------------------------------------------------------------------------------------------------
# The commands


def test_a_refiner_is_trained_resumed_exactly_and_played(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = "--variant refiner --layers 1 --d-model 32 --d-state 8 --batch 2 --seconds 0.5"
    monkeypatch.setattr(sample, "SHOWCASE", ["jazz reggae", "--seconds", "2"])
    size += " --crop 0.5 --valid-clips 2 --valid-every 3 --headdim 16"
    train.main([*size.split(), "--steps", "6", "--out", "out/whole"])
    assert (tmp_path / "out/whole/jazz-reggae.wav").exists()
    assert (tmp_path / "out/whole/loss.png").exists()

    # The same run, stopped and resumed, has the same losses and averages.
    assert read_config("out/whole/last")["train"]["ema"] > 0
    stop_after(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        train.main([*size.split(), "--steps", "6", "--out", "out/resumed"])
    assert read_config("out/resumed/last")["step"] == 4
    train.main(["--resume", "out/resumed"])
    assert losses(Path("out/resumed")) == losses(Path("out/whole"))
    a, b = (load_refiner(f"out/{run}/last").state_dict() for run in ("whole", "resumed"))
    assert all((a[k] == b[k]).all() for k in a)


def test_spread_widens_the_noise_that_a_window_starts_from(monkeypatch):
    refiner, encoder = small()
    seen = []
    monkeypatch.setattr(diffusion, "denoise", lambda predict, x, *rest: seen.append(x) or x)
    text, given = encoder.pooled(["jazz", ""]), codes(10)
    for spread in (1.0, 1.5):
        diffusion.paint(refiner, CODEC, text, given[:1], given[1:, :0], seed=0, spread=spread)
    assert torch.equal(seen[1], 1.5 * seen[0])


def test_a_student_learns_guided_predictions(tmp_path):
    refiner, encoder = small()
    for factors, low, high in ((dict(guidance=1.0, sketch_guidance=1.0), 0, 1e-12), ({}, 1e-3, 99)):
        save_checkpoint(tmp_path / "r", refiner, encoder, dict(codec="toy", sampling=factors))
        teacher = diffusion.teacher(tmp_path / "r")
        loss = lambda seed, teacher=teacher: refiner_loss(
            refiner, encoder, CODEC, codes(24)[None].expand(8, -1, -1), ["a"] * 8,
            generator=torch.Generator().manual_seed(seed), teacher=teacher,
        )  # fmt: skip
        assert low <= loss(0).item() < high  # a copy of its teacher, which is guided or not
    before = sum(loss(seed).item() for seed in range(100, 104))
    optimizer = torch.optim.AdamW(refiner.parameters(), 1e-3)
    for seed in range(30):
        optimizer.zero_grad()
        loss(seed).backward()
        optimizer.step()
    assert sum(loss(seed).item() for seed in range(100, 104)) < before / 2
