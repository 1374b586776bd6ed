"""The report of a run or of a pipeline, written to a file; or one of its figures by itself."""

from pathlib import Path

from fathom.errors import UserError, nearest
from fathom.pipeline.state import is_pipeline
from fathom.report.document import picture
from fathom.report.picture import png_of
from fathom.report.pipeline_page import pipeline_figures, pipeline_page
from fathom.report.run_data import Run
from fathom.report.run_page import run_figures, run_page
from fathom.report.stages import Story
from fathom.scratch import replace_bytes

_DRAWN = (".svg", ".png")
_PAGES = (".html", ".htm")


def write_report(path: Path, out: Path | None = None, *, figure: str | None = None) -> Path:
    """Write the report of the run or the pipeline in `path`, by default as its `report.html`; returns where it is.

    An `out` that ends in `.svg` or `.png` gets one figure alone: the one of that name, or without a name the main one.
    Raises `UserError` for what is no run, for files that cannot be read, for a figure that there is not, and for a
    place that cannot be written.
    """
    target = path / "report.html" if out is None else out
    suffix = target.suffix.lower()
    drawn = suffix in _DRAWN
    if not drawn and suffix not in _PAGES:
        raise UserError(f"{target}: a page's name ends in .html, a figure's in .svg or .png")
    if figure is not None and not drawn:
        raise UserError(f"--figure {figure}: is written with --out FILE, whose name ends in .svg or .png")
    data: Run | Story = Story.read(path) if is_pipeline(path) else Run.read(path)
    if drawn:
        content = _figure(data, figure, path, suffix)
    else:
        content = (pipeline_page(data) if isinstance(data, Story) else run_page(data)).encode()
    try:
        replace_bytes(target, content)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def _figure(data: Run | Story, name: str | None, path: Path, suffix: str) -> bytes:
    """The figure called `name`, or the main one, which comes first."""
    found = pipeline_figures(data) if isinstance(data, Story) else run_figures(data)
    if not found:
        raise UserError(f"{path}: has measured nothing yet that could be drawn")
    if name is not None and name not in found:
        raise UserError(f"--figure {name}: is no figure of {path}{nearest(name, found)}; there are: {', '.join(found)}")
    drawn = picture(found[next(iter(found)) if name is None else name].chart, wide=True, alone=True) + "\n"
    return png_of(drawn) if suffix == ".png" else drawn.encode()
