"""The listening test, taken by a program: at the keyboard, in a real browser."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from options import read_lines
from paper import listening

SYSTEMS = ["secret-mamba", "secret-transformer", "secret-musicgen"]
PROMPTS = [f"prompt number {i}, </script> & <b>“quoted”</b>" for i in range(5)]


@pytest.fixture
def page(tmp_path):
    rng = np.random.default_rng(0)
    for s, system in enumerate(SYSTEMS):
        (tmp_path / system).mkdir()
        for i in range(len(PROMPTS)):
            noise = rng.normal(size=8000) * 0.01 * (s + 1)
            soundfile.write(tmp_path / system / f"{i:03}.wav", noise, 8000)
        (tmp_path / system / "000.png").write_bytes(b"no clip, but its picture")
        (tmp_path / system / "\u00b2.wav").write_bytes(b"no number of a clip")
    folders = [tmp_path / s for s in SYSTEMS]
    assert listening.make_page(folders, PROMPTS, tmp_path / "test.html", count=4) == 4
    return tmp_path / "test.html"


def test_the_page_is_whole_and_names_nobody(page):
    text, key = page.read_text(), json.loads(page.with_suffix(".key.json").read_text())
    assert not any(system in text or system.split("-")[1] in text for system in SYSTEMS)
    assert "://" not in text  # nothing is fetched from anywhere
    assert text.count("data:audio/ogg;base64,") == 4 * 3 and text.count("</script>") == 1
    assert len(key) == 12 and set(key.values()) == set(SYSTEMS)
    assert all(code in text for code in key)
    assert sum(f"prompt number {i}," in text for i in range(5)) == 4  # drawn at random
    assert not list(page.parent.glob(".*"))


def test_an_empty_line_of_the_prompts_keeps_its_number(page, tmp_path):
    (tmp_path / "prompts.txt").write_text("first\n\nthird\nfourth\nfifth\n")
    lines = read_lines(tmp_path / "prompts.txt", empty=True)
    assert lines == ["first", "", "third", "fourth", "fifth"]
    folders = [tmp_path / s for s in SYSTEMS]
    assert listening.make_page(folders, lines, tmp_path / "other.html") == 4
    assert "third" in (tmp_path / "other.html").read_text()


def test_marks_are_counted_by_system(page, tmp_path):
    key = json.loads(page.with_suffix(".key.json").read_text())
    codes = {s: [c for c, system in key.items() if system == s] for s in SYSTEMS}
    folder = tmp_path / "answers"
    folder.mkdir()
    shutil.copy(page.with_suffix(".key.json"), folder)

    def answer(name, listener, given):
        marks = [
            dict(clip=c, prompt="", place=0, marks=dict(Consistency=m, Alignment=3, Overall=6 - m))
            for c, m in given
        ]
        text = json.dumps(dict(test="", listener=listener, answers=marks))
        (folder / f"{name}.json").write_text(text)

    mamba, transformer = codes[SYSTEMS[0]], codes[SYSTEMS[1]]
    answer("a", "1", [(mamba[0], 5), (mamba[1], 3), (transformer[0], 1)])
    answer("b", "2", [(mamba[2], 1)])
    answer("again", "1", [(mamba[0], 1)])  # one listener counts once
    marks, listeners = listening.tally(folder)
    assert listeners == 2 and marks[SYSTEMS[0]]["Consistency"] == [5, 3, 1]
    text = listening.table(marks, listeners)
    assert "| secret-mamba | 3.00 ± 2.00 | 3.00 ± 0.00 | 3.00 ± 2.00 | 3 |" in text
    assert "| secret-transformer | 1.00 ± 0.00 | 3.00 ± 0.00 | 5.00 ± 0.00 | 1 |" in text
    assert "2 listeners" in text
    for broken in ([("no such clip", 3)], [(mamba[0], 9)]):
        answer("c", "3", broken)
        with pytest.raises(ValueError, match="c.json is not an answer to"):
            listening.tally(folder)
    (folder / "c.json").write_text(json.dumps(dict(answers=[])))
    with pytest.raises(ValueError, match="c.json is not an answer to"):
        listening.tally(folder)
    (folder / "x.key.json").write_text("no JSON")
    with pytest.raises(ValueError, match="x.key.json is not the key of a page"):
        listening.tally(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "y.key.json").write_text("{}")
    answer("nothing", "1", [])
    with pytest.raises(ValueError, match="hold no marks"):
        listening.tally(folder)


def test_bad_folders_get_one_sentence(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="share clips of 3 prompts"):
        listening.make_page([tmp_path / "a", tmp_path / "b"], PROMPTS, tmp_path / "x.html")
    with pytest.raises(ValueError, match="two or more"):
        listening.make_page([tmp_path / "a"], PROMPTS, tmp_path / "x.html")
    with pytest.raises(ValueError, match="needs the listeners' answers"):
        listening.tally(tmp_path)


def test_prompts_that_cannot_be_read_get_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes("a waltz in a café\n".encode("latin-1"))
    for name in ("none.txt", "latin.txt"):
        monkeypatch.setattr("sys.argv", ["", "page", "a", "b", "--prompts", str(tmp_path / name)])
        with pytest.raises(ValueError, match=f"{name} could not be read as UTF-8 text"):
            listening.main()


# ------------------------------------------------------------------------------ in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not CHROMIUM:
        pytest.skip("apt-get install chromium")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def press(tab, keys):
    for key in keys.split():
        tab.keyboard.press(key)


def tab_to(tab, selector):
    """Presses Tab until the focus is on the element, as somebody without a mouse would."""
    for _ in range(80):
        if tab.evaluate("s => document.activeElement.matches(s)", selector):
            return
        tab.keyboard.press("Tab")
    raise AssertionError(f"{selector} cannot be reached with the Tab key")


def test_a_session_by_keyboard_alone(browser, page, tmp_path):
    tab = browser.new_context(accept_downloads=True).new_page()
    tab.set_default_timeout(60_000)
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab_to(tab, "button")
    press(tab, "Enter")
    given = {}
    for question in range(3):
        assert f"Question {question + 1} of 3" in tab.inner_text("h1")
        assert tab.inner_text("blockquote") in PROMPTS  # shown as text, whatever it holds
        assert tab.locator("audio").count() == 3
        for c, letter in enumerate("ABC"):
            for s, scale in enumerate(listening.SCALES):
                tab_to(tab, f"input[name='{scale}-{letter}']")
                mark = (question + c + s) % 5 + 1
                press(tab, " ".join(["Space"] + ["ArrowRight"] * (mark - 1)))
                given[question, letter, scale] = mark
            if question == 1 and letter == "B":  # in the middle
                before = tab.inner_text("blockquote")
                tab.reload()
                assert tab.inner_text("blockquote") == before
                checked = tab.eval_on_selector_all("input:checked", "all => all.map(i => +i.value)")
                assert checked == [given[1, n, scale] for n in "AB" for scale in listening.SCALES]
                tab_to(tab, "#next")
                press(tab, "Enter")  # a clip without marks holds the page back, and is named
                assert "Clip C still lacks a mark" in tab.inner_text("#note")
        tab_to(tab, "#next")
        press(tab, "Enter")
    tab_to(tab, "#download")
    with tab.expect_download() as download:
        press(tab, "Enter")
    (tmp_path / "answers").mkdir()
    download.value.save_as(tmp_path / "answers" / download.value.suggested_filename)

    assert {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}
    (file,) = (tmp_path / "answers").iterdir()
    shutil.copy(page.with_suffix(".key.json"), tmp_path / "answers")
    marks, listeners = listening.tally(tmp_path / "answers")
    assert listeners == 1 and set(marks) == set(SYSTEMS)
    for scale in listening.SCALES:
        found = sorted(m for system in marks.values() for m in system[scale])
        assert found == sorted(v for (_, _, name), v in given.items() if name == scale)
    # Each clip's marks are those of the letter under which it stood.
    for i, answer in enumerate(json.loads(file.read_text())["answers"]):
        question, letter = divmod(i, 3)
        expected = {scale: given[question, "ABC"[letter], scale] for scale in listening.SCALES}
        assert answer["marks"] == expected


def test_the_order_differs_between_listeners(browser, page):
    orders = set()
    for _ in range(6):
        tab = browser.new_context().new_page()
        tab.goto(page.as_uri())
        orders.add(tab.evaluate("JSON.stringify(session.order)"))
    assert len(orders) > 1


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser, page, width):
    tab = browser.new_page(viewport=dict(width=width, height=844))
    tab.goto(page.as_uri())
    tab.click("button")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    smallest = "all => Math.min(...all.map(l => Math.min(l.offsetWidth, l.offsetHeight)))"
    assert tab.eval_on_selector_all(".marks label", smallest) >= 40  # a thumb's width
    columns = tab.eval_on_selector_all("section", "all => new Set(all.map(s => s.offsetLeft)).size")
    assert columns == (1 if width == 390 else 2)
