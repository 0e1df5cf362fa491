"""The lines of ``bench/medicine.py``: one real data set each, beside the figures published for it."""
