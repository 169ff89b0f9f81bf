"""Prefect flows: thin, one task per stage of stsr_core, no science."""

import os

# Prefect reads it when it is imported, which is after this.
os.environ.setdefault("DO_NOT_TRACK", "1")
