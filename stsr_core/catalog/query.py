"""CQL2 over a table of items: text or JSON in, a mask of rows out.

Parsing is the library cql2's; evaluation is here, on whole columns, so that ten thousand items take milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, time
from functools import partial
from typing import TYPE_CHECKING, Any

from stsr_core.errors import ConfigurationError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LENGTH = 4000  # characters of a filter
MAX_DEPTH = 32  # operators inside each other
FAR = (datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))
COMPARISONS = {"=": "equal", "<>": "not_equal", "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal"}
ARITHMETIC = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
SPATIAL = ("intersects", "disjoint", "contains", "within", "touches", "crosses", "overlaps", "equals")
TEMPORAL = ("t_intersects", "t_disjoint", "t_before", "t_after", "t_during")
Value = Callable[[Any], Any]  # value of a node of a filter


def parse(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """Parse CQL2 text, or CQL2 JSON as an object, into CQL2 JSON.

    Raises:
        ConfigurationError: it is not CQL2, or too long or deep to be meant seriously.
    """
    import cql2

    raw = text if isinstance(text, str) else json.dumps(text)
    deepest = _deepest(raw)
    if len(raw) > MAX_LENGTH or deepest > 2 * MAX_DEPTH:
        raise ConfigurationError(
            f"The filter has {len(raw)} characters and {deepest} nested brackets; at most {MAX_LENGTH} and "
            f"{2 * MAX_DEPTH} are served. Shorten it."
        )
    try:
        expression = cql2.parse_text(raw) if isinstance(text, str) else cql2.parse_json(raw)
        parsed = expression.to_json()
    except Exception as e:  # the library has several roots of errors
        reason = " ".join(str(e).split())[:200]
        raise ConfigurationError(f'Filter {raw[:80]!r} is no CQL2 ({reason}). Example: "stsr:members" >= 8') from e
    return parsed if isinstance(parsed, dict) else {"op": "=", "args": [parsed, True]}


def _deepest(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def properties(expression: Any) -> set[str]:
    """Names of the properties that a parsed filter reads."""
    if isinstance(expression, dict):
        if "property" in expression:
            return {str(expression["property"])}
        expression = list(expression.values())
    return set().union(*map(properties, expression)) if isinstance(expression, list) else set()


def moment(text: str) -> datetime:
    """Read a date or time as UTC.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        found = datetime.fromisoformat(text.upper())  # RFC 3339 allows t and z
    except ValueError as e:
        raise ConfigurationError(f"{text!r} is no date or time; write 2018-05-01 or 2018-05-01T06:00:00Z.") from e
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def mask(table: pa.Table, expression: Mapping[str, Any]) -> pa.Array:
    """Rows of an index that meet a parsed filter.

    Args:
        table: columns of the index, among them those that the filter reads.
        expression: CQL2 JSON.

    Returns:
        Booleans, (rows,); a comparison with null is false.

    Raises:
        ConfigurationError: an operator or property that is not served, or a comparison of unlike things.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import shapely

    senseless = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)  # operands of unlike kinds
    try:
        found = _evaluate(table, expression, 0)
    except (pa.ArrowException, shapely.errors.ShapelyError, *senseless) as e:
        reason = str(e).split("\n")[0][:160]
        raise ConfigurationError(f"The filter cannot be applied ({reason}). Compare properties with their kind.") from e
    if not pa.types.is_boolean(found.type):
        raise ConfigurationError(f"The filter is {found.type}, neither true nor false. Compare it with something.")
    if isinstance(found, pa.Scalar):
        found = pa.array([found.as_py()] * table.num_rows, pa.bool_())
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    return pc.fill_null(found, False)


def _evaluate(table: pa.Table, node: Any, depth: int) -> Any:
    """Value of a node of a filter: a column or a scalar."""
    import pyarrow as pa

    if depth > MAX_DEPTH:
        raise ConfigurationError(f"The filter nests more than {MAX_DEPTH} operators. Shorten it.")
    if not isinstance(node, dict):
        return pa.scalar(node)
    if "property" in node:
        return _column(table, str(node["property"]))
    for kind in ("timestamp", "date"):
        if kind in node:
            return pa.scalar(moment(node[kind]), pa.timestamp("us", "UTC"))
    return _operate(table, str(node.get("op")), list(node.get("args", [])), depth + 1)


def period(table: pa.Table) -> tuple[Any, Any]:
    """First and last moment of each row of an index; they are one where it has no period."""
    import pyarrow.compute as pc

    first, last = (pc.coalesce(table["datetime"], table[end]) for end in ("start_datetime", "end_datetime"))
    return first, last


def _column(table: pa.Table, name: str) -> Any:
    if name == "datetime":
        return period(table)[0]
    if name not in table.column_names:
        raise ConfigurationError(f"Items have no property {name!r}. `stsr catalog show` lists those they have.")
    return table[name]


def _operate(table: pa.Table, op: str, args: list[Any], depth: int) -> Any:
    """Value of an operator."""
    if op[:2] == "s_" and op[2:] in SPATIAL:
        return _spatial(table, op[2:], args)
    if op in TEMPORAL:
        return _temporal(table, op, args)

    def value(node: Any) -> Any:
        return _evaluate(table, node, depth)

    if op in COMPARISONS | ARITHMETIC:
        return _compare((COMPARISONS | ARITHMETIC)[op], *(value(a) for a in args))
    if op not in OPERATORS:
        raise ConfigurationError(f"Operator {op!r} of CQL2 is not served. Compare, like, in, between, s_* and t_* are.")
    return OPERATORS[op](value, args)


def _compare(function: str, left: Any, right: Any) -> Any:
    import pyarrow.compute as pc

    return getattr(pc, function)(_like(left, right), _like(right, left))


def _join(value: Value, args: list[Any], function: str) -> Any:
    import pyarrow.compute as pc

    result = value(args[0])
    for arg in args[1:]:
        result = getattr(pc, function)(result, value(arg))
    return result


def _unary(value: Value, args: list[Any], function: str) -> Any:
    import pyarrow.compute as pc

    return getattr(pc, function)(value(args[0]))


def _between(value: Value, args: list[Any]) -> Any:
    import pyarrow.compute as pc

    bounds = args[1] if isinstance(args[1], list) else args[1:]  # drafts of the standard had them in a list
    subject, low, high = (value(a) for a in (args[0], *bounds))
    return pc.and_kleene(_compare("greater_equal", subject, low), _compare("less_equal", subject, high))


def _in(value: Value, args: list[Any]) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    subject = value(args[0])
    choices = pa.array([_like(value(a), subject).as_py() for a in args[1]], subject.type)
    return pc.is_in(subject, value_set=choices)


def _match(value: Value, args: list[Any]) -> Any:
    import pyarrow.compute as pc

    return pc.match_like(value(args[0]), value(args[1]).as_py())


def _hold(value: Value, args: list[Any], need: Callable[[Iterable[bool]], bool]) -> Any:
    import pyarrow as pa

    rows = value(args[0]).to_pylist()
    return pa.array([row is not None and need(x in row for x in args[1]) for row in rows], pa.bool_())


OPERATORS: dict[str, Callable[[Value, list[Any]], Any]] = {
    "and": partial(_join, function="and_kleene"),
    "or": partial(_join, function="or_kleene"),
    "not": partial(_unary, function="invert"),
    "isNull": partial(_unary, function="is_null"),
    "casei": partial(_unary, function="utf8_lower"),
    "between": _between,
    "in": _in,
    "like": _match,
    "a_contains": partial(_hold, need=all),
    "a_overlaps": partial(_hold, need=any),
}


def _like(found: Any, example: Any) -> Any:
    """Value in the type of what it is compared with: CQL2 has one kind of number, and dates may be plain text."""
    import pyarrow as pa

    if not isinstance(found, pa.Scalar):
        return found
    if pa.types.is_timestamp(example.type) and pa.types.is_string(found.type):
        return pa.scalar(moment(found.as_py()), example.type)
    if pa.types.is_integer(example.type) and pa.types.is_floating(found.type) and found.as_py() == int(found.as_py()):
        return found.cast(example.type)
    return found


def _spatial(table: pa.Table, name: str, args: list[Any]) -> pa.Array:
    import pyarrow as pa
    import shapely

    if args[0] != {"property": "geometry"}:
        raise ConfigurationError(f"s_{name} is served for the property geometry first, then a literal geometry.")
    literal = shapely.box(*args[1]["bbox"]) if "bbox" in args[1] else _shape(args[1])
    return pa.array(getattr(shapely, name)(_geometries(table), literal))


def touching(table: pa.Table, geometry: Mapping[str, Any]) -> pa.Array:
    """Rows whose footprint touches a GeoJSON geometry, (rows,) booleans.

    Raises:
        ConfigurationError: it is none.
    """
    import pyarrow as pa
    import shapely

    shape = _shape(geometry)
    shapely.prepare(shape)  # it may have thousands of corners, and the index thousands of rows
    return pa.array(shapely.intersects(shape, _geometries(table)))


def _shape(geometry: Mapping[str, Any]) -> Any:
    """Shapely geometry of a GeoJSON one."""
    import shapely

    try:
        return shapely.from_geojson(json.dumps(geometry))
    except (shapely.errors.ShapelyError, ValueError) as e:
        raise ConfigurationError(f"The geometry is no GeoJSON ({str(e)[:80]}).") from e


def _geometries(table: pa.Table) -> Any:
    """Footprints of items, (rows,) shapely polygons."""
    import shapely

    return shapely.from_wkb(table["geometry"].to_numpy())


def _temporal(table: pa.Table, op: str, args: list[Any]) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if args[0] not in (
        {"property": "datetime"},
        {"interval": [{"property": "start_datetime"}, {"property": "end_datetime"}]},
    ):
        raise ConfigurationError(f"{op} is served for the property datetime first, then a literal time or interval.")
    start, end = (pa.scalar(t, pa.timestamp("us", "UTC")) for t in _interval(args[1]))
    first, last = period(table)
    before, after = pc.less(last, start), pc.greater(first, end)
    if op == "t_before":
        return before
    if op == "t_after":
        return after
    if op == "t_during":
        return pc.and_kleene(pc.greater(first, start), pc.less(last, end))
    apart = pc.or_kleene(before, after)
    return apart if op == "t_disjoint" else pc.invert(apart)


def _interval(node: Mapping[str, Any]) -> tuple[datetime, datetime]:
    if "interval" in node:
        low, high = node["interval"]
        return tuple(far if t == ".." else moment(t) for t, far in zip((low, high), FAR, strict=True))  # type: ignore[return-value]
    at = moment(node["timestamp"] if "timestamp" in node else node["date"])
    return at, at


def interval(text: str) -> tuple[datetime, datetime]:
    """Read a time or an interval START/END, open ends as `..`, a day as the whole of it.

    Raises:
        ConfigurationError: it is none.
    """
    low, slash, high = text.partition("/")
    high = high if slash else low
    start = FAR[0] if low in ("..", "") and slash else moment(low)
    if high in ("..", "") and slash:
        return start, FAR[1]
    end = moment(high)
    return start, datetime.combine(end.date(), time.max, UTC) if len(high) == 10 else end
