"""Stages that do something else for denoisers (diffusers pipelines) than for classifiers; tasks/<stage>.py says what a
stage is for. A module here takes the place of the one of its name for targets whose `fetch.format` is "pipeline"."""
