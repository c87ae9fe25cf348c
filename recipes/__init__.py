"""Recipes: ready-made training jobs, their configurations (`conf/`) and the one entry point `train.py`.

A recipe is a package here with the name of its configuration. It offers two functions:

* ``build(cfg) -> (LightningModule, LightningDataModule)``: raises `ConfigurationError` for a wrong value, and does no slow work;
* ``show(module, cfg) -> str``: what a person wants to see of a trained model.
"""
