"""A page that plays endless music and follows what you type.

    python -m live                               opens http://127.0.0.1:8000 in a browser
    python -m live --port 9000 --listeners 4     another port, up to four listeners

Type other words, and the music turns to them within a second or two, on a beat. Every listener has
music of their own. It is made about a second before it is heard, and ends when the page is closed.
"""

import asyncio
import json
import time
import webbrowser
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import WSMsgType, web

from live.follow import follow, pcm
from options import check_value, entry, new_parser
from sample import Sampling, System, add_models, newest_checkpoint

PAGE = Path(__file__).with_name("page.html")
AHEAD = 1.0  # seconds of music that wait to be heard
LETTERS = 1000  # of a prompt; more are refused


class Live:
    """The server. here: how many listen now"""

    def __init__(self, system, listeners, host="127.0.0.1"):
        self.system, self.listeners = system, listeners
        self.hosts = {"127.0.0.1", "localhost", "::1", host}
        self.here = 0

    def app(self):
        app = web.Application(middlewares=[self.guard])
        app.router.add_get("/", self.page)
        app.router.add_get("/about", self.about)
        app.router.add_get("/listen", self.listen)
        return app

    @web.middleware
    async def guard(self, request, handler):
        """Other sites may not use this server: neither from their pages (Origin), nor by giving
        their own name its address (Host)."""
        origin, name = request.headers.get("Origin"), None
        foreign = True
        with suppress(ValueError):  # neither is an address
            foreign = origin is not None and urlsplit(origin).netloc != request.host
            name = urlsplit(f"//{request.host}").hostname
        if foreign or (name not in self.hosts and "0.0.0.0" not in self.hosts):
            raise web.HTTPForbidden(text="this page belongs to another site")
        return await handler(request)

    async def page(self, request):
        return web.FileResponse(PAGE, headers={"Cache-Control": "no-store"})

    async def about(self, request):
        """The words that the page has buttons for, and where its sliders start."""
        buttons = {}
        if self.system.codec.name == "toy":  # the words that it knows
            from toy.songbook import GENRES, LEADS, MOODS

            tempo = ["slow", "mid-tempo", "fast", "90 bpm", "120 bpm", "150 bpm"]
            buttons = dict(genre=[*GENRES], lead=[*LEADS], mood=[*MOODS], tempo=tempo)
        rate = self.system.codec.sample_rate
        return web.json_response(dict(rate=rate, buttons=buttons, sampling=self.system.sampling))

    async def listen(self, request):
        """A listener's connection: wishes come in as JSON, audio and news go out."""
        socket = web.WebSocketResponse(heartbeat=10, max_msg_size=1 << 16)
        await socket.prepare(request)
        if self.here == self.listeners:
            many = f"{self.listeners} listener(s) are here already: close another page first"
            await socket.send_json({"error": many})
            await socket.close()
            return socket
        self.here += 1
        wishes, player = [], None
        try:
            async for message in socket:
                if message.type != WSMsgType.TEXT:
                    continue
                try:
                    wishes.append(understood(message.data, self.system))
                except ValueError as error:
                    await socket.send_json({"refused": str(error)})
                    continue
                player = player or asyncio.create_task(play(self.system, wishes, socket))
        finally:
            self.here -= 1
            if player:
                player.cancel()
                await asyncio.gather(player, return_exceptions=True)
        return socket


async def play(system, wishes, socket):
    """Makes one listener's music in a thread, after the last of the wishes (`understood`), which
    may grow at any time. Sends audio, 16-bit mono PCM, and news: what it turns to, and whether the
    audio came too late."""
    asked = told = None

    def latest():
        nonlocal asked
        asked = wishes[-1]
        return asked

    music, end = follow(system, latest), 0.0  # end: when all that was sent will have been heard
    try:
        while True:
            audio = await asyncio.to_thread(next, music)
            if told != asked[0]:
                told = asked[0]
                await socket.send_json({"turning": told})
            now = time.monotonic()
            late = 0 < end < now
            end = max(end, now) + len(audio) / system.codec.sample_rate
            await socket.send_bytes(pcm(audio))
            await socket.send_json({"late": late})
            await asyncio.sleep(max(0, end - now - AHEAD))
    except ValueError as error:
        await socket.send_json({"error": str(error)})


def understood(text, system):
    """A wish as JSON -> (prompt, seed, options). ValueError, one sentence, if it is none."""
    try:
        asked = json.loads(text)
        prompt = asked["prompt"].encode("utf-8", "ignore").decode()
        chosen = {name: float(asked[name]) for name in ("guidance", "temperature") if name in asked}
        seed = int(asked.get("seed", 0))
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError("a wish is JSON with the words as its prompt") from None
    prompt = " ".join(prompt.split())
    if not prompt:
        raise ValueError("say what to play")
    if len(prompt) > LETTERS:
        raise ValueError(f"the words are too long: {len(prompt)} letters, at most {LETTERS}")
    options = system.sampling | chosen
    Sampling(**options)
    check_value("seed", seed, "[0, 4294967296)")
    return prompt, seed, options


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
    shown = f"[{shown}]" if ":" in shown else shown
    url = f"http://{shown}:{args.port}"

    def ready(_):  # aiohttp calls it once it has the port
        print(f"{url}  (Ctrl-C ends it)", flush=True)
        if not args.no_browser:
            webbrowser.open(url)

    app = Live(system, args.listeners, args.host).app()
    web.run_app(app, host=args.host, port=args.port, print=ready)


if __name__ == "__main__":
    entry(main)
