"""The report: records read from disk, sections made of them, one offline HTML page."""
