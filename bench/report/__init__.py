"""Result documents and how they are shown: gains, tables, terminal, Markdown, plots, HTML."""
