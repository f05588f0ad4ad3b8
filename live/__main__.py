"""A page that plays endless music and follows what you type.

    python -m live                               opens http://127.0.0.1:8000 in a browser
    python -m live --port 9000 --listeners 4     another port, up to four listeners

Type other words, and the music turns to them within a second or two, on a beat. Every listener has
music of their own. It is made about a second before it is heard, and ends when the page is closed.
"""

import asyncio
import io
import json
import os
import tempfile
import threading
import time
import webbrowser
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import soundfile
from aiohttp import WSMsgType, web

from audio import pcm
from options import check_value, entry, new_parser
from sample import Sampling, System, add_models, follow, newest_checkpoint

PAGE = Path(__file__).with_name("page.html")
AHEAD = 1.0  # seconds of music that wait to be heard
LETTERS = 1000  # of a prompt; more are refused


class Stream(threading.Thread):
    """One listener's music, made in a thread of its own.

    wish: (prompt, seed, options of `Sampling`), which may be replaced at any time. send(message) is
    called with audio (bytes, 16-bit mono PCM) and with news (dicts). What was sent is kept in a
    temporary file. `stopped` ends it all.
    """

    def __init__(self, system, wish, send):
        super().__init__(daemon=True)
        self.system, self.wish, self.send = system, wish, send
        self.stopped = threading.Event()
        self.file = tempfile.TemporaryFile()
        self.size = 0  # bytes in the file
        self.prompt = None  # what is being made

    def run(self):
        sent, start = 0.0, time.monotonic()  # seconds of music since the clock was started
        try:
            for audio in follow(self.system, self.asked):
                samples = pcm(audio)
                elapsed = time.monotonic() - start
                late = 0 < sent < elapsed  # the listener has heard all: the clock starts again
                if late or not sent:
                    sent, start, elapsed = 0.0, time.monotonic(), 0.0
                sent += len(audio) / self.system.codec.sample_rate
                self.file.write(samples)
                self.file.flush()
                self.size += len(samples)
                self.send(samples)
                self.send({"ahead": round(sent - elapsed, 2), "late": late})
                if self.stopped.wait(max(0, sent - elapsed - AHEAD)):
                    break
        except ValueError as error:
            self.send({"error": str(error)})
        self.file.close()

    def asked(self):
        """What to play next, for `sample.follow`."""
        if self.wish[0] != self.prompt:
            self.prompt = self.wish[0]
            self.send({"turning": self.prompt})
        return self.wish

    def wav(self, seconds=None):
        """The last so many seconds of what was sent, or all of it -> the bytes of a WAV file."""
        rate = self.system.codec.sample_rate
        count = self.size if seconds is None else min(self.size, 2 * round(seconds * rate))
        samples = os.pread(self.file.fileno(), count, self.size - count)
        file = io.BytesIO()
        soundfile.write(file, np.frombuffer(samples, np.int16), rate, format="WAV")
        return file.getvalue()


class Live:
    """The server. streams: {a listener's key: Stream}"""

    def __init__(self, system, listeners, host="127.0.0.1"):
        self.system, self.listeners = system, listeners
        self.hosts = {"127.0.0.1", "localhost", "::1", host}
        self.streams = {}

    def app(self):
        app = web.Application(middlewares=[self.guard])
        app.router.add_get("/", self.page)
        app.router.add_get("/about", self.about)
        app.router.add_get("/listen", self.listen)
        app.router.add_get("/wav/{key}", self.wav)
        return app

    @web.middleware
    async def guard(self, request, handler):
        """Other sites may not use this server: neither from their pages (Origin), nor by giving
        their own name its address (Host)."""
        origin = request.headers.get("Origin")
        foreign = origin is not None and urlsplit(origin).netloc != request.host
        name = urlsplit(f"//{request.host}").hostname
        if foreign or (name not in self.hosts and "0.0.0.0" not in self.hosts):
            raise web.HTTPForbidden(text="this page belongs to another site")
        return await handler(request)

    async def page(self, request):
        return web.FileResponse(PAGE, headers={"Cache-Control": "no-store"})

    async def wav(self, request):
        stream = self.streams.get(request.match_info["key"])
        if stream is None:
            raise web.HTTPNotFound(text="this music has ended")
        seconds = request.query.get("last", "")
        data = await asyncio.to_thread(stream.wav, float(seconds) if seconds.isdigit() else None)
        name = 'attachment; filename="music.wav"'
        return web.Response(
            body=data, content_type="audio/wav", headers={"Content-Disposition": name}
        )

    async def listen(self, request):
        """A listener's connection: wishes come in as JSON, audio and news go out."""
        socket = web.WebSocketResponse(heartbeat=10, max_msg_size=1 << 16)
        await socket.prepare(request)
        if len(self.streams) >= self.listeners:
            many = f"{self.listeners} listener(s) are here already: close another page first"
            await socket.send_json({"error": many})
            await socket.close()
            return socket
        key = os.urandom(8).hex()
        await socket.send_json(dict(key=key))
        loop = asyncio.get_running_loop()
        news = asyncio.Queue()
        send = lambda message: loop.call_soon_threadsafe(news.put_nowait, message)
        sender = asyncio.create_task(deliver(socket, news))
        stream = self.streams[key] = Stream(self.system, None, send)
        try:
            async for message in socket:
                if message.type != WSMsgType.TEXT:
                    continue
                try:
                    stream.wish = understood(message.data, self.system)
                except (ValueError, KeyError, TypeError, OverflowError) as error:
                    await socket.send_json({"refused": str(error)})
                    continue
                if not stream.ident:
                    stream.start()
        finally:
            del self.streams[key]
            stream.stopped.set()
            if stream.ident:
                await asyncio.to_thread(stream.join)
            sender.cancel()
        return socket

    async def about(self, request):
        """The words that the page has buttons for, and where its sliders start."""
        buttons = {}
        if self.system.codec.name == "toy":  # the words that it knows
            from toy.songbook import GENRES, LEADS, MOODS

            tempo = ["slow", "mid-tempo", "fast", "90 bpm", "120 bpm", "150 bpm"]
            buttons = dict(genre=[*GENRES], lead=[*LEADS], mood=[*MOODS], tempo=tempo)
        rate = self.system.codec.sample_rate
        return web.json_response(dict(rate=rate, buttons=buttons, sampling=self.system.sampling))


def understood(text, system):
    """A wish as JSON -> (prompt, seed, options). ValueError, one sentence, if it is none."""
    asked = json.loads(text)
    prompt = " ".join(str(asked["prompt"]).encode("utf-8", "ignore").decode().split())
    if not prompt:
        raise ValueError("say what to play")
    if len(prompt) > LETTERS:
        raise ValueError(f"the words are too long: {len(prompt)} letters, at most {LETTERS}")
    chosen = {name: float(asked[name]) for name in ("guidance", "temperature") if name in asked}
    options = system.sampling | chosen
    Sampling(**options)
    seed = int(asked.get("seed", 0))
    check_value("seed", seed, "[0, 4294967296)")
    return prompt, seed, options


async def deliver(socket, news):
    while True:
        message = await news.get()
        if isinstance(message, bytes):
            await socket.send_bytes(message)
        else:
            await socket.send_json(message)


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_models(parser)
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines listen [127.0.0.1]")
    add("--port", type=int, default=8000, help="[8000]")
    add("--listeners", type=int, default=2, help="at the same time, about one a core [2]")
    add("--no-browser", action="store_true", help="do not open the page")
    args = parser.parse_args(argv)
    check_value("port", args.port, "[1, 65535]")
    check_value("listeners", args.listeners, "[1, 64]")
    system = System(args.checkpoint or newest_checkpoint(), args.refiner)
    shown = "127.0.0.1" if args.host == "0.0.0.0" else args.host
    url = f"http://{shown}:{args.port}"

    async def ready(runner):
        print(f"{url}  (Ctrl-C ends it)", flush=True)
        if not args.no_browser:
            webbrowser.open(url)

    app = Live(system, args.listeners, args.host).app()
    app.on_startup.append(ready)
    web.run_app(app, host=args.host, port=args.port, print=None)


if __name__ == "__main__":
    entry(main)
