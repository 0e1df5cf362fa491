"""Texts in a column -> token ids. A text is never quoted, in no error and in no log."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.records.frames import Flags, check_header, refuse, texts
from client.records.identifiers import found_in, is_identifier, masked
from client.records.manifest import TEXT, Manifest
from shared_models.errors import RecordsError
from shared_models.pretrained import find_encoder
from shared_models.tasks import TokensInput
from shared_models.tokens import encode, words


def read_texts(manifest: Manifest, schema: TokensInput, frame: pd.DataFrame) -> NDArray[np.int64]:
    """Encode the text of each row.

    Args:
        manifest: Names the column, and says what becomes of a text in which something looks like an identifier.
        schema: Vocabulary and length, and whose tokenizer it is: the same guard stands before each.
        frame: A row per text.

    Returns:
        Token ids, shape ``(n, length)``; 0 pads.

    Raises:
        RecordsError: The column is missing, or is named like an identifier; a text holds what looks like one, or no
            word at all; with file, row and column.
    """
    column = manifest.column(TEXT)
    check_header(manifest.file, list(frame.columns), [column])
    if is_identifier(column):
        raise RecordsError(
            f"{manifest.file}: column {column!r} is named like an identifier, which is no text to learn from",
            hint="Name the column with the text: [columns] text = ...",
        )
    cells = texts(frame[column])
    if manifest.found_in_text == "mask":
        cells = cells.map(masked)
    else:
        _refuse_found(manifest, frame, column, [found_in(cell) for cell in cells])
    empty = np.array([not words(cell) for cell in cells], dtype=np.bool_)
    refuse(manifest, frame, column, empty, "the text has no word", quoted=False)
    return np.stack([_tokens(cell, schema) for cell in cells])


def _tokens(text: str, schema: TokensInput) -> NDArray[np.int64]:
    if schema.base is not None:
        return find_encoder(schema.base).encode(text, length=schema.length)
    return encode(text, vocabulary=schema.vocabulary, length=schema.length)


def _refuse_found(manifest: Manifest, frame: pd.DataFrame, column: str, found: list[str | None]) -> None:
    first = next((what for what in found if what is not None), None)
    what = f'looks as if it held {first}; mend the export, or found_in_text = "mask"'
    flags: Flags = np.array([what is not None for what in found], dtype=np.bool_)
    refuse(manifest, frame, column, flags, what, quoted=False)
