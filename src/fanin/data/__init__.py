"""Corpora: from raw files to parquet, tokens and batches."""
