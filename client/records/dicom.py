"""One DICOM file -> grey levels or colours: modality rescale, window, photometric interpretation.

Source:
    DICOM PS3.3: C.11.1 (modality LUT), C.11.2.1.2 (window centre and width; LINEAR, LINEAR_EXACT, SIGMOID),
    C.7.6.3.1.2 (photometric interpretation), C.7.5.1.1.2 (pixel padding), C.7.6.1.1.7 (burned-in annotation).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.records.extras import needed
from client.records.identifiers import refuse_found
from client.records.manifest import Manifest, Pictures
from client.records.patient_ids import plain
from client.records.pictures import Picture, Place, blanked, check_size, projected, to_bytes, windowed
from shared_models.errors import RecordsError

with needed("images", "pydicom"):
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, get_decoder, iter_pixels, pixel_array
    from pydicom.pixels.utils import get_expected_length
    from pydicom.tag import Tag
    from pydicom.uid import (
        JPEG2000,
        UID,
        ExplicitVRLittleEndian,
        JPEG2000Lossless,
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        JPEGLossless,
        JPEGLosslessSV1,
        JPEGLSTransferSyntaxes,
        RLELossless,
    )

# Of the confidentiality profile (PS3.15 table E.1-1): what names a patient, or is a number that a hospital can look up.
IDENTIFYING = tuple(
    """
    PatientName PatientID PatientBirthDate PatientBirthTime PatientBirthName PatientMotherBirthName PatientAddress
    PatientTelephoneNumbers PatientTelecomInformation OtherPatientIDs OtherPatientIDsSequence OtherPatientNames
    MedicalRecordLocator ResponsiblePerson PatientInsurancePlanCodeSequence PatientComments AccessionNumber AdmissionID
    IssuerOfPatientID
    """.split()  # noqa: SIM905  # a list of words reads better as words
)
_TAGS = {name: Tag(name) for name in IDENTIFYING}
# pydicom takes the first decoder that it finds, and decoders of lossy pictures differ by a grey level: each compression
# has one here, so that a picture is the same at every hospital, whatever else is installed there.
_DECODERS = {
    **dict.fromkeys((JPEGBaseline8Bit, JPEGExtended12Bit), ("pillow", "pillow")),
    **dict.fromkeys((JPEG2000, JPEG2000Lossless), ("pillow", "pillow")),
    **dict.fromkeys(JPEGLSTransferSyntaxes, ("pyjpegls", "pyjpegls")),
    **dict.fromkeys((JPEGLossless, JPEGLosslessSV1), ("gdcm", "python-gdcm")),
    RLELossless: ("pydicom", "pydicom"),
}
_GREY = {"MONOCHROME1", "MONOCHROME2"}
_OFTEN_WRITTEN_ON = {"US", "SC", "OT", "XC", "ES", "DOC"}  # ultrasound, screenshots, photographs, endoscopy, papers


def check_dicom(place: Place, manifest: Manifest, pictures: Pictures) -> tuple[int, int]:
    """Check all that stands before the pixels, and that uncompressed ones are there in full; arguments as below.

    Returns:
        Height and width.

    Raises:
        RecordsError, Exception: As ``read_dicom``.
    """
    with place.path.open("rb") as stream:
        data = pydicom.dcmread(stream, stop_before_pixels=True)
        left = place.path.stat().st_size - stream.tell()
    syntax = _syntax(data)
    if "Rows" not in data or (left <= 0 and not syntax.is_deflated):
        raise _without_pixels(place)
    _refuse(place, data, manifest, pictures)
    if not (syntax.is_compressed or syntax.is_deflated) and left < get_expected_length(data):
        raise ValueError("too short")
    _decoder(place, data)
    _frame(place, _frames(data), pictures)
    return int(data.Rows), int(data.Columns)


def read_dicom(place: Place, manifest: Manifest, pictures: Pictures) -> Picture:
    """Decode one frame, or all of them onto one.

    Args:
        place: The file, whose it is, and which frame of several.
        manifest: Names the tags that are left aside.
        pictures: The window, and what is known of text in the pixels.

    Returns:
        Pixels of shape ``(height, width)``, or ``(height, width, 3)`` for colours; 255 is white.

    Raises:
        RecordsError: Tags identify somebody and the manifest does not drop them; PatientID is another patient's; text
            is, or may be, burned into the pixels; there are no pixels, too many, or several frames and none is chosen.
        Exception: Whatever pydicom raises for a damaged file.
    """
    data = pydicom.dcmread(place.path)
    if "PixelData" not in data:
        raise _without_pixels(place)
    _refuse(place, data, manifest, pictures)
    grey = data.PhotometricInterpretation in _GREY and data.SamplesPerPixel == 1
    frame, decoder = _frame(place, _frames(data), pictures), _decoder(place, data)
    if frame is None and _frames(data) > 1:
        if not grey:
            raise RecordsError(f"{place.path} has colours", hint="A projection is of grey values; choose a slice.")
        frames = iter_pixels(data, decoding_plugin=decoder)
        picture = to_bytes(projected((_levels(pixels, data, pictures) for pixels in frames), pictures))
    else:
        pixels = pixel_array(data, index=frame, decoding_plugin=decoder)
        picture = to_bytes(_levels(pixels, data, pictures)) if grey else _colours(pixels, data)
    return blanked(picture, pictures)


def _syntax(data: Any) -> UID:
    return data.file_meta.TransferSyntaxUID if "TransferSyntaxUID" in data.file_meta else ExplicitVRLittleEndian


def _decoder(place: Place, data: Any) -> str:
    """Which of pydicom's plugins decodes it; empty where the pixels are not compressed.

    Raises:
        RecordsError: It is not installed, or there is none.
    """
    syntax = _syntax(data)
    if not syntax.is_compressed or syntax.is_deflated:
        return ""
    plugin, package = _DECODERS.get(syntax, ("", ""))
    if syntax == JPEGExtended12Bit and data.BitsStored != 8:  # Pillow does the half of it that has eight bits
        plugin = ""
    if plugin and plugin in get_decoder(syntax).available_plugins:
        return plugin
    hint = f"Install what decodes it, pip install {package}; or decompress the file." if plugin else "Decompress it."
    raise RecordsError(f"{place.path} is compressed in a way that nothing here decodes: {syntax.name}", hint=hint)


def _without_pixels(place: Place) -> RecordsError:
    return RecordsError(f"{place.path} has no pixels", hint="Leave objects other than images out.")


def _refuse(place: Place, data: Any, manifest: Manifest, pictures: Pictures) -> None:
    """All that a header can be refused for."""
    _refuse_identifiers(place, data, manifest)
    _refuse_writing(place, data, pictures)
    check_size(place.path, int(data.Rows), int(data.Columns), _frames(data))


def _frames(data: Any) -> int:
    return int(data.get("NumberOfFrames") or 1)


def _refuse_identifiers(place: Place, data: Any, manifest: Manifest) -> None:
    """A PatientID that is the row's own patient is a pseudonym which the hospital has chosen, and a check."""
    filled = [  # what is dropped or not there is not decoded: of a folder of files that is a third of the time
        name
        for name in IDENTIFYING
        if name not in manifest.drop and _TAGS[name] in data and str(data[_TAGS[name]].value or "").strip("^ ")
    ]
    if "PatientID" in filled and place.patient is not None:
        if plain(str(data.PatientID)) != plain(place.patient):
            raise RecordsError(
                f"{place.path}: PatientID is not the patient that the row names",
                hint='Mend the row; or drop = ["PatientID"], if the row has a pseudonym that the file has not.',
            )
        filled.remove("PatientID")
    refuse_found(place.path, filled)


def _refuse_writing(place: Place, data: Any, pictures: Pictures) -> None:
    flag, kind = str(data.get("BurnedInAnnotation") or ""), str(data.get("Modality") or "")
    if flag == "YES" and not pictures.blank:
        raise RecordsError(
            f"{place.path}: an annotation is burned into the pixels",
            hint="Say where: blank = [[top, left, bottom, right]] in [images]; or leave the file out.",
        )
    if flag not in {"YES", "NO"} and kind in _OFTEN_WRITTEN_ON and not (pictures.pixels_checked or pictures.blank):
        raise RecordsError(
            f"{place.path}: nothing says that no annotation is burned into the pixels, and images of modality {kind} "
            "often have one",
            hint="Look at them; then pixels_checked = true, or blank = [[top, left, bottom, right]], in [images].",
        )


def _frame(place: Place, frames: int, pictures: Pictures) -> int | None:
    """Which of several; None of one, or where all are projected onto one."""
    if frames == 1 or pictures.projection:
        return None
    if place.slice is None:
        raise RecordsError(
            f"{place.path} has {frames} frames", hint="Say which: slice, slice_column or projection in [images]."
        )
    return round(place.slice * (frames - 1))


def _levels(pixels: NDArray[Any], data: Any, pictures: Pictures) -> NDArray[np.float64]:
    """Grey levels from 0 to 1, by the manifest's window, the file's own, or the range of its format."""
    values = apply_modality_lut(pixels, data).astype(np.float64)
    if pictures.window:
        levels = windowed(values, *pictures.window)
    elif "WindowCenter" in data and "WindowWidth" in data:
        levels = _own_window(values, data)
    elif data.get("VOILUTSequence"):
        levels = apply_voi(values.astype(np.int64), data) / (2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    else:
        low, high = _range(data)
        levels = windowed(values, (low + high) / 2, high - low)
    if data.PhotometricInterpretation == "MONOCHROME1":
        levels = 1 - levels
    return np.where(_padding(pixels, data), 0, levels)


def _own_window(values: NDArray[np.float64], data: Any) -> NDArray[np.float64]:
    """The file's first window, by the function that it names."""
    centre, width = (float(np.ravel(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    match str(data.get("VOILUTFunction") or "LINEAR"):
        case "LINEAR" if width >= 1:
            if width == 1:
                return (values > centre - 0.5).astype(np.float64)
            return windowed(values, centre - 0.5, width - 1)
        case "LINEAR_EXACT" if width > 0:
            return windowed(values, centre, width)
        case "SIGMOID" if width > 0:
            return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -500, 500)))
    raise ValueError("no such window")


def _range(data: Any) -> tuple[float, float]:
    """The least and the greatest value that the file's format can hold, after the modality's rescale."""
    if data.get("ModalityLUTSequence"):
        return 0, 2 ** int(data.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits = int(data.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if data.PixelRepresentation else (0, 2**bits - 1)
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return ends[0], ends[1]


def _padding(pixels: NDArray[Any], data: Any) -> NDArray[np.bool_]:
    """Which stored pixels are outside what was imaged: they are black, whatever the window."""
    if "PixelPaddingValue" not in data:
        return np.zeros(pixels.shape, dtype=np.bool_)
    ends = sorted((int(data.PixelPaddingValue), int(data.get("PixelPaddingRangeLimit", data.PixelPaddingValue))))
    return (pixels >= ends[0]) & (pixels <= ends[1])


def _colours(pixels: NDArray[Any], data: Any) -> Picture:
    """Red, green and blue from 0 to 255; pydicom has turned YBR into RGB."""
    bits = int(data.BitsStored)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        pixels, bits = apply_color_lut(pixels, data), int(data.RedPaletteColorLookupTableDescriptor[2])
    if pixels.ndim != 3 or pixels.shape[2] < 3:
        raise ValueError("no colours")
    return to_bytes(pixels[:, :, :3].astype(np.float64) / (2**bits - 1))
