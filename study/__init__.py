"""The study: every method and every rival on a corpus, as records, tables and plots. `python -m study --help`."""
