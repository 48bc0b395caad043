"""Help that lists the keys of a schema, which is imported only when somebody asks for it."""

import argparse
import importlib


class SchemaHelp(argparse.Action):
    """`--keys [NAME]`: print the settings of a schema and exit.

    Args:
        schemas: name → "module:class", the name "" for a command with one schema.
    """

    def __init__(self, *arguments, schemas: dict[str, str], **options):
        super().__init__(*arguments, nargs=0 if "" in schemas else 1, **options)
        self.schemas = schemas

    def __call__(self, parser, namespace, values, option_string=None):
        from kosmosg.config import describe_schema

        name = values[0] if values else ""
        if name not in self.schemas:
            parser.error(f"'{name}' is none of {', '.join(self.schemas)}")
        module, _, schema = self.schemas[name].partition(":")
        print(describe_schema(getattr(importlib.import_module(module), schema)))
        parser.exit()
