"""A study's report: report.json, its summary, plots, tables and page."""
