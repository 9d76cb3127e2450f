"""The page's questions as widgets in a notebook: `widgets.explorer()` in a cell of its own."""

from __future__ import annotations

import ipywidgets as ipw
from IPython.display import display

from compdiff import config, stamp, studio
from compdiff.problems import DataError
from compdiff.request import Refused
from compdiff.studio import Sampling, TrainedRun


def explorer(run: TrainedRun | None = None) -> ipw.VBox:
    """Age, attributes, findings and methods of a trained run (default: the first found). Refused: there is none.

    Nothing is drawn before the button is pressed, so the cell costs nothing where nobody is there to press it.
    """
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
    how = {
        "seed": ipw.BoundedIntText(0, 0, studio.MAX_SEED, description="Seed"),
        "steps": ipw.IntSlider(usual.sample_steps, 1, studio.MAX_STEPS, description="Steps"),
        "guidance": ipw.FloatSlider(usual.guidance, min=0, max=studio.MAX_GUIDANCE, step=0.5, description="Guidance"),
        "n": ipw.IntSlider(2, 1, studio.MAX_IMAGES, description="Images"),
    }
    button, out = ipw.Button(description="Generate"), ipw.Output()

    def draw(_: ipw.Button) -> None:
        out.clear_output()
        with out:
            try:
                sampling = Sampling(**{name: c.value for name, c in how.items()})
                row = studio.request_row(data, years.value, {name: c.value for name, c in who.items()}, findings.value)
                for one in studio.generate(run, chosen.value, row, sampling):
                    display(
                        stamp.stamped(
                            one.image, [f"{config.METHODS[one.method].title}, image {one.number}", one.prompt]
                        )
                    )
                print({name: round(value, 3) for name, value in studio.truth(data, row).items()})
            except (Refused, DataError) as error:
                print(error)

    button.on_click(draw)
    return ipw.VBox(
        [ipw.HTML(f"<b>{run.name}</b>"), chosen, years, *who.values(), findings, *how.values(), button, out]
    )
