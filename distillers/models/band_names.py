"""Which band of a raster holds which polarisation, told by its description, by the file's name, or by the user.

A description counts where it names one polarisation and nothing that is computed from backscatter: `Sigma0_VV_db`,
`VHdB`, `vv`, but not `VH/VV`, `VV_coherence` or `incidenceAngle`. Nothing is guessed from values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from distillers.errors import BadInput

POLARISATIONS = ("VV", "VH")  # those that models have learnt from
KNOWN = (*POLARISATIONS, "HH", "HV")
_BEFORE = "sigma|gamma|beta|sig|gam|intensity|amplitude|backscatter|db|s|g|b"
_AFTER = "db|linear|lin|power|pow|pwr|amplitude|amp|intensity|int|ascending|asc|descending|desc|dsc|mean|median|pol"
_NAMED = re.compile(
    rf"(?:(?<![A-Za-z])(?i:{_BEFORE})?((?i:{'|'.join(KNOWN)}))|(?<=[a-z])({'|'.join(KNOWN)}))(?i:{_AFTER})?(?![A-Za-z])"
)
_PRODUCT = re.compile(r"(?<![A-Z0-9])1S([SD])([HV])(?![A-Z0-9])")  # as in S1A_IW_GRDH_1SDV_...
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NAMELESS = re.compile(r"(?i)(?:bands?|layer|channel|raster|gr[ae]y|undefined|b)?[ _#-]*\d*")
NO_BACKSCATTER = {"angle", "angles", "incidence", "lia", "ratio", "coherence", "coher", "coh", "phase", "nesz"} | {
    "std",
    "stddev",
    "variance",
    "var",
    "count",
    "mask",
}  # in a description, whatever else it says


def polarisation_of(description: str | None) -> str | None:
    """Tell the polarisation whose backscatter a band holds by its description; None where it does not name one alone.

    Words are divided by anything but letters, by digits and by capitals; units and orbits may follow without a gap.
    """
    text = description or ""
    found = {(match[1] or match[2]).upper() for match in _NAMED.finditer(text)}
    mentioned = {name for name in KNOWN if name in text.upper()}  # VVdivVH names one, but is a ratio
    return found.pop() if len(found) == len(mentioned) == 1 and not _words(text) & NO_BACKSCATTER else None


def is_nameless(description: str | None) -> bool:
    """Tell whether a band's description says nothing: none, a number, or a word such as "band"."""
    return bool(_NAMELESS.fullmatch((description or "").strip()))


def polarisations_of_file(file: str) -> list[str]:
    """List the polarisations in a file's name, in its order; without any, those of Sentinel-1's product code (1SDV)."""
    name = re.split(r"[/\\]", file)[-1]
    if found := list(dict.fromkeys((match[1] or match[2]).upper() for match in _NAMED.finditer(name))):
        return found
    if product := _PRODUCT.search(name.upper()):
        number, sent = product.groups()
        return [2 * sent] if number == "S" else [sent + received for received in (sent, "VH".replace(sent, ""))]
    return []


def name_bands(
    wanted: str | None, descriptions: Sequence[str | None], file: str = "", alpha: Collection[int] = ()
) -> tuple[dict[str, int], str]:
    """Name a raster's bands: {polarisation: band number from 1}, and how they were named.

    Args:
        wanted: None, or entries divided by commas: "VV,VH" (by description; by position where no band has a name),
            "2,1" (numbers, in the order VV, VH), "VV=2". Without: by descriptions, by the file's name where there is
            one band, by position for two.
        alpha: numbers of the bands that hold transparency; they are never a polarisation.

    Raises:
        BadInput: no such band, a polarisation that no model takes, one that two bands are named for, bands whose names
            do not tell.
    """
    bands = {i: text or "" for i, text in enumerate(descriptions, 1) if i not in alpha}
    if wanted is None:
        return _by_name(bands, file)
    return _as_asked(wanted, bands, len(descriptions)), "as asked for"


def _by_name(bands: dict[int, str], file: str) -> tuple[dict[str, int], str]:
    claims = _claims(bands)
    found = {name: claims[name] for name in POLARISATIONS if name in claims}
    if any(len(numbers) > 1 for numbers in found.values()):
        raise BadInput("bands", _listed(bands, found), f"one band each: --bands {_example(found)} decides")
    if found:
        left = [_shown(bands, i) for i in bands if i not in {numbers[0] for numbers in found.values()}]
        return {name: numbers[0] for name, numbers in found.items()}, "by band descriptions" + (
            f"; left out: {', '.join(left)}" if left else ""
        )
    if claims:
        raise BadInput("bands", _listed(bands, claims), f"VV, VH; {_taken_for(bands)}")
    if len(bands) == 1:
        return _one_band(bands, file)
    if len(bands) != 2 or not _are_nameless(bands):
        given = f"{len(bands)} bands without polarisations in their descriptions ({_names(bands)})"
        raise BadInput("bands", given, "--bands VV=NUMBER,VH=NUMBER")
    if (named := polarisations_of_file(file)) not in ([], [*POLARISATIONS]):
        raise BadInput("bands", f"two bands without names in {file}", f"VV, VH; {_taken_for(bands)}")
    first, second = bands
    assumed = "two bands without names are taken for VV, VH"
    return {"VV": first, "VH": second}, f"assumed: {assumed}" + (", as the file's name lists them" if named else "")


def _one_band(bands: dict[int, str], file: str) -> tuple[dict[str, int], str]:
    ((number, text),) = bands.items()
    allowed = f"VV or VH; --bands VV={number} takes it for VV"
    if _words(text) & NO_BACKSCATTER or any(name in text.upper() for name in KNOWN):
        raise BadInput("bands", f"one band, {text!r}", allowed)
    named = polarisations_of_file(file)
    if len(named) == 1 and named[0] in POLARISATIONS:
        return {named[0]: number}, "by the file's name"
    if set(named) - {*POLARISATIONS}:
        raise BadInput("bands", f"one band in a file named for {' and '.join(named)}", allowed)
    return {"VV": number}, "assumed: one band without a name is taken for VV"


def _as_asked(wanted: str, bands: dict[int, str], count: int) -> dict[str, int]:
    claims, allowed = _claims(bands), f"VV, VH, numbers 1 to {count}, or VV=NUMBER, divided by commas"
    by_number = {i: name for name in POLARISATIONS for i in claims.get(name, ())}
    entries = [entry.strip() for entry in wanted.split(",")]
    by_position = list(bands) if _are_nameless(bands) and len(entries) == len(bands) else []
    found: dict[str, int] = {}
    for position, entry in enumerate(entries):
        name, _, number = entry.upper().partition("=")
        if name.isdecimal() and not number:
            name, number = by_number.get(int(name), POLARISATIONS[min(position, 1)]), name
        if name not in POLARISATIONS or name in found or not (number or "1").isdecimal():
            raise BadInput("bands", wanted, allowed)
        numbers = [int(number)] if number else claims.get(name) or by_position[position : position + 1]
        if len(numbers) > 1:
            raise BadInput("bands", f"{wanted}: {_listed(bands, {name: numbers})}", f"one of them: {name}=NUMBER")
        if not numbers:
            raise BadInput("bands", f"{wanted}, in a raster of {count} ({_names(bands)})", allowed)
        if numbers[0] not in bands or numbers[0] in found.values():
            raise BadInput("bands", wanted, f"{allowed}, each once, and no band of transparency")
        found[name] = numbers[0]
    return found


def _claims(bands: dict[int, str]) -> dict[str, list[int]]:
    """List the numbers of the bands that are named for each polarisation."""
    found: dict[str, list[int]] = {}
    for i, text in bands.items():
        if name := polarisation_of(text):
            found.setdefault(name, []).append(i)
    return found


def _are_nameless(bands: dict[int, str]) -> bool:
    """Tell whether descriptions say nothing: empty, numbers, or the same for all bands."""
    if any(polarisation_of(text) for text in bands.values()):
        return False
    return all(is_nameless(text) for text in bands.values()) or (len(bands) > 1 and len(set(bands.values())) == 1)


def _listed(bands: dict[int, str], claims: dict[str, list[int]]) -> str:
    return "; ".join(f"{name} in {' and '.join(_shown(bands, i) for i in claims[name])}" for name in claims)


def _names(bands: dict[int, str]) -> str:
    return ", ".join(text or "no description" for text in bands.values())


def _shown(bands: dict[int, str], i: int) -> str:
    return f"band {i} ({bands[i] or 'no description'})"


def _example(claims: dict[str, list[int]]) -> str:
    return ",".join(f"{name}={numbers[0]}" for name, numbers in claims.items())


def _taken_for(bands: dict[int, str]) -> str:
    numbers = list(bands)[:2]
    pairs = zip(POLARISATIONS, numbers, strict=False)
    return f"--bands {','.join(f'{name}={i}' for name, i in pairs)} takes these bands for them"


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}
