"""`make app`: a page to ask the trained models for images. It answers this machine alone and asks no other.

Thin: what can be asked for and how it is drawn stands in `studio` and `heart_studio`. One job runs at a time; uploads
and generated pictures lie in a temporary folder that goes when the page ends.
"""

from __future__ import annotations

import contextlib
import html
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio would report to its makers
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: python -m pip install --no-deps -r requirements-app.txt") from None

from compdiff import config, heart_studio, masks, stamp, studio
from compdiff.pictures import Unreadable
from compdiff.problems import DataError
from compdiff.request import FOR_MAKE, Refused
from compdiff.studio import Sampling, TrainedRun

HOST = "127.0.0.1"
WORDS = {"RUNS": "folder with the runs", "BASE": "folder of the base that they were trained on",
         "DATA_ROOT": "folder of the real hearts that they were trained on", "PORT": "of the page"}  # fmt: skip
ALWAYS = ("chest", "fundus")  # tabs that stand there without a run, too
ONE_JOB = {"concurrency_id": "one job", "concurrency_limit": 1}
MASK, TIMES = 64, 4  # pixels of a mask, and of each of them on the canvas


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """What cannot be done is said on the page; anything else is a fault of ours, and goes to the terminal."""
    try:
        yield
    except Unreadable as error:
        raise gr.Error(html.escape(f"{error.problem}: {error.remedy}"), print_exception=False) from None
    except (Refused, DataError) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def told(drawn: Iterable, total: int, progress: gr.Progress) -> Iterator:
    """The same items, while the page shows how many are done."""
    progress((0, total), desc="loading the model", unit="images")
    for done, one in enumerate(drawn, start=1):
        progress((done, total), desc="drawing", unit="images")
        yield one


def table(title: str, values: Mapping[str, float]) -> str:
    """Markdown: names and numbers in two columns; "" for none."""
    lines = [f"| {name.replace('_', ' ')} | {value:.3g} |" for name, value in values.items()]
    return "\n".join([f"| {title} | |", "|---|---|", *lines]) if lines else ""


def sampling_controls(steps: int, guidance: float) -> dict[str, gr.components.Component]:
    """Seed, steps, guidance and number: the fields of `Sampling`."""
    with gr.Row():
        return {
            "seed": gr.Number(0, label="Seed", precision=0, minimum=0, maximum=studio.MAX_SEED),
            "steps": gr.Slider(1, studio.MAX_STEPS, steps, step=1, label="Steps"),
            "guidance": gr.Slider(0, studio.MAX_GUIDANCE, guidance, step=0.5, label="Guidance"),
            "n": gr.Slider(1, studio.MAX_IMAGES, 2, step=1, label="Images"),
        }


def gallery() -> gr.Gallery:
    """Of generated pictures."""
    return gr.Gallery(
        label=stamp.MARK, format="png", columns=4, object_fit="contain", height="auto", buttons=["download"],
        interactive=False, elem_classes="drawn",
    )  # fmt: skip


def fresh(scratch: Path) -> Path:
    """An empty folder for the pictures of one job; the last job's have been copied by gradio."""
    shutil.rmtree(scratch / "job", ignore_errors=True)
    return scratch / "job"


# --- chest, fundus and other images -----------------------------------------------------------------------------------
def image_tab(dataset: str, runs: Sequence[TrainedRun], scratch: Path) -> None:
    """Age, attributes and findings; the chosen methods side by side."""
    if not runs:
        gr.Markdown(studio.NOTHING_TRAINED.format(dataset, dataset))
        return
    try:
        data, usual = studio.load_data(runs[0]), studio.settings(runs[0], runs[0].methods[0]).sample
    except (DataError, Refused) as error:
        gr.Markdown(html.escape(str(error)))
        return
    by_name = {run.name: run for run in runs}
    known = [m for m in config.METHODS if any(m in run.methods for run in runs)]
    with gr.Row():
        which = gr.Dropdown(list(by_name), value=runs[0].name, label="Trained run")
        titles = [(config.METHODS[m].title, m) for m in known]
        chosen = gr.CheckboxGroup(titles, value=list(runs[0].methods), label="Methods, side by side")
    with gr.Row():
        years = gr.Slider(0, 100, 60, step=1, label="Age in years")
        who = {a.name: gr.Radio(list(a.categories), value=a.categories[0], label=a.name.capitalize())
               for a in data.schema.attributes if a.name != "age"}  # fmt: skip
    found = gr.CheckboxGroup(list(studio.findings(data)), label="Findings (none: healthy)")
    how = sampling_controls(usual.sample_steps, usual.guidance)
    button = gr.Button("Generate", variant="primary")
    said, shown, true = gr.Markdown(), gallery(), gr.Markdown()

    def draw(values: dict, progress=gr.Progress()):
        with in_words():
            run = by_name[values[which]]
            sampling = Sampling(**{name: values[c] for name, c in how.items()})
            here = studio.load_data(run)
            row = studio.request_row(here, values[years], {name: values[c] for name, c in who.items()}, values[found])
            folder, out, prompts = fresh(scratch), [], {}
            drawn = studio.generate(run, values[chosen], row, sampling)
            for one in told(drawn, len(values[chosen]) * sampling.n, progress):
                title = config.METHODS[one.method].title
                prompts[title] = one.prompt
                about = {"Method": title, "Run": run.name, "Prompt": one.prompt, "Request": row.iloc[0].to_dict(),
                         "Sampling": sampling, "Image": one.number, "Weights": one.checkpoint}  # fmt: skip
                lines = [title, f"seed {sampling.seed}, image {one.number}"]
                path = stamp.save(folder / f"{one.method}-{one.number}.png", one.image, lines, about)
                out.append((path, title))
            heading = [f"**{run.name}**, trained on {here.manifest.title}."]
            heading += [f"{title}: “{prompt}”" for title, prompt in prompts.items()]
            truth = table("true parameter of such a phantom, asked for", studio.truth(here, row))
        return "  \n".join(heading), gr.Gallery(out, columns=sampling.n), truth

    button.click(draw, {which, chosen, years, found, *who.values(), *how.values()}, [said, shown, true], **ONE_JOB)


# --- the heart --------------------------------------------------------------------------------------------------------
def on_canvas(mask: np.ndarray) -> np.ndarray:
    """ED | ES in grey, large enough to paint on."""
    return masks.to_grey(mask, TIMES)


def asked_for(mask: np.ndarray) -> str:
    """The table of what a stacked mask asks for."""
    return table("asked for by the mask", masks.measured(mask))


def painted(value: Mapping | None, size: int) -> np.ndarray:
    """What the canvas shows as a stacked mask uint8 [size, size, 3]. Unreadable, in words."""
    if not value or value["composite"] is None:
        raise Unreadable("no mask", "take an example, upload one, or paint one")
    return masks.from_grey(value["composite"], size)


def mask_controls(examples: Sequence[masks.Example]) -> tuple[gr.Gallery, gr.ImageEditor, gr.UploadButton]:
    """Masks to take, one to paint on, and a file of one's own."""
    pictures = [(masks.to_grey(e.mask, 2), e.name) for e in examples]
    with gr.Row():
        shelf = gr.Gallery(pictures, label="Phantom masks: take one", columns=2, format="png", allow_preview=False,
                           object_fit="contain", height="auto", interactive=False, buttons=[],
                           elem_classes="masks")  # fmt: skip
        with gr.Column():
            greys = [f"rgb({g}, {g}, {g})" for g in (0, 85, 170, 255)]
            brush = gr.Brush(default_size=12, colors=greys, default_color=greys[1], color_mode="fixed")
            canvas = gr.ImageEditor(
                on_canvas(examples[0].mask), label="The mask, to paint on", image_mode="L", format="png",
                sources=(), transforms=(), layers=False, brush=brush, buttons=[],
                canvas_size=(2 * MASK * TIMES, MASK * TIMES), fixed_canvas=True,
            )  # fmt: skip
            label = f"or a PNG of your own, up to {masks.MAX_BYTES // 2**20} MiB"
            upload = gr.UploadButton(label, file_types=[".png"], type="filepath")
    return shelf, canvas, upload


def which_heart(runs: Sequence[heart_studio.HeartRun]) -> tuple[gr.Dropdown | gr.State, Sampling]:
    """The choice of a run, and how the first one usually draws; without a run, how to train one."""
    if not runs:
        gr.Markdown(heart_studio.NOTHING_TRAINED)
        return gr.State(""), Sampling()
    usual = heart_studio.usual(runs[0])
    return gr.Dropdown([run.name for run in runs], value=runs[0].name, label="Trained run"), usual


def heart_tab(runs: Sequence[heart_studio.HeartRun], scratch: Path) -> None:
    """A mask from the gallery, from a file or painted, and a prompt; stacked image, ED and ES."""
    gr.Markdown(
        "Left half: end-diastole (ED), right half: end-systole (ES). Grey 85: cavity of the left ventricle, 170: its "
        "wall, 255: right ventricle."
    )
    by_name = {run.name: run for run in runs}
    try:
        which, usual = which_heart(runs)
    except Refused as error:
        gr.Markdown(html.escape(str(error)))
        return
    examples = masks.examples(MASK)
    shelf, canvas, upload = mask_controls(examples)
    prompt = gr.Textbox(heart_studio.prompt_of(examples[0].row), label="Prompt", max_length=heart_studio.MAX_PROMPT)
    taken = gr.State(0)  # number of the example whose attributes go to the token, where the model has one
    how = sampling_controls(usual.steps, usual.guidance)
    button = gr.Button("Generate", variant="primary")
    said, shown = gr.Markdown(), gallery()
    with gr.Row():
        asked = gr.Markdown(asked_for(examples[0].mask))
        true = gr.Markdown(table("true of this phantom", examples[0].truth))

    def take(event: gr.SelectData):
        example = examples[event.index]
        tables = asked_for(example.mask), table("true of this phantom", example.truth)
        return on_canvas(example.mask), heart_studio.prompt_of(example.row), event.index, *tables

    def tell(value: dict | None):
        try:
            return asked_for(painted(value, MASK))
        except Unreadable as error:
            return html.escape(f"{error.problem}: {error.remedy}")

    def put(path: str):
        with in_words():
            mask = masks.read(Path(path), MASK)
            return on_canvas(mask), asked_for(mask), ""

    def draw(values: dict, progress=gr.Progress()):
        with in_words():
            if values[which] not in by_name:
                raise Refused(heart_studio.NOTHING_TRAINED)
            run, sampling = by_name[values[which]], Sampling(**{name: values[c] for name, c in how.items()})
            mask = painted(values[canvas], heart_studio.settings(run).data.size)
            drawn = heart_studio.generate(run, mask, values[prompt], examples[values[taken]].row, sampling)
            folder, out = fresh(scratch), []
            for one in told(drawn, sampling.n, progress):
                about = {"Run": run.name, "Prompt": one.prompt, "Sampling": sampling, "Image": one.number,
                         "Weights": one.checkpoint}  # fmt: skip
                for name, image in heart_studio.frames(one.image).items():
                    line = f"{name}, seed {sampling.seed}, image {one.number}"
                    out.append((stamp.save(folder / f"{name}-{one.number}.png", image, [line], about), name))
        return f"**{run.name}**: “{values[prompt]}”", gr.Gallery(out, columns=3), asked_for(mask)

    shelf.select(take, None, [canvas, prompt, taken, asked, true], **ONE_JOB)  # `change` is for strokes alone
    upload.upload(put, upload, [canvas, asked, true], **ONE_JOB)
    button.click(draw, {which, canvas, prompt, taken, *how.values()}, [said, shown, asked], **ONE_JOB)
    canvas.change(tell, canvas, asked, show_progress="hidden", trigger_mode="always_last")


# --- the page ---------------------------------------------------------------------------------------------------------
def page(scratch: Path, runs: str = "", base: str = "", data_root: str = "") -> gr.Blocks:
    """The whole page, for the runs found now."""
    found = studio.trained_runs(runs, base)
    with gr.Blocks(title="CompDiff companion", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# Ask a trained model\nEvery image made here is synthetic and shows no patient. No clinical use.")
        for dataset in dict.fromkeys([*ALWAYS, *(run.dataset for run in found)]):
            with gr.Tab(dataset.capitalize()):
                image_tab(dataset, [run for run in found if run.dataset == dataset], scratch)
        with gr.Tab("Heart"):
            heart_tab(heart_studio.trained_runs(runs, base, data_root), scratch)
    return blocks.queue(api_open=False, max_size=8, default_concurrency_limit=1)


def launch(blocks: gr.Blocks, port: int | None = None) -> str:
    """Start serving on HOST in the background; returns the address. OSError: the port is taken."""
    Image.MAX_IMAGE_PIXELS = masks.MAX_SIDE**2  # of whatever gradio opens itself
    theme = gr.themes.Default(font="sans-serif", font_mono="monospace")  # its own fonts would come from elsewhere
    _, address, _ = blocks.launch(
        server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, inbrowser=False,
        theme=theme, footer_links=[], run_history=False, enable_monitoring=False, strict_cors=True,
        ssr_mode=False, mcp_server=False, pwa=False, max_file_size=masks.MAX_BYTES, show_error=False,
    )  # fmt: skip
    return address


def main(words: Sequence[str]) -> int:
    """`NAME=value` words with the names of WORDS. Exit code: 0 ended by the user, 2 refused."""
    given = {name: value for name, _, value in (word.partition("=") for word in words)}
    port = given.get("PORT") or "0"
    if not set(given) <= {*WORDS, *FOR_MAKE} or not port.isdecimal() or int(port) > 65535:
        known = "; ".join(f"{name}: {text}" for name, text in WORDS.items())
        print(f"compdiff: make app NAME=value ... with {known}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="compdiff-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/gradio"  # uploads, and its copies of what it shows
        blocks = page(Path(folder) / "made", *(given.get(name, "") for name in ("RUNS", "BASE", "DATA_ROOT")))
        try:
            address = launch(blocks, int(port) or None)
        except OSError as error:
            print(f"compdiff: {error}", file=sys.stderr)
            return 2
        print(f"open {address} in a browser of this machine; Ctrl-C ends", flush=True)
        blocks.block_thread()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
