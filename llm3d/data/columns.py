"""Which format the columns of a file fit: by a name for each of its fields, out of those that are in use."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from llm3d.errors import InputError

Kind = Literal["conversation", "comparison", "labeled", "prompt"]
Values = dict[str, Any]  # of a row, by the form's field; None where the row has none


@dataclass(frozen=True)
class Form:
    """A format. needs, allows: fields, each with the names of columns that hold it."""

    name: str
    kind: Kind
    read: Callable[[Values], Any]
    needs: dict[str, tuple[str, ...]]
    allows: dict[str, tuple[str, ...]]

    @property
    def fields(self) -> dict[str, tuple[str, ...]]:
        return self.needs | self.allows


def choose_form(
    every: Sequence[Form], columns: Sequence[str], kind: Kind, name: str, mapping: Mapping[str, str]
) -> Form:
    """The form of a kind that goes by a name, or, where that is "auto", that the columns fit.

    mapping: for fields of the form, the columns that hold them.
    Raises InputError where no form fits, or more than one.
    """
    forms = _named(every, kind, name, mapping)
    for field, column in mapping.items():
        if column not in columns:
            raise InputError(
                f"no column {column!r} to hold the field {field!r}{_nearest(column, columns)}; "
                f"there are: {listed(columns)}"
            )
    fitting = [form for form in forms if not _missing(form, columns, mapping)]
    if kind == "prompt":
        fitting = fitting[-1:]  # messages hold more than the prompt that may stand beside them
    if len(fitting) > 1:
        raise InputError(
            f"the columns {listed(columns)} fit more than one format: "
            f"{', '.join(form.name for form in fitting)}; name the one that is meant"
        )
    if not fitting:
        raise InputError(_why_none_fits(every, forms, columns, kind, mapping))
    return fitting[0]


def _named(every: Sequence[Form], kind: Kind, name: str, mapping: Mapping[str, str]) -> list[Form]:
    """The formats of a kind that go by a name and have all the fields that are mapped."""
    of_kind = [form for form in every if form.kind == kind]
    forms = [form for form in of_kind if name in ("auto", form.name)]
    if not forms:
        names = ["auto", *(form.name for form in of_kind)]
        raise InputError(
            f"no format {name!r} for a {kind}{_nearest(name, names)}; choose one of {', '.join(names)}"
        )
    for field in mapping:
        forms, before = [form for form in forms if field in form.fields], forms
        if not forms:
            known = sorted({field for form in before for field in form.fields})
            raise InputError(
                f"no field {field!r} in the format {' or '.join(form.name for form in before)}"
                f"{_nearest(field, known)}; there are: {', '.join(known)}"
            )
    return forms


def _missing(form: Form, columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    return [
        field
        for field, names in form.needs.items()
        if field not in mapping and not any(name in columns for name in names)
    ]


def _why_none_fits(
    every: Sequence[Form],
    forms: Sequence[Form],
    columns: Sequence[str],
    kind: Kind,
    mapping: Mapping[str, str],
) -> str:
    # A prompt is part of all the others.
    whole = [form for form in every if form.kind not in (kind, "prompt")]
    other = [form for form in whole if not _missing(form, columns, {})]
    if other:
        return f"the columns {listed(columns)} hold a {other[0].kind} ({other[0].name}), not a {kind}"
    needs = "; ".join(f"{form.name} needs {_spelled(form.needs)}" for form in forms)
    guess = _guess(forms, columns, mapping)
    return f"the columns {listed(columns)} fit no format for a {kind}: {needs}; {guess}"


def _spelled(needs: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(" or ".join(names) for names in needs.values())


def _guess(forms: Sequence[Form], columns: Sequence[str], mapping: Mapping[str, str]) -> str:
    """What to do: the mapping of the column that is nearest to one that is missing."""
    for form in forms:
        for field in _missing(form, columns, mapping):
            near = get_close_matches(field, columns, n=1)
            if near:
                return f"is {near[0]!r} meant? then map columns: {{{field}: {near[0]}}}"
    if "text" in columns:
        return "text alone is what a model is pretrained on: llm3d data tokenize, and then llm3d pretrain"
    return "map its fields to columns, as in columns: {FIELD: COLUMN}"


def place_of(form: Form, field: str, columns: Sequence[str], mapping: Mapping[str, str]) -> str:
    """The column that holds a field, or would hold it if a later row had it."""
    if field in mapping:
        return mapping[field]
    names = form.fields[field]
    present = [name for name in names if name in columns]
    if len(present) > 1:
        raise InputError(
            f"the columns {' and '.join(present)} can both hold the field {field!r} of the format {form.name}; "
            f"say which, as in columns: {{{field}: {present[0]}}}"
        )
    return present[0] if present else names[0]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def listed(columns: Iterable[str]) -> str:
    shown = list(columns)
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") or "none"
