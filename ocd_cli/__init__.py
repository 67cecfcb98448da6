"""The command line of ocd: parse, one library call, render. Typer and Rich live here only."""
