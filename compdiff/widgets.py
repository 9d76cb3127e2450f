"""The page's questions as widgets in a notebook: `widgets.explorer()` or `heart_explorer()` in a cell of its own.

Nothing is drawn before the button is pressed, so the cell costs nothing where nobody is there to press it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping

import ipywidgets as ipw
import numpy as np
from IPython.display import display
from PIL import Image

from compdiff import config, heart_studio, masks, stamp, studio
from compdiff.heart_studio import HeartRun
from compdiff.problems import DataError
from compdiff.request import Refused
from compdiff.studio import Sampling, TrainedRun


def sampling_controls(steps: int, guidance: float) -> dict[str, ipw.Widget]:
    """Seed, steps, guidance and number: the fields of `Sampling`."""
    return {
        "seed": ipw.BoundedIntText(0, 0, studio.MAX_SEED, description="Seed"),
        "steps": ipw.IntSlider(steps, 1, studio.MAX_STEPS, description="Steps"),
        "guidance": ipw.FloatSlider(guidance, min=0, max=studio.MAX_GUIDANCE, step=0.5, description="Guidance"),
        "n": ipw.IntSlider(2, 1, studio.MAX_IMAGES, description="Images"),
    }


def box(title: str, controls: Iterable[ipw.Widget], how: Mapping[str, ipw.Widget], draw: Callable[[Sampling], None]
        ) -> ipw.VBox:  # fmt: skip
    """Controls above a button, below which stands what `draw` shows or, in words, why it refuses."""
    button, out = ipw.Button(description="Generate"), ipw.Output()

    def pressed(_: ipw.Button) -> None:
        out.clear_output()
        with out:
            try:
                draw(Sampling(**{name: c.value for name, c in how.items()}))
            except (Refused, DataError) as error:
                print(error)

    button.on_click(pressed)
    return ipw.VBox([ipw.HTML(f"<b>{title}</b>"), *controls, *how.values(), button, out])


def explorer(run: TrainedRun | None = None) -> ipw.VBox:
    """Age, attributes, findings and methods of a trained run (default: the first found). Refused: there is none."""
    found = [run] if run else studio.trained_runs()
    if not found:
        raise Refused(studio.NOTHING_TRAINED.format("an image", "chest"))
    run, data = found[0], studio.load_data(found[0])
    usual = studio.settings(run, run.methods[0]).sample
    chosen = ipw.SelectMultiple(
        options=[(config.METHODS[m].title, m) for m in run.methods], value=run.methods, description="Methods"
    )
    years = ipw.IntSlider(60, 0, 100, description="Age")
    who = {
        a.name: ipw.ToggleButtons(options=a.categories, description=a.name.capitalize())
        for a in data.schema.attributes
        if a.name != "age"
    }
    findings = ipw.SelectMultiple(options=list(studio.findings(data)), description="Findings")

    def draw(sampling: Sampling) -> None:
        row = studio.request_row(data, years.value, {name: c.value for name, c in who.items()}, findings.value)
        for one in studio.generate(run, chosen.value, row, sampling):
            display(stamp.stamped(one.image, [f"{config.METHODS[one.method].title}, image {one.number}", one.prompt]))
        print({name: round(value, 3) for name, value in studio.truth(data, row).items()})

    how = sampling_controls(usual.sample_steps, usual.guidance)
    return box(run.name, [chosen, years, *who.values(), findings], how, draw)


def heart_explorer(run: HeartRun | None = None, runs: str = "", base: str = "", data_root: str = "") -> ipw.VBox:
    """An example's mask and a prompt for a trained ControlNet (default: the first found below `runs`; data_root: of the
    real data that it learnt from). Refused: there is none."""
    found = [run] if run else heart_studio.trained_runs(runs, base, data_root)
    if not found:
        raise Refused(heart_studio.NOTHING_TRAINED)
    run, usual = found[0], heart_studio.usual(found[0])
    examples = masks.examples(heart_studio.settings(run).data.size)
    chosen = ipw.Dropdown(options=[(e.name, k) for k, e in enumerate(examples)], value=0, description="Mask")
    prompt = ipw.Text(heart_studio.prompt_of(examples[0].row), description="Prompt")
    look = ipw.Image(value=png(masks.to_grey(examples[0].mask)), format="png", width=2 * stamp.WIDTH)

    def take(change: Mapping) -> None:
        example = examples[change["new"]]
        prompt.value, look.value = heart_studio.prompt_of(example.row), png(masks.to_grey(example.mask))

    def draw(sampling: Sampling) -> None:
        example = examples[chosen.value]
        for one in heart_studio.generate(run, example.mask, prompt.value, example.row, sampling):
            frames = heart_studio.frames(one.image)
            lines = [f"ED | ES, seed {sampling.seed}, image {one.number}", one.prompt]
            display(stamp.stamped(np.hstack([frames["ED"], frames["ES"]]), lines))
        print({name: round(value, 3) for name, value in masks.measured(example.mask).items()})

    chosen.observe(take, "value")
    return box(run.name, [chosen, look, prompt], sampling_controls(usual.steps, usual.guidance), draw)


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
