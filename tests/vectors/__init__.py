"""Known answers as JSON, and the script that regenerates them."""
