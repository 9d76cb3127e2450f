"""The page: on this machine only, silent towards others, and in a real browser from the first choice to the image."""

import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import browser
import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip(
    "gradio", reason="gradio is not installed: make test, or pip install --no-deps -r requirements-app.txt"
)
from compdiff import app, heart_studio, masks, record, studio

# Runs the page in a process whose every connection and name look-up is written down.
WATCHED = """
import signal, sys
def heard(event, given):
    if event == "socket.connect" and isinstance(given[1], tuple):
        print("TO", given[1][0], flush=True)
    if event == "socket.getaddrinfo":
        print("TO", given[0], flush=True)
sys.addaudithook(heard)
signal.signal(signal.SIGTERM, signal.default_int_handler)
from compdiff import app
sys.exit(app.main(sys.argv[1:]))
"""
UPLOAD = 'input[type=file][accept=".png"]'
HERE = {"127.0.0.1", "localhost", "::1"}


def started(folder, *words):
    """(process, address) of a page that serves."""
    code = [sys.executable, "-c", WATCHED, *words]
    with open(folder / "page.log", "w") as log:
        process = subprocess.Popen(code, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(folder)})
    told = lambda: (folder / "page.log").read_text()  # noqa: E731
    look = lambda: re.search(r"open (\S+) in a browser", told()) or process.poll() is not None  # noqa: E731
    found = browser.waited(look, what="the page")
    assert process.poll() is None, told()
    return process, found[1]


@pytest.fixture(scope="module")
def served(heart_root, tmp_path_factory):
    """A page over tiny runs of chest and heart: (process, address, folder)."""
    folder = tmp_path_factory.mktemp("page")
    process, address = started(folder, f"RUNS={heart_root}", f"BASE={heart_root / 'base'}")
    yield process, address, folder
    process.terminate()
    assert process.wait(browser.PATIENCE) == 0
    assert not list(folder.glob("compdiff-app-*")), "uploads and pictures go with the page"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not (path := browser.find()):
        pytest.skip("no Chromium here: apt-get install chromium")
    opened = browser.Browser(path, tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture
def at_page(chromium, served):
    chromium.asked.clear()
    chromium.call("Page.navigate", url=served[1])
    chromium.wait("!!document.querySelector('button[role=tab]')")
    return chromium


def tab(page, name):
    page.click("button[role=tab]", name)
    page.wait(f"document.querySelector('button[role=tab][aria-selected=true]').innerText === {name!r}")


def toast(page, said):
    """Wait for a message with these words; an older one may still be shown beside it."""
    page.wait(f"[...document.querySelectorAll('.toast-body')].some(e => e.innerText.includes({said!r}))")


def set_number(page, label, value):
    """Type into the number field of a control."""
    page.js(f"""(() => {{
        const blocks = [...document.querySelectorAll('.block')]
        const block = blocks.filter(e => e.offsetParent && e.innerText.includes({label!r})).pop()
        const field = block.querySelector('input[type=number]')
        field.value = {value}
        for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, {{bubbles: true}}))
    }})()""")


# --- the server -------------------------------------------------------------------------------------------------------
def test_it_listens_on_this_machine_only_and_asks_no_other(served):
    process, address, folder = served
    with urllib.request.urlopen(address) as answer:
        assert answer.status == 200
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    asked = set(re.findall(r"^TO (.*)$", (folder / "page.log").read_text(), re.M))
    assert asked <= HERE, asked


def test_a_large_upload_is_refused_by_the_server(served):
    for size, refused in ((masks.MAX_BYTES // 2, False), (masks.MAX_BYTES + 10_000, True)):
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            + b"0" * size
            + b"\r\n--x--\r\n"
        )
        ask = urllib.request.Request(
            f"{served[1]}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
        )
        try:
            urllib.request.urlopen(ask).close()
            assert not refused
        except urllib.error.HTTPError as error:
            assert refused and error.code == 413


def test_one_job_runs_at_a_time_and_tells_how_far_it_is(served):
    with urllib.request.urlopen(f"{served[1]}config") as answer:
        config = json.load(answer)
    parts = {c["id"]: c["props"] for c in config["components"]}
    jobs, session = {d["api_name"]: d for d in config["dependencies"]}, "two jobs"

    def join(name, **values):
        data = [values.get(parts[i].get("label"), parts[i].get("value")) for i in jobs[name]["inputs"]]
        body = json.dumps({"fn_index": jobs[name]["id"], "session_hash": session, "data": data}).encode()
        ask = urllib.request.Request(f"{served[1]}gradio_api/queue/join", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(ask) as answer:
            return json.load(answer)["event_id"]

    first, second = join("draw", Steps=20, Images=8), join("draw_1", **{"The mask, to paint on": None})  # chest, heart
    with urllib.request.urlopen(f"{served[1]}gradio_api/queue/data?session_hash=two%20jobs", timeout=browser.PATIENCE) as stream:
        heard = [json.loads(line[6:]) for line in stream if line.startswith(b"data: ")]
    order = [(m["event_id"], m["msg"]) for m in heard]
    ends = [order.index((job, "process_completed")) for job in (first, second)]
    assert ends[0] < order.index((second, "process_starts")) < ends[1], "the other tab's job waits"
    assert [heard[k]["success"] for k in ends] == [True, False], "the second has no mask"
    told = [m["progress_data"][0] for m in heard if (m["event_id"], m["msg"]) == (first, "progress")]
    done = [t["index"] for t in told]
    assert done == sorted(done) and done[0] == 0 < done[-1] <= 16 and {(t["length"], t["unit"]) for t in told} == {(16, "images")}
    assert (told[0]["desc"], told[-1]["desc"]) == ("loading the model", "drawing")


@pytest.mark.parametrize("path", ["/etc/passwd", app.__file__, "../README.md"])
def test_files_of_this_machine_are_not_served(served, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{served[1]}gradio_api/file={path}")
    assert refused.value.code in (403, 404)


@pytest.mark.parametrize("words", [["PORT=many"], ["PORT=65536"], ["SHARE=1"], ["runs"]])
def test_unknown_words_are_refused(words, capsys):
    assert app.main(words) == 2 and "RUNS: folder" in capsys.readouterr().err


def test_without_a_run_the_page_says_what_to_do(tmp_path):
    texts = [c["props"].get("value") for c in app.page(tmp_path, str(tmp_path)).config["components"]]
    told = "\n".join(t for t in texts if isinstance(t, str))
    assert (
        "make paper DATASETS=chest" in told
        and "make paper DATASETS=fundus" in told
        and "make paper DATASETS=cardiac" in told
    )
    assert told.count("make smoke") >= 1


def test_a_heart_without_a_run_is_refused_in_words(tmp_path):
    (draw,) = [f for f in app.page(tmp_path, str(tmp_path)).fns.values() if f.name == "draw"]
    with pytest.raises(app.gr.Error, match="No trained heart model here"):
        draw.fn({c: getattr(c, "value", None) for c in draw.inputs})


# --- in a browser -----------------------------------------------------------------------------------------------------
def test_choose_generate_and_see_the_image(at_page, served, tmp_path):
    tab(at_page, "Chest")
    at_page.click("label", "Cardiomegaly")
    at_page.click("label", "Female")
    set_number(at_page, "Steps", 2)
    at_page.click("button", "Generate")
    shown = "document.querySelectorAll('.drawn img').length === 4"
    at_page.wait(f"{shown} || !!document.querySelector('.toast-body')")
    assert at_page.js(shown), at_page.text() + (served[2] / "page.log").read_text()
    at_page.js("document.querySelector('.drawn').scrollIntoView()")  # pictures load when they are in view
    at_page.wait("[...document.querySelectorAll('.drawn img')].every(i => i.complete && i.naturalWidth >= 256)")
    text = at_page.text()
    one, other = "60 year old White female. The heart is enlarged.", "The heart is enlarged."
    prompts = f"Text baseline: “{one}”", f"HCN (CompDiff): “{other}”"
    for said in (*prompts, "profile smoke, training seed 0", "trained on Chest phantoms"):
        assert said in text
    row = re.search(r"heart thorax ratio\s+([\d.]+)", text)
    assert float(row[1]) > 0.5, "cardiomegaly is asked for"
    source = at_page.js("document.querySelector('.drawn img').src")
    with urllib.request.urlopen(source) as answer:
        (tmp_path / "one.png").write_bytes(answer.read())
    with Image.open(tmp_path / "one.png") as image:
        image.load()
        assert image.format == "PNG" and image.text["Description"] == "synthetic, not a patient"
        assert "60 year old" in image.text["Prompt"] and image.height > image.width
        assert np.asarray(image)[image.width :].std() > 10, "the mark is in the margin"
    assert {re.match(r"\w+://([^:/]*)", a)[1] for a in at_page.asked if a.startswith(("http", "ws"))} <= HERE


def test_generate_a_heart_and_see_its_frames(at_page, served, heart_root):
    tab(at_page, "Heart")
    at_page.click("button", "Generate")
    shown = "document.querySelectorAll('.drawn img').length === 6"
    at_page.wait(f"{shown} || !!document.querySelector('.toast-body')")
    assert at_page.js(shown), at_page.text() + (served[2] / "page.log").read_text()
    example, (run,) = masks.examples()[0], heart_studio.trained_runs(str(heart_root), base=str(heart_root / "base"))
    prompt, mask = heart_studio.prompt_of(example.row), masks.from_grey(masks.to_grey(example.mask), 32)
    how = studio.Sampling(0, 2, 2.5, 2)  # steps of the run, guidance of its random set
    weights = record.sha256_file(run.folder.train("control") / "all" / "weights.safetensors")
    drawn = list(heart_studio.generate(run, mask, prompt, example.row, how))
    expected = [pair for one in drawn for pair in heart_studio.frames(one.image).items()]
    sources = at_page.js("[...document.querySelectorAll('.drawn img')].map(i => i.src)")
    for number, ((name, frame), source) in enumerate(zip(expected, sources, strict=True)):
        with urllib.request.urlopen(source) as answer, Image.open(io.BytesIO(answer.read())) as image:
            image.load()
        about = {"Description": "synthetic, not a patient", "Run": run.name, "Prompt": prompt, "Sampling": str(how),
                 "Image": str(number // 3), "Weights": weights}  # fmt: skip
        assert image.format == "PNG" and image.text == about
        seen = np.asarray(image)[: 8 * 32 : 8, ::8].astype(int)  # 32 pixels, enlarged to 256
        assert np.abs(seen - (frame if name == "stacked" else frame[..., None])).max() <= 1
        assert np.asarray(image)[image.width :].std() > 10, "the mark is in the margin"
    assert f"{run.name}: “{prompt}”" in at_page.text().replace("\n", " ")


def test_what_cannot_be_done_is_said_on_the_page(at_page):
    tab(at_page, "Fundus")
    at_page.wait("document.body.innerText.includes('No trained model of fundus here')")
    tab(at_page, "Chest")
    for label in ("Text baseline", "HCN (CompDiff)"):
        at_page.click("label", label)
    at_page.click("button", "Generate")
    toast(at_page, "choose at least one method")


def test_a_hostile_upload_is_refused_and_a_good_one_taken(at_page, tmp_path):
    tab(at_page, "Heart")
    at_page.wait(f"!!document.querySelector({UPLOAD!r})")
    (tmp_path / "page.png").write_bytes(b"<html><script>document.title = 'mine'</script>")
    at_page.upload(UPLOAD, tmp_path / "page.png")
    toast(at_page, "not a PNG")
    assert at_page.js("document.title") != "mine"
    for number in (3, 0):
        asked = masks.measured(masks.examples()[number].mask)["ejection fraction"]
        at_page.js(f"document.querySelectorAll('.masks .thumbnail-item')[{number}].click()")
        at_page.wait(f"/asked for by the mask[^]*ejection fraction\\s+{asked:.3g}/.test(document.body.innerText)")
    Image.fromarray(masks.to_grey(masks.examples()[1].mask)).save(tmp_path / "good.png")
    at_page.upload(UPLOAD, tmp_path / "good.png")
    asked = masks.measured(masks.examples()[1].mask)["ejection fraction"]
    at_page.wait(f"/asked for by the mask[^]*ejection fraction\\s+{asked:.3g}/.test(document.body.innerText)")
    page = Path(os.environ.get("SCREENSHOTS", tmp_path)) / "heart.png"
    at_page.screenshot(page)
    assert page.stat().st_size > 10_000
