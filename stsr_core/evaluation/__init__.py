"""Scores of ensembles against fine truth, beside baselines in the same run."""
