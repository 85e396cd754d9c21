"""Command: scores a split with a run, or raw requests with an artefact, into Parquet with raw ids."""
