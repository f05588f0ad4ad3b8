"""The language models: one function in two forms, no leaks, and sampling that can be repeated."""

import itertools
import json

import pytest
import torch

import checkpoint
import model
import sample
from model import LMConfig, MusicLM
from sample import generate, sample_tokens
from text import TextEncoder

CAPTIONS = ["slow piano waltz", "jazz", "a dark techno track at 132 bpm, with a synth lead", ""]


def tokenizer_json():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer.to_str()


def tiny(variant="simba", dtype=torch.float32, **options):
    """A random model small enough for a test, and an encoder; its outputs are made large."""
    torch.manual_seed(0)
    config = dict(blocks=2, d_model=32, d_state=8, headdim=16, chunk=8, d_text=64, dropout=0.0)
    config |= dict(attention_heads=4, codebook_size=50, trained_frames=64)
    lm = MusicLM(LMConfig(variant=variant, **(config | options))).to(dtype).eval()
    for head in lm.heads:
        head.weight.data *= 10
    if lm.config.clock == "beat":
        lm.beat_proj.weight.data.normal_()
    return lm, TextEncoder.small(tokenizer_json(), d_model=64, layers=1, max_tokens=24).eval()


VARIANTS = [(v, k, "ff") for v in model.VARIANTS for k in (1, 9)]
VARIANTS += [("simba", 1, "einfft"), ("cross-simba", 9, "einfft")]
CLOCKS = [*itertools.product(model.VARIANTS, ["text", "beat"]), ("simba", "music")]


@pytest.mark.parametrize(
    "options, millions",
    [
        (dict(variant="mamba"), 357.7),
        (dict(variant="simba"), 281.0),
        (dict(variant="cross-simba"), 381.7),
        (dict(variant="transformer"), 305.0),
        (dict(variant="simba", codebooks=9), 297.8),
        (dict(variant="simba", blocks=12), 142.0),
        (dict(variant="simba", blocks=6), 72.4),
    ],
)
def test_parameter_counts_at_paper_size(options, millions):
    with torch.device("meta"):
        lm = MusicLM(LMConfig(**options))
    assert sum(p.numel() for p in lm.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_heads_start_as_their_authors_or_as_running_means():
    torch.manual_seed(0)
    for init, low, high in (("mamba2", 1, 16), ("memory", 0.01, 1)):
        mamba = model.Mamba2(LMConfig(d_model=256, init=init))
        rate = mamba.A_log.exp()
        assert low <= rate.min() < rate.max() <= high
        B, C = torch.nn.functional.silu(mamba.conv1d.bias[mamba.sizes[0] :]).chunk(2)
        assert (B @ C > 100) == (init == "memory")  # of 512 columns


@pytest.mark.parametrize(
    "variant, codebooks, mixer, clock",
    [(*v, "text") for v in VARIANTS] + [(v, 1, "ff", "beat") for v in model.VARIANTS],
)
@torch.no_grad()
def test_step_equals_forward_for_every_variant(variant, codebooks, mixer, clock):
    """1,000 tokens: forward reads the first 10, step the others, from the state it left."""
    lm, encoder = tiny(variant, codebooks=codebooks, mixer=mixer, clock=clock)
    text = encoder(CAPTIONS[:3])
    codes = torch.randint(50, (3, codebooks, 1000))
    columns = lm.delay(codes)
    hidden, _ = lm.read(columns[:, :, :1000], *text)
    expected = torch.stack([head(hidden) for head in lm.heads], 1)  # (B, K, L, V)
    # A prompt of 10 frames is read as 11 columns; what of them is not yet known is 50.
    logits, state = lm.prefill(*text, codes[:, :, :10], room=1000)
    for s in range(11, 1000):
        error = (logits - expected[:, :, s - 1]).abs().max()
        assert error < 1e-4 * expected.abs().max().clamp(min=1), s
        logits = lm.step(columns[:, :, s], state)


@pytest.mark.parametrize("variant, clock", CLOCKS)
@torch.no_grad()
def test_a_batch_of_unequal_prompts_gives_each_prompts_own_logits(variant, clock):
    lm, encoder = tiny(variant, torch.float64, clock=clock)
    encoder.double()
    codes = torch.randint(50, (4, 1, 30))
    text, mask, tempo = encoder(CAPTIONS)
    text[~mask] = 1e3  # what stands in the padding must not matter
    together = lm(codes, text, mask, tempo)
    _, states = lm.read(lm.delay(codes)[:, :, :30], text, mask, tempo)
    for i, caption in enumerate(CAPTIONS):
        alone = lm(codes[i : i + 1], *encoder([caption]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
        if variant in ("mamba", "simba"):
            _, state = lm.read(lm.delay(codes)[i : i + 1, :, :30], *encoder([caption]))
            torch.testing.assert_close(states.blocks[1][0].ssm[i], state.blocks[1][0].ssm[0])
            assert states.position[i] == state.position[0]


@pytest.mark.parametrize("clock", ["text", "music", "beat"])
@torch.no_grad()
def test_the_clock_counts_from_the_text_or_from_the_music(clock, monkeypatch):
    lm, encoder = tiny("simba", clock=clock)
    text, mask, tempo = encoder(CAPTIONS[:2])
    words = mask.sum(1).tolist()
    assert words[0] != words[1]
    seen = []
    spy = lambda p, *tempo: seen.append(p) or MusicLM._positions(lm, p, *tempo)
    monkeypatch.setattr(lm, "_positions", spy)
    lm(torch.randint(50, (2, 1, 10)), text, mask, tempo)
    for i, count in enumerate(words):
        zero = count if clock == "text" else 0
        assert seen[0][i, -10 - count :].tolist() == list(range(zero - count, zero + 10))


@pytest.mark.parametrize("variant, codebooks, mixer", VARIANTS)
def test_no_code_sees_itself_or_its_future(variant, codebooks, mixer):
    lm, encoder = tiny(variant, torch.float64, codebooks=codebooks, mixer=mixer)
    text = encoder.double()(["jazz"])
    codes = torch.randint(50, (1, codebooks, 20))
    changed = codes.clone()
    k, t = codebooks // 2, 12
    changed[0, k, t] = (codes[0, k, t] + 1) % 50
    difference = (lm(codes, *text) - lm(changed, *text)).abs().amax(-1)[0]  # (K, L)
    # In the delay pattern codebook j of frame u is predicted at column u + j; the change, read at
    # column t + k + 1, may show from there on.
    column = torch.arange(20) + torch.arange(codebooks)[:, None]
    assert difference[column < t + k + 1].max() == 0
    assert difference[column == t + k + 1].max() > 0


def test_text_changes_the_music_and_gradients_reach_it():
    for variant in model.VARIANTS:
        lm, encoder = tiny(variant)
        codes = torch.randint(50, (2, 1, 20))
        logits = lm(codes, *encoder(CAPTIONS[:2]))
        logits[:, :, -1].square().mean().backward()
        assert all(p.grad is not None for n, p in lm.named_parameters())
        assert encoder.encoder.shared.weight.grad.abs().max() > 0
        other = lm(codes, *encoder(CAPTIONS[2:]))
        assert (logits - other).abs().max() > 1e-3


def test_positions_are_sinusoids_cosine_first():
    lm, _ = tiny()
    table = lm._positions(torch.tensor([[0, 7, 63, 64, 1000]]), torch.zeros(1, 1))[0]
    half = 16
    for i in (0, 5, 15):
        angle = torch.tensor(7 / 10000 ** (i / (half - 1)))
        assert table[1, i] == pytest.approx(angle.cos().item(), abs=1e-6)
        assert table[1, half + i] == pytest.approx(angle.sin().item(), abs=1e-6)
    assert (table[3] == table[2]).all() and (table[4] == table[2]).all()  # the last one trained


def test_the_text_encoder_finds_the_bpm():
    _, encoder = tiny()
    captions = ["techno at 132 BPM", "90.5bpm", "84 beats per minute, calm", "100 drums", "bpm", ""]
    assert encoder(captions)[2].tolist() == [132, 90.5, 84, 0, 0, 0]
    many_digits = "1234567890123456789012345678901234567890 bpm"
    beyond_the_cut = "slow piano waltz " * 24 + "at 90 bpm"
    assert encoder([many_digits, beyond_the_cut])[2].tolist() == [0, 0] and encoder.cut > 0


@torch.no_grad()
def test_beats_are_counted_at_the_tempo_that_the_text_names():
    lm, _ = tiny(clock="beat", d_model=16)
    lm.beat_proj.weight.data = torch.eye(16)[:, :13]  # what comes out is what goes in
    beat = 60 * model.FRAME_RATE / 120  # frames
    position, tempo = torch.tensor([0.0, 0.25, 1, 2, 3, 12000]) * beat, torch.tensor(120.0)
    cosines, sines, known = lm._beats(position, tempo).split([6, 6, 4], -1)
    assert known[:, 0].tolist() == [1] * 6
    for i, period in enumerate([0.25, 0.5, 1, 2, 3, 4]):
        angle = 2 * torch.pi * position / beat / period
        torch.testing.assert_close(cosines[:5, i], angle[:5].cos(), atol=1e-4, rtol=0)
        torch.testing.assert_close(sines[:5, i], angle[:5].sin(), atol=1e-4, rtol=0)
    torch.testing.assert_close(cosines[5], torch.ones(6), atol=1e-4, rtol=0)  # later than an hour
    assert not lm._beats(position, torch.tensor(0.0)).any()
    assert not lm._beats(torch.tensor([-3]), tempo).any()  # in the text


def run(lm, encoder, prompts, seeds, frames=40, **options):
    return torch.cat(list(generate(lm, encoder, prompts, frames, seeds, **options)), 2)


@pytest.mark.parametrize("variant, codebooks, mixer", VARIANTS)
def test_a_sample_made_in_a_batch_is_the_sample_made_alone(variant, codebooks, mixer):
    """In fp64, where rounding does not decide between tokens."""
    lm, encoder = tiny(variant, torch.float64, codebooks=codebooks, mixer=mixer)
    encoder.double()
    prompts, seeds = [*CAPTIONS[:3], "blues", "jazz"], [3, 1, 4, 1, 5]
    together = run(lm, encoder, prompts, seeds)
    assert together.shape == (5, codebooks, 40) and together.max() < 50
    for i in (0, 3, 4):
        assert (together[i] == run(lm, encoder, [prompts[i]], [seeds[i]])[0]).all()
    assert (together[1] != run(lm, encoder, [prompts[1]], [2])[0]).any()
    assert (run(lm, encoder, prompts, seeds) == together).all()


@pytest.mark.parametrize("codebooks", [1, 9])
def test_generation_is_the_model_run_forward(codebooks):
    """Greedy tokens from `generate`, state and all, against re-reading everything each time."""
    lm, encoder = tiny(codebooks=codebooks)
    codes = run(lm, encoder, ["jazz"], [0], frames=12, top_k=1, guidance=3.0)
    conditional, unconditional = (lm(codes, *encoder([t])) for t in ("jazz", ""))
    logits = unconditional + 3 * (conditional - unconditional)
    # Fine codebooks of the last frames were sampled beside coarse ones beyond the end.
    assert (logits[..., :-1].argmax(-1) == codes)[:, :, : 12 - codebooks + 1].all()


@pytest.mark.parametrize("codebooks", [1, 9])
def test_continuation_goes_on_as_if_it_had_never_stopped(codebooks):
    lm, encoder = tiny(codebooks=codebooks)
    whole = run(lm, encoder, ["jazz"], [0], frames=30, top_k=1)
    rest = run(lm, encoder, ["jazz"], [0], frames=10, top_k=1, codes=whole[:, :, :20])
    assert (rest == whole[:, :, 20:]).all()


def test_a_large_model_samples_in_bf16_and_compiled_and_repeats_itself(monkeypatch):
    lm, encoder = tiny()
    monkeypatch.setattr(sample, "LARGE", 0)
    monkeypatch.setattr(sample, "multiplies_bf16", lambda device: True)
    exact = torch.cat(list(generate(lm, encoder, ["jazz"], 12, [0], top_k=1)), 2)
    lm = sample.prepare(lm, "cpu")
    assert lm.heads[0].weight.dtype == torch.bfloat16 and lm.text_norm.weight.dtype == torch.float32
    make = lambda: torch.cat(list(generate(lm, encoder, ["jazz", "slow"], 12, [0, 1])), 2)
    assert torch.equal(make(), make())
    text = encoder(["jazz"])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits, state = lm.prefill(*text)
        stepped = lm.step(exact[:, :, 0], state)
        forward = lm(exact[:, :, :2], *text)[:, :, 1]
    assert state.blocks[0][0].ssm.dtype == torch.float32
    torch.testing.assert_close(stepped.float(), forward.float(), rtol=0.1, atol=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant, clock", CLOCKS)
def test_a_recorded_step_is_the_step(variant, clock, monkeypatch):
    lm, encoder = tiny(variant, clock=clock)
    lm, encoder = lm.cuda(), encoder.cuda()
    recorded = run(lm, encoder, CAPTIONS, [0, 1, 2, 3])
    plain = lambda lm, _, state: lambda column: lm.step(column, state)
    monkeypatch.setattr(sample, "step_function", plain)
    assert torch.equal(recorded, run(lm, encoder, CAPTIONS, [0, 1, 2, 3]))


def test_guidance_1_is_conditional_and_0_is_the_negative_prompt():
    lm, encoder = tiny()
    plain = run(lm, encoder, ["jazz"], [7], guidance=1.0)
    assert (plain == run(lm, encoder, ["jazz"], [7], guidance=1.0, negative="blues")).all()
    away = run(lm, encoder, ["jazz"], [7], guidance=0.0, negative="sad blues", top_k=1)
    assert (away == run(lm, encoder, ["sad blues"], [7], guidance=1.0, top_k=1)).all()


def test_sampled_tokens_have_the_right_frequencies():
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0, 99.0])  # the last is the special token
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    frequency = lambda **o: (
        sample_tokens(logits.expand(len(u), 5), u, **o).bincount(minlength=5) / len(u)
    )
    expected = torch.softmax(logits[:4] / 2, 0)
    torch.testing.assert_close(frequency(temperature=2.0)[:4], expected, atol=5e-3, rtol=0)
    assert frequency()[4] == 0
    top2 = torch.softmax(torch.tensor([3.0, 2.0]), 0)
    measured = frequency(temperature=1.0, top_k=2)
    torch.testing.assert_close(measured[[1, 2]], top2, atol=5e-3, rtol=0)
    assert measured[[0, 3]].sum() == 0
    # probabilities .644 .237 .087 .032: the fewest that reach 0.7 are two, that reach 0.6 one
    assert frequency(temperature=1.0, top_p=0.7).count_nonzero() == 2
    assert frequency(temperature=1.0, top_p=0.6).count_nonzero() == 1


def test_checkpoints_come_back_whole(tmp_path):
    lm, encoder = tiny("cross-simba")
    for _ in range(2):  # the second replaces the first
        checkpoint.save_checkpoint(tmp_path / "run", lm, encoder, dict(codec="toy"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert checkpoint.read_config(tmp_path / "run")["codec"] == "toy"
    lm2, encoder2 = (
        checkpoint.load_checkpoint(tmp_path / "run"),
        checkpoint.load_text_encoder(tmp_path / "run"),
    )
    codes = torch.randint(50, (4, 1, 20))
    with torch.no_grad():
        assert (lm(codes, *encoder(CAPTIONS)) == lm2(codes, *encoder2(CAPTIONS))).all()


def test_broken_checkpoints_get_one_sentence(tmp_path):
    lm, encoder = tiny()
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.load_checkpoint(folder)
    checkpoint.save_checkpoint(folder, lm, encoder)
    good = (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="cut short"):
        checkpoint.load_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(good)
    config["model"]["d_model"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another shape"):
        checkpoint.load_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="describes no model"):
        checkpoint.load_checkpoint(folder)
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="describes no model"):
        checkpoint.load_checkpoint(folder)


def test_impossible_shapes_get_one_sentence():
    for options, match in [
        (dict(variant="rnn"), "unknown --variant"),
        (dict(mixer="fft"), "unknown --mixer"),
        (dict(variant="mamba", mixer="einfft"), "goes with"),
        (dict(headdim=60), "must divide"),
    ]:
        with pytest.raises(ValueError, match=match):
            LMConfig(**options)


@pytest.fixture
def hybrid(monkeypatch):
    """A variant of one's own: attention between an SSD and a feed-forward, text as a prefix."""
    layers = (model.Mamba2, model.SelfAttention, model.FeedForward)
    monkeypatch.setitem(model.VARIANTS, "hybrid", layers)
    valid = LMConfig.__dataclass_fields__["variant"].metadata["valid"]
    valid.append("hybrid")
    yield "hybrid"
    valid.remove("hybrid")


@pytest.mark.parametrize("clock", ["text", "music", "beat"])
@torch.no_grad()
def test_a_prefix_variant_with_attention_steps_as_it_reads_and_padding_leaks_nothing(hybrid, clock):
    lm, encoder = tiny(hybrid, torch.float64, clock=clock)
    encoder.double()
    assert lm.config.prefix
    codes = torch.randint(50, (4, 1, 60))
    text, mask, tempo = encoder(CAPTIONS)
    text[~mask] = 1e3
    together = lm(codes, text, mask, tempo)
    columns = lm.delay(codes)
    logits, state = lm.prefill(text, mask, tempo, codes[:, :, :10], room=60)
    for s in range(11, 60):
        torch.testing.assert_close(logits, together[:, :, s - 1], atol=1e-9, rtol=0)
        logits = lm.step(columns[:, :, s], state)
    for i, caption in enumerate(CAPTIONS):
        alone = lm(codes[i : i + 1], *encoder([caption]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", [*model.VARIANTS, "hybrid"])
@pytest.mark.parametrize("cut", [1, 3, 8, 20])
def test_a_sequence_read_in_parts_is_the_sequence_with_all_gradients(variant, cut, hybrid):
    lm, encoder = tiny(variant, torch.float64, clock="beat")
    text = encoder.double()(CAPTIONS)
    codes = torch.randint(50, (4, 1, 29))
    columns = lm.delay(codes)[:, :, :29]
    weight = torch.randn(4, 29, 32, dtype=torch.float64)

    def outcome(*cuts):
        state, parts = None, []
        for begin, end in itertools.pairwise((0, *cuts, 29)):
            words = text if state is None else ()
            h, state = lm.read(columns[:, :, begin:end], *words, state=state)
            parts.append(h)
        h = torch.cat(parts, 1)
        loss = (h * weight).sum()
        if isinstance(state.blocks[-1][0], model.MambaState):
            loss = loss + state.blocks[-1][0].ssm.square().sum()
        gradients = torch.autograd.grad(
            loss, [*lm.parameters(), *encoder.parameters()], allow_unused=True, retain_graph=True
        )
        return [h, *(g for g in gradients if g is not None)]

    for a, b in zip(outcome(), outcome(cut, cut + 2)):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    lm, encoder = tiny()
    lm.heads[0].weight.data[0, 0] = float("nan")
    checkpoint.save_checkpoint(tmp_path / "run", lm, encoder)
    with pytest.raises(ValueError, match="not numbers"):
        checkpoint.load_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="not finite"):
        run(lm, encoder, ["jazz"], [0])


def test_a_broken_tokenizer_is_named(tmp_path):
    lm, encoder = tiny()
    checkpoint.save_checkpoint(tmp_path / "run", lm, encoder)
    file = tmp_path / "run/tokenizer.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match="tokenizer.json"):
        checkpoint.load_text_encoder(tmp_path / "run")


@pytest.mark.parametrize("values", [dict(blocks=None), dict(d_state=3.5), dict(dropout="0")])
def test_options_of_another_type_are_refused(values):
    with pytest.raises(ValueError, match="must be (int|float), not"):
        LMConfig(**values)
