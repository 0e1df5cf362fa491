"""What goes wrong at a consortium over the years, played with real keys, files, processes and connections."""
