"""The starter model of clipvisionalign: adapters and heads in `model/`, found by the name `starter`."""
