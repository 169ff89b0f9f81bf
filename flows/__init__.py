"""Prefect flows: thin, one task per stage of stsr_core, no science."""
