"""Turns raw logs into canonical tables and then Parquet and `manifest.json` (contract: `gpsd_dist/schema.py`)."""
