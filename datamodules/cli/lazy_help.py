"""Help that lists the keys of a schema, which is imported only when somebody asks for it."""

import argparse
from pkgutil import resolve_name


class SchemaHelp(argparse.Action):
    """`--keys NAME`: print the settings of a schema and exit.

    Args:
        schemas: name → "module:schema".
    """

    def __init__(self, *arguments, schemas: dict[str, str], **options):
        super().__init__(*arguments, **options)
        self.schemas = schemas

    def __call__(self, parser, namespace, values, option_string=None):
        from kosmosg.config import describe_schema

        if values not in self.schemas:
            parser.error(f"'{values}' is none of {', '.join(self.schemas)}")
        print(describe_schema(resolve_name(self.schemas[values])))
        parser.exit()
