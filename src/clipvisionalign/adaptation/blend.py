"""Models between a run and what it started from: which one to take, as a run folder of its own.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv:2109.01903 (WiSE-FT).
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from clipvisionalign.adaptation.blended_run import blended_folder, check_output, write_blended_run
from clipvisionalign.adaptation.comparison import ComparisonRequest, compare_with_base

logger = logging.getLogger(__name__)

#: The curve as an image, in the folder of a blended run.
PLOT_FILE = "blend.png"


def blend(request: ComparisonRequest, out: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the best model between a run and its base as a run folder.

    >>> from clipvisionalign.adaptation.comparison import ComparisonRequest
    >>> blend(ComparisonRequest("runs/tuned", foreign=["flickr8k"]), "runs/blended")    # doctest: +SKIP

    Args:
        request: the run, its base, the data sets, and how alpha is chosen.
        out: the folder to write: a run, with blend.json and blend.png.
        overwrite: whether a blended run that is there is replaced.

    Returns:
        What `clipvisionalign blend --json` prints.

    Raises:
        FileExistsError: `out` holds something.
        ValueError, FileNotFoundError, DataError: as `compare_with_base`.
    """
    request.check()
    base = request.base_name()
    check_output(str(out), request.run, base, overwrite)
    comparison = compare_with_base(request)
    with blended_folder(str(out), request.run, base, overwrite) as folder:
        comparison.document["out"] = str(out)
        results = write_blended_run(comparison, str(out), folder, request.device)
        comparison.document["chosen"] = {
            name: value for name, value in results["chosen"].items() if name != "model_in_sample"
        }
        if importlib.util.find_spec("matplotlib") is None:
            logger.info('%s is not drawn: pip install "clipvisionalign[study]"', PLOT_FILE)
        else:
            from clipvisionalign.adaptation.blend_plot import plot_curve

            plot_curve(comparison.document, folder / PLOT_FILE)
    return comparison.document
