"""What a result document holds, and how it is shown: tables, plots, HTML."""
