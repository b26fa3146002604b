"""One module per place where arrays are computed; `_dispatch` imports the one that is needed."""
