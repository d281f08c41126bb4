"""Prints the JSON schema of report.json."""

from clipvisionalign.study.report.schema import json_schema

print(json_schema(), end="")
