"""Training of the shipped models, run from a clone; no part of the package.

python -m models.training RECIPE.py
"""
