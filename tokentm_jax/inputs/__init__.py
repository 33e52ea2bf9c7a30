"""Inputs of models, one file per modality: how they are read, checked, hidden in part, and shown with a map."""
