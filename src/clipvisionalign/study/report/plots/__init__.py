"""The plots of a report."""

from clipvisionalign.study.report.plots.draw import Plot, draw_plots

__all__ = ["Plot", "draw_plots"]
