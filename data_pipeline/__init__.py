"""Raw logs -> canonical tables -> Parquet and `manifest.json` (the contract is `gpsd_dist/schema.py`)."""
