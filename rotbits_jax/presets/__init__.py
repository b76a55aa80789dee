"""Presets: values that say how a model is rewritten and coded."""
