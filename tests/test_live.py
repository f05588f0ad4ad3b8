"""The live page, in a real browser where there is one, and the server's manners without it."""

import asyncio
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from aiohttp import WSMsgType, WSServerHandshakeError
from aiohttp.test_utils import TestClient, TestServer

import sample
from live import follow
from live.__main__ import Live, understood
from sample import generate
from toy.judge import FACTORS, load_judge

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def system():
    return sample.System(sample.SHIPPED)


def with_server(system, use, listeners=2):
    async def run():
        live = Live(system, listeners)
        async with TestClient(TestServer(live.app())) as client:
            await use(live, client)

    asyncio.run(run())


async def heard(socket, seconds):
    """Audio (S,) of so many seconds, and the news that came with it."""
    pcm, news = b"", []
    while len(pcm) < 2 * 44100 * seconds:
        message = await socket.receive(timeout=60)
        if message.type == WSMsgType.BINARY:
            pcm += message.data
        else:
            news.append(json.loads(message.data))
    return np.frombuffer(pcm, np.int16) / 32768, news


def test_words_turn_the_music(system):
    async def use(live, client):
        socket = await client.ws_connect("/listen")
        await socket.send_json({"prompt": "jazz", "seed": 3})
        audio, news = await heard(socket, 1)
        assert np.sqrt(np.mean(audio**2)) > 0.01 and {"turning": "jazz"} in news
        await socket.send_json({"prompt": "techno", "temperature": 0.9})
        audio, news = await heard(socket, 2)
        assert {"turning": "techno"} in news
        await socket.close()
        for _ in range(100):
            if not live.here:
                break
            await asyncio.sleep(0.1)
        assert not live.here and not [t for t in asyncio.all_tasks() if "play" in repr(t)]

    with_server(system, use)


def units(system, wish, monkeypatch):
    """What `follow` makes, as codes and without a refiner."""
    monkeypatch.setattr(follow, "decode_stream", lambda codec, units, step: units)
    parts = dict(lm=system.lm, encoder=system.encoder, codec=system.codec)
    return follow.follow(SimpleNamespace(**parts, second=None), wish)


def test_the_page_plays_what_generate_plays(system, monkeypatch):
    """Also beyond the trained length, where `generate` reads the words again."""
    music = units(system, lambda: ("calm jazz", 3, system.sampling), monkeypatch)
    made = torch.cat([next(music) for _ in range(14)], 1)
    assert made.shape[1] > system.lm.config.trained_frames + 200
    parts = system.lm, system.encoder, ["calm jazz"], made.shape[1], [3]
    assert torch.equal(made, torch.cat([*generate(*parts, block=1, **system.sampling)], 2)[0])


def test_what_is_heard_when_a_wish_changes(system, monkeypatch):
    """Frames are numbers: what the language model hears shows where it comes from."""
    heard, numbers = [], itertools.count()

    def numbered(lm, encoder, prompts, frames, seeds, codes, before, **options):
        heard.append((prompts, codes[0, 0].tolist(), before))
        while True:
            yield torch.full((1, 1, 1), next(numbers))

    monkeypatch.setattr(follow, "generate", numbered)
    wishes = [("120 bpm", 0, {})] * 4 + [("120 bpm", 0, {"guidance": 2.0}), ("90 bpm", 0, {})]
    wishes += [("90 bpm", 1, {})]
    music = units(system, iter(wishes).__next__, monkeypatch)
    lengths = [next(music).shape[1] for _ in wishes]
    assert lengths == [86, 86, 86, 87, 86, 57, 57], "half a bar, and whole bars on time"
    assert heard == [
        (["120 bpm"], [], 0),
        (["120 bpm"], [*range(345 - 259, 345)], 345),  # new options: the last three seconds
        (["90 bpm"], [], 0),  # new words: nothing
        (["90 bpm"], [], 0),  # a new seed: nothing
    ]


def test_the_judge_hears_the_new_words(system):
    """Sixteen changes from one genre to another: the ten seconds after them."""
    genres, clips = [*FACTORS["genre"]], []
    for seed in range(16):
        old, new = [(genres[i % 20], seed, system.sampling) for i in (seed, seed + 7)]
        wishes = itertools.chain([old, old], itertools.repeat(new))
        music = follow.follow(system, wishes.__next__)
        clips.append(torch.cat([*itertools.islice(music, 24)])[-441_000:])
    logits = load_judge().listen(clips).logits["genre"]
    right = [genres[i] == genres[(n + 7) % 20] for n, i in enumerate(logits.argmax(1))]
    assert sum(right) >= 13, right


def test_nonsense_is_refused_and_the_music_goes_on(system):
    async def use(live, client):
        socket = await client.ws_connect("/listen")
        await socket.send_json({"prompt": "waltz"})
        await heard(socket, 0.5)
        nonsense = ["{", "[]", "3", '{"prompt": ""}', '{"prompt": 3e999, "seed": 1e999}']
        nonsense += [json.dumps({"prompt": "x" * 10_000}), '{"prompt": "a", "temperature": 0}']
        nonsense += ["[" * 60_000, '{"prompt": null}', '{"prompt": ["jazz"]}']
        nonsense += ['{"prompt": "a", "seed": -1}', '{"prompt": "a", "guidance": "NaN"}']
        for text in nonsense:
            await socket.send_str(text)
        refused = []
        while len(refused) < len(nonsense):
            refused += [n for n in (await heard(socket, 0.1))[1] if "refused" in n]
        assert all(n["refused"] for n in refused)
        await heard(socket, 0.5)

    with_server(system, use)


def test_every_listener_has_a_stream_and_one_too_many_gets_a_sentence(system):
    async def use(live, client):
        one, two = [await client.ws_connect("/listen") for _ in range(2)]
        three = await client.ws_connect("/listen")
        assert "2 listener(s)" in (await three.receive_json())["error"]
        assert (await three.receive()).type == WSMsgType.CLOSE
        for socket, prompt in ((one, "house"), (two, "folk")):
            await socket.send_json({"prompt": prompt})
        for socket in (one, two):
            await heard(socket, 0.5)
        one._response.connection.transport.abort()  # it vanishes without a word
        for _ in range(100):
            if live.here == 1:
                break
            await asyncio.sleep(0.1)
        again = await client.ws_connect("/listen")
        await again.send_json({"prompt": ""})
        assert "refused" in await again.receive_json()
        await heard(two, 0.5)

    with_server(system, use)


def test_other_sites_are_refused(system):
    async def use(live, client):
        foreign = {"Origin": "http://example.com"}
        assert (await client.get("/", headers=foreign)).status == 403
        with pytest.raises(WSServerHandshakeError, match="403"):
            await client.ws_connect("/listen", headers=foreign)
        assert (await client.get("/", headers={"Host": "example.com"})).status == 403
        for name in ("[::1", "[x]"):
            assert (await client.get("/", headers={"Host": name})).status == 403
        assert (await client.get("/", headers={"Origin": "http://[::1"})).status == 403
        own = {"Origin": f"http://127.0.0.1:{client.port}"}
        assert (await client.get("/about", headers=own)).status == 200

    with_server(system, use)


def test_a_wish(system):
    prompt, seed, options = understood('{"prompt": "  sad \\ud800 blues\\n", "seed": 7}', system)
    assert (prompt, seed, options) == ("sad blues", 7, system.sampling)


@pytest.fixture
def page():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not shutil.which("chromium"):
        pytest.skip("needs chromium")
    command = [sys.executable, "-m", "live", "--no-browser", "--port", "8765"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    server.stdout.readline()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"],
        )
        page = browser.new_page(viewport=dict(width=390, height=800))
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.requests.append(f"error: {error}"))
        page.goto("http://127.0.0.1:8765")
        yield page
        browser.close()
    server.terminate()
    server.wait()


def test_sound_arrives_in_a_browser(page):
    """By keyboard alone; loudness is measured behind the AudioWorklet."""
    page.focus("#prompt")
    page.keyboard.press("Enter")
    loud = """() => {
        if (!analyser || !window.state || state.played < 0.5) return false;
        const wave = new Float32Array(2048);
        analyser.getFloatTimeDomainData(wave);
        return Math.hypot(...wave) / Math.sqrt(2048) > 0.01;
    }"""
    page.wait_for_function(loud, timeout=60_000)
    page.fill("#prompt", "fast techno")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#now').textContent.includes('fast techno')")
    page.click("text=happy")
    page.wait_for_function("document.querySelector('#now').textContent.includes('happy')")
    assert page.input_value("#prompt") == "fast techno, happy"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.reload()
    page.click("#play")
    page.wait_for_function(loud, timeout=60_000)
    page.click("#stop")
    for button in ("#all", "#minute"):
        with page.expect_download() as download:
            page.click(button)
        audio, rate = soundfile.read(download.value.path())
        assert rate == 44100 and len(audio) > rate / 2 and np.abs(audio).max() > 0.01
    allowed = ("http://127.0.0.1:8765/", "ws://127.0.0.1:8765/", "blob:", "data:")
    assert all(url.startswith(allowed) for url in page.requests), page.requests


def test_a_port_in_use_is_one_sentence(system):
    async def use(live, client):
        command = [sys.executable, "-m", "live", "--no-browser", "--port", str(client.port)]
        done = await asyncio.to_thread(
            subprocess.run, command, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.startswith("python -m live: ")
        assert str(client.port) in done.stderr

    with_server(system, use)
