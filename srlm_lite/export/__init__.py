"""From a run to a model of its own: merged weights or one adapter, checked, with a model card."""
