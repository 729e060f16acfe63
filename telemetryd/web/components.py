"""Builds the named schemas of the OpenAPI document: of what requests hold, and of what answers do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from telemetryd.errors import ErrorItem
from telemetryd.model import events, requests, runs
from telemetryd.model.values import COMPONENT

Schema = dict[str, Any]

_REF: Final = "#/components/schemas/{model}"
_REQUESTS: Final[tuple[type[BaseModel], ...]] = (
    runs.NewRun,
    runs.RunPatch,
    events.NewEvent,
    requests.ProcessRequest,
    runs.CommitAssociation,
    requests.PruneRequest,
    requests.ReapRequest,
    requests.ConfirmRequest,
)


def ref(name: str) -> Schema:
    """Return a reference to a named schema of the document."""
    return {"$ref": _REF.format(model=name)}


def array(name: str, **more: Any) -> Schema:
    """Return the schema of an array whose items are a named schema."""
    return {"type": "array", "items": ref(name), **more}


def obj(properties: Mapping[str, Schema], required: Iterable[str] | None = None, **more: Any) -> Schema:
    """Return the schema of an object; every property is required by default."""
    names = list(properties if required is None else required)
    return {"type": "object", "properties": {**properties}, **({"required": names} if names else {}), **more}


STRING: Final[Schema] = {"type": "string"}


class Components:
    """The schemas that have a name; each is defined once, and everywhere else there is a reference to it."""

    def __init__(self) -> None:
        self.schemas: dict[str, Schema] = {}

    def reference(self, schema: object) -> Any:
        """Return a schema as the document has it: what has a name is defined here, and referred to.

        Titles are left out, as generators would name types after them, and so are defaults of properties: a property
        that has one need not be given, but TypeScript would require it.
        """
        if isinstance(schema, list):
            return [self.reference(each) for each in schema]
        if not isinstance(schema, Mapping):
            return schema
        kept = {
            key: {name: self.reference(_without_default(each)) for name, each in value.items()}
            if key == "properties"
            else value
            if key in ("examples", "const", "enum")
            else self.reference(value)
            for key, value in schema.items()
            if key not in ("title", COMPONENT)
        }
        if kept.get("additionalProperties") is True and "properties" in kept:
            del kept["additionalProperties"]  # JSON Schema takes it for granted; a type would lose its names by it
        for name, definition in schema.get(COMPONENT, {}).items():
            if definition is not None:
                self.schemas[name] = self.reference(definition)
            kept |= ref(name)
        return kept

    def define(self, schemas: Mapping[str, Schema]) -> None:
        """Define schemas under their names."""
        for name, schema in schemas.items():
            self.schemas[name] = self.reference(schema)

    def add_answers(self, kinds: Iterable[Any]) -> dict[int, Schema]:
        """Define the types of answers with everything in them; return the schema of each, by its `id`.

        What their docstrings say is for those who read the code, and python -OO has none.
        """
        inputs: list[tuple[int, JsonSchemaMode, TypeAdapter[Any]]] = [
            (id(kind), "serialization", TypeAdapter(kind)) for kind in kinds
        ]
        schemas, made = TypeAdapter.json_schemas(inputs, ref_template=_REF)
        for name, schema in made.get("$defs", {}).items():
            says = "description" if schema.get("type") == "object" else None
            self.schemas[name] = self.reference({key: value for key, value in schema.items() if key != says})
        return {key: self.reference(schema) for (key, _), schema in schemas.items()}


def _without_default(schema: Schema) -> Schema:
    """Return the schema of a property without its default, which its description names instead."""
    if "default" not in schema:
        return schema
    default, kept = schema["default"], {key: value for key, value in schema.items() if key != "default"}
    if default not in (None, "", []) and "description" in schema:
        shown = str(default).lower() if isinstance(default, bool) else default
        kept["description"] = f"{schema['description']} Default: {shown}."
    return kept


def make() -> Components:
    """Return the schemas of requests, of runs and events, and of errors."""
    made = Components()
    _, taken = models_json_schema([(model, "validation") for model in _REQUESTS], ref_template=_REF)
    made.define(taken["$defs"])
    made.define(
        {
            "NewRunBatch": obj({"runs": array("NewRun")}, description="Runs as they are created, in an object."),
            "NewRuns": {
                "anyOf": [array("NewRun"), ref("NewRunBatch")],
                "description": "Runs as they are created, in an array or in an object.",
            },
            "NewEvents": {
                "anyOf": [ref("NewEvent"), array("NewEvent", maxItems=events.MAX_EVENTS)],
                "description": "One event as it is created, or several.",
            },
            "BackupRequest": obj({}, additionalProperties=False, description="Nothing: where backups go is a setting."),
        }
    )
    event = _stored(events.Event)
    made.define(
        {
            "Event": obj(event, description="An event as it is stored."),
            "EventOfRun": obj(
                {"run": {"type": "integer", "minimum": 0, "description": "The id of its run."}, **event},
                description="An event as it is stored, with the id of its run.",
            ),
        }
    )
    url: Schema = {"anyOf": [{"type": "string", "format": "uri"}, {"type": "null"}]}
    always: Schema = {
        **_stored(runs.Run),
        "commit_url": {**url, "description": "The web page of the commit, if it is known."},
        "repo_url": {**url, "description": "The web page of the repository, if it is known."},
    }
    shown: Schema = {
        "events": {**array("Event"), "description": "Its first events, if `include` asks for them."},
        "more_events": {"type": "boolean", "description": "Whether there are more, if `include` asks for events."},
    }
    made.define(
        {
            "Run": obj({**always, **shown}, always, description="A run as it is stored."),
            "ListedRun": obj(
                {**always, **shown}, (), description="A run in a list: whole, or what `fields` chooses of it."
            ),
            "Error": obj({"detail": STRING}, description="Why a request was refused, in a sentence."),
            "ValidationErrors": obj(
                {"detail": array("ErrorItem")}, description="Why a body was refused: every fault of it."
            ),
        }
    )
    made.add_answers([ErrorItem])
    return made


def _stored(model: type[BaseModel]) -> dict[str, Schema]:
    """Return the properties of what is stored, as it is answered: all of them, whatever a request may leave out."""
    properties = model.model_json_schema(ref_template=_REF, mode="serialization")["properties"]
    return {name: {key: value for key, value in each.items() if key != "default"} for name, each in properties.items()}
